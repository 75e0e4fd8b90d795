"""Gradients to sizes: p-norms in float32 or wider, reading each gradient once.

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

from lightning_gradclip.gradients import foreach
from lightning_gradclip.gradients import norms as pnorm
from lightning_gradclip.gradients.plan import OutdatedError, Plan

Tensors = Sequence[Tensor | None]
_Result = TypeVar("_Result")


class Meter:
    """Measures the same list of tensors at every step.

    Args:
        norm_type: The p of the norm, in (0, inf].
    """

    def __init__(self, norm_type: float) -> None:
        self._norm_type = norm_type
        self._plans: dict[bool, Plan] = {}

    def each(self, tensors: Tensors) -> Tensor:
        """The p-norm of each tensor.

        Args:
            tensors: Gradients or weights of any dtype, shape, layout and device; None counts as 0.

        Returns:
            Norms, `(len(tensors),)`, local, float64 (float32 on devices without it), on the device of the first tensor.
        """
        found = self.each_on_host(tensors)
        return _norms_on_device(tensors, self._norm_type) if found is None else found

    def each_on_host(self, tensors: Tensors) -> Tensor | None:
        """`each`, or None unless all tensors are on CPU, where looking at a number makes nobody wait."""
        found = self._read(tensors, True, Plan.each)
        if found is None:
            return None
        low, high = torch.aminmax(found) if len(found) else (found.new_ones(()),) * 2
        # Where one is NaN both are.
        if pnorm.smallest(self._norm_type) <= low.item() and high.item() < math.inf:
            return found
        for place, norm in enumerate(found.tolist()):
            tensor = tensors[place]
            if tensor is not None and self._is_suspect(norm):
                found[place] = pnorm.exact_norm(pnorm.dense_values(tensor), self._norm_type)
        return found

    def joint(self, tensors: Tensors) -> float | None:
        """The p-norm of all entries together, in float64, or None unless all tensors are on CPU."""
        norm = self._read(tensors, False, Plan.joint)
        if norm is None or not self._is_suspect(norm):
            return norm
        norms = self.each_on_host(tensors)
        return None if norms is None else pnorm.joint_norm(norms, self._norm_type).item()

    def count(self, tensors: Tensors) -> int:
        """The number of entries of tensors on CPU."""
        for plan in self._plans.values():
            if plan.fits(tensors):
                return plan.count
        return sum(tensor.numel() for tensor in tensors if tensor is not None)

    def _read(self, tensors: Tensors, apart: bool, reading: Callable[[Plan, Tensors], _Result]) -> _Result | None:
        plan = self._plans.get(apart)
        if plan is not None and plan.fits(tensors):
            try:
                return reading(plan, tensors)
            except OutdatedError:
                del self._plans[apart]
        if any(tensor is not None and tensor.device.type != "cpu" for tensor in tensors):
            return None
        plan = self._plans[apart] = Plan(tensors, self._norm_type, apart=apart)
        return reading(plan, tensors)

    def _is_suspect(self, norm: float) -> bool:
        return not math.isnan(norm) and pnorm.is_suspect(norm, self._norm_type)


def exact_norms(tensors: Tensors, norm_type: float) -> Tensor:
    """`Meter.each` in float64, scaled by the largest entry: slow, and right for any finite entries."""
    found = [pnorm.exact_norm(pnorm.dense_values(tensor), norm_type) for tensor in tensors if tensor is not None]
    if not found:
        return torch.zeros(len(tensors), dtype=torch.float64, device="cpu")
    return _spread(_together(found, found[0].device), tensors)


def _norms_on_device(tensors: Tensors, norm_type: float) -> Tensor:
    """Norms where some tensor is on an accelerator: one call for all tensors of a kind."""
    present = [pnorm.dense_values(tensor) for tensor in tensors if tensor is not None]
    device = present[0].device
    alike: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for place, value in enumerate(present):
        if value.numel():
            alike.setdefault((value.device, value.dtype), []).append(place)
    result = [torch.zeros((), device=device)] * len(present)
    for (_, dtype), places in alike.items():
        values = [present[place] for place in places]
        found = foreach.norms(values, norm_type, pnorm.accumulator(dtype, norm_type))
        for place, norm in zip(places, found, strict=True):
            result[place] = norm
    return _spread(_together(result, device), tensors)


def _together(found: Sequence[Tensor], device: torch.device) -> Tensor:
    wide = pnorm.widest(device)
    if len({(norm.device, norm.dtype) for norm in found}) == 1:
        return torch.stack(list(found)).to(device, wide)
    return torch.stack([norm.to(device, wide) for norm in found])


def _spread(found: Tensor, tensors: Tensors) -> Tensor:
    """Norms of the tensors that are there among zeros for those that are not."""
    if len(found) == len(tensors):
        return found
    places = tuple(place for place, tensor in enumerate(tensors) if tensor is not None)
    return found.new_zeros(len(tensors)).index_copy(0, pnorm.integers_on(places, found.device), found)
