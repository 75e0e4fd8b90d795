"""torch's operations over lists of tensors: the private names the package relies on, each with a public way out.

One call for a list costs a fraction of one call for each tensor. torch's own optimizers and `clip_grad_norm_` are built
on these functions, but they have no public names; where a release drops or changes one, the public functions beside it
give the same results more slowly. Our own kernel for CUDA, which wants Triton, is used where it is asked for.
"""

import importlib
import threading
import warnings
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from lightning_gradclip.gradients.norms import LAUNCH, MANY_SMALL, SMALL_ON_AVERAGE, by_kind

_Norm = Callable[..., Sequence[Tensor]]
_Write = Callable[..., None]
_Flatten = Callable[[Sequence[Tensor]], Tensor]


_norm: _Norm | None = getattr(torch, "_foreach_norm", None)
_mul: _Write | None = getattr(torch, "_foreach_mul_", None)
_unscale: _Write | None = getattr(torch, "_amp_foreach_non_finite_check_and_unscale_", None)
_flatten: _Flatten | None = getattr(getattr(torch._C, "_nn", None), "flatten_dense_tensors", None)  # pyright: ignore[reportPrivateUsage]


class _Arguments(threading.local):
    """Numbers as tensors, made once for each thread: making one takes as long as a small model does."""

    def __init__(self) -> None:
        with torch.inference_mode(mode=False):
            self.factor = torch.ones((), dtype=torch.float32, device="cpu")
            # The same number as the vector that `_unscale` wants.
            self.factors = self.factor.view(1)
            # Whether an entry is not finite, which is known where this is used and read by nobody.
            self.found = torch.zeros(1, dtype=torch.float32, device="cpu")


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


def multiply_(tensors: Sequence[Tensor], factor: Tensor | Sequence[Tensor], *, triton: bool = False) -> None:
    """Multiply the tensors by one factor, 0-d and on their device, or each by its own.

    With `triton` our kernel does it on CUDA, for one factor.
    """
    if triton and isinstance(factor, Tensor) and factor.device.type == "cuda":
        tensors = left_by_kernel_(tensors, factor)
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
    _arguments.factor.fill_(factor)
    if _unscale is None or not _are_many_small(tensors):
        multiply_(tensors, _arguments.factor)
        return
    _unscale(tensors, _arguments.found, _arguments.factors)
    # Which this function, unlike the others, leaves to its caller.
    torch.autograd.graph.increment_version(tensors)


def _are_many_small(tensors: Sequence[Tensor]) -> bool:
    """Whether GradScaler's function is faster than a product."""
    if len(tensors) < MANY_SMALL:
        return False
    # Some of them tell.
    some = tensors[:: len(tensors) // 32 + 1]
    return sum(map(Tensor.numel, some)) <= SMALL_ON_AVERAGE * len(some)


def left_by_kernel_(tensors: Sequence[Tensor], coef: Tensor) -> list[Tensor]:
    """Multiply CUDA tensors, where that pays, by a kernel that leaves memory alone where the coefficient, 0-d, is 1.

    Returned are those that are still to be multiplied.
    """
    left: list[Tensor] = []
    for (_, dtype, _), places in by_kind(tensors, range(len(tensors))).items():
        some = [tensors[place] for place in places]
        large = coef.device.type == "cuda" and sum(map(Tensor.numel, some)) >= LAUNCH
        kernel = _kernel(coef.device, dtype) if large else None
        if kernel is None:
            left += some
            continue
        fitting = list(map(kernel.fits, some))
        kernel.scale_([one for one, fits in zip(some, fitting, strict=True) if fits], coef)
        left += [one for one, fits in zip(some, fitting, strict=True) if not fits]
    return left


@lru_cache(maxsize=64)
def _kernel(device: torch.device, dtype: torch.dtype) -> Any | None:
    """The kernel's module once it has multiplied a few numbers as torch does; that one time the host waits."""
    try:
        kernel: Any = importlib.import_module("lightning_gradclip.gradients.cuda")
        if _is_right(kernel, device, dtype):
            return kernel
        fault = "it gives other numbers than torch"
    # Triton compiles with what the machine has: a compiler, headers and a driver may be missing, each in its own way.
    except Exception as error:  # noqa: BLE001
        fault = f"{type(error).__name__}: {error}"
    warnings.warn(
        f"the kernel that triton=True asks for cannot be used on {device} ({fault}); gradients are multiplied by "
        "torch._foreach_mul_, which writes them at every step; repair Triton, or leave triton=True out",
        stacklevel=2,
    )
    return None


def _is_right(kernel: Any, device: torch.device, dtype: torch.dtype) -> bool:
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    for factor in (1.0, 0.3):
        values = torch.linspace(-3, 3, 1001, device=device).to(dtype)
        coef = torch.tensor(factor, dtype=wide, device=device)
        expected = values * coef
        kernel.scale_([values], coef)
        if not torch.equal(values, expected):
            return False
    return True
