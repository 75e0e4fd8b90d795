"""The arithmetic of p-norms: of pieces joined to a whole, and exact where a fast sum is not."""

import math
from collections.abc import Iterable, Sequence
from functools import lru_cache

import torch
from torch import Tensor

from lightning_gradclip.select.scopes import Scopes

Tensors = Sequence[Tensor | None]
Kind = tuple[torch.device, torch.dtype, torch.Size | None]

CPU = torch.device("cpu")

# -- Every number that was chosen by measuring: on one thread of an AMD EPYC with 1 MiB of L2, torch 2.13, float32. --

# Entries copied, converted or compared at once, a mebibyte: 2,000 tensors of 1,000 take 1.2 times as long with 2**16,
# 0.92 with 2**19, which is twice the memory.
CHUNK = 2**18
# The same on a device, where it only bounds the memory that comparing takes; not measured.
CHUNK_ON_DEVICE = 2**24
# Entries in one float32 sum: even of equal ones, whose rounding errors all agree, 512 stay within 1e-6; 768 do not.
BLOCK = 512
# Entries of a unit in one sum, as timm and torch add them up, bit for bit: beyond this the sixth digit is lost.
UNIT = 8192
# bfloat16 entries that are read as they are, since the errors of so many blocks average out: see `blocks`.
MANY_BLOCKS = 2**20
# Entries below which a tensor is copied beside others: 100 tensors of 12,000 take 0.53 of a call for each, of 24,000
# 0.84.
SMALL = 2**14
# Tensors of one shape but for dim 0 that are worth a copy of their own: 1,000 tensors in 2 to 50 shapes take 0.5 to 0.8
# of one copy for all with 1 to 16, in 500 shapes 2.8 times as long with 2.
ALIKE = 4
# Of a gradient with so many entries only the units that change are written, where they are no more than this share: in
# steps of AGC over ResNet-50 and GPT-2 that takes 0.80 to 0.89 of writing all at 5 %, 1.00 to 1.03 at 15 %.
MANY, FEW = 2**20, 1 / 8
# So many tensors, of so few entries on average, GradScaler's foreach function multiplies in 0.7 (16 entries) to 0.87
# (1,000) of the product's time; fewer ones in the same time, larger ones in up to 1.3.
MANY_SMALL, SMALL_ON_AVERAGE = 64, 2000
# Entries of a dtype on CUDA below which launching a kernel takes longer than multiplying, and entries of one program of
# that kernel: reckoned from 3 TB/s and 10 us a launch, not measured.
LAUNCH, PROGRAM = 2**22, 8192


def vector_norm(value: Tensor, norm_type: float, dim: int | None = None, dtype: torch.dtype | None = None) -> Tensor:
    """torch's, which is not annotated."""
    return torch.linalg.vector_norm(value, norm_type, dim=dim, dtype=dtype)


def joint_norm(norms: Tensor, norm_type: float) -> Tensor:
    """The p-norm of a vector of p-norms, 0-d, in the widest dtype; 0 for none."""
    norms = norms.to(widest(norms.device))
    if norms.numel() == 0:
        return norms.new_zeros(())
    if norm_type <= 2.0 or math.isinf(norm_type):
        norm = vector_norm(norms, norm_type)
        if not norms.is_cpu or 1e-100 < norm.item() < 1e100:
            return norm
    # Higher powers, and float64 gradients of extreme size, leave the range of float64.
    scale = _scale(norms.amax())
    return scale * vector_norm(norms / scale, norm_type)


def scope_norms(norms: Tensor, scopes: Scopes, norm_type: float) -> Tensor:
    """The joint p-norm of each scope, `(S,)`, from the norm of each parameter."""
    count = scopes.count
    if count == len(scopes.index) > 1:
        return norms
    if count == 1:
        return joint_norm(norms, norm_type).view(1)
    return grouped_norms(norms, scopes.index_on(norms.device), count, norm_type)


def grouped_norms(norms: Tensor, index: Tensor, count: int, norm_type: float) -> Tensor:
    """The joint p-norm of each group, `(count,)`, from norms `(N,)` and the group of each, `(N,)`."""
    zeros = norms.new_zeros(count)
    largest = zeros.scatter_reduce(0, index, norms, "amax")
    if math.isinf(norm_type):
        return largest
    # Higher powers would leave the range of float64: each group is scaled by its largest norm.
    scale = _scale(largest)
    sums = zeros.scatter_add(0, index, (norms / scale[index]).pow(norm_type))
    return scale * sums.pow(1.0 / norm_type)


def exact_norm(value: Tensor, norm_type: float) -> Tensor:
    """The p-norm in float64, scaled by the largest entry, 0-d: slow, and right for any finite entries."""
    if value.numel() == 0:
        return torch.zeros((), device=value.device)
    if not value.is_cpu or not value.dtype.is_floating_point:
        return exact_row_norms(value.reshape(1, -1), norm_type)[0]
    low, high = torch.aminmax(value)
    largest = torch.maximum(-low, high).double()
    if norm_type == math.inf or not 0 < largest.item() < math.inf:  # zeros, or not finite
        return largest
    # A chunk at a time, since a copy of a large gradient may not fit.
    chunks = in_memory_order(value).reshape(-1).split(CHUNK // 2)
    norms = [vector_norm(chunk.double() / largest, norm_type) for chunk in chunks]
    return largest * joint_norm(torch.stack(norms), norm_type)


def exact_row_norms(matrix: Tensor, norm_type: float) -> Tensor:
    """The same of each row, `(k,)`."""
    if matrix.numel() == 0:
        return torch.zeros(len(matrix), dtype=torch.float32, device=matrix.device)
    magnitude = matrix.abs()
    scale = _scale(magnitude.amax(dim=1)).to(widest(matrix.device))
    return scale * vector_norm(magnitude.to(scale.dtype) / scale[:, None], norm_type, dim=1)


def _scale(largest: Tensor) -> Tensor:
    return torch.where((largest > 0) & torch.isfinite(largest), largest, 1.0)


def is_suspect(norm: float, norm_type: float) -> bool:
    """Whether a fast norm may have overflowed or underflowed."""
    return not smallest(norm_type) <= norm < math.inf


@lru_cache(maxsize=64)
def smallest(norm_type: float) -> float:
    """Norms below this may have lost entries whose p-th power is below float32's normal range, about 1e-38."""
    return 0.0 if math.isinf(norm_type) else 1e-24 ** (1.0 / norm_type)


@lru_cache(maxsize=64)
def accumulator(dtype: torch.dtype, norm_type: float) -> torch.dtype | None:
    """The dtype to sum in; None: the gradient's own, which is wide enough."""
    if norm_type != 2.0 and not math.isinf(norm_type):
        return torch.complex128 if dtype.is_complex else torch.float64
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else None


def widest(device: torch.device) -> torch.dtype:
    """float64, or float32 where the device has nothing wider."""
    return torch.float32 if device.type == "mps" else torch.float64


def home(tensors: Iterable[Tensor | None]) -> torch.device:
    """Where numbers about these tensors belong: on the first device that is not the CPU, if there is one."""
    for tensor in tensors:
        if tensor is not None and not tensor.is_cpu:
            return tensor.device
    return CPU


def by_kind(tensors: Tensors, places: Iterable[int], *, by_shape: bool = False) -> dict[Kind, list[int]]:
    """The places of the tensors that one call can serve together, by device, dtype and, if asked for, shape."""
    kinds: dict[Kind, list[int]] = {}
    for place in places:
        if (tensor := tensors[place]) is not None:
            key = tensor.device, tensor.dtype, tensor.shape if by_shape else None
            kinds.setdefault(key, []).append(place)
    return kinds


def dense_values(tensor: Tensor) -> Tensor:
    """The stored entries: duplicates of a sparse gradient are added up first."""
    return tensor.coalesce().values() if tensor.is_sparse else tensor


def in_memory_order(value: Tensor) -> Tensor:
    """A view with the strides descending, contiguous for channels-last and transposed tensors."""
    if value.is_contiguous():
        return value
    return value.permute(sorted(range(value.dim()), key=value.stride, reverse=True))


@lru_cache(maxsize=64)
def integers_on(values: tuple[int, ...], device: torch.device) -> Tensor:
    """Whole numbers as a tensor, kept: copying them to a device anew at every step would make the host wait for it."""
    return torch.tensor(values, dtype=torch.long, device="cpu").to(device)
