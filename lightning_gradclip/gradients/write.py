"""The only writes to gradients."""

from collections.abc import Iterable, Sequence
from functools import lru_cache
from itertools import accumulate, pairwise
from operator import attrgetter

import torch
from torch import Tensor

from lightning_gradclip.gradients import foreach
from lightning_gradclip.gradients import norms as pnorm
from lightning_gradclip.gradients.rows import BLOCK
from lightning_gradclip.select import layout

_dtype_of = attrgetter("dtype")

# The normal range of float32.
_SMALLEST, _LARGEST = 1.2e-38, 3.4e38
# Gradients that a float32 factor loses nothing against.
_FLOAT32 = {torch.float32, torch.bfloat16, torch.float16}
# Of gradients with so many entries only the slices that change are written, where they are no more than this share.
_MANY, _FEW = 2**19, 1 / 8


def scale_(params: Sequence[Tensor], coefs: Sequence[Tensor]) -> None:
    """Multiply the gradient of each parameter by its coefficient, a 0-d tensor on any device."""
    batches: dict[tuple[torch.device, torch.dtype], tuple[list[Tensor], list[Tensor]]] = {}
    for parameter, coef in zip(params, coefs, strict=True):
        if (gradient := parameter.grad) is not None:
            values = _real_values(parameter, gradient)
            gradients, factors = batches.setdefault((values.device, _factor_dtype(values)), ([], []))
            gradients.append(values)
            factors.append(coef)
    for (device, dtype), (gradients, factors) in batches.items():
        joined = factors[0] if all(one is factors[0] for one in factors) else torch.stack(factors)
        if _leaves_float32(joined):
            for values, factor in zip(gradients, factors, strict=True):
                values.copy_(values.double() * factor.double())
        elif joined.ndim == 0:
            foreach.multiply_(gradients, joined.to(device, dtype))
        else:
            foreach.multiply_(gradients, joined.to(device, dtype).unbind())


def scale_all_(params: Sequence[Tensor], coef: float) -> None:
    """Multiply all gradients, on CPU, by one coefficient."""
    gradients = [gradient for parameter in params if (gradient := parameter.grad) is not None]
    if set(map(type, gradients)) != {Tensor}:
        gradients = [layout.local(gradient) for gradient in gradients]
    dtypes = set(map(_dtype_of, gradients))
    plain = len(dtypes) == 1 and dtypes <= _FLOAT32 and _SMALLEST <= coef <= _LARGEST
    # Contiguous gradients share no memory and are not sparse.
    if plain and all(map(Tensor.is_contiguous, gradients)):
        foreach.scale_(gradients, coef)
    else:
        scale_(params, [torch.tensor(coef, dtype=torch.float64, device="cpu")] * len(params))


def scale_units_(params: Sequence[Tensor], rows: Sequence[int], coefs: Tensor) -> None:
    """Multiply each unit of the gradients by its coefficient; on CPU a gradient that nothing changes is not written.

    Args:
        params: The parameters. A unit is a slice of the gradient along dim 0; a gradient of fewer than two dims is one.
        rows: The number of units of each.
        coefs: The coefficient of each unit, `(sum(rows),)`.
    """
    starts = (0, *accumulate(rows))
    units, spans = _changed(coefs, starts)
    written = [place for place, (first, end) in enumerate(spans) if first < end and params[place].grad is not None]
    whole = [place for place in written if params[place].ndim < 2]
    index = pnorm.integers_on(tuple(starts[place] for place in whole), coefs.device)
    scale_([params[place] for place in whole], coefs[index].unbind())
    wide = _leaves_float32(coefs)
    # Each conversion once, and not for each gradient.
    converted: dict[tuple[torch.device, torch.dtype], Tensor] = {}
    batches: dict[tuple[torch.device, torch.dtype], tuple[list[Tensor], list[Tensor]]] = {}
    for place in written:
        parameter, (first, end) = params[place], spans[place]
        if parameter.ndim < 2 or (gradient := parameter.grad) is None:
            continue
        values = _real_values(parameter, gradient)
        key = values.device, torch.float64 if wide else _factor_dtype(values)
        if key not in converted:
            converted[key] = coefs.to(*key)
        factors = converted[key][starts[place] : starts[place + 1]]
        if gradient.is_sparse:
            factors = factors[gradient.coalesce().indices()[0]]
        factors = factors.view(-1, *[1] * (values.ndim - 1))
        if wide or (values.is_cpu and values.dtype is torch.bfloat16):
            _scale_converted_(values, factors)
        elif end - first <= _FEW * rows[place] and values.numel() >= _MANY and not gradient.is_sparse:
            _scale_some_(values, units[first:end] - starts[place], factors)
        else:
            gradients, theirs = batches.setdefault(key, ([], []))
            gradients.append(values)
            theirs.append(factors)
    for gradients, theirs in batches.values():
        foreach.multiply_(gradients, theirs)


def clamp_(params: Iterable[Tensor], low: float, high: float) -> None:
    """Replace entries below `low` by it and entries above `high` by that; NaN stays."""
    for parameter in params:
        if (gradient := parameter.grad) is not None:
            values = _stored_values(parameter, gradient)
            values.clamp_(*stored_bounds(values.dtype, low, high))


@lru_cache(maxsize=64)
def stored_bounds(dtype: torch.dtype, low: float, high: float) -> tuple[float, float]:
    """The bounds as `dtype` stores them: 0.1 in bfloat16 is a neighbour of 0.1, and 1e5 in float16 is infinite."""
    least, most = torch.tensor([low, high], dtype=dtype, device="cpu").tolist()
    return least, most


def zero_nonfinite_(params: Iterable[Tensor]) -> None:
    """Replace NaN and infinite entries by zero; by a mask, since 0 * inf is NaN."""
    for parameter in params:
        if (gradient := parameter.grad) is not None:
            values = _stored_values(parameter, gradient)
            values.masked_fill_(~torch.isfinite(values), 0.0)


def drop_(params: Iterable[Tensor]) -> None:
    """Remove the gradients, so that the optimizer leaves parameters and its own state as they are."""
    for parameter in params:
        parameter.grad = None


def _changed(coefs: Tensor, starts: Sequence[int]) -> tuple[Tensor, list[tuple[int, int]]]:
    """The units whose coefficient is not 1, and which part of them belongs to each parameter.

    On devices, where looking would make the host wait, all units.
    """
    if coefs.device.type != "cpu":
        return pnorm.integers_on((), coefs.device), list(pairwise(starts))
    units = (coefs != 1).nonzero()[:, 0]
    return units, list(pairwise(torch.searchsorted(units, pnorm.integers_on(tuple(starts), coefs.device)).tolist()))


def _scale_converted_(values: Tensor, factors: Tensor) -> None:
    """Multiply slices in the dtype of their factors: torch's product of bfloat16 and a column is four times slower."""
    size = max(1, BLOCK * len(values) // max(1, values.numel()))
    for some, by in zip(values.split(size), factors.split(size), strict=True):
        some.copy_(some.to(by.dtype).mul_(by))


def _scale_some_(values: Tensor, slices: Tensor, factors: Tensor) -> None:
    """Multiply these slices of a large gradient by way of a copy that stays in the cache."""
    for some in slices.split(max(1, BLOCK * len(values) // values.numel())):
        values.index_copy_(0, some, values.index_select(0, some).mul_(factors[some]))


def _factor_dtype(values: Tensor) -> torch.dtype:
    # A float32 factor keeps its digits against half gradients, where a half factor would add an error.
    return torch.float64 if values.dtype == torch.float64 else torch.float32


def _leaves_float32(coefs: Tensor) -> bool:
    """Whether float32 cannot hold some coefficient; on devices, where looking would make the host wait, never."""
    if coefs.device.type != "cpu" or coefs.numel() == 0:
        return False
    low, high = torch.aminmax(coefs)
    return not _SMALLEST <= low.item() <= high.item() <= _LARGEST


def _real_values(parameter: Tensor, gradient: Tensor) -> Tensor:
    # As real numbers: a complex product makes inf + nan j of inf times 1.
    values = _stored_values(parameter, gradient)
    return torch.view_as_real(values) if values.is_complex() else values


def _stored_values(parameter: Tensor, gradient: Tensor) -> Tensor:
    if gradient.is_sparse:
        if not gradient.is_coalesced():
            # The values of an uncoalesced gradient are summands: clamping or masking them would be wrong.
            parameter.grad = gradient = gradient.coalesce()
        return gradient.values()
    values = held = layout.local(gradient)
    if values.is_conj() or values.is_neg():
        # Not yet computed, so that nothing can be written.
        values = values.resolve_conj().resolve_neg()
    if not values.is_contiguous() and 0 in values.stride():
        # Expanded: several entries share their memory and would be scaled several times.
        values = values.contiguous()
    if values is not held:
        parameter.grad = layout.with_local(gradient, values)
    return values
