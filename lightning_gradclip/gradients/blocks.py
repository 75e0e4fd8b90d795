"""What one call reads: small tensors copied together, and the entries of large ones in blocks.

A float32 sum over 1e8 entries reads 1 % low, while sums of 512, even of equal entries, whose rounding errors all agree,
stay within 1e-6. So memory is read as rows of a matrix, one a block, which torch computes on all threads, and
their norms are joined in float64.

torch has vectorised kernels for norms of float32, float64 and bfloat16 in their own dtype only. A bfloat16 result has
three digits, so that smaller half tensors are converted first, which costs two to three times the reading. From 2**20
entries on bfloat16 blocks are taken as they are: where many count, their errors average out. That leaves 5e-5 of
normally distributed entries at 2**20, 1e-5 at 2**22, and 5e-4 where a few large entries make up the norm; where all
entries are equal nothing averages out, and up to 4e-3 remains, as of the bfloat16 norm that torch gives.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor

from lightning_gradclip.gradients import foreach, norms
from lightning_gradclip.gradients.norms import ALIKE, BLOCK, CHUNK, MANY_BLOCKS, Tensors, vector_norm

# Dtypes that are read in blocks.
REAL = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


class OutdatedError(Exception):
    """A gradient is not what it was when the order of reading was planned."""


@dataclass(frozen=True)
class Batch:
    """Small tensors on CPU that are copied together: `numel` entries in all.

    Of one `shape`; or, where that is None, `alike` but for dim 0, so that they can be concatenated as they are, or not.
    """

    places: tuple[int, ...]
    dtype: torch.dtype
    numel: int
    shape: torch.Size | None
    alike: bool = True

    @cached_property
    def _chosen(self) -> Callable[[Tensors], Any]:
        return itemgetter(*self.places)

    def gathered(self, tensors: Tensors) -> Tensor:
        """The entries, `(N,)` or, of one shape, `(len(places), n)`, contiguous: a copy, or one tensor where it lies.

        Raises:
            OutdatedError: If some tensor is not as it was.
        """
        chosen = self._chosen(tensors)
        try:
            if len(self.places) == 1:
                together = chosen
            elif self.shape is not None:
                together = torch.stack(chosen)
            else:
                together = torch.cat(chosen) if self.alike else foreach.flatten(chosen)
        except (RuntimeError, TypeError) as error:  # one is sparse, on another device, of another shape, or absent
            raise OutdatedError from error
        # A single odd one among them shows in what they make together.
        if (
            together is None
            or together.dtype is not self.dtype
            or together.layout is not torch.strided
            or not together.is_cpu
            or together.numel() != self.numel
            or (self.shape is not None and together.shape[together.ndim - len(self.shape) :] != self.shape)
        ):
            raise OutdatedError
        flat = together if together.dim() == 1 else together.reshape(-1)
        # Strides other than 1 would be summed one entry after the other.
        return flat.contiguous() if self.shape is None else flat.contiguous().view(len(self.places), -1)


def batches_of_one_shape(tensors: Tensors, places: Iterable[int]) -> list[Batch]:
    """Small tensors on CPU of any shapes, in batches of no more than a chunk of tensors of one shape."""
    kinds = norms.by_kind(tensors, places, by_shape=True)
    return [
        Batch(some, dtype, count, shape)
        for (_, dtype, shape), alike in kinds.items()
        for some, count in _in_chunks(tensors, alike)
    ]


def batches_thrown_together(tensors: Tensors, places: Iterable[int]) -> list[Batch]:
    """Small tensors in as few batches as do no harm: those that differ in dim 0 only concatenate as they are."""
    kinds: dict[tuple[torch.dtype, torch.Size | None], list[int]] = {}
    for place in places:
        if (tensor := tensors[place]) is not None:
            kinds.setdefault((tensor.dtype, tensor.shape[1:] if tensor.dim() else None), []).append(place)
    batches: list[Batch] = []
    rest: list[int] = []
    for (dtype, shape), some in kinds.items():
        if shape is None or len(some) < ALIKE:  # torch does not concatenate 0-d tensors
            rest += some
        else:
            batches += (Batch(chunk, dtype, count, None) for chunk, count in _in_chunks(tensors, some))
    for (_, dtype, _), some in norms.by_kind(tensors, rest).items():
        batches += (Batch(chunk, dtype, count, None, alike=False) for chunk, count in _in_chunks(tensors, some))
    return batches


def _in_chunks(tensors: Tensors, places: Iterable[int]) -> Iterator[tuple[tuple[int, ...], int]]:
    """The places in chunks that are copied at once, and how many entries each chunk has."""
    chunk: list[int] = []
    entries = 0
    for place in places:
        numel = 0 if (tensor := tensors[place]) is None else tensor.numel()
        if chunk and entries + numel > CHUNK:
            yield tuple(chunk), entries
            chunk, entries = [], 0
        chunk.append(place)
        entries += numel
    if chunk:
        yield tuple(chunk), entries


def row_norms(matrix: Tensor, norm_type: float, longest: int = BLOCK, *, widen: bool = True) -> Tensor:
    """The norm of each row of a matrix `(k, n)`, `(k,)`, summed in float32 or wider.

    Up to `longest` entries go into one sum where torch has a vectorised kernel for it. The norms of longer rows are
    joined in float64, and stay so with `widen`.
    """
    columns = matrix.shape[1]
    wide = norms.accumulator(matrix.dtype, norm_type)
    if columns == 0:
        return torch.zeros(len(matrix), dtype=wide or matrix.dtype, device=matrix.device)
    if matrix.is_cpu and matrix.is_complex() and norm_type == 2.0:
        # That of as many real numbers, for which torch has a vectorised kernel.
        real = torch.view_as_real(matrix.resolve_conj().resolve_neg()).flatten(1)
        return row_norms(real, norm_type, longest, widen=widen)
    if wide is torch.float32 and matrix.is_cpu:
        # Given another dtype to sum in, torch would convert all entries at once.
        chunks = matrix.split(max(1, CHUNK // columns))
        return torch.cat([row_norms(chunk.float(), norm_type, widen=widen) for chunk in chunks])
    if norm_type == math.inf and not matrix.is_complex():
        # `aminmax` along a dim is twenty times slower.
        return torch.maximum(-matrix.amin(dim=1), matrix.amax(dim=1)).abs().to(wide or matrix.dtype)
    if matrix.is_cpu and wide is None and columns > BLOCK and matrix.stride(1) != 1:
        # Where entries do not lie beside each other a norm adds one after the other, a sum many at once.
        sums = [some.square().sum(dim=1) for some in matrix.split(max(1, CHUNK // len(matrix)), dim=1)]
        found = torch.stack(sums).sum(dim=0, dtype=torch.float64).sqrt()
        return found if widen else found.to(matrix.dtype)
    if matrix.is_cpu and matrix.stride(1) != 1 and matrix.dtype is torch.float32:
        # The same holds for short rows, which a copy puts in order.
        matrix = matrix.contiguous()
    # Where torch has no vectorised kernel it sums one entry after the other.
    vectorised = matrix.dtype in (torch.float32, torch.float64) and matrix.stride(1) == 1
    if columns <= (longest if vectorised else BLOCK):
        return torch.linalg.vector_norm(matrix, norm_type, dim=1, dtype=wide)
    whole = columns // BLOCK * BLOCK
    pieces = vector_norm(matrix[:, :whole].unflatten(1, (-1, BLOCK)), norm_type, dim=2, dtype=wide)
    if whole < columns:
        rest = vector_norm(matrix[:, whole:], norm_type, dim=1, dtype=wide)
        pieces = torch.cat((pieces, rest[:, None]), dim=1)
    found = vector_norm(pieces, norm_type, dim=1, dtype=norms.widest(matrix.device))
    return found if widen else found.to(pieces.dtype)


def append_blocks(pieces: list[Tensor], values: Tensor, norm_type: float) -> None:
    """Append norms of pieces of the entries of a contiguous real tensor, 1-d, float32 or wider."""
    numel, dtype = values.numel(), values.dtype
    if numel == 0:
        return
    if norm_type == math.inf:
        low, high = torch.aminmax(values)
        pieces.append(torch.maximum(-low, high).double().view(1))
        return
    wide = norms.accumulator(dtype, norm_type)
    rough = dtype is torch.bfloat16 and wide is torch.float32 and numel >= MANY_BLOCKS
    if wide is not None and wide is not dtype and not rough:
        for chunk in values.view(-1).split(CHUNK if wide is torch.float32 else CHUNK // 2):
            append_blocks(pieces, chunk.to(wide), norm_type)
        return
    block = block_of(numel)
    if numel % block:
        flat, whole = values.view(-1), numel // block * block
        if whole:
            append_blocks(pieces, flat[:whole], norm_type)
        pieces.append(vector_norm(flat[whole:], norm_type, dtype=wide).view(1))
        return
    found = torch.linalg.vector_norm(values.view(-1, block), norm_type, dim=1)
    pieces.append(found.float() if rough else found)


@lru_cache(maxsize=4096)
def block_of(numel: int) -> int:
    """How many entries to take as a block, so that none are left over, which would cost a call of their own.

    Where no number of medium size divides `numel`, 512.
    """
    exact = [block for block in range(BLOCK, BLOCK // 2 - 1, -1) if numel % block == 0]
    # Blocks that begin on a line of the cache are a little faster.
    return next((block for block in exact if block % 16 == 0), exact[0] if exact else BLOCK)


def joined(pieces: list[Tensor], norm_type: float) -> Tensor:
    """The joint norm of 1-d tensors of norms, 0-d, float64."""
    if len(pieces) == 1:
        return pieces[0][0].double() if len(pieces[0]) == 1 else norms.joint_norm(pieces[0], norm_type)
    return norms.joint_norm(torch.cat(pieces) if pieces else torch.zeros(0, device="cpu"), norm_type)


def hypotenuse(pieces: list[Tensor]) -> float:
    """The joint 2-norm of 1-d tensors of a few norms: on floats it takes a tenth of what it does on tensors."""
    values = [norm for piece in pieces for norm in piece.tolist()]
    norm = math.hypot(*values)
    # To which infinity counts for more than NaN.
    return math.nan if norm == math.inf and any(map(math.isnan, values)) else norm


def all_joined(lists: list[list[Tensor]], norm_type: float) -> Tensor:
    """`joined` of each list, `(len(lists),)`, in one call where float64 holds the powers of float32 norms."""
    merged = [pieces[0] if len(pieces) == 1 else torch.cat(pieces) for pieces in lists]
    if norm_type <= 2.0 and all(one.dtype is torch.float32 for one in merged):
        return torch.stack(list(foreach.norms(merged, norm_type, torch.float64)))
    return torch.stack([joined([one], norm_type) for one in merged])
