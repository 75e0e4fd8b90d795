"""Single entries as scopes: bounds that every entry of a gradient is clamped to."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_gradclip.gradients import norms as pnorm
from lightning_gradclip.gradients import write
from lightning_gradclip.gradients.plan import SMALL
from lightning_gradclip.gradients.ranks import Reduced, Reducer
from lightning_gradclip.gradients.read import Meter
from lightning_gradclip.gradients.rows import BLOCK
from lightning_gradclip.limit.limiter import Gradients, Limiter, Outcome
from lightning_gradclip.record.step import Row, pack_elements
from lightning_gradclip.select.parameters import Selection

# Entries compared at once, so that what is compared is small beside the gradients, and on CPU stays in the cache.
_CHUNK, _CHUNK_ON_DEVICE = 2**18, 2**24
# Entries looked at at once, until one outside is found.
_LOOK = 2**16
# No entry exceeds the 2-norm, but for the norm's rounding.
_ROUNDING = 1e-5


@dataclass(slots=True)
class Clamping(Outcome):
    """One step of a method with bounds.

    Attributes:
        low: Smallest entry allowed.
        high: Largest entry allowed.
        touched: Indices of the parameters that may have entries outside.
    """

    low: float
    high: float
    touched: tuple[int, ...]


class ElementLimiter(Limiter):
    """Runs a method over single entries. The one size is the joint norm, the one limit the upper bound."""

    has_details = True

    def serve(self, selection: Selection, reducer: Reducer | None = None) -> None:
        super().serve(selection, reducer)
        for name, parameter in zip(selection.names, selection.params, strict=True):
            if parameter.is_complex():
                raise TypeError(
                    f"parameter {name!r} is complex, and complex numbers have no order to clamp by; "
                    f"leave it out with exclude={name!r}, or clip it by norm"
                )

    def write(self, outcome: Outcome) -> None:
        """Clamp the gradients that have entries outside the bounds."""
        if isinstance(outcome, Clamping):
            write.clamp_([self._params[i] for i in outcome.touched], outcome.low, outcome.high)

    def excess(self, outcome: Outcome) -> str:
        """Which share of the entries is outside, in words."""
        if not isinstance(outcome, Clamping) or isinstance(outcome.row, Tensor):
            return super().excess(outcome)
        share = f"{outcome.row.clipped:.3g}" if self.detailed else "some"
        return f"{share} of the entries lie outside [{outcome.low:g}, {outcome.high:g}]"

    def _outcome(self, gradients: Gradients, local_norms: Tensor, step: int, scale: float | Tensor) -> Outcome:
        low, high = self._method.bounds(step)
        device = local_norms.device if self._reducer is None else self._reducer.device
        if device.type == "cpu":
            scale = float(scale)
            # Not written is what has no entry outside.
            touched = tuple(_outside(gradients, local_norms.tolist(), low * scale, high * scale))
        else:
            touched = tuple(i for i, gradient in enumerate(gradients) if gradient is not None)
        looked = self._looked(gradients, touched, local_norms, low * scale, high * scale)
        known = self._reduced(gradients, looked.norms, [looked.counts])
        norms = known.norms[0] / scale
        joint = pnorm.joint_norm(norms, self._method.norm_type)
        after = pnorm.joint_norm(known.norms[1] / scale, self._method.norm_type) if self.detailed else joint * math.nan
        outside = known.totals[0]
        if self.detailed:
            outside = outside / self._entries(gradients, known, norms)
        measured = self._measured_norms(gradients, known, norms)
        if device.type == "cpu":
            row = _row(joint.item(), after.item(), high, outside.item(), detailed=self.detailed)
            return Clamping(row.norm, high, None, row, measured, known.nothing, low, high, touched)
        row = self._on_host_if_asked(pack_elements(joint, after, high, outside, detailed=self.detailed))
        limits = self._method.limit(joint.view(1), None, step)
        return Clamping(joint.view(1), limits, None, row, measured, known.nothing, low, high, touched)

    def _looked(
        self,
        gradients: Gradients,
        touched: Sequence[int],
        norms: Tensor,
        low: float | Tensor,
        high: float | Tensor,
    ) -> "_Looked":
        """What this rank finds outside the bounds in the gradients at the places `touched`."""
        places = pnorm.integers_on(tuple(touched), norms.device)
        values = [pnorm.dense_values(one) for i in touched if (one := gradients[i]) is not None]
        counts = torch.zeros_like(norms)
        if self.detailed and values:
            found, after = zip(*(_compared(one, low, high, self._method.norm_type) for one in values), strict=True)
            clamped = norms.index_copy(0, places, torch.stack([norm.to(norms) for norm in after]))
            counts.index_copy_(0, places, torch.stack([one.to(norms) for one in found]))
            return _Looked([norms, clamped], counts)
        if norms.device.type == "cpu":
            counts.index_fill_(0, places, 1.0)
        elif values:
            flags = [_count_outside(one, *_stored(one.dtype, low, high)).any() for one in values]
            counts.index_copy_(0, places, torch.stack(flags).to(norms))
        return _Looked([norms, norms] if self.detailed else [norms], counts)

    def _entries(self, gradients: Gradients, known: Reduced, norms: Tensor) -> Tensor | int:
        """The number of entries of all gradients over all ranks, at least 1."""
        if known.present is None:
            return max(1, sum(gradient.numel() for gradient in gradients if gradient is not None))
        return (self._counts(norms) * (known.present > 0)).sum().clamp_min(1.0)


class _Looked(NamedTuple):
    """Norms of the gradients, and when clamped where that is asked for, `(P,)` each, and entries outside, `(P,)`.

    Where it is not, a count of 1 means that there are some.
    """

    norms: list[Tensor]
    counts: Tensor


def _row(norm: float, after: float, high: float, outside: float, *, detailed: bool) -> Row:
    changed = float(outside > 0)
    share = outside if detailed else changed and math.nan
    return Row(norm, after, high, math.nan, share, float(math.isfinite(norm)), 0.0, changed, 0.0)


def _outside(gradients: Gradients, norms: Sequence[float], low: float, high: float) -> Iterator[int]:
    """The gradients on CPU with entries outside the bounds, in no order."""
    bound = min(-low, high) * (1 - _ROUNDING)
    alike: dict[tuple[torch.dtype, torch.Size], list[int]] = {}
    for i, (gradient, norm) in enumerate(zip(gradients, norms, strict=True)):
        if gradient is None or norm <= bound:  # NaN is not
            continue
        if gradient.numel() < SMALL and gradient.layout is torch.strided:
            alike.setdefault((gradient.dtype, gradient.shape), []).append(i)
        elif _has_outside(pnorm.dense_values(gradient), *write.stored_bounds(gradient.dtype, low, high)):
            yield i
    for (dtype, shape), places in alike.items():
        least, most = write.stored_bounds(dtype, low, high)
        size = max(1, BLOCK // max(1, math.prod(shape)))
        for begin in range(0, len(places), size):
            some = places[begin : begin + size]
            matrix = torch.stack([gradients[i].flatten() for i in some])  # pyright: ignore[reportOptionalMemberAccess]
            if matrix.numel():
                extremes = zip(matrix.amin(dim=1).tolist(), matrix.amax(dim=1).tolist(), strict=True)
                for row, (lowest, highest) in enumerate(extremes):
                    is_nan = lowest != lowest
                    if lowest < least or highest > most or (is_nan and _count_outside(matrix[row], least, most)):
                        yield some[row]


def _has_outside(values: Tensor, low: float, high: float) -> bool:
    """Whether an entry is outside the bounds; where many are, the first chunk shows it."""
    for chunk in pnorm.in_memory_order(values).reshape(-1).split(_LOOK):
        if chunk.numel():
            least, most = torch.aminmax(chunk)
            if least.item() < low or most.item() > high:
                return True
            if least.isnan() and _count_outside(chunk, low, high):
                return True
    return False


def _compared(values: Tensor, low: float | Tensor, high: float | Tensor, norm_type: float) -> tuple[Tensor, Tensor]:
    """The number of entries outside the bounds, and the norm when they are clamped, both 0-d."""
    least, most = _stored(values.dtype, low, high)
    flat = pnorm.in_memory_order(values).reshape(-1)
    size = _CHUNK if values.device.type == "cpu" else _CHUNK_ON_DEVICE
    counts, norms = [], []
    for chunk in flat.split(size):
        counts.append(_count_outside(chunk, least, most))
        norms.append(Meter(norm_type).each([torch.clamp(chunk, least, most)]))
    return torch.stack(counts).sum(), pnorm.joint_norm(torch.cat(norms), norm_type)


def _count_outside(values: Tensor, low: float | Tensor, high: float | Tensor) -> Tensor:
    return ((values < low) | (values > high)).sum()


def _stored(dtype: torch.dtype, low: float | Tensor, high: float | Tensor) -> tuple[Any, Any]:
    """The bounds as `dtype` stores them; those that a device has scaled stay there."""
    if isinstance(low, Tensor) or isinstance(high, Tensor):
        return torch.as_tensor(low).to(dtype), torch.as_tensor(high).to(dtype)
    return write.stored_bounds(dtype, low, high)
