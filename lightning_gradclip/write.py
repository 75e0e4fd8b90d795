"""The only writes to gradients."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

_DOUBLE = (torch.float64, torch.complex128)
# The normal range of float32.
_SMALLEST, _LARGEST = 1.2e-38, 3.4e38


def scale_(params: Sequence[Tensor], coefs: Sequence[Tensor]) -> None:
    """Multiply the gradient of each parameter by its coefficient, a 0-d tensor on any device."""
    batches: dict[tuple[torch.device, torch.dtype], tuple[list[Tensor], list[Tensor]]] = {}
    for parameter, coef in zip(params, coefs, strict=True):
        if (gradient := parameter.grad) is not None:
            values = _stored_values(parameter, gradient)
            # A float32 factor keeps its digits against half gradients, where a half factor would add an error.
            factor = torch.float64 if values.dtype in _DOUBLE else torch.float32
            gradients, factors = batches.setdefault((values.device, factor), ([], []))
            gradients.append(values)
            factors.append(coef)
    for (device, dtype), (gradients, factors) in batches.items():
        if all(one is factors[0] for one in factors):
            for part in _parts(factors[0]):
                _multiply_(gradients, part.to(device, dtype))
        else:
            for part in _parts(torch.stack(factors)):
                _multiply_(gradients, list(part.to(device, dtype).unbind()))


def scale_units_(parameter: Tensor, coefs: Tensor) -> None:
    """Multiply each slice of the parameter's gradient along dim 0 by its coefficient, `(rows,)`."""
    if (gradient := parameter.grad) is None:
        return
    values = _stored_values(parameter, gradient)
    if gradient.is_sparse:
        coefs = coefs[gradient.coalesce().indices()[0]]
    factor = torch.float64 if values.dtype in _DOUBLE else torch.float32
    for part in _parts(coefs):
        values.mul_(part.to(values.device, factor).view(-1, *[1] * (values.ndim - 1)))


def clamp_(params: Iterable[Tensor], low: float, high: float) -> None:
    """Replace entries below `low` by it and entries above `high` by that; NaN stays."""
    for parameter in params:
        if (gradient := parameter.grad) is not None:
            _stored_values(parameter, gradient).clamp_(low, high)


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


def _parts(coefs: Tensor) -> tuple[Tensor, ...]:
    """Factors whose product is the coefficient and which float32 can hold."""
    if coefs.device.type != "cpu" or _SMALLEST <= coefs.min().item() <= coefs.max().item() <= _LARGEST:
        return (coefs,)
    root = coefs.sqrt()
    return root, root


def _multiply_(gradients: list[Tensor], factors: Tensor | list[Tensor]) -> None:
    # One call for all gradients; torch offers it under a private name only.
    multiply: Any = torch._foreach_mul_  # pyright: ignore[reportPrivateUsage, reportPrivateImportUsage]
    multiply(gradients, factors)


def _stored_values(parameter: Tensor, gradient: Tensor) -> Tensor:
    if gradient.is_sparse:
        if not gradient.is_coalesced():
            # The values of an uncoalesced gradient are summands: clamping or masking them would be wrong.
            parameter.grad = gradient = gradient.coalesce()
        return gradient.values()
    if not gradient.is_contiguous() and 0 in gradient.stride():
        # Expanded: several entries share their memory and would be scaled several times.
        parameter.grad = gradient = gradient.contiguous()
    return gradient
