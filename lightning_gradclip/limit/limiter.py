"""Gradients to sizes, limits and coefficients: everything about a step that is known before acting on it."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_gradclip.gradients import norms as pnorm
from lightning_gradclip.gradients import read as measure
from lightning_gradclip.gradients import write
from lightning_gradclip.gradients.ranks import Reduced, Reducer
from lightning_gradclip.gradients.read import Meter
from lightning_gradclip.limit import learned
from lightning_gradclip.methods.method import ClipMethod
from lightning_gradclip.record.step import Row, pack, untouched
from lightning_gradclip.select import layout
from lightning_gradclip.select.parameters import Selection
from lightning_gradclip.select.scopes import Scopes, Units

Gradients = Sequence[Tensor | None]


@dataclass(slots=True)
class Outcome:
    """One step before anything is done about it.

    Attributes:
        sizes: Statistic of each scope, `(S,)`, or the float of the only one.
        limits: Limit of each scope, `(S,)`, or the float of the only one.
        coefs: Coefficient of each scope, `(S,)`, exactly 1 where nothing is to be done, or the float of the only one;
            None: all are 1.
        row: The packed row of a step that goes ahead; on the host where the host decides.
        measured: Norms of the scopes that `measure_per` asked for, NaN for absent ones.
        nothing: Whether this rank has no gradient, and no other rank has.
    """

    sizes: Any
    limits: Any
    coefs: Tensor | float | None
    row: Tensor | Row
    measured: Tensor | None
    nothing: bool

    @property
    def finite(self) -> float | Tensor:
        """Whether all gradients are finite, 1 or 0, where the row is."""
        return self.row.finite if isinstance(self.row, Row) else self.row[Row._fields.index("finite")]


class Limiter:
    """Runs one method over the parameters of one optimizer and keeps its learned values in order.

    This one serves scopes made of whole parameters.

    Args:
        method: The method; changed only by `learn` and `load_state_dict`.
        measure_per: Kind of the scopes whose norms are recorded as well, if any.
        on_host: Whether the host reads the packed row on devices where that is a synchronisation.

    Attributes:
        on_host: As above.
        has_details: Whether there is anything that costs passes of its own.
        detailed: Whether to find out at each step what costs passes of its own.
    """

    has_details = False

    def __init__(self, method: ClipMethod, measure_per: str | None, *, on_host: bool) -> None:
        self._method = method
        self._adaptive = method.adaptive
        self._measure_per = measure_per
        self._gradients, self._weighing = Meter(method.norm_type), Meter(method.norm_type)
        self.on_host = on_host
        self._rows_of: tuple[str, ...] = ()
        self._strict = False
        self._arranged: Scopes | Units | None = None
        self._reducer: Reducer | None = None
        self.detailed = True

    def serve(self, selection: Selection, reducer: Reducer | None = None) -> None:
        """Take over the parameters of this selection; learned values follow their scopes' names.

        Args:
            selection: The parameters.
            reducer: Joins what the ranks know of them, where ranks hold pieces.
        """
        self._params = selection.params
        self._reducer = reducer
        self.scopes: Scopes | Units = self._scopes_of(selection)
        self.measured = selection.scopes(self._measure_per) if self._measure_per else None

    def judge(self, gradients: Gradients, step: int, scale: float | Tensor = 1.0) -> Outcome:
        """Measure, reduce and limit; once more in wide arithmetic when the fast sum left its range.

        Args:
            gradients: What this rank holds of the gradient of each selected parameter, None where absent.
            step: Steps taken before this one.
            scale: What the gradients are still multiplied by.
        """
        outcome = self._outcome(gradients, self._norms(gradients), step, scale)
        row, sizes = outcome.row, outcome.sizes
        on_device = isinstance(sizes, Tensor) and sizes.device.type != "cpu"
        if on_device and isinstance(row, Row) and pnorm.is_suspect(row.norm, self._method.norm_type):
            outcome = self._outcome(gradients, self._norms(gradients, exact=True), step, scale)
        return outcome

    def anywhere(self, flags: Sequence[bool]) -> Sequence[bool]:
        """For each parameter whether the flag is up on some rank; all ranks ask together."""
        return flags if self._reducer is None else self._reducer.anywhere(flags)

    def write(self, outcome: Outcome) -> None:
        """Scale the gradients as the coefficients say."""
        if not isinstance(outcome.coefs, Tensor):
            return
        coefs = outcome.coefs.unbind()
        index = self._scopes.index
        params: Sequence[Tensor] = self._params
        if len(coefs) > 1 and outcome.coefs.device.type == "cpu":
            # Gradients within their limit are not written.
            changed = outcome.coefs.ne(1.0).tolist()
            touched = [i for i, scope in enumerate(index) if changed[scope]]
            params, index = [params[i] for i in touched], [index[i] for i in touched]
        write.scale_(params, [coefs[scope] for scope in index])

    def excess(self, outcome: Outcome) -> str:
        """Which scope is furthest over its limit, in words."""
        worst = int((outcome.sizes / outcome.limits).nan_to_num(0.0).argmax())
        size, limit = outcome.sizes[worst].item(), outcome.limits[worst].item()
        return f"the size {size:g} of scope {self.scopes.names[worst]!r} is over its limit {limit:g}"

    def learn(self, outcome: Outcome, *, whole: bool | Tensor) -> None:
        """Let the method learn from a step, unless some scope of it was not finite (`whole` is false)."""
        if whole is False or not self._adaptive:
            return
        active = torch.isfinite(outcome.sizes) & (outcome.sizes > 0)
        self._method.update(outcome.sizes, outcome.limits, active if whole is True else active & whole)

    def state_dict(self) -> dict[str, Any]:
        """Learned values by scope name, with their fingerprint."""
        return learned.save(self._method, self._rows_of)

    def load_state_dict(self, state: Mapping[str, Any], *, strict: bool) -> None:
        """Take over learned values; they are arranged and moved to the device at the next step.

        With `strict` it is an error there if none of their scopes is in this run.
        """
        learned.require_same_meaning(self._method, state)
        self._rows_of = tuple(state["scopes"])
        self._method.load_state_dict(state["values"])
        self._arranged = None
        self._strict = strict

    def _outcome(self, gradients: Gradients, local_norms: Tensor, step: int, scale: float | Tensor) -> Outcome:
        method, p = self._method, self._method.norm_type
        known = self._reduced(gradients, [local_norms, self._weights()] if method.needs_weight else [local_norms])
        sizes_of = known.norms[0]
        if isinstance(scale, Tensor) or scale != 1.0:
            sizes_of = sizes_of / scale
        scope_norms = self._scope_norms(sizes_of)
        sizes = scope_norms
        if method.statistic == "rms":
            sizes = scope_norms / self._root_counts(gradients, known, sizes_of)
        if self._adaptive:
            self._arrange(sizes)
        weights = self._scope_norms(known.norms[1]) if method.needs_weight else None
        limits = method.limit(sizes, weights, step)
        if self._adaptive:
            # A scope that was absent so far has learned no limit yet: it must not be frozen at zero.
            limits = torch.where(limits > 0, limits, math.inf)
        measured = self._measured_norms(gradients, known, sizes_of)
        joint = pnorm.joint_norm(sizes_of, p) if len(sizes) != 1 else scope_norms[0]
        on_cpu = sizes.device.type == "cpu"
        # On CPU the host looks for free, and most steps have nothing to be scaled.
        looks = on_cpu and not method.may_grow
        if looks and math.isfinite(norm := joint.item()) and not (sizes > limits).any():
            return Outcome(sizes, limits, None, untouched(norm, limits), measured, known.nothing)
        wide = pnorm.widest(sizes.device)
        coefs = torch.where(torch.isfinite(sizes), method.coef(sizes.to(wide), limits.to(wide)), 1.0)
        row = self._on_host_if_asked(pack(joint, scope_norms, sizes, limits, coefs, p))
        return Outcome(sizes, limits, coefs, row, measured, known.nothing)

    def _scopes_of(self, selection: Selection) -> Scopes | Units:
        self._scopes = selection.scopes(self._method.per)
        return self._scopes

    def _norms(self, gradients: Gradients, *, exact: bool = False) -> Tensor:
        """Local norms of what the scopes are made of: here, of parameters, `(P,)`."""
        if exact:
            return measure.exact_norms(gradients, self._method.norm_type)
        return self._gradients.each(gradients)

    def _weights(self) -> Tensor:
        """The same of the weights, whether they have a gradient or not."""
        return self._weighing.each(self._held())

    def _held(self) -> Gradients:
        """What this rank holds of the parameters."""
        return self._params if self._reducer is None else [layout.local(one) for one in self._params]

    def _reduced(self, gradients: Gradients, norms: Sequence[Tensor], counts: Sequence[Tensor] = ()) -> Reduced:
        """Norms and numbers for each parameter over all ranks, from those on this one."""
        if self._reducer is None:
            return Reduced(tuple(norms), totals=tuple(one.sum() for one in counts))
        present = [gradient is not None for gradient in gradients]
        return self._reducer.reduce(norms, present, self._method.norm_type, counts)

    def _scope_norms(self, local: Tensor) -> Tensor:
        return pnorm.scope_norms(local, self._scopes, self._method.norm_type)

    def _parameter_norms(self, norms: Tensor) -> Tensor:
        return norms

    def _measured_norms(self, gradients: Gradients, known: Reduced, norms: Tensor) -> Tensor | None:
        if self.measured is None:
            return None
        result = pnorm.scope_norms(self._parameter_norms(norms), self.measured, self._method.norm_type)
        present = self._present(gradients, known, result.device).to(result.dtype)
        there = torch.zeros_like(result).index_add_(0, self.measured.index_on(result.device), present)
        return result.where(there > 0, math.nan)

    def _root_counts(self, gradients: Gradients, known: Reduced, norms: Tensor) -> Tensor:
        """Square root of the number of elements of each scope that have a gradient, `(S,)`; at least 1."""
        counts = self._counts(norms) * self._present(gradients, known, norms.device)
        sums = norms.new_zeros(self._scopes.count).index_add_(0, self._scopes.index_on(norms.device), counts)
        return sums.clamp_min(1.0).sqrt()

    def _counts(self, norms: Tensor) -> Tensor:
        """The number of elements of each parameter over all ranks, `(P,)`."""
        numels = tuple(map(Tensor.numel, self._params)) if self._reducer is None else self._reducer.numels
        return pnorm.integers_on(numels, norms.device).to(norms.dtype)

    def _present(self, gradients: Gradients, known: Reduced, device: torch.device) -> Tensor:
        """For each parameter whether there is a gradient of it, `(P,)`."""
        if known.present is not None:
            return known.present > 0
        return pnorm.integers_on(tuple(one is not None for one in gradients), device) > 0

    def _on_host_if_asked(self, row: Tensor) -> Row | Tensor:
        return Row(*row.cpu().tolist()) if self.on_host or row.device.type == "cpu" else row

    def _arrange(self, sizes: Tensor) -> None:
        if self._arranged is not self.scopes:
            learned.arrange(self._method, self._rows_of, self.scopes.names, sizes, strict=self._strict)
            self._rows_of = self.scopes.names
            self._strict = False
            self._arranged = self.scopes
