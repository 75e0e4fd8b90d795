"""Output units as scopes: a limit for each slice of a weight along dim 0.

Norms of units stay in the dtype that they are accumulated in, float32 for most models: there are up to a million of
them, and the published rules over units are defined in it.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_gradclip import measure, write
from lightning_gradclip.limit import Gradients, Limiter, Outcome
from lightning_gradclip.scopes import Units
from lightning_gradclip.select import Selection

# A float32 sum over more entries loses the sixth digit; up to here norms are those of torch, bit for bit.
_LONG = 8192
# Where torch has no vectorised kernel, it sums one after the other.
_COLUMNS = 512


class UnitLimiter(Limiter):
    """Runs a method over output units."""

    def write(self, outcome: Outcome) -> None:
        """Scale the units as the coefficients say; parameters of which no unit is over its limit are not written."""
        coefs = outcome.coefs
        if coefs is None:
            return
        touched = range(len(self._params))
        if coefs.device.type == "cpu":
            touched = self._units.index_on(coefs.device)[coefs != 1].unique().tolist()
        pieces = coefs.split(self._units.rows)
        whole = [i for i in touched if not self._units.sliced[i]]
        write.scale_([self._params[i] for i in whole], [pieces[i][0] for i in whole])
        for i in touched:
            if self._units.sliced[i]:
                write.scale_units_(self._params[i], pieces[i])

    def _scopes_of(self, selection: Selection) -> Units:
        self._units = selection.units()
        return self._units

    def _norms(self, tensors: Gradients, *, exact: bool = False) -> Tensor:
        return unit_norms(tensors, self._units, self._method.norm_type, exact=exact)

    def _scope_norms(self, norms: Tensor) -> Tensor:
        return norms

    def _root_counts(self, gradients: Gradients, norms: Tensor) -> Tensor:
        counts = tuple(
            max(1, one.numel() // max(1, rows)) for one, rows in zip(self._params, self._units.rows, strict=True)
        )
        index = self._units.index_on(norms.device)
        return measure.integers_on(counts, norms.device)[index].to(norms.dtype).sqrt()

    def _parameter_norms(self, norms: Tensor) -> Tensor:
        wide = norms.to(measure.widest(norms.device))
        index = self._units.index_on(norms.device)
        return measure.grouped_norms(wide, index, len(self._params), self._method.norm_type)


def unit_norms(tensors: Sequence[Tensor | None], units: Units, norm_type: float, *, exact: bool = False) -> Tensor:
    """The p-norm of each unit.

    Args:
        tensors: Gradients or weights, one for each parameter of `units`; None counts as zeros.
        units: What the units are.
        norm_type: The p of the norm, in (0, inf].
        exact: Whether to measure in float64, scaled by the largest entry: slow, and right for any finite entries.

    Returns:
        Norms, `(S,)`, local, float32 or wider, on the device of the first tensor.
    """
    present = [tensor for tensor in tensors if tensor is not None]
    if not present:
        return torch.zeros(units.count, dtype=torch.float64)
    device = present[0].device
    pieces = [
        torch.zeros(rows, device=device) if tensor is None else _norms_of(tensor, rows, norm_type, exact).to(device)
        for tensor, rows in zip(tensors, units.rows, strict=True)
    ]
    # Promotes to the widest among them.
    return torch.cat(pieces)


def _norms_of(tensor: Tensor, rows: int, norm_type: float, exact: bool) -> Tensor:
    """The p-norms of the units of one tensor, `(rows,)`."""
    if tensor.is_sparse:
        return _sparse_norms(tensor, rows, norm_type)
    if tensor.numel() == 0:
        return torch.zeros(rows, device=tensor.device)
    matrix = _as_rows(tensor)
    if exact:
        return _exact_norms(matrix, norm_type)
    norms = _fast_norms(matrix, norm_type)
    if tensor.device.type != "cpu":
        return norms
    low, high = torch.aminmax(norms)
    if not measure.is_suspect(low.item(), norm_type) and not measure.is_suspect(high.item(), norm_type):
        return norms
    # Units without any gradient are common, those whose entries vanish when squared are not.
    suspect = ~((norms >= measure.smallest(norm_type)) & (norms < math.inf))
    if low == 0:
        suspect &= measure.vector_norm(matrix, math.inf, dim=1) != 0
    if not suspect.any():
        return norms
    return norms.double().index_copy(0, suspect.nonzero()[:, 0], _exact_norms(matrix[suspect], norm_type))


def _fast_norms(matrix: Tensor, norm_type: float) -> Tensor:
    wide = measure.accumulator(matrix.dtype, norm_type)
    vectorised = matrix.dtype in (torch.float32, torch.float64) and matrix.stride(1) == 1
    columns = matrix.shape[1]
    if columns <= (_LONG if vectorised else _COLUMNS):
        return measure.vector_norm(matrix, norm_type, dim=1, dtype=wide)
    whole = columns // _COLUMNS * _COLUMNS
    blocks = matrix[:, :whole].unflatten(1, (-1, _COLUMNS))
    pieces = [measure.vector_norm(blocks, norm_type, dim=2, dtype=wide)]
    if whole < columns:
        pieces.append(measure.vector_norm(matrix[:, whole:], norm_type, dim=1, dtype=wide)[:, None])
    joined = torch.cat(pieces, dim=1)
    return measure.vector_norm(joined, norm_type, dim=1, dtype=measure.widest(matrix.device)).to(joined.dtype)


def _exact_norms(matrix: Tensor, norm_type: float) -> Tensor:
    magnitude = matrix.abs()
    largest = magnitude.amax(dim=1)
    scale = torch.where((largest > 0) & torch.isfinite(largest), largest, 1.0).to(measure.widest(matrix.device))
    return scale * measure.vector_norm(magnitude.to(scale.dtype) / scale[:, None], norm_type, dim=1)


def _as_rows(tensor: Tensor) -> Tensor:
    """A view `(rows, entries)`, or a copy where the strides allow no view."""
    if tensor.ndim < 2:
        return tensor.reshape(1, -1)
    # The order within a unit does not matter: channels-last kernels are read as they lie in memory.
    inner = sorted(range(1, tensor.ndim), key=tensor.stride, reverse=True)
    return tensor.permute(0, *inner).flatten(1)


def _sparse_norms(tensor: Tensor, rows: int, norm_type: float) -> Tensor:
    tensor = tensor.coalesce()
    values, units = tensor.values(), tensor.indices()[0]
    if tensor.ndim < 2:
        units = torch.zeros_like(units)
    if values.numel() == 0:
        return torch.zeros(rows, device=tensor.device)
    norms = _exact_norms(values.reshape(len(values), -1), norm_type)
    return measure.grouped_norms(norms, units, rows, norm_type)
