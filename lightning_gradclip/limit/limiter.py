"""Gradients to sizes, limits and coefficients: everything about a step that is known before acting on it."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, final

import torch
from torch import Tensor

from lightning_gradclip.gradients import norms
from lightning_gradclip.gradients.norms import Tensors
from lightning_gradclip.gradients.ranks import Reduced, Reducer, reduced
from lightning_gradclip.gradients.read import Meter, exact_norms
from lightning_gradclip.gradients.write import Change, Clamp, Scale, ScaleAll
from lightning_gradclip.limit.learned import Learned
from lightning_gradclip.methods.method import ClipMethod, coefs_of
from lightning_gradclip.methods.numbers import divide
from lightning_gradclip.record.step import Row, row_of
from lightning_gradclip.select import layout
from lightning_gradclip.select.parameters import Selection
from lightning_gradclip.select.scopes import Scopes, Units


@dataclass(slots=True)
class Outcome:
    """One step before anything is done about it.

    Attributes:
        sizes: Statistic of each scope, `(S,)`, or the float of the only one.
        limits: Limit of each scope, `(S,)`, or the float of the only one.
        change: How the gradients are to be written; None: not at all.
        row: The row of a step that goes ahead; on the host where the host decides.
        measured: Norms of the scopes that `measure_per` asked for, NaN for absent ones.
        nothing: Whether this rank has no gradient, and no other rank has.
    """

    sizes: Any
    limits: Any
    change: Change | None
    row: Row | Tensor
    measured: Tensor | None
    nothing: bool

    @property
    def finite(self) -> float | Tensor:
        """Whether all gradients are finite, 1 or 0, where the row is."""
        return self.row.finite if isinstance(self.row, Row) else self.row[Row._fields.index("finite")]

    def excess(self, scopes: Scopes | Units) -> str:
        """What is furthest over its limit, in words; only of a row on the host."""
        if isinstance(self.change, Clamp):
            clipped = self.row.clipped if isinstance(self.row, Row) else math.nan
            share = "some" if math.isnan(clipped) else f"{clipped:.3g}"
            return f"{share} of the entries lie outside [{self.change.low:g}, {self.change.high:g}]"
        sizes, limits, worst = self.sizes, self.limits, 0
        if isinstance(sizes, Tensor):
            worst = int((sizes / limits).nan_to_num(0.0).argmax())
            sizes, limits = sizes[worst].item(), limits[worst].item()
        return f"the size {sizes:g} of scope {scopes.names[worst]!r} is over its limit {limits:g}"


class Limiter(ABC):
    """Runs one method over the parameters of one optimizer and keeps its learned values in order.

    Args:
        method: The method; changed only by `learn` and `load_state_dict`.
        measure_per: Kind of the scopes whose norms are recorded as well, if any.

    Attributes:
        scopes: Where the method measures.
        measured: The scopes that `measure_per` asked for.
        has_details: Whether there is anything that costs passes of its own.
        adaptive: Whether there is anything to learn.
    """

    has_details: bool = False
    scopes: Scopes | Units
    measured: Scopes | None

    def __init__(self, method: ClipMethod, measure_per: str | None) -> None:
        self._method, self._measure_per = method, measure_per
        self._learned = Learned(method)
        self.adaptive = self._learned.adaptive

    @final
    def serve(self, selection: Selection, reducer: Reducer | None = None) -> None:
        """Take over the parameters of this selection; learned values follow their scopes' names.

        Args:
            selection: The parameters.
            reducer: Joins what the ranks know of them, where ranks hold pieces.
        """
        self._params, self._reducer = selection.params, reducer
        self.measured = selection.scopes(self._measure_per) if self._measure_per else None
        self.scopes = self._serve(selection)

    @abstractmethod
    def judge(
        self,
        gradients: Tensors,
        step: int,
        scale: float | Tensor = 1.0,
        *,
        on_host: bool,
        detailed: bool,
    ) -> Outcome:
        """Measure, reduce and limit; once more in wide arithmetic when the fast sum left its range.

        Args:
            gradients: What this rank holds of the gradient of each selected parameter, None where absent.
            step: Steps taken before this one.
            scale: What the gradients are still multiplied by.
            on_host: Whether the host reads the row on devices where that makes it wait.
            detailed: Whether to find out what costs passes of its own.
        """

    @abstractmethod
    def _serve(self, selection: Selection) -> Scopes | Units:
        """The scopes of the method among these parameters."""

    @final
    def learn(self, outcome: Outcome, *, whole: bool | Tensor) -> None:
        """Let the method learn from a step, unless some scope of it was not finite (`whole` is false)."""
        if self.adaptive and whole is not False:
            self._learned.learn(outcome.sizes, outcome.limits, whole)

    @final
    def anywhere(self, flags: Sequence[bool]) -> Sequence[bool]:
        """For each parameter whether the flag is up on some rank; all ranks ask together."""
        return flags if self._reducer is None else self._reducer.anywhere(flags)

    @final
    def state_dict(self) -> dict[str, Any]:
        """Learned values by scope name, with their fingerprint."""
        return self._learned.state_dict()

    @final
    def load_state_dict(self, state: Mapping[str, Any], *, strict: bool) -> None:
        """Take over learned values; they are arranged and moved to the device at the next step.

        With `strict` it is an error there if none of their scopes is in this run.
        """
        self._learned.load_state_dict(state, strict=strict)

    @final
    def _held(self) -> Tensors:
        """What this rank holds of the parameters."""
        return self._params if self._reducer is None else [layout.local(one) for one in self._params]

    @final
    def _present(self, gradients: Tensors, known: Reduced, device: torch.device) -> Tensor:
        """For each parameter whether there is a gradient of it, `(P,)`."""
        if known.present is not None:
            return known.present > 0
        return norms.integers_on(tuple(int(one is not None) for one in gradients), device) > 0

    @final
    def _counts(self, like: Tensor) -> Tensor:
        """The number of entries of each parameter over all ranks, `(P,)`."""
        numels = tuple(map(Tensor.numel, self._params)) if self._reducer is None else self._reducer.numels
        return norms.integers_on(numels, like.device).to(like.dtype)

    @final
    def _measured_norms(self, gradients: Tensors, known: Reduced, of_parameters: Tensor) -> Tensor | None:
        """Norms of the scopes that `measure_per` asked for, from those of the parameters, `(P,)`."""
        if self.measured is None:
            return None
        found = norms.scope_norms(of_parameters, self.measured, self._method.norm_type)
        present = self._present(gradients, known, found.device).to(found.dtype)
        there = torch.zeros_like(found).index_add_(0, self.measured.index_on(found.device), present)
        return found.where(there > 0, math.nan)


@dataclass(slots=True)
class Sizes:
    """What was measured in one step.

    Attributes:
        norms: Of each scope, `(S,)`.
        joint: Of all together, 0-d.
        sizes: The method's statistic of each scope, `(S,)`.
        weights: Sizes of the weights of each scope, `(S,)`, where the method wants them.
        measured: As in `Outcome`; so is `nothing`.
    """

    norms: Tensor
    joint: Tensor
    sizes: Tensor
    weights: Tensor | None
    measured: Tensor | None
    nothing: bool


class Finding(Protocol):
    """Measures the gradients of a step, with `exact` in wide arithmetic."""

    def __call__(self, *, exact: bool) -> Sizes: ...


def limited(
    find: Finding,
    learned: Learned,
    scopes: Scopes | Units,
    step: int,
    change: Callable[[Tensor], Change],
    *,
    on_host: bool,
) -> Outcome:
    """From sizes to an outcome, as tensors.

    Args:
        find: Measures.
        learned: The method and what it has learned.
        scopes: Where it measures.
        step: Steps taken before this one.
        change: What coefficients, `(S,)`, do to the gradients.
        on_host: Whether the host reads the row on devices where that makes it wait.
    """
    outcome = _limited(find(exact=False), learned, scopes, step, change, on_host=on_host)
    on_device = not outcome.sizes.is_cpu
    if on_device and isinstance(outcome.row, Row) and norms.is_suspect(outcome.row.norm, learned.method.norm_type):
        outcome = _limited(find(exact=True), learned, scopes, step, change, on_host=on_host)
    return outcome


def _limited(
    found: Sizes,
    learned: Learned,
    scopes: Scopes | Units,
    step: int,
    change: Callable[[Tensor], Change],
    *,
    on_host: bool,
) -> Outcome:
    method, sizes = learned.method, found.sizes
    learned.arrange(scopes, sizes)
    limits = method.limit(sizes, found.weights, step)
    if learned.adaptive:
        # A scope that was absent so far has learned no limit yet: it must not be frozen at zero.
        limits = torch.where(limits > 0, limits, math.inf)
    limit = limits[0] if limits.numel() == 1 else math.nan
    # On CPU the host looks for free, and most steps have nothing to be scaled.
    looks = sizes.is_cpu and not method.may_grow
    if looks and math.isfinite(norm := found.joint.item()) and not (sizes > limits).any():
        row: Row | Tensor = row_of(norm, norm, limit=float(limit))
        return Outcome(sizes, limits, None, row, found.measured, found.nothing)
    wide = norms.widest(sizes.device)
    finite = torch.isfinite(sizes)
    coefs = torch.where(finite, coefs_of(method, sizes.to(wide), limits.to(wide), step), 1.0)
    some = coefs.numel() > 0
    row = row_of(
        found.joint,
        norms.joint_norm(found.norms * coefs, method.norm_type),
        limit=limit,
        coef=coefs.amin() if some else 1.0,
        clipped=((sizes > limits) & finite).to(wide).mean() if some else 0.0,
        changed=(coefs != 1).any(),
    )
    if on_host or row.is_cpu:
        row = Row(*row.tolist())
    return Outcome(sizes, limits, change(coefs), row, found.measured, found.nothing)


@final
class ScopeLimiter(Limiter):
    """Runs a method over scopes that are made of whole parameters.

    Most runs limit one joint norm. Its handful of numbers costs more as tensors than the gradients of a small model
    cost to measure, so that on CPU rules that are written for floats as well are given floats. Where the gradients are
    on a device, and for rules that want tensors, one scope is as several.

    Attributes:
        takes_floats: Whether the rule is given floats on CPU.
    """

    def __init__(self, method: ClipMethod, measure_per: str | None) -> None:
        super().__init__(method, measure_per)
        self._gradients, self._weighing = Meter(method.norm_type), Meter(method.norm_type)
        self.takes_floats = method.takes_floats and method.per == "model"

    def _serve(self, selection: Selection) -> Scopes:
        self._scopes = selection.scopes(self._method.per)
        return self._scopes

    def judge(
        self, gradients: Tensors, step: int, scale: float | Tensor = 1.0, *, on_host: bool, detailed: bool
    ) -> Outcome:
        if self.takes_floats:
            outcome = self._judge_in_floats(gradients, step, scale)
            if outcome is not None:
                return outcome

        def find(*, exact: bool) -> Sizes:
            p = self._method.norm_type
            return self._sizes(
                gradients, exact_norms(gradients, p) if exact else self._gradients.each(gradients), scale
            )

        return limited(find, self._learned, self._scopes, step, self._change, on_host=on_host)

    def _change(self, coefs: Tensor) -> Change:
        return ScaleAll(coefs) if len(coefs) == 1 else Scale(coefs, self._scopes.index)

    def _sizes(self, gradients: Tensors, local: Tensor, scale: float | Tensor) -> Sizes:
        method, p = self._method, self._method.norm_type
        vectors = [local, self._weighing.each(self._held())] if method.needs_weight else [local]
        known = reduced(self._reducer, gradients, vectors, p)
        each = known.norms[0]
        if isinstance(scale, Tensor) or scale != 1.0:
            each = each / scale
        of_scopes = norms.scope_norms(each, self._scopes, p)
        sizes = of_scopes / self._root_counts(gradients, known, each) if method.statistic == "rms" else of_scopes
        weights = norms.scope_norms(known.norms[1], self._scopes, p) if method.needs_weight else None
        joint = of_scopes[0] if len(of_scopes) == 1 else norms.joint_norm(each, p)
        measured = self._measured_norms(gradients, known, each)
        return Sizes(of_scopes, joint, sizes, weights, measured, known.nothing)

    def _root_counts(self, gradients: Tensors, known: Reduced, like: Tensor) -> Tensor:
        """Square root of the number of elements of each scope that have a gradient, `(S,)`; at least 1."""
        counts = self._counts(like) * self._present(gradients, known, like.device)
        sums = like.new_zeros(self._scopes.count).index_add_(0, self._scopes.index_on(like.device), counts)
        return sums.clamp_min(1.0).sqrt()

    def _judge_in_floats(self, gradients: Tensors, step: int, scale: float | Tensor) -> Outcome | None:
        """`judge` for a single scope; None unless it is on CPU."""
        norm, known = self._joint(gradients)
        if norm is None:
            return None
        method, learned, measured = self._learned.rule, self._learned, None
        if known is not None:
            measured = self._measured_norms(gradients, known, known.norms[0] / scale)
        if scale != 1.0:
            # A GradScaler that never finds a finite step ends at 0.
            norm = float(divide(norm, float(scale)))
        size = norm / self._root_count(gradients, known) if method.statistic == "rms" else norm
        if learned.adaptive:
            learned.arrange_floats(self._scopes)
        limit = method.limit(size, None, step)
        if learned.adaptive and not limit > 0:
            limit = math.inf
        nothing = known is not None and known.nothing
        over = size > limit and norm < math.inf
        if not (over or method.may_grow):
            return Outcome(size, limit, None, row_of(norm, norm, limit=limit), measured, nothing)
        coef = coefs_of(method, size, limit, step) if math.isfinite(norm) else 1.0
        change = ScaleAll(coef) if coef != 1.0 else None
        row = row_of(norm, norm * coef, limit=limit, coef=coef, clipped=float(over), changed=float(coef != 1.0))
        return Outcome(size, limit, change, row, measured, nothing)

    def _joint(self, gradients: Tensors) -> tuple[float | None, Reduced | None]:
        """The joint norm, None unless on CPU, and where those of the parameters are wanted too, what is known."""
        if self._reducer is None and self.measured is None:
            return self._gradients.joint(gradients), None
        # Whether a rank goes this way must not depend on the gradients that it happens to have.
        on_cpu = self._reducer is None or self._reducer.device.type == "cpu"
        each = self._gradients.each_on_host(gradients) if on_cpu else None
        if each is None:
            return None, None
        known = reduced(self._reducer, gradients, [each], self._method.norm_type)
        return norms.joint_norm(known.norms[0], self._method.norm_type).item(), known

    def _root_count(self, gradients: Tensors, known: Reduced | None) -> float:
        if known is None:
            return math.sqrt(max(1, self._gradients.count(gradients)))
        return self._root_counts(gradients, known, known.norms[0]).item()
