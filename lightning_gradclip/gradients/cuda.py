"""Whether a Triton kernel multiplies gradients on CUDA: where Triton is installed, and once it is seen to work."""

import importlib
import importlib.util
import warnings
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

# Entries of a dtype together. Fewer are multiplied in less time than the host needs to launch the kernel.
LARGE = 2**22


def multiply_(tensors: Sequence[Tensor], coef: Tensor) -> list[Tensor]:
    """Multiply those of the tensors for which that pays by a coefficient that is probably 1.

    Args:
        tensors: Tensors on one device.
        coef: 0-d, on the same device.

    Returns:
        The tensors that are still to be multiplied.
    """
    alike: dict[torch.dtype, list[Tensor]] = {}
    for tensor in tensors:
        alike.setdefault(tensor.dtype, []).append(tensor)
    left: list[Tensor] = []
    for dtype, some in alike.items():
        large = coef.device.type == "cuda" and sum(map(Tensor.numel, some)) >= LARGE
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
    if importlib.util.find_spec("triton") is None:
        return None
    try:
        kernel: Any = importlib.import_module("lightning_gradclip.gradients.triton_scale")
        if _is_right(kernel, device, dtype):
            return kernel
        fault = "it gives other numbers than torch"
    # Triton compiles with what the machine has: a compiler, headers and a driver may be missing, each in its own way.
    except Exception as error:  # noqa: BLE001
        fault = f"{type(error).__name__}: {error}"
    warnings.warn(
        f"Triton is installed but its kernel cannot be used on {device} ({fault}); gradients are multiplied by "
        "torch._foreach_mul_, which writes them at every step; repair or uninstall triton to silence this",
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
