"""Gradients to norms: in float32 or wider, reading each gradient once, in an order that is planned once.

What costs is, for large tensors, one pass over the memory; for small ones, the calls. So on CPU

- large tensors are read where they lie, as rows of up to 512 entries, whose norms torch computes on all threads;
- small ones are copied together, a mebibyte at a time, so that the copy stays in the cache and a call serves many;
- the few that are neither dense nor real are measured one by one.

Two float32 entries of 1e20 overflow when squared and entries of 1e-25 vanish. A norm outside the range in which the
fast sum is exact is therefore measured again in float64, scaled by the largest entry: on CPU each norm that needs it
(NaN does not, since finite entries never add up to it); on other devices, where looking at each would make the host
wait, all of them when the host reads a joint norm that is out of range.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from operator import itemgetter
from typing import Any, TypeVar

import torch
from torch import Tensor

from lightning_gradclip.gradients import foreach, norms
from lightning_gradclip.gradients.norms import REAL, Tensors
from lightning_gradclip.gradients.tuning import ALIKE, ROW, SMALL

_Result = TypeVar("_Result")
_CPU = torch.device("cpu")


class Meter:
    """Measures the same list of tensors at every step.

    Args:
        norm_type: The p of the norm, in (0, inf].
    """

    def __init__(self, norm_type: float) -> None:
        self._norm_type = norm_type
        self._smallest = norms.smallest(norm_type)
        self._plans: dict[bool, Plan] = {}

    def each(self, tensors: Tensors) -> Tensor:
        """The p-norm of each tensor.

        Args:
            tensors: Gradients or weights of any dtype, shape, layout and device; None counts as 0.

        Returns:
            Norms, `(len(tensors),)`, local, float64 (float32 on devices without it), on the first device of a tensor
            that is not the CPU, if there is one.
        """
        found = self.each_on_host(tensors)
        return _norms_on_devices(tensors, self._norm_type) if found is None else found

    def each_on_host(self, tensors: Tensors) -> Tensor | None:
        """`each`, or None unless all tensors are on CPU, where looking at a number makes nobody wait."""
        found = self._read(tensors, True, Plan.each)
        if found is None:
            return None
        low, high = torch.aminmax(found) if len(found) else (found.new_ones(()),) * 2
        # Where one is NaN both are.
        if self._smallest <= low.item() and high.item() < math.inf:
            return found
        for place, norm in enumerate(found.tolist()):
            tensor = tensors[place]
            if tensor is not None and self._is_suspect(norm):
                found[place] = norms.exact_norm(norms.dense_values(tensor), self._norm_type)
        return found

    def joint(self, tensors: Tensors) -> float | None:
        """The p-norm of all entries together, in float64, or None unless all tensors are on CPU."""
        norm = self._read(tensors, False, Plan.joint)
        if norm is None or not self._is_suspect(norm):
            return norm
        found = self.each_on_host(tensors)
        return None if found is None else norms.joint_norm(found, self._norm_type).item()

    def count(self, tensors: Tensors) -> int:
        """The number of entries of tensors on CPU."""
        for plan in self._plans.values():
            if plan.fits(tensors):
                return plan.count
        return sum(tensor.numel() for tensor in tensors if tensor is not None)

    def _read(self, tensors: Tensors, apart: bool, reading: "Callable[[Plan, Tensors], _Result]") -> _Result | None:
        plan = self._plans.get(apart)
        if plan is not None and plan.fits(tensors):
            try:
                return reading(plan, tensors)
            except OutdatedError:
                del self._plans[apart]
        if norms.home(tensors) != _CPU:
            return None
        plan = self._plans[apart] = Plan(tensors, self._norm_type, apart=apart)
        return reading(plan, tensors)

    def _is_suspect(self, norm: float) -> bool:
        return not self._smallest <= norm < math.inf and not math.isnan(norm)


def exact_norms(tensors: Tensors, norm_type: float) -> Tensor:
    """`Meter.each` in float64, scaled by the largest entry: slow, and right for any finite entries."""
    found = [norms.exact_norm(norms.dense_values(tensor), norm_type) for tensor in tensors if tensor is not None]
    return _spread(found, tensors)


def _norms_on_devices(tensors: Tensors, norm_type: float) -> Tensor:
    """Norms where some tensor is on an accelerator: one call for all tensors of a kind."""
    present = [norms.dense_values(tensor) for tensor in tensors if tensor is not None]
    found = [torch.zeros((), device=value.device) for value in present]
    filled = (place for place, value in enumerate(present) if value.numel())
    for (_, dtype, _), places in norms.by_kind(present, filled).items():
        values = [present[place] for place in places]
        together = foreach.norms(values, norm_type, norms.accumulator(dtype, norm_type))
        for place, norm in zip(places, together, strict=True):
            found[place] = norm
    return _spread(found, tensors)


def _spread(found: Sequence[Tensor], tensors: Tensors) -> Tensor:
    """Norms of the tensors that are there, together, among zeros for those that are not."""
    device = norms.home(tensors)
    wide = norms.widest(device)
    if not found:
        return torch.zeros(len(tensors), dtype=wide, device=device)
    if len({(norm.device, norm.dtype) for norm in found}) == 1:
        together = torch.stack(list(found)).to(device, wide)
    else:
        together = torch.stack([norm.to(device, wide) for norm in found])
    if len(found) == len(tensors):
        return together
    places = tuple(place for place, tensor in enumerate(tensors) if tensor is not None)
    return together.new_zeros(len(tensors)).index_copy(0, norms.integers_on(places, device), together)


class OutdatedError(Exception):
    """A gradient is not what it was when the plan was made."""


@dataclass(frozen=True)
class Batch:
    """Small tensors on CPU that are copied together.

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


def batches_of_one_shape(tensors: Tensors, places: Sequence[int]) -> Iterator[Batch]:
    """Small tensors of any shapes, in batches of no more than a block of tensors of one shape."""
    for (_, dtype, shape), alike in norms.by_kind(tensors, places, by_shape=True).items():
        yield from (Batch(some, dtype, entries, shape, alike=True) for some, entries in norms.in_blocks(tensors, alike))


def _batches_thrown_together(tensors: Tensors, places: Sequence[int]) -> Iterator[Batch]:
    """Small tensors in as few batches as do no harm: those that differ in dim 0 only concatenate as they are."""
    alike: dict[tuple[torch.dtype, torch.Size | None], list[int]] = {}
    for place in places:
        if (tensor := tensors[place]) is not None:
            alike.setdefault((tensor.dtype, tensor.shape[1:] if tensor.dim() else None), []).append(place)
    rest: dict[torch.dtype, list[int]] = {}
    for (dtype, shape), some in alike.items():
        if shape is None or len(some) < ALIKE:  # torch does not concatenate 0-d tensors
            rest.setdefault(dtype, []).extend(some)
        else:
            yield from (Batch(block, dtype, n, None, alike=True) for block, n in norms.in_blocks(tensors, some))
    for dtype, some in rest.items():
        yield from (Batch(block, dtype, n, None, alike=False) for block, n in norms.in_blocks(tensors, some))


class Plan:
    """The order in which to read one list of gradients on CPU.

    Args:
        tensors: Gradients on CPU or None.
        norm_type: The p of the norm.
        apart: Whether the norm of each tensor is wanted, or only that of all together.
    """

    def __init__(self, tensors: Tensors, norm_type: float, *, apart: bool) -> None:
        self._norm_type = norm_type
        self._length = len(tensors)
        self._absent = [place for place, tensor in enumerate(tensors) if tensor is None]
        self._large: list[tuple[int, torch.dtype, int]] = []
        self._others: list[tuple[int, int]] = []
        small: list[int] = []
        self.count = 0
        for place, tensor in enumerate(tensors):
            if tensor is None:
                continue
            self.count += tensor.numel()
            if tensor.layout is not torch.strided or tensor.dtype not in REAL:
                self._others.append((place, tensor.numel()))
            elif tensor.numel() < SMALL:
                small.append(place)
            else:
                self._large.append((place, tensor.dtype, tensor.numel()))
        self._batches = list((batches_of_one_shape if apart else _batches_thrown_together)(tensors, small))
        one_piece = len(self._batches) == 1 and 0 < self.count <= ROW and not (self._large or self._others)
        self._tiny = one_piece and norms.accumulator(self._batches[0].dtype, norm_type) is None
        self._measured = (*(place for batch in self._batches for place in batch.places),)
        self._measured += (*(place for place, *_ in self._large + self._others),)

    def fits(self, tensors: Tensors) -> bool:
        """Whether the same gradients are present; what each of them is shows when it is read."""
        if len(tensors) != self._length:
            return False
        if not self._absent:
            return type(None) not in set(map(type, tensors))
        return [place for place, tensor in enumerate(tensors) if tensor is None] == self._absent

    def joint(self, tensors: Tensors) -> float:
        """The norm of all entries together.

        Raises:
            OutdatedError: If some gradient is not as it was.
        """
        if self._tiny:
            # One piece: what follows would cost more than measuring.
            return torch.linalg.vector_norm(self._batches[0].gathered(tensors), self._norm_type).item()
        pieces: list[Tensor] = []
        for batch in self._batches:
            norms.append_rows(pieces, batch.gathered(tensors), self._norm_type)
        for place, dtype, numel in self._large:
            norms.append_rows(pieces, _dense(tensors[place], dtype, numel), self._norm_type)
        pieces += [_norm_of(tensors[place], numel, self._norm_type) for place, numel in self._others]
        return norms.joined(pieces, self._norm_type).item()

    def each(self, tensors: Tensors) -> Tensor:
        """The norm of each gradient, `(len(tensors),)`, float64, 0 for absent ones.

        Raises:
            OutdatedError: If some gradient is not as it was.
        """
        pieces = [norms.row_norms(batch.gathered(tensors), self._norm_type).double() for batch in self._batches]
        of_rows: list[list[Tensor]] = []
        for place, dtype, numel in self._large:
            of_rows.append([])
            norms.append_rows(of_rows[-1], _dense(tensors[place], dtype, numel), self._norm_type)
        if of_rows:
            pieces.append(norms.all_joined(of_rows, self._norm_type))
        pieces += [_norm_of(tensors[place], numel, self._norm_type) for place, numel in self._others]
        result = torch.zeros(self._length, dtype=torch.float64, device="cpu")
        if not pieces:
            return result
        return result.index_copy_(0, norms.integers_on(self._measured, result.device), torch.cat(pieces))


def _dense(tensor: Tensor | None, dtype: torch.dtype, numel: int) -> Tensor:
    """The entries of a large gradient in the order of the memory, contiguous."""
    if tensor is None or tensor.dtype is not dtype or tensor.numel() != numel or not tensor.is_cpu:
        raise OutdatedError
    if tensor.is_contiguous():
        return tensor
    if tensor.layout is not torch.strided:
        raise OutdatedError
    # Strided or expanded, which autograd does not produce: a copy.
    return norms.in_memory_order(tensor).contiguous()


def _norm_of(tensor: Tensor | None, numel: int, norm_type: float) -> Tensor:
    """The norm of a gradient that is sparse, complex or of an unusual dtype, `(1,)`, float64."""
    if tensor is None or tensor.numel() != numel or not tensor.is_cpu:
        raise OutdatedError
    value = norms.dense_values(tensor)
    if value.dtype in REAL:
        rows: list[Tensor] = []
        norms.append_rows(rows, value.reshape(-1), norm_type)
        return norms.joined(rows, norm_type).view(1)
    magnitudes = value.abs() if value.numel() else torch.zeros(1, device="cpu")
    return norms.vector_norm(magnitudes, norm_type, dtype=torch.float64).view(1)
