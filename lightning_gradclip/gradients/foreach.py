"""torch's operations over lists of tensors: the private names the package relies on, each with a public way out.

One call for a list costs a fraction of one call for each tensor. torch's own optimizers and `clip_grad_norm_` are built
on these functions, but they have no public names; where a release drops or changes one, the public functions beside it
give the same results more slowly.
"""

import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_gradclip.gradients import cuda as early_exit

# For tensors that are smaller on average GradScaler's function takes a third to two thirds of the time, for larger ones
# more than the product.
_SMALL = 4096
# Tensors to look at for that.
_SAMPLE = 32

_Norm = Callable[..., Sequence[Tensor]]
_Write = Callable[..., None]


def _found(holder: object, name: str) -> Any:
    return getattr(holder, name, None)


_norm: _Norm | None = _found(torch, "_foreach_norm")
_mul: _Write | None = _found(torch, "_foreach_mul_")
_unscale: _Write | None = _found(torch, "_amp_foreach_non_finite_check_and_unscale_")
_flatten: Callable[[Sequence[Tensor]], Tensor] | None = _found(
    _found(_found(torch, "_C"), "_nn"), "flatten_dense_tensors"
)


class _Arguments(threading.local):
    """What `_unscale` is given, made once for each thread: making them takes longer than a small model does."""

    def __init__(self) -> None:
        with torch.inference_mode(mode=False):
            # Whether an entry is not finite, which is known where this is used and read by nobody.
            self.found = torch.zeros(1, dtype=torch.float32, device="cpu")
            self.factor = torch.ones(1, dtype=torch.float32, device="cpu")


_arguments = _Arguments()


def norms(tensors: Sequence[Tensor], norm_type: float, dtype: torch.dtype | None) -> Sequence[Tensor]:
    """The p-norm of each tensor, accumulated in `dtype`; of one device and dtype, none of them empty."""
    if _norm is None:
        return [torch.linalg.vector_norm(one, norm_type, dtype=dtype) for one in tensors]
    return _norm(tensors, norm_type, dtype=dtype)


def flatten(tensors: Sequence[Tensor]) -> Tensor:
    """A copy of all entries, one tensor after the other, `(N,)`."""
    if _flatten is None:
        return torch.cat([one.reshape(-1) for one in tensors])
    return _flatten(tensors)


def multiply_(tensors: Sequence[Tensor], factor: Tensor | Sequence[Tensor]) -> None:
    """Multiply the tensors by one factor, 0-d and on their device, or each by its own."""
    if isinstance(factor, Tensor) and factor.device.type == "cuda":
        tensors = early_exit.multiply_(tensors, factor)
        if not tensors:
            return
    if _mul is not None:
        _mul(tensors, factor)
        return
    factors = [factor] * len(tensors) if isinstance(factor, Tensor) else factor
    for one, by in zip(tensors, factors, strict=True):
        one.mul_(by)


def scale_(tensors: Sequence[Tensor], factor: float) -> None:
    """Multiply CPU tensors of one floating dtype by one factor, rounded to float32: the fastest way for them."""
    some = tensors[:: len(tensors) // _SAMPLE + 1]
    if _unscale is None or sum(map(Tensor.numel, some)) > _SMALL * len(some):
        multiply_(tensors, torch.tensor(factor, dtype=torch.float32, device="cpu"))
        return
    _unscale(tensors, _arguments.found, _arguments.factor.fill_(factor))
    # Which this function, unlike the others, leaves to its caller.
    torch.autograd.graph.increment_version(tensors)
