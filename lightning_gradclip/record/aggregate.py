"""What the steps of a window come to: means and extremes in bounded memory, the same digits whoever asks in between."""

import math

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_gradclip.record.step import Row

# The field that each mean is of.
_MEANS = {name: name for name in ("norm", "norm_clipped", "limit")} | {"clip_rate": "changed", "clipped": "clipped"}


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
        # Whether steps have no factor, and `clipped` is a share of entries.
        self.by_entry = False
        zeros = [0.0] * len(_MEANS)
        for name, value in {"sums": zeros, "counts": zeros, "norm_max": -math.inf, "coef_min": math.inf}.items():
            self.add_state(name, torch.tensor(value, dtype=torch.float64, device="cpu"), persistent=True)

    def update(self, rows: Tensor) -> None:
        """Take in the rows of some steps, `(N, len(Row._fields))`, float64, on the host."""
        columns = dict(
            zip(Row._fields, rows[torch.isfinite(rows[:, Row._fields.index("norm")])].unbind(1), strict=True)
        )
        norm, coef, limit = columns["norm"], columns["coef"], columns["limit"]
        if not len(norm):
            return
        if not self.by_entry:
            # With one scope it would say the same as the rate.
            columns["clipped"] = columns["clipped"].where(torch.isnan(limit), math.nan)
        values = torch.stack([columns[field] for field in _MEANS.values()])
        known = torch.isfinite(values)
        self.sums = summed(self.sums, torch.where(known, values, 0.0))
        self.counts += known.sum(1)
        self.norm_max = torch.maximum(self.norm_max, norm.amax())
        self.coef_min = torch.minimum(self.coef_min, coef.amin())

    def compute(self) -> dict[str, float]:
        """By name, in the order in which they are logged; what is not known of every step is left out."""
        pairs = zip(_MEANS, self.sums.tolist(), self.counts.tolist(), strict=True)
        steps = self.counts[0].item()
        means = {name: total / count for name, total, count in pairs if count == steps > 0}
        extremes = {"norm_max": self.norm_max.item(), "coef_min": self.coef_min.item()}
        if self.by_entry:
            del extremes["coef_min"]
        found = means | {name: value for name, value in extremes.items() if math.isfinite(value)}
        order = ("norm", "norm_clipped", "norm_max", "limit", "coef_min", "clip_rate", "clipped")
        return {name: found[name] for name in order if name in found}


def summed(sums: Tensor, values: Tensor) -> Tensor:
    """The sums, `(K,)`, after adding values, `(K, N)`, one by one: in one batch or in several they are the same."""
    return torch.cat((sums[:, None], values), dim=1).cumsum(1)[:, -1]
