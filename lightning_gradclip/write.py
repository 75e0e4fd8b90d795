"""The only writes to gradients."""

from collections.abc import Iterable, Sequence
from functools import lru_cache

import torch
from torch import Tensor

from lightning_gradclip import foreach, layout

# The normal range of float32.
_SMALLEST, _LARGEST = 1.2e-38, 3.4e38
# Gradients that a float32 factor loses nothing against.
_FLOAT32 = {torch.float32, torch.bfloat16, torch.float16}


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
    dtypes = {gradient.dtype for gradient in gradients}
    plain = len(dtypes) == 1 and dtypes <= _FLOAT32 and _SMALLEST <= coef <= _LARGEST
    # Contiguous gradients share no memory and are not sparse.
    if plain and all(map(Tensor.is_contiguous, gradients)):
        foreach.scale_(gradients, coef)
    else:
        scale_(params, [torch.tensor(coef, dtype=torch.float64, device="cpu")] * len(params))


def scale_units_(parameter: Tensor, coefs: Tensor) -> None:
    """Multiply each slice of the parameter's gradient along dim 0 by its coefficient, `(rows,)`."""
    if (gradient := parameter.grad) is None:
        return
    values = _real_values(parameter, gradient)
    if gradient.is_sparse:
        coefs = coefs[gradient.coalesce().indices()[0]]
    factors = coefs.view(-1, *[1] * (values.ndim - 1))
    if _leaves_float32(factors):
        values.copy_(values.double() * factors.double())
    else:
        values.mul_(factors.to(values.device, _factor_dtype(values)))


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
