"""Packed rows of many steps to a handful of numbers: one torchmetrics object, updated with a matrix."""

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_gradclip.record.step import Row

# What is averaged, and under which name.
_MEANS = {
    "norm": "norm",
    "norm_clipped": "norm_clipped",
    "limit": "limit",
    "clip_rate": "changed",
    "clipped": "clipped",
}


class Aggregate(Metric):
    """Means, the largest norm and the smallest coefficient of steps in any number, in bounded memory.

    Every rank has seen the same global values, so there is nothing to synchronise.
    """

    full_state_update = False
    sums: Tensor
    counts: Tensor
    norm_max: Tensor
    coef_min: Tensor

    def __init__(self) -> None:
        super().__init__(sync_on_compute=False)
        zeros = torch.zeros(len(_MEANS), dtype=torch.float64, device="cpu")
        self.add_state("sums", zeros.clone(), persistent=True)
        self.add_state("counts", zeros.clone(), persistent=True)
        self.add_state("norm_max", torch.tensor(-torch.inf, dtype=torch.float64, device="cpu"), persistent=True)
        self.add_state("coef_min", torch.tensor(torch.inf, dtype=torch.float64, device="cpu"), persistent=True)

    def update(self, rows: Tensor) -> None:
        """Take in the rows of some steps, `(N, len(Row._fields))`, float64, on the host."""
        if not len(rows):
            return
        columns = dict(zip(Row._fields, rows.unbind(1), strict=True))
        finite, coef, limit = columns["finite"] != 0, columns["coef"], columns["limit"]
        # NaN where nobody has looked.
        looked = finite & ~torch.isnan(columns["norm_clipped"])
        # With one scope it would say the same as the rate.
        several = torch.isnan(limit) | torch.isnan(coef)
        counted = {
            "norm": finite,
            "norm_clipped": looked,
            "limit": finite & torch.isfinite(limit),
            "clip_rate": torch.ones_like(finite),
            "clipped": looked & several,
        }
        masks = torch.stack([counted[name] for name in _MEANS])
        values = torch.stack([columns[field] for field in _MEANS.values()])
        self.sums += torch.where(masks, values, 0.0).sum(1)
        self.counts += masks.sum(1)
        self.norm_max = torch.maximum(self.norm_max, columns["norm"].where(finite, -torch.inf).amax())
        # NaN where no factor is applied.
        smallest = coef.where(finite & torch.isfinite(coef), torch.inf).amin()
        self.coef_min = torch.minimum(self.coef_min, smallest)

    def compute(self) -> dict[str, float]:
        """By name, in the order in which they are logged; what no step had is left out."""
        pairs = zip(_MEANS, self.sums.tolist(), self.counts.tolist(), strict=True)
        means = {name: total / count for name, total, count in pairs if count}
        extremes = {"norm_max": self.norm_max.item(), "coef_min": self.coef_min.item()}
        found = {**means, **{name: value for name, value in extremes.items() if abs(value) != torch.inf}}
        order = ("norm", "norm_clipped", "norm_max", "limit", "coef_min", "clip_rate", "clipped")
        return {name: found[name] for name in order if name in found}
