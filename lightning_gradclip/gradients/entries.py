"""Single entries outside fixed bounds: which gradients have some, how many, and what is left when they are clamped."""

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_gradclip.gradients import norms
from lightning_gradclip.gradients.blocks import batches_of_one_shape, row_norms
from lightning_gradclip.gradients.norms import CHUNK, CHUNK_ON_DEVICE, SMALL, Tensors
from lightning_gradclip.gradients.read import Meter

Bound = float | Tensor

# No entry exceeds the 2-norm, but for the norm's rounding.
_ROUNDING = 1e-5


class Found(NamedTuple):
    """Entries outside the bounds, `(P,)`, or 1 for some; and norms of the clamped gradients, if anybody wants them."""

    counts: Tensor
    clamped: Tensor | None


def with_outside(tensors: Tensors, local_norms: Sequence[float], low: float, high: float) -> tuple[int, ...]:
    """The places of the tensors on CPU that have entries outside the bounds, in no order."""
    bound = min(-low, high) * (1 - _ROUNDING)
    small: list[int] = []
    found: list[int] = []
    for place, (tensor, norm) in enumerate(zip(tensors, local_norms, strict=True)):
        if tensor is None or norm <= bound:  # NaN is not
            continue
        if _is_small(tensor):
            small.append(place)
        elif _has_outside(norms.dense_values(tensor), *stored_bounds(tensor.dtype, low, high)):
            found.append(place)
    for batch in batches_of_one_shape(tensors, small):
        if batch.numel:
            matrix, (least, most) = batch.gathered(tensors), stored_bounds(batch.dtype, low, high)
            # `aminmax` along a dim is twenty times slower.
            extremes = zip(matrix.amin(dim=1).tolist(), matrix.amax(dim=1).tolist(), strict=True)
            for row, (lowest, highest) in enumerate(extremes):
                if lowest < least or highest > most or (math.isnan(lowest) and _count(matrix[row], least, most)):
                    found.append(batch.places[row])
    return tuple(found)


def compared(
    tensors: Tensors, places: Sequence[int], local_norms: Tensor, low: Bound, high: Bound, norm_type: float
) -> Found:
    """Count and clamp, in a pass over the tensors at these places; the norms of the others, `(P,)`, are known."""
    counts = torch.zeros_like(local_norms)
    clamped = local_norms.clone()
    small = [place for place in places if (one := tensors[place]) is not None and one.is_cpu and _is_small(one)]
    for batch in batches_of_one_shape(tensors, small):
        matrix = batch.gathered(tensors)
        least, most = _stored(matrix, low, high)
        index = norms.integers_on(batch.places, counts.device)
        counts.index_copy_(0, index, ((matrix < least) | (matrix > most)).sum(dim=1).to(counts))
        clamped.index_copy_(0, index, row_norms(torch.clamp(matrix, least, most), norm_type).to(clamped))
    for place in sorted({*places} - {*small}):
        if (tensor := tensors[place]) is not None:
            counts[place], clamped[place] = _compared(norms.dense_values(tensor), low, high, norm_type)
    return Found(counts, _measured_again(clamped, tensors, places, low, high, norm_type))


def flagged(tensors: Tensors, places: Sequence[int], local_norms: Tensor, low: Bound, high: Bound) -> Found:
    """Tell which of the tensors at these places have entries outside; on CPU the places say so themselves."""
    counts = torch.zeros_like(local_norms)
    index = norms.integers_on(tuple(places), local_norms.device)
    if local_norms.is_cpu:
        return Found(counts.index_fill_(0, index, 1.0), None)
    values = [norms.dense_values(one) for place in places if (one := tensors[place]) is not None]
    flags = [_count(one, *_stored(one, low, high)).any().to(counts) for one in values]
    return Found(counts.index_copy_(0, index, torch.stack(flags)) if flags else counts, None)


@lru_cache(maxsize=64)
def stored_bounds(dtype: torch.dtype, low: float, high: float) -> tuple[float, float]:
    """The bounds as `dtype` stores them: 0.1 in bfloat16 is a neighbour of 0.1, and 1e5 in float16 is infinite."""
    least, most = torch.tensor([low, high], dtype=dtype, device="cpu").tolist()
    return least, most


def _is_small(tensor: Tensor) -> bool:
    return tensor.numel() < SMALL and tensor.layout is torch.strided


def _has_outside(values: Tensor, low: float, high: float) -> bool:
    """Whether an entry is outside the bounds; where many are, the first chunk shows it."""
    for chunk in norms.in_memory_order(values).reshape(-1).split(CHUNK):
        if chunk.numel():
            least, most = torch.aminmax(chunk)
            if least.item() < low or most.item() > high:
                return True
            if least.isnan() and _count(chunk, low, high):
                return True
    return False


def _compared(values: Tensor, low: Bound, high: Bound, norm_type: float) -> tuple[Tensor, Tensor]:
    """The number of entries outside the bounds, and the norm when they are clamped, both 0-d."""
    least, most = _stored(values, low, high)
    flat = norms.in_memory_order(values).reshape(-1)
    meter, counts, clamped = Meter(norm_type), [], []
    for chunk in flat.split(CHUNK if values.is_cpu else CHUNK_ON_DEVICE):
        counts.append(_count(chunk, least, most))
        clamped.append(meter.each([torch.clamp(chunk, least, most)]))
    return torch.stack(counts).sum(), norms.joint_norm(torch.cat(clamped), norm_type)


def _measured_again(
    clamped: Tensor, tensors: Tensors, places: Sequence[int], low: Bound, high: Bound, norm_type: float
) -> Tensor:
    """The same, on CPU, with norms that a fast sum may have lost measured exactly."""
    for place in places if clamped.is_cpu else ():
        tensor, norm = tensors[place], clamped[place].item()
        if tensor is not None and not math.isnan(norm) and norms.is_suspect(norm, norm_type):
            values = norms.dense_values(tensor)
            clamped[place] = norms.exact_norm(torch.clamp(values, *_stored(values, low, high)), norm_type)
    return clamped


def _count(values: Tensor, low: Any, high: Any) -> Tensor:
    return ((values < low) | (values > high)).sum()


def _stored(values: Tensor, low: Bound, high: Bound) -> tuple[Any, Any]:
    """The bounds as the dtype stores them; those that a device has scaled stay there."""
    if isinstance(low, Tensor) or isinstance(high, Tensor):
        return torch.as_tensor(low).to(values), torch.as_tensor(high).to(values)
    return stored_bounds(values.dtype, low, high)
