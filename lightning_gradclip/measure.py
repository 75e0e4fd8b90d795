"""Gradients to sizes: the p-norm of every tensor, in float32 or wider, reading each gradient once.

Norms of large tensors are taken over rows first. On CPU that runs on all threads, and it keeps the error below 1e-6
where one float32 sum over 1e8 elements reads 1 % low. Norms other than 2 and inf have no vectorised kernel to lose;
they are summed in float64.

Two float32 entries of 1e20 overflow when squared and entries of 1e-25 vanish. A norm outside the range in which the
fast sum is exact is therefore measured again in float64, scaled by the largest entry: on CPU each norm that
needs it; on other devices, where looking at each would make the host wait, all of them when the host reads a joint norm
that is out of range.
"""

import math
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from lightning_gradclip.scopes import Scopes

_COLUMNS = 512  # even equal entries, whose rounding errors all agree, stay within 3e-7
_LARGE = 2048


def parameter_norms(tensors: Sequence[Tensor | None], norm_type: float) -> Tensor:
    """The p-norm of each tensor.

    Args:
        tensors: Gradients or weights of any dtype, shape, layout and device; None counts as 0.
        norm_type: The p of the norm, in (0, inf].

    Returns:
        Norms, `(len(tensors),)`, local, float64 (float32 on devices without it), on the device of the first tensor.
    """
    present = [tensor for tensor in tensors if tensor is not None]
    if not present:
        return torch.zeros(len(tensors), dtype=torch.float64)
    device = present[0].device
    values = [dense_values(tensor) for tensor in present]
    norms = _fast_norms(values, norm_type, device)
    if device.type == "cpu":
        # The host looks only where that costs nothing; elsewhere the caller asks for `exact_norms` if need be.
        norms = _measured_again(values, norms, norm_type)
    return norms if len(present) == len(tensors) else _spread(norms, tensors)


def exact_norms(tensors: Sequence[Tensor | None], norm_type: float) -> Tensor:
    """`parameter_norms` in float64, scaled by the largest entry: slow, and right for any finite entries."""
    norms = [_exact_norm(dense_values(tensor), norm_type) for tensor in tensors if tensor is not None]
    if not norms:
        return torch.zeros(len(tensors), dtype=torch.float64)
    joined = _together(norms, norms[0].device)
    return joined if len(norms) == len(tensors) else _spread(joined, tensors)


def is_suspect(norm: float, norm_type: float) -> bool:
    """Whether a fast norm may have overflowed or underflowed."""
    return not smallest(norm_type) <= norm < math.inf


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
    scale = torch.where((largest > 0) & torch.isfinite(largest), largest, 1.0)
    sums = zeros.scatter_add(0, index, (norms / scale[index]).pow(norm_type))
    return scale * sums.pow(1.0 / norm_type)


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
    largest = norms.amax()
    scale = torch.where((largest > 0) & torch.isfinite(largest), largest, 1.0)
    return scale * vector_norm(norms / scale, norm_type)


def vector_norm(value: Tensor, norm_type: float, dim: int | None = None, dtype: torch.dtype | None = None) -> Tensor:
    """torch's, which is not annotated."""
    return torch.linalg.vector_norm(value, norm_type, dim=dim, dtype=dtype)


def dense_values(tensor: Tensor) -> Tensor:
    """The stored entries: duplicates of a sparse gradient are added up first."""
    return tensor.coalesce().values() if tensor.is_sparse else tensor


def _fast_norms(values: Sequence[Tensor], norm_type: float, device: torch.device) -> Tensor:
    """Norms, `(len(values),)`: large CPU tensors by rows, all others of a kind in one call."""
    alike: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    by_rows: list[int] = []
    for i, value in enumerate(values):
        if value.device.type == "cpu" and value.numel() > _LARGE:
            by_rows.append(i)
        elif value.numel():
            alike.setdefault((value.device, value.dtype), []).append(i)
    found = [(i, _row_norm(values[i], norm_type)) for i in by_rows]
    for (_, dtype), places in alike.items():
        norms = _foreach_norm([values[i] for i in places], norm_type, accumulator(dtype, norm_type))
        if len(places) == len(values):
            return torch.stack(norms).to(device, widest(device))
        found += zip(places, norms, strict=True)
    result = [torch.zeros((), device=device)] * len(values)
    for i, norm in found:
        result[i] = norm
    return _together(result, device)


def _row_norm(value: Tensor, norm_type: float) -> Tensor:
    value = in_memory_order(value)
    if not value.is_contiguous():
        # Strided or expanded, which autograd does not produce: slow and exact.
        return vector_norm(value.abs(), norm_type, dtype=torch.float64)
    wide = accumulator(value.dtype, norm_type)
    flat = value.view(-1)
    whole = flat.numel() // _COLUMNS * _COLUMNS
    rows = vector_norm(flat[:whole].view(-1, _COLUMNS), norm_type, dim=1, dtype=wide)
    if whole < flat.numel():
        rows = torch.cat((rows, vector_norm(flat[whole:], norm_type, dtype=wide).view(1)))
    return vector_norm(rows, norm_type, dtype=torch.float64)


def accumulator(dtype: torch.dtype, norm_type: float) -> torch.dtype | None:
    """The dtype to sum in; None: the gradient's own, which is wide enough."""
    if norm_type != 2.0 and not math.isinf(norm_type):
        return torch.complex128 if dtype.is_complex else torch.float64
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else None


def _foreach_norm(values: list[Tensor], norm_type: float, dtype: torch.dtype | None) -> tuple[Tensor, ...]:
    # What torch.nn.utils.clip_grad_norm_ calls; it has no public name, and wants tensors that are not empty.
    return torch._foreach_norm(values, norm_type, dtype=dtype)  # pyright: ignore[reportPrivateUsage, reportPrivateImportUsage]


def in_memory_order(value: Tensor) -> Tensor:
    """A view with the strides descending, contiguous for channels-last and transposed tensors."""
    if value.is_contiguous():
        return value
    return value.permute(sorted(range(value.dim()), key=value.stride, reverse=True))


def _measured_again(values: Sequence[Tensor], norms: Tensor, norm_type: float) -> Tensor:
    low, high = torch.aminmax(norms)
    if not is_suspect(low.item(), norm_type) and not is_suspect(high.item(), norm_type):
        return norms
    suspects = [i for i, norm in enumerate(norms.tolist()) if is_suspect(norm, norm_type)]
    norms = norms.clone()
    for i in suspects:
        norms[i] = _exact_norm(values[i], norm_type)
    return norms


def _exact_norm(value: Tensor, norm_type: float) -> Tensor:
    if value.numel() == 0:
        return torch.zeros((), device=value.device)
    magnitude = value.abs()
    largest = magnitude.amax()
    if value.device.type == "cpu" and largest.item() == 0:
        return largest
    scale = torch.where((largest > 0) & torch.isfinite(largest), largest, 1.0).to(widest(value.device))
    return scale * vector_norm(magnitude.to(scale.dtype) / scale, norm_type)


def _together(norms: Sequence[Tensor], device: torch.device) -> Tensor:
    wide = widest(device)
    if len({(norm.device, norm.dtype) for norm in norms}) == 1:
        return torch.stack(list(norms)).to(device, wide)
    return torch.stack([norm.to(device, wide) for norm in norms])


def _spread(norms: Tensor, tensors: Sequence[Tensor | None]) -> Tensor:
    """Norms of the tensors that are there among zeros for those that are not."""
    places = tuple(i for i, tensor in enumerate(tensors) if tensor is not None)
    return norms.new_zeros(len(tensors)).index_copy(0, integers_on(places, norms.device), norms)


@lru_cache(maxsize=64)
def integers_on(values: tuple[int, ...], device: torch.device) -> Tensor:
    """Whole numbers as a tensor, kept: copying them to a device anew at every step would make the host wait for it."""
    return torch.tensor(values, device="cpu").to(device)


def widest(device: torch.device) -> torch.dtype:
    """float64, or float32 where the device has nothing wider."""
    return torch.float32 if device.type == "mps" else torch.float64


def smallest(norm_type: float) -> float:
    """Norms below this may have lost entries whose p-th power is below float32's normal range, about 1e-38."""
    return 0.0 if math.isinf(norm_type) else 1e-24 ** (1.0 / norm_type)
