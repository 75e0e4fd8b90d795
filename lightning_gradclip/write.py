"""The only writes to gradients."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor


def scale_(params: Sequence[Tensor], coefs: Sequence[Tensor]) -> None:
    """Multiply the gradient of each parameter by its coefficient, a 0-d tensor on any device."""
    batches: dict[tuple[torch.device, torch.dtype, bool], tuple[list[Tensor], list[Tensor]]] = {}
    for parameter, coef in zip(params, coefs, strict=True):
        if (gradient := parameter.grad) is not None:
            values = _stored_values(parameter, gradient)
            # A float32 factor keeps its digits against half gradients, where a half factor would add an error.
            factor = torch.float64 if values.dtype in (torch.float64, torch.complex128) else torch.float32
            gradients, factors = batches.setdefault((values.device, factor, values.is_complex()), ([], []))
            gradients.append(values)
            factors.append(coef)
    for (device, factor, _), (gradients, factors) in batches.items():
        if all(one is factors[0] for one in factors):
            torch._foreach_mul_(  # pyright: ignore[reportPrivateUsage, reportPrivateImportUsage]
                gradients, factors[0].to(device=device, dtype=factor)
            )
        else:
            torch._foreach_mul_(  # pyright: ignore[reportPrivateUsage, reportPrivateImportUsage]
                gradients, torch.stack(factors).to(device=device, dtype=factor).unbind()
            )


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


def _stored_values(parameter: Tensor, gradient: Tensor) -> Tensor:
    if not gradient.is_sparse:
        return gradient
    if not gradient.is_coalesced():
        # The values of an uncoalesced gradient are summands: clamping or masking them would be wrong.
        parameter.grad = gradient = gradient.coalesce()
    return gradient.values()
