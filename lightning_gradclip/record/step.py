"""What one step did, as one packed row."""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_gradclip.gradients import norms as pnorm
from lightning_gradclip.select.scopes import Scopes, Units


class Row(NamedTuple):
    """One step in numbers; on the device a tensor `(len(Row._fields),)` in this order.

    Flags are 1.0 or 0.0.
    """

    norm: float
    norm_clipped: float
    limit: float
    coef: float
    clipped: float
    finite: float
    skipped: float
    changed: float
    overflow: float


@dataclass(frozen=True, eq=False, slots=True)
class StepStats:
    """What clipping did in one step. Nothing here waits for the device until it is converted to a number.

    `S` is the number of scopes; all values are global, none is a DTensor.

    Attributes:
        row: The packed row: host floats on CPU, otherwise a float64 tensor on the device.
        size: What was measured in each scope, `(S,)`, or the float of the only one.
        allowed: What was allowed in each scope, `(S,)`, or the float of the only one.
        places: The scopes.
        measured: Norms of the scopes that `measure_per` asked for, in the order of `measured_scopes`, NaN for absent
            ones; None without.
        measured_places: These scopes.
    """

    row: Row | Tensor
    size: Tensor | float
    allowed: Tensor | float
    places: Scopes | Units
    measured: Tensor | None = None
    measured_places: Scopes | None = None

    @classmethod
    def of_nothing(cls, places: Scopes | Units) -> "StepStats":
        """A step in which no parameter has a gradient."""
        sizes = torch.zeros(places.count, dtype=torch.float64, device="cpu")
        limits = torch.full_like(sizes, math.inf)
        return cls(untouched(0.0, limits), sizes, limits, places)

    @property
    def sizes(self) -> Tensor:
        """What was measured in each scope, before clipping, `(S,)`."""
        return _rows(self.size)

    @property
    def limits(self) -> Tensor:
        """What was allowed in each scope, `(S,)`; +inf where there is no limit."""
        return _rows(self.allowed)

    @property
    def scopes(self) -> tuple[str, ...]:
        """The names of the scopes, `S` of them."""
        return self.places.names

    @property
    def measured_scopes(self) -> tuple[str, ...]:
        """The names of the scopes that `measure_per` asked for."""
        return () if self.measured_places is None else self.measured_places.names

    @property
    def norm(self) -> Tensor:
        """Joint p-norm of the selected gradients before clipping, after unscaling and averaging, 0-d."""
        return self._field("norm")

    @property
    def norm_clipped(self) -> Tensor:
        """Joint p-norm of what the optimizer receives, 0-d; 0 for a dropped step."""
        return self._field("norm_clipped")

    @property
    def limit(self) -> Tensor:
        """The limit, 0-d; NaN where there is more than one scope."""
        return self._field("limit")

    @property
    def coef(self) -> Tensor:
        """The smallest coefficient applied to a scope, 0-d; 1 if nothing was clipped, 0 if dropped, NaN if by value."""
        return self._field("coef")

    @property
    def clipped(self) -> Tensor:
        """Fraction of the scopes over their limit, 0-d; of the entries outside the bounds for clipping by value."""
        return self._field("clipped")

    @property
    def finite(self) -> Tensor:
        """Whether every selected gradient was finite, 0-d boolean."""
        return self._field("finite") != 0

    @property
    def skipped(self) -> Tensor:
        """Whether the optimizer step is dropped, by the clipper or on overflow by the GradScaler, 0-d boolean."""
        return self._field("skipped") != 0

    def _field(self, name: str) -> Tensor:
        position = Row._fields.index(name)
        if isinstance(self.row, Tensor):
            return self.row[position]
        return torch.tensor(self.row[position], dtype=torch.float64, device="cpu")


def pack(
    norm: Tensor,
    scope_norms: Tensor,
    sizes: Tensor,
    limits: Tensor,
    coefs: Tensor,
    norm_type: float,
) -> Tensor:
    """The row of a step that is neither dropped nor overflowing, `(len(Row._fields),)`, without a host read."""
    zero, one = torch.zeros_like(norm), torch.ones_like(norm)
    some = sizes.numel() > 0
    over = (sizes > limits) & torch.isfinite(sizes)
    values = {
        "norm": norm,
        "norm_clipped": pnorm.joint_norm(scope_norms * coefs, norm_type),
        "limit": limits[0] if limits.numel() == 1 else one * math.nan,
        "coef": coefs.amin() if some else one,
        "clipped": over.to(norm.dtype).mean() if some else zero,
        "finite": torch.isfinite(norm).to(norm.dtype),
        "skipped": zero,
        "changed": (coefs != 1).any().to(norm.dtype),
        "overflow": zero,
    }
    return torch.stack([values[name] for name in Row._fields])


def mark_dropped(row: Tensor, dropped: Tensor) -> Tensor:
    """The row of a step that a device drops where `dropped`, 0-d, is 1."""
    values = dict(zip(Row._fields, row.unbind(), strict=True))
    zero = torch.zeros_like(dropped)
    values["skipped"] = dropped
    values["changed"] = torch.maximum(values["changed"], dropped)
    values["coef"] = torch.where(dropped > 0, zero, values["coef"])
    values["norm_clipped"] = torch.where(dropped > 0, zero, values["norm_clipped"])
    return torch.stack([values[name] for name in Row._fields])


def mark_overflow(row: Tensor) -> Tensor:
    """The row of a step that a GradScaler drops if it is not finite."""
    values = dict(zip(Row._fields, row.unbind(), strict=True))
    values["overflow"] = values["skipped"] = 1 - values["finite"]
    values["changed"] = values["changed"] * values["finite"]
    return torch.stack([values[name] for name in Row._fields])


def pack_elements(norm: Tensor, norm_clipped: Tensor, limit: float, share: Tensor, *, detailed: bool) -> Tensor:
    """The same where single entries are limited: `share` of them is outside the bounds, and no factor is applied.

    Without `detailed`, where nobody has looked closely, the norm after clipping and a share above 0 are NaN.
    """
    zero, one = torch.zeros_like(norm), torch.ones_like(norm)
    values = {
        "norm": norm,
        "norm_clipped": norm_clipped if detailed else one * math.nan,
        "limit": one * limit,
        "coef": one * math.nan,
        "clipped": share if detailed else torch.where(share > 0, math.nan, zero),
        "finite": torch.isfinite(norm).to(norm.dtype),
        "skipped": zero,
        "changed": (share > 0).to(norm.dtype),
        "overflow": zero,
    }
    return torch.stack([values[name] for name in Row._fields])


def untouched(norm: float, limits: Tensor) -> Row:
    """The row of a step on the host in which every scope is finite and within its limit."""
    limit = limits.item() if limits.numel() == 1 else math.nan
    return Row(norm, norm, limit, coef=1.0, clipped=0.0, finite=1.0, skipped=0.0, changed=0.0, overflow=0.0)


def _rows(numbers: Tensor | float) -> Tensor:
    return numbers if isinstance(numbers, Tensor) else torch.tensor([numbers], dtype=torch.float64, device="cpu")
