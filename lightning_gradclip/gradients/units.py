"""Norms of output units: slices along dim 0, measured together where tensors are small and alike.

Norms of units stay in the dtype that they are accumulated in, float32 for most models: there are up to a million of
them, and the published rules over units are defined in it. In float32 and float64 they are those of torch, bit for bit,
up to 8192 entries.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_gradclip.gradients import norms as pnorm
from lightning_gradclip.gradients.plan import SMALL, Batch, OutdatedError
from lightning_gradclip.gradients.rows import BLOCK
from lightning_gradclip.select.scopes import Units

Tensors = Sequence[Tensor | None]

# A float32 sum over more entries loses the sixth digit.
_LONG = 8192
# Where torch has no vectorised kernel, it sums one after the other.
_COLUMNS = 512


class UnitMeter:
    """Measures the units of the same parameters at every step.

    Args:
        units: What the units are.
        norm_type: The p of the norm, in (0, inf].
    """

    def __init__(self, units: Units, norm_type: float) -> None:
        self._units = units
        self._norm_type = norm_type
        self._batches: list[Batch] = []
        self._plain: list[tuple[int, torch.Size, torch.dtype]] = []
        self._others: list[int] = []
        self._order: Tensor | None = None

    def norms(self, tensors: Tensors) -> Tensor:
        """The p-norm of each unit.

        Args:
            tensors: Gradients or weights, one for each parameter of the units; None counts as zeros.

        Returns:
            Norms, `(S,)`, local, float32 or wider, on the device of the first tensor.

        Raises:
            RuntimeError: If a parameter has another number of units than it had.
        """
        device = next((tensor.device for tensor in tensors if tensor is not None), None)
        if device is None:
            return torch.zeros(self._units.count, dtype=torch.float64, device="cpu")
        if not (self._batches or self._plain or self._others):
            self._arrange(tensors)
        try:
            found = self._read(tensors, device)
        except OutdatedError:
            self._arrange(tensors)
            found = self._read(tensors, device)
        return self._measured_again(found, tensors) if device.type == "cpu" else found

    def exact(self, tensors: Tensors) -> Tensor:
        """`norms` in float64, scaled by the largest entry: slow, and right for any finite entries."""
        pieces = [
            torch.zeros(rows, dtype=torch.float64, device="cpu")
            if tensor is None
            else _sparse_norms(tensor, rows, self._norm_type)
            if tensor.is_sparse
            else _exact_norms(_as_rows(tensor), self._norm_type)
            for tensor, rows in zip(tensors, self._units.rows, strict=True)
        ]
        device = next((tensor.device for tensor in tensors if tensor is not None), torch.device("cpu"))
        return torch.cat([piece.to(device) for piece in pieces]) if pieces else torch.zeros(0, device="cpu")

    def _arrange(self, tensors: Tensors) -> None:
        """Decide which tensors are measured together, and where their units then belong."""
        self._batches, self._plain, self._others = [], [], []
        alike: dict[tuple[torch.dtype, torch.Size], list[int]] = {}
        for place, tensor in enumerate(tensors):
            self._require_same_count(place, tensor)
            if tensor is not None and _is_small(tensor):
                alike.setdefault((tensor.dtype, tensor.shape), []).append(place)
            elif tensor is not None and _is_plain(tensor, self._norm_type):
                self._plain.append((place, tensor.shape, tensor.dtype))
            else:
                self._others.append(place)
        for (dtype, shape), places in alike.items():
            size = max(1, BLOCK // max(1, math.prod(shape)))
            for begin in range(0, len(places), size):
                some = tuple(places[begin : begin + size])
                self._batches.append(Batch(some, dtype, len(some) * math.prod(shape), shape, alike=True))
        measured = [place for batch in self._batches for place in batch.places]
        measured += [place for place, *_ in self._plain] + self._others
        starts = self._units.starts
        self._order = None
        if measured != sorted(measured):
            units = torch.cat([torch.arange(starts[i], starts[i + 1], device="cpu") for i in measured])
            self._order = torch.empty_like(units).index_copy_(0, units, torch.arange(len(units), device="cpu"))

    def _require_same_count(self, place: int, tensor: Tensor | None) -> None:
        rows = self._units.rows[place]
        if tensor is not None and (tensor.shape[0] if tensor.ndim > 1 else 1) != rows:
            raise RuntimeError(
                f"parameter {self._units.parameters[place]!r} had {rows} units and now has the shape "
                f"{tuple(tensor.shape)}; make a new Clipper where the shape of a parameter changes"
            )

    def _read(self, tensors: Tensors, device: torch.device) -> Tensor:
        pieces: list[Tensor] = []
        for batch in self._batches:
            together = batch.gathered(tensors)
            rows = len(batch.places) * self._units.rows[batch.places[0]]
            pieces.append(_fast_norms(together.view(rows, -1), self._norm_type))
        for place, shape, dtype in self._plain:
            tensor = tensors[place]
            same = tensor is not None and tensor.shape == shape and tensor.dtype is dtype and tensor.is_cpu
            if tensor is None or not same or not tensor.is_contiguous():
                raise OutdatedError
            pieces.append(pnorm.vector_norm(tensor if len(shape) == 2 else tensor.flatten(1), self._norm_type, dim=1))
        pieces += [self._norms_of(place, tensors[place], device) for place in self._others]
        # Promotes to the widest among them.
        found = torch.cat(pieces if device.type == "cpu" else [one.to(device) for one in pieces])
        return found if self._order is None else found.index_select(0, self._order.to(device))

    def _norms_of(self, place: int, tensor: Tensor | None, device: torch.device) -> Tensor:
        rows = self._units.rows[place]
        if tensor is not None and (tensor.shape[0] if tensor.ndim > 1 else 1) != rows:
            raise OutdatedError
        if tensor is None or tensor.numel() == 0:
            return torch.zeros(rows, dtype=torch.float32, device=device)
        if tensor.is_sparse:
            return _sparse_norms(tensor, rows, self._norm_type).to(device)
        return _fast_norms(_as_rows(tensor), self._norm_type).to(device)

    def _measured_again(self, found: Tensor, tensors: Tensors) -> Tensor:
        """The same with units whose norm left the range of the fast sum measured exactly."""
        if len(found) == 0:
            return found
        low, high = (extreme.item() for extreme in torch.aminmax(found))
        if not pnorm.is_suspect(low, self._norm_type) and not pnorm.is_suspect(high, self._norm_type):
            return found
        # NaN is what it is, and must not make the others float64.
        suspect = (found < pnorm.smallest(self._norm_type)) | (found == math.inf)
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
                found = found.double().index_copy(0, units[odd], _exact_norms(matrix[odd], self._norm_type))
        return found


def _is_small(tensor: Tensor) -> bool:
    plain = tensor.is_contiguous() and tensor.device.type == "cpu" and not tensor.is_complex()
    return plain and 0 < tensor.numel() < SMALL


def _is_plain(tensor: Tensor, norm_type: float) -> bool:
    """Whether torch has the norms of the slices ready in one call."""
    own = tensor.dtype in (torch.float32, torch.float64) and pnorm.accumulator(tensor.dtype, norm_type) is None
    dense = own and tensor.is_cpu and tensor.is_contiguous() and tensor.ndim > 1
    return dense and 0 < tensor.numel() <= _LONG * tensor.shape[0]


def _fast_norms(matrix: Tensor, norm_type: float, long: int = _LONG) -> Tensor:
    """The norm of each row, in one sum for up to `long` entries where torch has a vectorised kernel."""
    wide = pnorm.accumulator(matrix.dtype, norm_type)
    columns = matrix.shape[1]
    if wide is torch.float32 and matrix.device.type == "cpu":
        blocks = matrix.split(max(1, BLOCK // columns))
        return torch.cat([_fast_norms(block.float(), norm_type, _COLUMNS) for block in blocks])
    vectorised = matrix.dtype in (torch.float32, torch.float64) and matrix.stride(1) == 1
    if columns <= (long if vectorised else _COLUMNS):
        return pnorm.vector_norm(matrix, norm_type, dim=1, dtype=wide)
    whole = columns // _COLUMNS * _COLUMNS
    blocks = matrix[:, :whole].unflatten(1, (-1, _COLUMNS))
    pieces = [pnorm.vector_norm(blocks, norm_type, dim=2, dtype=wide)]
    if whole < columns:
        pieces.append(pnorm.vector_norm(matrix[:, whole:], norm_type, dim=1, dtype=wide)[:, None])
    joined = torch.cat(pieces, dim=1)
    return pnorm.vector_norm(joined, norm_type, dim=1, dtype=pnorm.widest(matrix.device)).to(joined.dtype)


def _exact_norms(matrix: Tensor, norm_type: float) -> Tensor:
    if matrix.numel() == 0:
        return torch.zeros(len(matrix), dtype=torch.float32, device=matrix.device)
    magnitude = matrix.abs()
    largest = magnitude.amax(dim=1)
    scale = torch.where((largest > 0) & torch.isfinite(largest), largest, 1.0).to(pnorm.widest(matrix.device))
    return scale * pnorm.vector_norm(magnitude.to(scale.dtype) / scale[:, None], norm_type, dim=1)


def _is_nonzero(matrix: Tensor) -> Tensor:
    """Whether a row has an entry other than zero: two passes that are ten times faster than `any`."""
    if matrix.is_complex():
        matrix = torch.view_as_real(matrix.resolve_conj()).flatten(1)
    return (matrix.amax(dim=1) != 0) | (matrix.amin(dim=1) != 0)


def _as_rows(tensor: Tensor) -> Tensor:
    """A view `(rows, entries)`, or a copy where the strides allow no view."""
    if tensor.ndim < 2:
        return tensor.reshape(1, -1)
    if tensor.is_contiguous():
        return tensor.flatten(1)
    # The order within a unit does not matter: channels-last kernels are read as they lie in memory.
    inner = sorted(range(1, tensor.ndim), key=tensor.stride, reverse=True)
    return tensor.permute(0, *inner).flatten(1)


def _sparse_norms(tensor: Tensor, rows: int, norm_type: float) -> Tensor:
    tensor = tensor.coalesce()
    values, units = tensor.values(), tensor.indices()[0]
    if tensor.ndim < 2:
        units = torch.zeros_like(units)
    if values.numel() == 0:
        return torch.zeros(rows, dtype=torch.float32, device=tensor.device)
    norms = _exact_norms(values.reshape(len(values), -1), norm_type)
    return pnorm.grouped_norms(norms, units, rows, norm_type)
