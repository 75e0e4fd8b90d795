"""The arithmetic of p-norms: of rows and of single tensors, joined from pieces, and exact where a fast sum is not.

A float32 sum over 1e8 entries reads 1 % low, while sums of 512, even of equal entries, whose rounding errors all agree,
stay within 1e-6. Memory is therefore read as rows, which torch computes on all threads, and norms of rows are joined in
float64.

torch has vectorised kernels for norms of float32, float64 and bfloat16 in their own dtype only. A bfloat16 result has
three digits, so that smaller half tensors are converted first, which costs two to three times the reading. From 2**20
entries on bfloat16 rows are taken as they are: where many rows count, their errors average out. That leaves 5e-5 of
normally distributed entries at 2**20, 1e-5 at 2**22, and 5e-4 where a few large entries make up the norm; where all
entries are equal nothing averages out, and up to 4e-3 remains, as of the bfloat16 norm that torch gives.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache

import torch
from torch import Tensor

from lightning_gradclip.gradients import foreach
from lightning_gradclip.gradients.tuning import BLOCK, MANY_ROWS, ROW
from lightning_gradclip.select.scopes import Scopes

# Dtypes that are read by rows.
REAL = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_CPU = torch.device("cpu")

Tensors = Sequence[Tensor | None]
Kind = tuple[torch.device, torch.dtype, torch.Size | None]


def vector_norm(value: Tensor, norm_type: float, dim: int | None = None, dtype: torch.dtype | None = None) -> Tensor:
    """torch's, which is not annotated."""
    return torch.linalg.vector_norm(value, norm_type, dim=dim, dtype=dtype)


# -- Norms of norms --


def joint_norm(norms: Tensor, norm_type: float) -> Tensor:
    """The p-norm of a vector of p-norms, 0-d, in the widest dtype; 0 for none."""
    norms = norms.to(widest(norms.device))
    if norms.numel() == 0:
        return norms.new_zeros(())
    if norm_type <= 2.0 or math.isinf(norm_type):
        norm = vector_norm(norms, norm_type)
        if norms.device.type != "cpu" or 1e-100 < norm.item() < 1e100:
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


# -- Norms of entries, by rows --


def row_norms(matrix: Tensor, norm_type: float, longest: int = ROW) -> Tensor:
    """The norm of each row, `(k,)`, summed in float32 or wider; of longer rows than `longest` joined in float64.

    Args:
        matrix: Real or complex entries, `(k, n)`.
        norm_type: The p of the norm, in (0, inf].
        longest: How many entries go into one sum at most, where torch has a vectorised kernel for it.
    """
    columns = matrix.shape[1]
    wide = accumulator(matrix.dtype, norm_type)
    if columns == 0:
        return torch.zeros(len(matrix), dtype=wide or matrix.dtype, device=matrix.device)
    if wide is torch.float32 and matrix.is_cpu:
        # Given another dtype to sum in, torch would convert all entries at once.
        blocks = matrix.split(max(1, BLOCK // columns))
        return torch.cat([row_norms(block.float(), norm_type) for block in blocks])
    if norm_type == math.inf and not matrix.is_complex():
        low, high = torch.aminmax(matrix, dim=1)
        return torch.maximum(-low, high)
    # Where torch has no vectorised kernel it sums one entry after the other.
    vectorised = matrix.dtype in (torch.float32, torch.float64) and matrix.stride(1) == 1
    longest = longest if vectorised else ROW
    if columns <= longest:
        return vector_norm(matrix, norm_type, dim=1, dtype=wide)
    whole = columns // ROW * ROW
    pieces = vector_norm(matrix[:, :whole].unflatten(1, (-1, ROW)), norm_type, dim=2, dtype=wide)
    if whole < columns:
        rest = vector_norm(matrix[:, whole:], norm_type, dim=1, dtype=wide)
        pieces = torch.cat((pieces, rest[:, None]), dim=1)
    return vector_norm(pieces, norm_type, dim=1, dtype=widest(matrix.device))


def append_rows(pieces: list[Tensor], values: Tensor, norm_type: float) -> None:
    """Append norms of pieces of the entries of a contiguous real tensor, 1-d, float32 or wider."""
    numel, dtype = values.numel(), values.dtype
    if numel == 0:
        return
    if norm_type == math.inf:
        low, high = torch.aminmax(values)
        pieces.append(torch.maximum(-low, high).double().view(1))
        return
    wide = accumulator(dtype, norm_type)
    rough = dtype is torch.bfloat16 and wide is torch.float32 and numel >= MANY_ROWS
    if wide is not None and wide is not dtype and not rough:
        for block in values.view(-1).split(BLOCK if wide is torch.float32 else BLOCK // 2):
            append_rows(pieces, block.to(wide), norm_type)
        return
    row = row_of(numel)
    if numel % row:
        flat, whole = values.view(-1), numel // row * row
        if whole:
            append_rows(pieces, flat[:whole], norm_type)
        pieces.append(vector_norm(flat[whole:], norm_type, dtype=wide).view(1))
        return
    rows = vector_norm(values.view(-1, row), norm_type, dim=1)
    pieces.append(rows.float() if rough else rows)


@lru_cache(maxsize=4096)
def row_of(numel: int) -> int:
    """How many entries to take as a row, so that none are left over, which would cost a call of their own.

    Where no number of medium size divides `numel`, 512.
    """
    exact = [row for row in range(ROW, ROW // 2 - 1, -1) if numel % row == 0]
    # Rows that begin on a line of the cache are a little faster.
    return next((row for row in exact if row % 16 == 0), exact[0] if exact else ROW)


def joined(pieces: list[Tensor], norm_type: float) -> Tensor:
    """The joint norm of 1-d tensors of norms, 0-d, float64."""
    if not pieces:
        return torch.zeros((), dtype=torch.float64, device="cpu")
    if len(pieces) == 1 and len(pieces[0]) == 1:
        return pieces[0][0].double()
    return joint_norm(pieces[0] if len(pieces) == 1 else torch.cat(pieces), norm_type)


def all_joined(lists: list[list[Tensor]], norm_type: float) -> Tensor:
    """`joined` of each list, `(len(lists),)`, in one call where float64 holds the powers of float32 norms."""
    merged = [pieces[0] if len(pieces) == 1 else torch.cat(pieces) for pieces in lists]
    if norm_type <= 2.0 and all(one.dtype is torch.float32 for one in merged):
        return torch.stack(list(foreach.norms(merged, norm_type, torch.float64)))
    return torch.stack([joined([one], norm_type) for one in merged])


# -- Exact norms, for what a fast sum may have lost --


def exact_norm(value: Tensor, norm_type: float) -> Tensor:
    """The p-norm in float64, scaled by the largest entry, 0-d: slow, and right for any finite entries."""
    if value.numel() == 0:
        return torch.zeros((), device=value.device)
    if value.device.type == "cpu" and value.dtype.is_floating_point:
        return _exact_norm_on_cpu(value, norm_type)
    return exact_row_norms(value.reshape(1, -1), norm_type)[0]


def exact_row_norms(matrix: Tensor, norm_type: float) -> Tensor:
    """The same of each row, `(k,)`."""
    if matrix.numel() == 0:
        return torch.zeros(len(matrix), dtype=torch.float32, device=matrix.device)
    magnitude = matrix.abs()
    scale = _scale(magnitude.amax(dim=1)).to(widest(matrix.device))
    return scale * vector_norm(magnitude.to(scale.dtype) / scale[:, None], norm_type, dim=1)


def _exact_norm_on_cpu(value: Tensor, norm_type: float) -> Tensor:
    """The same a block at a time, since a copy of a large gradient may not fit."""
    low, high = torch.aminmax(value)
    largest = torch.maximum(-low, high).double()
    if norm_type == math.inf or not 0 < largest.item() < math.inf:  # zeros, or not finite
        return largest
    blocks = in_memory_order(value).reshape(-1).split(BLOCK // 2)
    norms = [vector_norm(block.double() / largest, norm_type) for block in blocks]
    return largest * joint_norm(torch.stack(norms), norm_type)


def _scale(largest: Tensor) -> Tensor:
    return torch.where((largest > 0) & torch.isfinite(largest), largest, 1.0)


def is_suspect(norm: float, norm_type: float) -> bool:
    """Whether a fast norm may have overflowed or underflowed."""
    return not smallest(norm_type) <= norm < math.inf


@lru_cache(maxsize=64)
def smallest(norm_type: float) -> float:
    """Norms below this may have lost entries whose p-th power is below float32's normal range, about 1e-38."""
    return 0.0 if math.isinf(norm_type) else 1e-24 ** (1.0 / norm_type)


# -- What tensors are --


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
    devices = (one.device for one in tensors if one is not None)
    return next((device for device in devices if device.type != "cpu"), _CPU)


def by_kind(tensors: Tensors, places: Iterable[int], *, by_shape: bool = False) -> dict[Kind, list[int]]:
    """The places of the tensors that one call can serve together, by device, dtype and, if asked for, shape."""
    kinds: dict[Kind, list[int]] = {}
    for place in places:
        if (tensor := tensors[place]) is not None:
            key = tensor.device, tensor.dtype, tensor.shape if by_shape else None
            kinds.setdefault(key, []).append(place)
    return kinds


def in_blocks(tensors: Tensors, places: Iterable[int]) -> Iterator[tuple[tuple[int, ...], int]]:
    """The places in blocks that are copied at once, and how many entries each block has."""
    block: list[int] = []
    entries = 0
    for place in places:
        tensor = tensors[place]
        numel = 0 if tensor is None else tensor.numel()
        if block and entries + numel > BLOCK:
            yield tuple(block), entries
            block, entries = [], 0
        block.append(place)
        entries += numel
    if block:
        yield tuple(block), entries


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
