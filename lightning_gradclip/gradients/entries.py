"""Single entries outside fixed bounds: which gradients have some, how many, and what is left when they are clamped."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from lightning_gradclip.gradients import norms
from lightning_gradclip.gradients.norms import Tensors
from lightning_gradclip.gradients.read import Meter
from lightning_gradclip.gradients.tuning import BLOCK, BLOCK_ON_DEVICE, LOOK, SMALL

Bound = float | Tensor

# No entry exceeds the 2-norm, but for the norm's rounding.
_ROUNDING = 1e-5


@dataclass(frozen=True, slots=True)
class Found:
    """What some gradients have outside the bounds.

    Attributes:
        counts: Entries outside, `(P,)`; where nobody wants the number, 1 for some and 0 for none.
        clamped: The norms of the gradients with their entries clamped, `(P,)`; None where nobody wants them.
    """

    counts: Tensor
    clamped: Tensor | None


def with_outside(tensors: Tensors, local_norms: Sequence[float], low: float, high: float) -> tuple[int, ...]:
    """The places of the tensors on CPU that have entries outside the bounds, in no order."""
    return tuple(_with_outside(tensors, local_norms, low, high))


def compared(
    tensors: Tensors, places: Sequence[int], local_norms: Tensor, low: Bound, high: Bound, norm_type: float
) -> Found:
    """Count and clamp, in a pass over the tensors at these places; the norms of the others are known.

    Args:
        tensors: On any devices.
        places: The tensors that may have entries outside.
        local_norms: Of all tensors, `(P,)`.
        low: Smallest entry allowed.
        high: Largest.
        norm_type: The p of the norms.
    """
    values = [norms.dense_values(one) for place in places if (one := tensors[place]) is not None]
    counts = torch.zeros_like(local_norms)
    if not values:
        return Found(counts, local_norms)
    index = norms.integers_on(tuple(places), local_norms.device)
    counted, clamped = zip(*(_counted_and_clamped(one, low, high, norm_type) for one in values), strict=True)
    counts.index_copy_(0, index, _stacked(counted, local_norms))
    return Found(counts, local_norms.index_copy(0, index, _stacked(clamped, local_norms)))


def flagged(tensors: Tensors, places: Sequence[int], local_norms: Tensor, low: Bound, high: Bound) -> Found:
    """Tell which of the tensors at these places have entries outside; on CPU the places say so themselves."""
    counts = torch.zeros_like(local_norms)
    index = norms.integers_on(tuple(places), local_norms.device)
    if local_norms.is_cpu:
        return Found(counts.index_fill_(0, index, 1.0), None)
    values = [norms.dense_values(one) for place in places if (one := tensors[place]) is not None]
    flags = [_count(one, *_stored(one, low, high)).any() for one in values]
    return Found(counts.index_copy_(0, index, _stacked(flags, local_norms)) if flags else counts, None)


@lru_cache(maxsize=64)
def stored_bounds(dtype: torch.dtype, low: float, high: float) -> tuple[float, float]:
    """The bounds as `dtype` stores them: 0.1 in bfloat16 is a neighbour of 0.1, and 1e5 in float16 is infinite."""
    least, most = torch.tensor([low, high], dtype=dtype, device="cpu").tolist()
    return least, most


def _with_outside(tensors: Tensors, local_norms: Sequence[float], low: float, high: float) -> Iterator[int]:
    bound = min(-low, high) * (1 - _ROUNDING)
    small: list[int] = []
    for place, (tensor, norm) in enumerate(zip(tensors, local_norms, strict=True)):
        if tensor is None or norm <= bound:  # NaN is not
            continue
        if tensor.numel() < SMALL and tensor.layout is torch.strided:
            small.append(place)
        elif _has_outside(norms.dense_values(tensor), *stored_bounds(tensor.dtype, low, high)):
            yield place
    for (_, dtype, _), alike in norms.by_kind(tensors, small, by_shape=True).items():
        least, most = stored_bounds(dtype, low, high)
        for places, entries in norms.in_blocks(tensors, alike):
            if entries:
                matrix = torch.stack([tensors[i].flatten() for i in places])  # pyright: ignore[reportOptionalMemberAccess]
                yield from (places[row] for row in _rows_with_outside(matrix, least, most))


def _rows_with_outside(matrix: Tensor, low: float, high: float) -> Iterator[int]:
    extremes = zip(matrix.amin(dim=1).tolist(), matrix.amax(dim=1).tolist(), strict=True)
    for row, (least, most) in enumerate(extremes):
        if least < low or most > high or (math.isnan(least) and _count(matrix[row], low, high)):
            yield row


def _has_outside(values: Tensor, low: float, high: float) -> bool:
    """Whether an entry is outside the bounds; where many are, the first chunk shows it."""
    for chunk in norms.in_memory_order(values).reshape(-1).split(LOOK):
        if chunk.numel():
            least, most = torch.aminmax(chunk)
            if least.item() < low or most.item() > high:
                return True
            if least.isnan() and _count(chunk, low, high):
                return True
    return False


def _counted_and_clamped(values: Tensor, low: Bound, high: Bound, norm_type: float) -> tuple[Tensor, Tensor]:
    """The number of entries outside the bounds, and the norm when they are clamped, both 0-d."""
    least, most = _stored(values, low, high)
    flat = norms.in_memory_order(values).reshape(-1)
    counts, clamped = [], []
    for block in flat.split(BLOCK if values.is_cpu else BLOCK_ON_DEVICE):
        counts.append(_count(block, least, most))
        clamped.append(Meter(norm_type).each([torch.clamp(block, least, most)]))
    return torch.stack(counts).sum(), norms.joint_norm(torch.cat(clamped), norm_type)


def _count(values: Tensor, low: Any, high: Any) -> Tensor:
    return ((values < low) | (values > high)).sum()


def _stacked(numbers: Sequence[Tensor], like: Tensor) -> Tensor:
    return torch.stack([number.to(like) for number in numbers])


def _stored(values: Tensor, low: Bound, high: Bound) -> tuple[Any, Any]:
    """The bounds as the dtype stores them; those that a device has scaled stay there."""
    if isinstance(low, Tensor) or isinstance(high, Tensor):
        return torch.as_tensor(low).to(values), torch.as_tensor(high).to(values)
    return stored_bounds(values.dtype, low, high)
