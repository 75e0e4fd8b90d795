"""The memory of gradients to norms: in float32 or wider, reading each once, in an order that is planned once.

What costs is, for large tensors, one pass over the memory; for small ones, the calls. So on CPU large tensors are read
where they lie; small ones are copied together, a mebibyte at a time, so that the copy stays in the cache and a call
serves many; and the few that are neither dense nor real are measured one by one.

Two float32 entries of 1e20 overflow when squared and entries of 1e-25 vanish. A norm outside the range in which the
fast sum is exact is therefore measured again in float64, scaled by the largest entry: on CPU each norm that needs it
(NaN does not, since finite entries never add up to it); on other devices, where looking at each would make the host
wait, all of them when the host reads a joint norm that is out of range.
"""

import math
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from lightning_gradclip.gradients import blocks, foreach, norms, ranks
from lightning_gradclip.gradients.blocks import REAL, OutdatedError
from lightning_gradclip.gradients.norms import BLOCK, CPU, SMALL, Tensors
from lightning_gradclip.select import layout
from lightning_gradclip.select.parameters import Selection

_Result = TypeVar("_Result")


def gradients_of(selection: Selection, *, settled: bool) -> list[Tensor | None]:
    """What this rank holds of each gradient, None where absent; sums over ranks are made unless they are `settled`."""
    if not selection.is_distributed:
        return [parameter.grad for parameter in selection.params]
    found = [(parameter.grad, parameter) for parameter in selection.params]
    whole = [one if one is None or settled else ranks.settled(one, parameter) for one, parameter in found]
    return [None if one is None else layout.local(one) for one in whole]


def is_none(gradients: Tensors) -> bool:
    """Whether there is no gradient at all."""
    # Nearly always the first tells.
    return not gradients or (gradients[0] is None and all(gradient is None for gradient in gradients))


def is_finite(gradient: Tensor) -> bool:
    """Whether all entries are."""
    return bool(torch.isfinite(norms.dense_values(gradient)).all())


def fingerprints(tensors: Tensors) -> Tensor:
    """Norm and sum of each tensor, zeros for None, by which copies are known, `(len(tensors), 2)`, float64 or as wide.

    Each is read twice, which is for what is done once.
    """
    device = norms.home(tensors)
    wide = norms.widest(device)
    found = torch.zeros(len(tensors), 2, dtype=wide, device=device)
    for place, tensor in enumerate(tensors):
        if tensor is not None and tensor.numel() and not tensor.is_meta:
            values = norms.dense_values(tensor.detach())
            values = torch.view_as_real(values.resolve_conj()) if values.is_complex() else values
            here = norms.widest(values.device)
            found[place, 0] = torch.linalg.vector_norm(values, dtype=here)
            found[place, 1] = values.sum(dtype=here)
    return found


class Meter:
    """Measures the same list of tensors, of any dtype, shape, layout and device, at every step.

    Args:
        norm_type: The p of the norm, in (0, inf].
    """

    def __init__(self, norm_type: float) -> None:
        self._norm_type = norm_type
        self._smallest = norms.smallest(norm_type)
        self._plans: dict[bool, _Plan] = {}

    def each(self, tensors: Tensors) -> Tensor:
        """The p-norm of each tensor, 0 for None, `(len(tensors),)`, local, float64 (float32 on devices without it).

        On the first device of a tensor that is not the CPU, if there is one.
        """
        found = self.each_on_host(tensors)
        return _norms_on_devices(tensors, self._norm_type) if found is None else found

    def each_on_host(self, tensors: Tensors) -> Tensor | None:
        """`each`, or None unless all tensors are on CPU, where looking at a number makes nobody wait."""
        found = self._read(tensors, True, _Plan.each)
        return None if found is None else measured_again(found, tensors, self._norm_type)

    def joint(self, tensors: Tensors) -> float | None:
        """The p-norm of all entries together, in float64, or None unless all tensors are on CPU."""
        norm = self._read(tensors, False, _Plan.joint)
        # NaN is what it is.
        if norm is None or self._smallest <= norm < math.inf or norm != norm:
            return norm
        found = self.each_on_host(tensors)
        return None if found is None else norms.joint_norm(found, self._norm_type).item()

    def count(self, tensors: Tensors) -> int:
        """The number of entries of tensors on CPU."""
        for plan in self._plans.values():
            if plan.fits(tensors):
                return plan.count
        return sum(tensor.numel() for tensor in tensors if tensor is not None)

    def _read(self, tensors: Tensors, apart: bool, reading: "Callable[[_Plan, Tensors], _Result]") -> _Result | None:
        plan = self._plans.get(apart)
        if plan is not None and plan.fits(tensors):
            try:
                return reading(plan, tensors)
            except OutdatedError:
                del self._plans[apart]
        if norms.home(tensors) != CPU:
            return None
        plan = self._plans[apart] = _Plan(tensors, self._norm_type, apart=apart)
        return reading(plan, tensors)


def measured_again(found: Tensor, tensors: Tensors, norm_type: float) -> Tensor:
    """Norms of tensors on CPU, `(len(tensors),)`, float64, of which those that a fast sum may have lost are exact."""
    low, high = torch.aminmax(found) if len(found) else (found.new_ones(()),) * 2
    # Where one is NaN both are.
    if norms.smallest(norm_type) <= low.item() and high.item() < math.inf:
        return found
    for place, norm in enumerate(found.tolist()):
        tensor = tensors[place]
        if tensor is not None and norm == norm and norms.is_suspect(norm, norm_type):
            found[place] = norms.exact_norm(norms.dense_values(tensor), norm_type)
    return found


def exact_norms(tensors: Tensors, norm_type: float) -> Tensor:
    """`Meter.each` in float64, scaled by the largest entry: slow, and right for any finite entries."""
    found = [norms.exact_norm(norms.dense_values(tensor), norm_type) for tensor in tensors if tensor is not None]
    return _spread(found, tensors)


def _norms_on_devices(tensors: Tensors, norm_type: float) -> Tensor:
    """Norms where some tensor is on an accelerator: one call for all tensors of a kind."""
    present = [norms.dense_values(tensor) for tensor in tensors if tensor is not None]
    found = [torch.zeros((), device=value.device) for value in present]
    filled = [place for place, value in enumerate(present) if value.numel()]
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
    alike = len({(norm.device, norm.dtype) for norm in found}) == 1
    together = torch.stack(list(found) if alike else [norm.to(device, wide) for norm in found]).to(device, wide)
    if len(found) == len(tensors):
        return together
    places = tuple(place for place, tensor in enumerate(tensors) if tensor is not None)
    return together.new_zeros(len(tensors)).index_copy(0, norms.integers_on(places, device), together)


class _Plan:
    """The order in which to read one list of tensors on CPU; `apart` where the norm of each is wanted."""

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
        self._batches = (blocks.batches_of_one_shape if apart else blocks.batches_thrown_together)(tensors, small)
        one_piece = len(self._batches) == 1 and 0 < self.count <= BLOCK and not (self._large or self._others)
        self._tiny = one_piece and norms.accumulator(self._batches[0].dtype, norm_type) is None
        self._few = norm_type == 2.0 and self.count <= SMALL
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
        """The norm of all entries together; an `OutdatedError` if some gradient is not as it was."""
        if self._tiny:
            # One piece: what follows would cost more than measuring.
            return torch.linalg.vector_norm(self._batches[0].gathered(tensors), self._norm_type).item()
        pieces: list[Tensor] = []
        for batch in self._batches:
            blocks.append_blocks(pieces, batch.gathered(tensors), self._norm_type)
        for place, dtype, numel in self._large:
            blocks.append_blocks(pieces, _dense(tensors[place], dtype, numel), self._norm_type)
        pieces += [_norm_of(tensors[place], numel, self._norm_type) for place, numel in self._others]
        return blocks.hypotenuse(pieces) if self._few else blocks.joined(pieces, self._norm_type).item()

    def each(self, tensors: Tensors) -> Tensor:
        """The norm of each gradient, `(len(tensors),)`, float64, 0 for absent ones; errors as of `joint`."""
        pieces: list[Tensor] = []
        for batch in self._batches:
            pieces.append(blocks.row_norms(batch.gathered(tensors), self._norm_type).double())
        of_large: list[list[Tensor]] = []
        for place, dtype, numel in self._large:
            of_large.append([])
            blocks.append_blocks(of_large[-1], _dense(tensors[place], dtype, numel), self._norm_type)
        if of_large:
            pieces.append(blocks.all_joined(of_large, self._norm_type))
        pieces += [_norm_of(tensors[place], numel, self._norm_type) for place, numel in self._others]
        result = torch.zeros(self._length, dtype=torch.float64, device="cpu")
        if not pieces:
            return result
        return result.index_copy_(0, norms.integers_on(self._measured, CPU), torch.cat(pieces))


def _dense(tensor: Tensor | None, dtype: torch.dtype, numel: int) -> Tensor:
    """The entries of a large gradient in the order of the memory, contiguous."""
    if tensor is None or tensor.dtype is not dtype or tensor.numel() != numel or not tensor.is_cpu:
        raise OutdatedError
    if tensor.layout is not torch.strided:
        raise OutdatedError
    # Strided or expanded, which autograd does not produce: a copy.
    return tensor if tensor.is_contiguous() else norms.in_memory_order(tensor).contiguous()


def _norm_of(tensor: Tensor | None, numel: int, norm_type: float) -> Tensor:
    """The norm of a gradient that is sparse, complex or of an unusual dtype, `(1,)`, float64."""
    if tensor is None or tensor.numel() != numel or not tensor.is_cpu:
        raise OutdatedError
    value = norms.dense_values(tensor)
    if value.dtype in REAL:
        pieces: list[Tensor] = []
        blocks.append_blocks(pieces, value.reshape(-1), norm_type)
        return blocks.joined(pieces, norm_type).view(1)
    magnitudes = value.abs() if value.numel() else torch.zeros(1, device="cpu")
    return norms.vector_norm(magnitudes, norm_type, dtype=torch.float64).view(1)
