"""What one step did, as one packed row."""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_gradclip import checks
from lightning_gradclip.select.scopes import Scopes, Units


class Row(NamedTuple):
    """One step in numbers; on the device a tensor `(len(Row._fields),)` in this order.

    Flags are 1.0 or 0.0. `norm` is not finite where gradients were not and stayed so. Of a dropped step `norm_clipped`
    and `coef` are 0.
    """

    norm: float
    norm_clipped: float
    limit: float
    coef: float = 1.0
    clipped: float = 0.0
    finite: float = 1.0
    skipped: float = 0.0
    changed: float = 0.0
    overflow: float = 0.0


@dataclass(eq=False, slots=True)
class StepStats:
    """What clipping did in one step. Nothing here waits for the device until it is converted to a number.

    `S` is the number of scopes; all values are global, none is a DTensor.

    """

    # Read only by way of properties: to freeze the class would triple the time that one takes to make.
    _row: Row | Tensor
    _sizes: Tensor | float
    _limits: Tensor | float
    _scopes: Scopes | Units
    _measured: Tensor | None = None
    _measured_scopes: Scopes | None = None

    @classmethod
    def of_nothing(cls, scopes: Scopes | Units) -> "StepStats":
        """A step in which no parameter has a gradient."""
        sizes = torch.zeros(scopes.count, dtype=torch.float64, device="cpu")
        limits = torch.full_like(sizes, math.inf)
        limit = math.inf if scopes.count == 1 else math.nan
        return cls(row_of(0.0, 0.0, limit=limit), sizes, limits, scopes)

    @property
    def row(self) -> Row | Tensor:
        """The packed row: host floats on CPU, otherwise a float64 tensor on the device."""
        return self._row

    @property
    def sizes(self) -> Tensor:
        """What was measured in each scope, before clipping, `(S,)`."""
        return _rows(self._sizes)

    @property
    def limits(self) -> Tensor:
        """What was allowed in each scope, `(S,)`; +inf where there is no limit."""
        return _rows(self._limits)

    @property
    def scopes(self) -> tuple[str, ...]:
        """The names of the scopes, `S` of them."""
        return self._scopes.names

    @property
    def measured(self) -> Tensor | None:
        """Norms of these scopes, in their order, NaN for absent ones; None without `measure_per`."""
        return self._measured

    @property
    def measured_scopes(self) -> tuple[str, ...]:
        """The names of the scopes that `measure_per` asked for."""
        return () if self._measured_scopes is None else self._measured_scopes.names

    def as_dict(self) -> dict[str, Any]:
        """All of it as plain numbers, for which the host waits.

        Returns:
            `norm`, `norm_clipped`, `limit`, `coef` and `clipped` as floats, the flags `finite`, `skipped`, `changed`
            and `overflow`; `sizes` and `limits` by scope, and `norms` by the scopes that `measure_per` asked for.
        """
        numbers = dict(zip(Row._fields, map(float, self._row), strict=True))
        flags = {name: bool(numbers[name]) for name in ("finite", "skipped", "changed", "overflow")}
        found = {"sizes": _by_scope(self.scopes, self.sizes), "limits": _by_scope(self.scopes, self.limits)}
        return {**numbers, **flags, **found, "norms": _by_scope(self.measured_scopes, self._measured)}

    @property
    def norm(self) -> Tensor:
        """Joint p-norm of the selected gradients before clipping, after unscaling, averaging and zeroing, 0-d."""
        return self._field("norm")

    @property
    def norm_clipped(self) -> Tensor:
        """Joint p-norm of what the optimizer receives, 0-d; 0 for a dropped step, NaN where nobody looked."""
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
        """Of the scopes that had a gradient the fraction over their limit, 0-d; by value, of the entries outside."""
        return self._field("clipped")

    @property
    def finite(self) -> Tensor:
        """Whether every selected gradient was finite, before any was zeroed, 0-d boolean."""
        return self._field("finite") != 0

    @property
    def skipped(self) -> Tensor:
        """Whether the optimizer step is dropped, by the clipper or on overflow by the GradScaler, 0-d boolean."""
        return self._field("skipped") != 0

    @property
    def changed(self) -> Tensor:
        """Whether any gradient was written or dropped, 0-d boolean."""
        return self._field("changed") != 0

    @property
    def overflow(self) -> Tensor:
        """Whether the GradScaler drops the step, since gradients are not finite, 0-d boolean."""
        return self._field("overflow") != 0

    @property
    def size(self) -> Tensor | float:
        """Now `sizes`."""
        return checks.renamed("StepStats.size", "StepStats.sizes", self._sizes)

    @property
    def allowed(self) -> Tensor | float:
        """Now `limits`."""
        return checks.renamed("StepStats.allowed", "StepStats.limits", self._limits)

    @property
    def places(self) -> Scopes | Units:
        """Now `scopes`, their names."""
        return checks.renamed("StepStats.places", "StepStats.scopes", self._scopes)

    @property
    def measured_places(self) -> Scopes | None:
        """Now `measured_scopes`, their names."""
        return checks.renamed("StepStats.measured_places", "StepStats.measured_scopes", self._measured_scopes)

    def _field(self, name: str) -> Tensor:
        position = Row._fields.index(name)
        if isinstance(self._row, Tensor):
            return self._row[position]
        return torch.tensor(self._row[position], dtype=torch.float64, device="cpu")


def row_of(norm: Any, norm_clipped: Any, *, limit: Any, coef: Any = 1.0, clipped: Any = 0.0, changed: Any = 0.0) -> Any:
    """The row of a step that is neither dropped nor overflowing; without more words, of one that changes nothing.

    Args:
        norm: Joint norm before clipping: a float, for a row on the host, or a tensor, 0-d, where the row shall be.
        norm_clipped: After; NaN where nobody looked.
        limit: The limit of the only scope, else NaN.
        coef: The smallest factor; NaN where none is applied.
        clipped: Of the scopes with a gradient the share over their limit, or of the entries the share
            outside the bounds; NaN where nobody counted.
        changed: Whether any gradient is to be written, 1 or 0.
    """
    if not isinstance(norm, Tensor):
        finite = 1.0 if math.isfinite(norm) else 0.0
        return Row(norm, norm_clipped, limit=limit, coef=coef, clipped=clipped, finite=finite, changed=changed)
    values: Any = {"norm": norm, "norm_clipped": norm_clipped, "limit": limit, "coef": coef, "clipped": clipped}
    row: Any = Row(**values, finite=torch.isfinite(norm), changed=changed)  # pyright: ignore[reportArgumentType]
    return torch.stack([torch.full_like(norm, one) if isinstance(one, float) else one.to(norm.dtype) for one in row])


def unchanged(norm: float, limit: float) -> Row:
    """The row, on the host, of a step that changes nothing; what most steps of small models are, in half the time."""
    if math.isfinite(norm):
        return Row(norm=norm, norm_clipped=norm, limit=limit)
    return Row(norm=norm, norm_clipped=norm, limit=limit, finite=0.0)


def amended(row: Row | Tensor, **fields: Any) -> Any:
    """The row with other values in these fields, where the row is."""
    return row._replace(**fields) if isinstance(row, Row) else torch.stack([*_named(row)._replace(**fields)])


def dropped(row: Row | Tensor, drops: float | Tensor = 1.0) -> Any:
    """The row of a step that is dropped where `drops`, on a device 0-d, is 1."""
    fields = _named(row)
    changed = torch.maximum(fields.changed, drops) if isinstance(drops, Tensor) else 1.0
    return amended(row, skipped=drops, changed=changed, **_left(fields, drops))


def overflowing(row: Row | Tensor) -> Any:
    """The row of a step that a GradScaler drops if it is not finite."""
    fields = _named(row)
    drops = 1 - fields.finite
    return amended(row, overflow=drops, skipped=drops, changed=fields.changed * fields.finite, **_left(fields, drops))


def _left(fields: Any, drops: float | Tensor) -> dict[str, Any]:
    """What the optimizer receives: of a step that is dropped, nothing."""
    names = ("coef", "norm_clipped")
    if isinstance(drops, Tensor):
        return {name: getattr(fields, name).where(drops == 0, 0.0) for name in names}
    return dict.fromkeys(names, 0.0) if drops else {}


def _named(row: Row | Tensor) -> Any:
    """The fields, each 0-d where the row is a tensor."""
    return Row(*row.unbind()) if isinstance(row, Tensor) else row  # pyright: ignore[reportArgumentType]


def _by_scope(names: tuple[str, ...], numbers: Tensor | None) -> dict[str, float]:
    return {} if numbers is None else dict(zip(names, numbers.tolist(), strict=True))


def _rows(numbers: Tensor | float) -> Tensor:
    return numbers if isinstance(numbers, Tensor) else torch.tensor([numbers], dtype=torch.float64, device="cpu")
