"""Multiplying CUDA gradients by one coefficient, and leaving their memory alone where it is 1.

On a device the host does not know whether anything is to be clipped. `torch._foreach_mul_` therefore reads and writes
all gradients at every step, although most steps clip nothing. This kernel looks at the coefficient, on the device, and
touches no gradient when it is 1.

One launch serves all gradients of a dtype, since a launch for each would cost the host more than it saves the device.
Which part of which gradient a program works on depends on the sizes alone, and is kept on the device. The addresses
change wherever gradients are made anew; they are copied from pinned memory, for which the host does not wait.
"""

# Triton comes with torch for CUDA and is missing elsewhere, also where types are checked.
# pyright: reportMissingImports=false, reportMissingTypeStubs=false, reportUnknownMemberType=false
# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false, reportUnknownParameterType=false
# pyright: reportMissingParameterType=false, reportArgumentType=false

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_gradclip.gradients.norms import PROGRAM, by_kind

# Bytes at which gradients begin, so that several entries are moved at once.
_ALIGNED = 16
_DTYPES = {
    torch.float32: tl.float32,
    torch.float64: tl.float64,
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
}


# Triton compiles this: annotations of Python's own are names that it does not know.
def _scale(addresses, counts, owners, firsts, coef, DTYPE: tl.constexpr, BLOCK: tl.constexpr):  # noqa: N803
    factor = tl.load(coef)
    # NaN differs from 1 as well.
    if factor != 1.0:
        program = tl.program_id(0)
        owner = tl.load(owners + program)
        first = tl.multiple_of(tl.load(firsts + program), BLOCK)
        values = tl.multiple_of(tl.load(addresses + owner).to(tl.pointer_type(DTYPE)), 16)
        places = first + tl.arange(0, BLOCK)
        inside = places < tl.load(counts + owner)
        found = tl.load(values + places, mask=inside)
        tl.store(values + places, (found.to(factor.dtype) * factor).to(found.dtype), mask=inside)


_kernel: Any = triton.jit(_scale)


def fits(tensor: Tensor) -> bool:
    """Whether the tensor is one for `scale_`: without gaps in its memory, and beginning where it should."""
    dense = tensor.is_contiguous() or (tensor.ndim == 4 and tensor.is_contiguous(memory_format=torch.channels_last))
    return dense and tensor.dtype in _DTYPES and tensor.data_ptr() % _ALIGNED == 0


def scale_(tensors: Sequence[Tensor], coef: Tensor) -> None:
    """Multiply tensors on one device that `fits` approves by one coefficient, rounding once.

    It is 0-d on the same device; float64 for float64 tensors, else float32.
    """
    filled = [tensor for tensor in tensors if tensor.numel()]
    for (_, dtype, _), places in by_kind(filled, range(len(filled))).items():
        some = [filled[place] for place in places]
        addresses = _kept(tuple(one.data_ptr() for one in some), coef.device)
        counts, owners, firsts = _programs(tuple(one.numel() for one in some), coef.device)
        # Triton launches on the current device.
        with torch.cuda.device_of(coef):
            _kernel[(len(owners),)](addresses, counts, owners, firsts, coef, DTYPE=_DTYPES[dtype], BLOCK=PROGRAM)
        # Which only torch's own operations do by themselves.
        torch.autograd.graph.increment_version(some)


@lru_cache(maxsize=16)
def _programs(counts: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """The number of entries of each tensor; then for each program its tensor and the entry there to begin with."""
    pieces = [-(-count // PROGRAM) for count in counts]
    owners = [owner for owner, many in enumerate(pieces) for _ in range(many)]
    firsts = [piece * PROGRAM for many in pieces for piece in range(many)]
    return _kept(counts, device), _kept(tuple(owners), device), _kept(tuple(firsts), device)


@lru_cache(maxsize=64)
def _kept(values: tuple[int, ...], device: torch.device) -> Tensor:
    """Whole numbers on the device, without waiting for it."""
    host = torch.tensor(values, dtype=torch.int64, device="cpu")
    return host if device.type == "cpu" else host.pin_memory().to(device, non_blocking=True)
