"""Gradients to sizes, limits and coefficients: everything about a step that is known before acting on it."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_gradclip import learned, measure, pnorm, reduce, write
from lightning_gradclip.measure import Meter
from lightning_gradclip.methods.method import ClipMethod
from lightning_gradclip.scopes import Scopes, Units
from lightning_gradclip.select import Selection
from lightning_gradclip.stats import Row, pack, untouched

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
    """

    sizes: Any
    limits: Any
    coefs: Tensor | float | None
    row: Tensor | Row
    measured: Tensor | None


class Limiter:
    """Runs one method over the parameters of one optimizer and keeps its learned values in order.

    This one serves scopes made of whole parameters.

    Args:
        method: The method; changed only by `learn` and `load_state_dict`.
        measure_per: Kind of the scopes whose norms are recorded as well, if any.
        on_host: Whether the host reads the packed row on devices where that is a synchronisation.

    Attributes:
        on_host: As above.
        detailed: Whether to find out at each step what costs passes of its own.
    """

    def __init__(self, method: ClipMethod, measure_per: str | None, *, on_host: bool) -> None:
        self._method = method
        self._adaptive = method.adaptive
        self._measure_per = measure_per
        self._gradients, self._weighing = Meter(method.norm_type), Meter(method.norm_type)
        self.on_host = on_host
        self._rows_of: tuple[str, ...] = ()
        self._strict = False
        self._arranged: Scopes | Units | None = None
        self.detailed = True

    def serve(self, selection: Selection) -> None:
        """Take over the parameters of this selection; learned values follow their scopes' names."""
        self._params = selection.params
        self.scopes: Scopes | Units = self._scopes_of(selection)
        self.measured = selection.scopes(self._measure_per) if self._measure_per else None

    def judge(self, gradients: Gradients, step: int, scale: float | Tensor = 1.0) -> Outcome:
        """Measure, reduce and limit; once more in wide arithmetic when the fast sum left its range.

        Args:
            gradients: Gradient of each selected parameter, None where absent.
            step: Steps taken before this one.
            scale: What the gradients are still multiplied by.
        """
        outcome = self._outcome(gradients, self._norms(gradients), step, scale)
        row, sizes = outcome.row, outcome.sizes
        on_device = isinstance(sizes, Tensor) and sizes.device.type != "cpu"
        if on_device and isinstance(row, Row) and pnorm.is_suspect(row.norm, self._method.norm_type):
            outcome = self._outcome(gradients, self._norms(gradients, exact=True), step, scale)
        return outcome

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
        sizes_of = reduce.global_sizes(local_norms)
        if isinstance(scale, Tensor) or scale != 1.0:
            sizes_of = sizes_of / scale
        scope_norms = self._scope_norms(sizes_of)
        sizes = scope_norms
        if method.statistic == "rms":
            sizes = scope_norms / self._root_counts(gradients, sizes_of)
        if self._adaptive:
            self._arrange(sizes)
        weights = self._weights() if method.needs_weight else None
        limits = method.limit(sizes, weights, step)
        if self._adaptive:
            # A scope that was absent so far has learned no limit yet: it must not be frozen at zero.
            limits = torch.where(limits > 0, limits, math.inf)
        measured = self._measured_norms(gradients, sizes_of)
        joint = pnorm.joint_norm(sizes_of, p) if len(sizes) != 1 else scope_norms[0]
        on_cpu = sizes.device.type == "cpu"
        # On CPU the host looks for free, and most steps have nothing to be scaled.
        looks = on_cpu and not method.may_grow
        if looks and math.isfinite(norm := joint.item()) and not (sizes > limits).any():
            return Outcome(sizes, limits, None, untouched(norm, limits), measured)
        wide = pnorm.widest(sizes.device)
        coefs = torch.where(torch.isfinite(sizes), method.coef(sizes.to(wide), limits.to(wide)), 1.0)
        row = self._on_host_if_asked(pack(joint, scope_norms, sizes, limits, coefs, p))
        return Outcome(sizes, limits, coefs, row, measured)

    def _scopes_of(self, selection: Selection) -> Scopes | Units:
        self._scopes = selection.scopes(self._method.per)
        return self._scopes

    def _norms(self, tensors: Gradients, *, exact: bool = False) -> Tensor:
        """Local norms of what the scopes are made of: here, of whole parameters, `(P,)`."""
        if exact:
            return measure.exact_norms(tensors, self._method.norm_type)
        return (self._weighing if tensors is self._params else self._gradients).each(tensors)

    def _scope_norms(self, local: Tensor) -> Tensor:
        return pnorm.scope_norms(local, self._scopes, self._method.norm_type)

    def _parameter_norms(self, local: Tensor) -> Tensor:
        return local

    def _measured_norms(self, gradients: Gradients, local: Tensor) -> Tensor | None:
        if self.measured is None:
            return None
        members = self.measured.members
        absent = [scope for scope, ones in enumerate(members) if all(gradients[i] is None for i in ones)]
        result = pnorm.scope_norms(self._parameter_norms(local), self.measured, self._method.norm_type)
        return result.index_fill(0, pnorm.integers_on(tuple(absent), result.device), math.nan) if absent else result

    def _root_counts(self, gradients: Gradients, local: Tensor) -> Tensor:
        """Square root of the number of elements of each scope that have a gradient, `(S,)`; at least 1."""
        counts = [0 if gradient is None else gradient.numel() for gradient in gradients]
        sums = tuple(max(1, sum(counts[i] for i in ones)) for ones in self._scopes.members)
        return pnorm.integers_on(sums, local.device).to(local.dtype).sqrt()

    def _weights(self) -> Tensor:
        """The norm of the weights of each scope, `(S,)`, whether they have a gradient or not."""
        return self._scope_norms(reduce.global_sizes(self._norms(self._params)))

    def _on_host_if_asked(self, row: Tensor) -> Row | Tensor:
        return Row(*row.cpu().tolist()) if self.on_host or row.device.type == "cpu" else row

    def _arrange(self, sizes: Tensor) -> None:
        if self._arranged is not self.scopes:
            learned.arrange(self._method, self._rows_of, self.scopes.names, sizes, strict=self._strict)
            self._rows_of = self.scopes.names
            self._strict = False
            self._arranged = self.scopes
