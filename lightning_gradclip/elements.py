"""Single entries as scopes: bounds that every entry of a gradient is clamped to."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_gradclip import pnorm, reduce, write
from lightning_gradclip.limit import Gradients, Limiter, Outcome
from lightning_gradclip.measure import Meter
from lightning_gradclip.plan import SMALL
from lightning_gradclip.rows import BLOCK
from lightning_gradclip.select import Selection
from lightning_gradclip.stats import Row, pack_elements

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

    def serve(self, selection: Selection) -> None:
        super().serve(selection)
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
        norms = reduce.global_sizes(local_norms) / scale
        joint = pnorm.joint_norm(norms, self._method.norm_type)
        low, high = self._method.bounds(step)
        measured = self._measured_norms(gradients, norms)
        if norms.device.type == "cpu":
            scale = float(scale)
            least, most = low * scale, high * scale
            # Not written is what has no entry outside.
            touched = tuple(_outside(gradients, local_norms.tolist(), least, most))
            changed, norm = float(bool(touched)), joint.item()
            share, after = changed and math.nan, math.nan
            if self.detailed:
                share, after = (one.item() for one in self._details(gradients, touched, norms, least, most, scale))
            row = Row(norm, after, high, math.nan, share, float(math.isfinite(norm)), 0.0, changed, 0.0)
            return Clamping(norm, high, None, row, measured, low, high, touched)
        touched = tuple(i for i, gradient in enumerate(gradients) if gradient is not None)
        share, after = self._details(gradients, touched, norms, low * scale, high * scale, scale)
        row = self._on_host_if_asked(pack_elements(joint, after, high, share, detailed=self.detailed))
        limits = self._method.limit(joint.view(1), None, step)
        return Clamping(joint.view(1), limits, None, row, measured, low, high, touched)

    def _details(
        self,
        gradients: Gradients,
        touched: Sequence[int],
        norms: Tensor,
        low: float | Tensor,
        high: float | Tensor,
        scale: float | Tensor,
    ) -> tuple[Tensor, Tensor]:
        """The share of the entries outside the bounds and the joint norm when they are clamped, both 0-d.

        On devices without `detailed` the share is 1 where there are any, and the norm the joint one.
        """
        p = self._method.norm_type
        joint = pnorm.joint_norm(norms, p)
        values = [pnorm.dense_values(one) for i in touched if (one := gradients[i]) is not None]
        if not values:
            return torch.zeros_like(joint), joint
        if not self.detailed:
            found = [_count_outside(one, *_stored(one.dtype, low, high)).any() for one in values]
            return torch.stack(found).any().to(norms), joint
        counts, after = zip(*(_compared(one, low, high, p) for one in values), strict=True)
        places = pnorm.integers_on(tuple(touched), norms.device)
        clamped = torch.stack([norm.to(norms) for norm in after]) / scale
        total = max(1, sum(gradient.numel() for gradient in gradients if gradient is not None))
        return (
            torch.stack([count.to(norms) for count in counts]).sum() / total,
            pnorm.joint_norm(norms.index_copy(0, places, clamped), p),
        )


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
