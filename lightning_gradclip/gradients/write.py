"""The only writes to gradients: four ways to change them, and what is done about entries that are not finite.

A `Change` says how the gradients of one step are to be written, and `apply` writes them; where `triton` asks for it,
our kernel multiplies by one factor on CUDA. Gradients that need no change are not written: looking is free on CPU; on
a device, where it would make the host wait, a factor of 1 is multiplied.
"""

from collections.abc import Iterable, Sequence
from itertools import accumulate, pairwise
from operator import attrgetter
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from lightning_gradclip.gradients import foreach, norms
from lightning_gradclip.gradients.entries import stored_bounds
from lightning_gradclip.gradients.moments import Moment, kept_within
from lightning_gradclip.gradients.norms import CHUNK, FEW, MANY
from lightning_gradclip.gradients.ranks import settled
from lightning_gradclip.select import layout

_dtype_of = attrgetter("dtype")

# The normal range of float32.
_SMALLEST, _LARGEST = 1.2e-38, 3.4e38
# Gradients that a float32 factor loses nothing against.
_FLOAT32 = {torch.float32, torch.bfloat16, torch.float16}


class ScaleAll(NamedTuple):
    """Multiply all gradients by one coefficient, a float where all are on CPU, or a tensor of one element."""

    coef: float | Tensor

    def apply(self, params: Sequence[Tensor], *, triton: bool = False) -> None:
        """Write the gradients of these parameters."""
        if isinstance(self.coef, Tensor):
            _multiply(params, [self.coef.view(())] * len(params), triton=triton)
            return
        gradients = [gradient for parameter in params if (gradient := parameter.grad) is not None]
        if set(map(type, gradients)) != {Tensor}:
            gradients = [layout.local(gradient) for gradient in gradients]
        dtypes = set(map(_dtype_of, gradients))
        plain = len(dtypes) == 1 and dtypes <= _FLOAT32 and _SMALLEST <= self.coef <= _LARGEST
        # Contiguous gradients share no memory and are not sparse; those that are negated are not yet computed.
        if plain and all(map(Tensor.is_contiguous, gradients)) and not any(map(Tensor.is_neg, gradients)):
            foreach.scale_(gradients, self.coef)
        else:
            _multiply(params, [torch.tensor(self.coef, dtype=torch.float64, device="cpu")] * len(params))


class Scale(NamedTuple):
    """Multiply the gradient of each parameter by the coefficient, of `(S,)` on any device, of its scope."""

    coefs: Tensor
    scopes: Sequence[int]

    def apply(self, params: Sequence[Tensor], *, triton: bool = False) -> None:
        """Write the gradients of these parameters."""
        coefs, scopes = self.coefs.unbind(), self.scopes
        if self.coefs.is_cpu:
            changed = self.coefs.ne(1.0).tolist()
            touched = [place for place, scope in enumerate(scopes) if changed[scope]]
            params, scopes = [params[place] for place in touched], [scopes[place] for place in touched]
        _multiply(params, [coefs[scope] for scope in scopes], triton=triton)


class ScaleUnits(NamedTuple):
    """Multiply each unit of the gradients by its coefficient, of `(sum(counts),)`; `counts` has those of a parameter.

    Units are slices of a gradient along dim 0; a gradient of fewer than two dims is one.
    """

    coefs: Tensor
    counts: Sequence[int]

    def apply(self, params: Sequence[Tensor], *, triton: bool = False) -> None:
        """Write the gradients of these parameters; on CPU one that nothing changes is not written."""
        coefs = self.coefs
        starts = (0, *accumulate(self.counts))
        units, spans = _changed(coefs, starts)
        written = [place for place, (first, end) in enumerate(spans) if first < end and params[place].grad is not None]
        whole = [place for place in written if params[place].ndim < 2]
        index = norms.integers_on(tuple(starts[place] for place in whole), coefs.device)
        _multiply([params[place] for place in whole], coefs[index].unbind())
        batches = _UnitBatches(coefs)
        for place in written:
            if params[place].ndim > 1:
                first, end = spans[place]
                changed = None if units is None else units[first:end] - starts[place]
                batches.take(params[place], starts[place], starts[place + 1], changed)
        batches.multiply_()


class Clamp(NamedTuple):
    """Replace entries below `low` by it and above `high` by that, of the parameters at these places; NaN stays."""

    low: float
    high: float
    places: Sequence[int]

    def apply(self, params: Sequence[Tensor], *, triton: bool = False) -> None:
        """Write the gradients of these parameters."""
        for place in self.places:
            if (gradient := params[place].grad) is not None:
                values = _stored_values(params[place], gradient)
                values.clamp_(*stored_bounds(values.dtype, self.low, self.high))


class ClampBeside(NamedTuple):
    """Bring entries beyond `bounds`, `(P,)`, times the root of what an optimizer has as their mean square, to that.

    Of the parameters at these places; what the optimizer knows is as `moments` has it for each, `(P,)`.
    """

    bounds: Tensor
    moments: Sequence[Moment | None]
    places: Sequence[int]

    def apply(self, params: Sequence[Tensor], *, triton: bool = False) -> None:
        """Write the gradients of these parameters."""
        for place in self.places:
            moment, gradient = self.moments[place], params[place].grad
            if gradient is None or moment is None:
                continue
            values, square = _stored_values(params[place], gradient), moment.square
            if (sparse := params[place].grad) is not None and sparse.is_sparse:
                square = square[sparse.indices().unbind()]
            bound = self.bounds[place].to(square.device)
            rows, squares = (one.view(1) if one.ndim == 0 else one for one in (values, square))
            size = max(1, CHUNK * len(rows) // max(1, rows.numel()))
            for some, theirs in zip(rows.split(size), squares.split(size), strict=True):
                some.copy_(kept_within(some, theirs, bound))


Change: TypeAlias = ScaleAll | Scale | ScaleUnits | Clamp | ClampBeside


def settle_(params: Iterable[Tensor]) -> None:
    """Add up, for good, gradients that are still to be added up over ranks, by a collective for each."""
    for parameter in params:
        if (gradient := parameter.grad) is not None:
            whole = settled(gradient, parameter)
            if whole is not gradient:
                parameter.grad = whole


def resolve_(params: Iterable[Tensor]) -> None:
    """Compute gradients that are still to be negated or conjugated, in which torch's foreach functions cannot write."""
    for parameter in params:
        if (gradient := parameter.grad) is not None and (gradient.is_neg() or gradient.is_conj()):
            parameter.grad = gradient.resolve_conj().resolve_neg()


def zero_nonfinite_(params: Iterable[Tensor]) -> None:
    """Replace NaN and infinite entries by zero; by a mask, since 0 * inf is NaN."""
    for parameter in params:
        if (gradient := parameter.grad) is not None:
            values = _stored_values(parameter, gradient)
            values.masked_fill_(~torch.isfinite(values), 0.0)


def centralize_(params: Iterable[Tensor]) -> None:
    """Take from each gradient of two dims or more its mean over all dims but the first.

    A row with an entry that is not finite stays as it is, so that it does not spread.
    """
    for parameter in params:
        gradient = parameter.grad
        if gradient is None or parameter.ndim < 2 or parameter.numel() == 0:
            continue
        # Of a DTensor itself, whose ranks may hold pieces of a row.
        values = _stored_values(parameter, gradient) if type(gradient) is Tensor else gradient
        mean = values.mean(dim=tuple(range(1, values.ndim)), keepdim=True)
        values.sub_(torch.where(torch.isfinite(mean), mean, torch.zeros_like(mean)))


def drop_(params: Iterable[Tensor]) -> None:
    """Remove the gradients, so that the optimizer leaves parameters and its own state as they are."""
    for parameter in params:
        parameter.grad = None


def _multiply(params: Sequence[Tensor], coefs: Sequence[Tensor], *, triton: bool = False) -> None:
    """Multiply the gradient of each parameter by its coefficient, a 0-d tensor on any device."""
    batches: dict[tuple[torch.device, torch.dtype], tuple[list[Tensor], list[Tensor]]] = {}
    for parameter, coef in zip(params, coefs, strict=True):
        if (gradient := parameter.grad) is not None:
            values = _real_values(parameter, gradient)
            gradients, factors = batches.setdefault((values.device, _factor_dtype(values)), ([], []))
            gradients.append(values)
            factors.append(coef)
    for (device, dtype), (gradients, factors) in batches.items():
        joined = factors[0] if all(one is factors[0] for one in factors) else torch.stack(factors)
        if _leaves_float32(joined):
            for values, factor in zip(gradients, factors, strict=True):
                values.copy_(values.double() * factor.double())
        elif joined.ndim == 0:
            foreach.multiply_(gradients, joined.to(device, dtype), triton=triton)
        else:
            foreach.multiply_(gradients, joined.to(device, dtype).unbind())


class _UnitBatches:
    """Gradients of more than one dim and factors for their units, to be multiplied together where that is faster."""

    def __init__(self, coefs: Tensor) -> None:
        self._coefs, self._wide = coefs, _leaves_float32(coefs)
        # Each conversion once, and not for each gradient.
        self._converted: dict[tuple[torch.device, torch.dtype], Tensor] = {}
        self._batches: dict[tuple[torch.device, torch.dtype], tuple[list[Tensor], list[Tensor]]] = {}

    def take(self, parameter: Tensor, start: int, end: int, units: Tensor | None) -> None:
        """Multiply the units of one gradient, whose coefficients are those from `start` to `end`, now or with others.

        Given are those that change, counted from 0; None: perhaps all.
        """
        if (gradient := parameter.grad) is None:
            return
        values = _real_values(parameter, gradient)
        key = values.device, torch.float64 if self._wide else _factor_dtype(values)
        if key not in self._converted:
            self._converted[key] = self._coefs.to(*key)
        factors = self._converted[key][start:end]
        if gradient.is_sparse:
            factors = factors[gradient.coalesce().indices()[0]]
        factors = factors.view(-1, *[1] * (values.ndim - 1))
        if self._wide or (values.is_cpu and values.dtype is torch.bfloat16):
            _scale_converted_(values, factors)
        elif not (units is None or gradient.is_sparse or values.numel() < MANY) and len(units) <= FEW * (end - start):
            _scale_some_(values, units, factors)
        else:
            gradients, theirs = self._batches.setdefault(key, ([], []))
            gradients.append(values)
            theirs.append(factors)

    def multiply_(self) -> None:
        for gradients, factors in self._batches.values():
            foreach.multiply_(gradients, factors)


def _changed(coefs: Tensor, starts: Sequence[int]) -> tuple[Tensor | None, list[tuple[int, int]]]:
    """The units whose coefficient is not 1, and which part of them belongs to each parameter.

    On devices, where looking would make the host wait, None and all units.
    """
    if not coefs.is_cpu:
        return None, list(pairwise(starts))
    units = (coefs != 1).nonzero()[:, 0]
    return units, list(pairwise(torch.searchsorted(units, norms.integers_on(tuple(starts), coefs.device)).tolist()))


def _scale_converted_(values: Tensor, factors: Tensor) -> None:
    """Multiply slices in the dtype of their factors: torch's product of bfloat16 and a column is four times slower."""
    size = max(1, CHUNK * len(values) // max(1, values.numel()))
    for some, by in zip(values.split(size), factors.split(size), strict=True):
        some.copy_(some.to(by.dtype).mul_(by))


def _scale_some_(values: Tensor, slices: Tensor, factors: Tensor) -> None:
    """Multiply these slices of a large gradient by way of a copy that stays in the cache."""
    for some in slices.split(max(1, CHUNK * len(values) // values.numel())):
        values.index_copy_(0, some, values.index_select(0, some).mul_(factors[some]))


def _factor_dtype(values: Tensor) -> torch.dtype:
    # A float32 factor keeps its digits against half gradients, where a half factor would add an error.
    return torch.float64 if values.dtype == torch.float64 else torch.float32


def _leaves_float32(coefs: Tensor) -> bool:
    """Whether float32 cannot hold some coefficient; on devices, where looking would make the host wait, never."""
    if not coefs.is_cpu or coefs.numel() == 0:
        return False
    low, high = torch.aminmax(coefs)
    return not _SMALLEST <= low.item() <= high.item() <= _LARGEST


def _real_values(parameter: Tensor, gradient: Tensor) -> Tensor:
    # As real numbers: a complex product makes inf + nan j of inf times 1.
    values = _stored_values(parameter, gradient)
    return torch.view_as_real(values) if values.is_complex() else values


def _stored_values(parameter: Tensor, gradient: Tensor) -> Tensor:
    if gradient.is_sparse:
        if not gradient.is_coalesced():
            # The values of an uncoalesced gradient are summands: clamping or masking them would be wrong.
            parameter.grad = gradient = gradient.coalesce()
        return gradient.values()
    values = held = gradient if type(gradient) is Tensor else layout.local(gradient)
    if values.is_conj() or values.is_neg():
        # Not yet computed, so that nothing can be written.
        values = values.resolve_conj().resolve_neg()
    if not values.is_contiguous() and 0 in values.stride():
        # Expanded: several entries share their memory and would be scaled several times.
        values = values.contiguous()
    if values is not held:
        parameter.grad = layout.with_local(gradient, values)
    return values
