"""Norms of output units: slices along dim 0, measured together where tensors are small and alike.

Norms of units stay in the dtype that they are accumulated in, float32 for most models: there are up to a million of
them, and the published rules over units are defined in it. In float32 and float64 they are those of torch, bit for bit,
up to 8192 entries that lie beside each other; of others those of torch for a copy in which they do.
"""

import math

import torch
from torch import Tensor

from lightning_gradclip.gradients import norms
from lightning_gradclip.gradients.blocks import Batch, OutdatedError, batches_of_one_shape, row_norms
from lightning_gradclip.gradients.norms import CPU, SMALL, UNIT, Tensors
from lightning_gradclip.select.scopes import Units, units_in


class UnitMeter:
    """Measures the units of the same parameters at every step."""

    def __init__(self, units: Units, norm_type: float) -> None:
        self._units = units
        self._norm_type = norm_type
        self._smallest = norms.smallest(norm_type)
        self._batches: list[Batch] = []
        self._plain: list[tuple[int, torch.Size, torch.dtype]] = []
        self._others: list[int] = []
        self._order: Tensor | None = None

    def each(self, tensors: Tensors) -> Tensor:
        """The p-norm of each unit, `(S,)`, local, float32 or wider; those of an absent tensor are 0.

        On the first device of a tensor that is not the CPU, if there is one. It is a RuntimeError if a parameter has
        another number of units than it had.
        """
        if all(tensor is None for tensor in tensors):
            return torch.zeros(self._units.count, dtype=torch.float64, device="cpu")
        device = norms.home(tensors)
        if not (self._batches or self._plain or self._others):
            self._arrange(tensors)
        try:
            found = self._read(tensors, device)
        except OutdatedError:
            self._arrange(tensors)
            found = self._read(tensors, device)
        return self._measured_again(found, tensors) if device == CPU else found

    def exact(self, tensors: Tensors) -> Tensor:
        """`each` in float64, scaled by the largest entry: slow, and right for any finite entries."""
        pieces = [
            torch.zeros(count, dtype=torch.float64, device="cpu")
            if tensor is None
            else _sparse_norms(tensor, count, self._norm_type)
            if tensor.is_sparse
            else norms.exact_row_norms(_as_rows(tensor), self._norm_type)
            for tensor, count in zip(tensors, self._units.counts, strict=True)
        ]
        device = norms.home(tensors)
        return torch.cat([piece.to(device) for piece in pieces]) if pieces else torch.zeros(0, device="cpu")

    def _arrange(self, tensors: Tensors) -> None:
        """Decide which tensors are measured together, and where their units then belong."""
        self._plain, self._others = [], []
        small: list[int] = []
        for place, tensor in enumerate(tensors):
            self._require_same_count(place, tensor)
            if tensor is not None and _is_small(tensor):
                small.append(place)
            elif tensor is not None and _is_plain(tensor, self._norm_type):
                self._plain.append((place, tensor.shape, tensor.dtype))
            else:
                self._others.append(place)
        self._batches = batches_of_one_shape(tensors, small)
        measured = [place for batch in self._batches for place in batch.places]
        measured += [place for place, *_ in self._plain] + self._others
        starts = self._units.starts
        self._order = None
        if measured != sorted(measured):
            units = torch.cat([torch.arange(starts[i], starts[i + 1], device="cpu") for i in measured])
            self._order = torch.empty_like(units).index_copy_(0, units, torch.arange(len(units), device="cpu"))

    def _require_same_count(self, place: int, tensor: Tensor | None) -> None:
        count = self._units.counts[place]
        if tensor is not None and units_in(tensor) != count:
            raise RuntimeError(
                f"parameter {self._units.parameters[place]!r} had {count} units and now has the shape "
                f"{tuple(tensor.shape)}; make a new Clipper where the shape of a parameter changes"
            )

    def _read(self, tensors: Tensors, device: torch.device) -> Tensor:
        pieces: list[Tensor] = []
        for batch in self._batches:
            count = len(batch.places) * self._units.counts[batch.places[0]]
            pieces.append(row_norms(batch.gathered(tensors).view(count, -1), self._norm_type, UNIT, widen=False))
        for place, shape, dtype in self._plain:
            tensor = tensors[place]
            same = tensor is not None and tensor.shape == shape and tensor.dtype is dtype and tensor.is_cpu
            if tensor is None or not same or not tensor.is_contiguous():
                raise OutdatedError
            pieces.append(norms.vector_norm(tensor if len(shape) == 2 else tensor.flatten(1), self._norm_type, dim=1))
        pieces += [self._norms_of(place, tensors[place], device) for place in self._others]
        # Promotes to the widest among them.
        found = torch.cat(pieces if device == CPU else [one.to(device) for one in pieces])
        return found if self._order is None else found.index_select(0, self._order.to(device))

    def _norms_of(self, place: int, tensor: Tensor | None, device: torch.device) -> Tensor:
        count = self._units.counts[place]
        if tensor is not None and units_in(tensor) != count:
            raise OutdatedError
        if tensor is None or tensor.numel() == 0:
            return torch.zeros(count, dtype=torch.float32, device=device)
        if tensor.is_sparse:
            return _sparse_norms(tensor, count, self._norm_type).to(device)
        return row_norms(_as_rows(tensor), self._norm_type, UNIT, widen=False).to(device)

    def _measured_again(self, found: Tensor, tensors: Tensors) -> Tensor:
        """The same with units whose norm left the range of the fast sum measured exactly."""
        if len(found) == 0:
            return found
        low, high = torch.aminmax(found)
        if self._smallest <= low.item() and high.item() < math.inf:
            return found
        # NaN is what it is, and must not make the others float64.
        suspect = (found < self._smallest) | (found == math.inf)
        index = self._units.index_on(found.device)
        for place in index[suspect].unique().tolist():
            tensor = tensors[place]
            if tensor is None or tensor.is_sparse or tensor.numel() == 0:
                continue
            matrix, units = _as_rows(tensor), (index == place).nonzero()[:, 0]
            odd = suspect[units]
            # Units without any gradient are common, those whose entries vanish when squared are not.
            odd &= (found[units] != 0) | _is_nonzero(matrix)
            if odd.any():
                exact = norms.exact_row_norms(matrix[odd], self._norm_type)
                found = found.double().index_copy(0, units[odd], exact)
        return found


def _is_small(tensor: Tensor) -> bool:
    return tensor.is_contiguous() and tensor.is_cpu and not tensor.is_complex() and 0 < tensor.numel() < SMALL


def _is_plain(tensor: Tensor, norm_type: float) -> bool:
    """Whether torch has the norms of the slices ready in one call."""
    own = tensor.dtype in (torch.float32, torch.float64) and norms.accumulator(tensor.dtype, norm_type) is None
    dense = own and tensor.is_cpu and tensor.is_contiguous() and tensor.ndim > 1
    return dense and 0 < tensor.numel() <= UNIT * tensor.shape[0]


def _is_nonzero(matrix: Tensor) -> Tensor:
    """Whether a row has an entry other than zero: two passes that are ten times faster than `any`."""
    if matrix.is_complex():
        matrix = torch.view_as_real(matrix.resolve_conj()).flatten(1)
    return (matrix.amax(dim=1) != 0) | (matrix.amin(dim=1) != 0)


def _as_rows(tensor: Tensor) -> Tensor:
    """A view `(units, entries)`, or a copy where the strides allow no view."""
    if tensor.ndim < 2:
        return tensor.reshape(1, -1)
    if tensor.is_contiguous():
        return tensor.flatten(1)
    # The order within a unit does not matter: channels-last kernels are read as they lie in memory.
    inner = sorted(range(1, tensor.ndim), key=tensor.stride, reverse=True)
    return tensor.permute(0, *inner).flatten(1)


def _sparse_norms(tensor: Tensor, count: int, norm_type: float) -> Tensor:
    tensor = tensor.coalesce()
    values, units = tensor.values(), tensor.indices()[0]
    if tensor.ndim < 2:
        units = torch.zeros_like(units)
    return norms.grouped_norms(norms.exact_row_norms(values[:, None].flatten(1), norm_type), units, count, norm_type)
