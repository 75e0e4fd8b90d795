"""The p-norm of one piece of memory on CPU, by rows.

Rows keep the result exact, and torch computes them on all threads: one float32 sum over 1e8 entries reads 1 % low,
while sums of 512, even of equal entries, whose rounding errors all agree, stay within 1e-6. The norms of rows are
joined in float64.

torch has vectorised kernels for norms of float32, float64 and bfloat16 in their own dtype only. A bfloat16 result has
three digits, so that smaller half tensors are converted first, which costs two to three times the reading. From 2**20
entries on bfloat16 rows are taken as they are: where many rows count, their errors average out. That leaves 5e-5 of
normally distributed entries at 2**20, 1e-5 at 2**22, and 5e-4 where a few large entries make up the norm; where all
entries are equal nothing averages out, and up to 4e-3 remains, as of the bfloat16 norm that torch gives.
"""

import math
from functools import lru_cache

import torch
from torch import Tensor

from lightning_gradclip.gradients import foreach
from lightning_gradclip.gradients import norms as pnorm

# Entries of a row at most; longer ones are no faster.
ROW = 512
# Entries copied or converted at once: a mebibyte of float32 stays in the cache.
BLOCK = 2**18
# From here on rows of a bfloat16 tensor are many enough.
_MANY_ROWS = 2**20

# Dtypes that are read by rows.
REAL = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def joined(pieces: list[Tensor], norm_type: float) -> Tensor:
    """The joint norm of 1-d tensors of norms, 0-d, float64."""
    if not pieces:
        return torch.zeros((), dtype=torch.float64, device="cpu")
    if len(pieces) == 1 and len(pieces[0]) == 1:
        return pieces[0][0].double()
    return pnorm.joint_norm(pieces[0] if len(pieces) == 1 else torch.cat(pieces), norm_type)


def all_joined(lists: list[list[Tensor]], norm_type: float) -> Tensor:
    """`joined` of each list, `(len(lists),)`, in one call where float64 holds the powers of float32 norms."""
    merged = [pieces[0] if len(pieces) == 1 else torch.cat(pieces) for pieces in lists]
    if norm_type <= 2.0 and all(one.dtype is torch.float32 for one in merged):
        return torch.stack(list(foreach.norms(merged, norm_type, torch.float64)))
    return torch.stack([joined([one], norm_type) for one in merged])


@lru_cache(maxsize=4096)
def row_of(numel: int) -> int:
    """How many entries to take as a row, so that none are left over, which would cost a call of their own.

    Where no number of medium size divides `numel`, 512.
    """
    exact = [row for row in range(ROW, ROW // 2 - 1, -1) if numel % row == 0]
    # Rows that begin on a line of the cache are a little faster.
    return next((row for row in exact if row % 16 == 0), exact[0] if exact else ROW)


def append_rows(pieces: list[Tensor], values: Tensor, norm_type: float) -> None:
    """Append norms of pieces of the entries of a contiguous tensor, 1-d, float32 or wider."""
    numel, dtype = values.numel(), values.dtype
    if numel == 0:
        return
    if norm_type == math.inf:
        low, high = torch.aminmax(values)
        pieces.append(torch.maximum(-low, high).double().view(1))
        return
    wide = pnorm.accumulator(dtype, norm_type)
    if wide is not None and wide is not dtype and not (wide is torch.float32 and _averages(dtype, numel)):
        # Given another dtype to sum in, torch would convert all entries at once.
        for block in values.view(-1).split(BLOCK if wide is torch.float32 else BLOCK // 2):
            append_rows(pieces, block.to(wide), norm_type)
        return
    row = row_of(numel)
    if numel % row == 0:
        rows = pnorm.vector_norm(values.view(-1, row), norm_type, dim=1)
        pieces.append(rows.float() if dtype is torch.bfloat16 else rows)
        return
    flat, whole = values.view(-1), numel // row * row
    if whole:
        append_rows(pieces, flat[:whole], norm_type)
    rest = pnorm.vector_norm(flat[whole:], norm_type)
    pieces.append(rest.double().view(1) if dtype is torch.bfloat16 else rest.view(1))


def _averages(dtype: torch.dtype, numel: int) -> bool:
    return dtype is torch.bfloat16 and numel >= _MANY_ROWS


def norms_along(matrix: Tensor, norm_type: float) -> Tensor:
    """The norm of each row of a batch, `(k,)`, float64."""
    columns = matrix.shape[1]
    if columns == 0:
        return torch.zeros(len(matrix), dtype=torch.float64, device="cpu")
    if norm_type == math.inf:
        low, high = torch.aminmax(matrix, dim=1)
        return torch.maximum(-low, high).double()
    wide = pnorm.accumulator(matrix.dtype, norm_type)
    if wide is torch.float32:
        matrix, wide = matrix.float(), None
    if columns <= ROW:
        return pnorm.vector_norm(matrix, norm_type, dim=1, dtype=wide).double()
    whole = columns // ROW * ROW
    pieces = pnorm.vector_norm(matrix[:, :whole].unflatten(1, (-1, ROW)), norm_type, dim=2, dtype=wide)
    if whole < columns:
        rest = pnorm.vector_norm(matrix[:, whole:], norm_type, dim=1, dtype=wide)
        pieces = torch.cat((pieces, rest[:, None]), dim=1)
    return pnorm.vector_norm(pieces.double(), norm_type, dim=1)
