"""How to read a list of CPU gradients fast: decided once for the list, then the same few calls at every step.

What costs is, for large tensors, one pass over the memory; for small ones, the calls. So

- large tensors are read where they lie, as rows of up to 512 entries, whose norms torch computes on all threads;
- small ones are copied together, a mebibyte at a time, so that the copy stays in the cache and a call serves many;
- the few that are neither dense nor real are measured one by one.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor

from lightning_gradclip.gradients import foreach
from lightning_gradclip.gradients import norms as pnorm
from lightning_gradclip.gradients.rows import BLOCK, REAL, ROW, all_joined, append_rows, joined, norms_along

# Up to here copying a tensor costs less than a call for it.
SMALL = 2**14
# So many tensors of one shape are worth a batch of their own.
_ALIKE = 4


class OutdatedError(Exception):
    """A gradient is not what it was when the plan was made."""


@dataclass(frozen=True)
class Batch:
    """Small tensors that are copied together.

    Attributes:
        places: Their places in the list.
        dtype: The dtype of each.
        numel: How many entries they have together.
        shape: The shape of each, where all have the same; else None.
        alike: Whether all have the same shape but for dim 0, so that they can be concatenated as they are.
    """

    places: tuple[int, ...]
    dtype: torch.dtype
    numel: int
    shape: torch.Size | None
    alike: bool

    @cached_property
    def _chosen(self) -> Callable[[Sequence[Tensor | None]], Any]:
        return itemgetter(*self.places)

    def gathered(self, gradients: Sequence[Tensor | None]) -> Tensor:
        """A copy of the entries, `(N,)` or, of one shape, `(len(places), n)`; one tensor is viewed where it lies.

        Raises:
            OutdatedError: If some gradient is not as it was.
        """
        chosen = self._chosen(gradients)
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
            or together.device.type != "cpu"
            or together.numel() != self.numel
            or (self.shape is not None and together.shape[together.ndim - len(self.shape) :] != self.shape)
        ):
            raise OutdatedError
        if self.shape is None:
            return together if together.dim() == 1 else together.reshape(-1)
        return together.reshape(len(self.places), -1)


class Plan:
    """The order in which to read one list of gradients.

    Args:
        gradients: Gradients on CPU or None.
        norm_type: The p of the norm.
        apart: Whether the norm of each tensor is wanted, or only that of all together.
    """

    def __init__(self, gradients: Sequence[Tensor | None], norm_type: float, *, apart: bool) -> None:
        self._norm_type = norm_type
        self._length = len(gradients)
        self._absent = [place for place, gradient in enumerate(gradients) if gradient is None]
        self._large: list[tuple[int, torch.dtype, int]] = []
        self._others: list[tuple[int, int]] = []
        small: dict[tuple[torch.dtype, torch.Size | None], list[int]] = {}
        self.count = 0
        for place, gradient in enumerate(gradients):
            if gradient is None:
                continue
            self.count += gradient.numel()
            if gradient.layout is not torch.strided or gradient.dtype not in REAL:
                self._others.append((place, gradient.numel()))
            elif gradient.numel() < SMALL:
                shape = gradient.shape if apart else gradient.shape[1:] if gradient.dim() else None
                small.setdefault((gradient.dtype, shape), []).append(place)
            else:
                self._large.append((place, gradient.dtype, gradient.numel()))
        self._batches = list(_batches(small, gradients, apart=apart))
        self._tiny = len(self._batches) == 1 and 0 < self.count <= ROW and not (self._large or self._others)
        self._tiny &= pnorm.accumulator(self._batches[0].dtype, norm_type) is None if self._batches else False
        self._tensors = [place for batch in self._batches for place in batch.places]
        self._tensors += [place for place, *_ in self._large + self._others]

    def fits(self, gradients: Sequence[Tensor | None]) -> bool:
        """Whether the same gradients are present; what each of them is shows when it is read."""
        if len(gradients) != self._length:
            return False
        if not self._absent:
            return type(None) not in set(map(type, gradients))
        return [place for place, gradient in enumerate(gradients) if gradient is None] == self._absent

    def joint(self, gradients: Sequence[Tensor | None]) -> float:
        """The norm of all entries together.

        Raises:
            OutdatedError: If some gradient is not as it was.
        """
        if self._tiny:
            # One piece: what follows would cost more than measuring.
            return torch.linalg.vector_norm(self._batches[0].gathered(gradients), self._norm_type).item()
        pieces: list[Tensor] = []
        for batch in self._batches:
            append_rows(pieces, batch.gathered(gradients), self._norm_type)
        for place, dtype, numel in self._large:
            append_rows(pieces, _dense(gradients[place], dtype, numel), self._norm_type)
        pieces += [_norm_of(gradients[place], numel, self._norm_type) for place, numel in self._others]
        return joined(pieces, self._norm_type).item()

    def each(self, gradients: Sequence[Tensor | None]) -> Tensor:
        """The norm of each gradient, `(len(gradients),)`, float64, 0 for absent ones.

        Raises:
            OutdatedError: If some gradient is not as it was.
        """
        pieces = [norms_along(batch.gathered(gradients), self._norm_type) for batch in self._batches]
        of_rows: list[list[Tensor]] = []
        for place, dtype, numel in self._large:
            of_rows.append([])
            append_rows(of_rows[-1], _dense(gradients[place], dtype, numel), self._norm_type)
        if of_rows:
            pieces.append(all_joined(of_rows, self._norm_type))
        pieces += [_norm_of(gradients[place], numel, self._norm_type) for place, numel in self._others]
        result = torch.zeros(self._length, dtype=torch.float64, device="cpu")
        if not pieces:
            return result
        found = torch.cat(pieces)
        return result.index_copy_(0, pnorm.integers_on(tuple(self._tensors), result.device), found)


def _batches(
    small: dict[tuple[torch.dtype, torch.Size | None], list[int]], gradients: Sequence[Tensor | None], *, apart: bool
) -> Iterator[Batch]:
    """Batches of no more than `BLOCK` entries; small groups are thrown together where that does no harm."""
    rest: dict[torch.dtype, list[int]] = {}
    for (dtype, shape), places in small.items():
        if apart and shape is not None:
            numel = math.prod(shape)
            size = max(1, BLOCK // max(1, numel))
            for begin in range(0, len(places), size):
                some = tuple(places[begin : begin + size])
                yield Batch(some, dtype, len(some) * numel, shape, alike=True)
        elif shape is None or len(places) < _ALIKE:  # torch does not concatenate 0-d tensors
            rest.setdefault(dtype, []).extend(places)
        else:
            yield from (Batch(some, dtype, numel, None, alike=True) for some, numel in _blocks(places, gradients))
    for dtype, places in rest.items():
        yield from (Batch(some, dtype, numel, None, alike=False) for some, numel in _blocks(places, gradients))


def _blocks(places: Sequence[int], gradients: Sequence[Tensor | None]) -> Iterator[tuple[tuple[int, ...], int]]:
    """The places in blocks, and how many entries each block has."""
    block: list[int] = []
    entries = 0
    for place in places:
        gradient = gradients[place]
        numel = 0 if gradient is None else gradient.numel()
        if block and entries + numel > BLOCK:
            yield tuple(block), entries
            block, entries = [], 0
        block.append(place)
        entries += numel
    yield tuple(block), entries


def _dense(gradient: Tensor | None, dtype: torch.dtype, numel: int) -> Tensor:
    """The entries of a large gradient in the order of the memory, contiguous."""
    if gradient is None or gradient.dtype is not dtype or gradient.numel() != numel or not gradient.is_cpu:
        raise OutdatedError
    if gradient.is_contiguous():
        return gradient
    if gradient.layout is not torch.strided:
        raise OutdatedError
    # Strided or expanded, which autograd does not produce: a copy.
    return pnorm.in_memory_order(gradient).contiguous()


def _norm_of(gradient: Tensor | None, numel: int, norm_type: float) -> Tensor:
    """The norm of a gradient that is sparse, complex or of an unusual dtype, `(1,)`, float64."""
    if gradient is None or gradient.numel() != numel or gradient.device.type != "cpu":
        raise OutdatedError
    value = pnorm.dense_values(gradient)
    if value.dtype in REAL:
        rows: list[Tensor] = []
        append_rows(rows, value.reshape(-1), norm_type)
        return joined(rows, norm_type).view(1)
    magnitudes = value.abs() if value.numel() else torch.zeros(1, device="cpu")
    return pnorm.vector_norm(magnitudes, norm_type, dtype=torch.float64).view(1)
