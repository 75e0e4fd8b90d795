"""Gradients to sizes, limits and coefficients: everything about a step that is known before acting on it."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_gradclip.gradients import norms
from lightning_gradclip.gradients.moments import ripeness, seasoned, surprises
from lightning_gradclip.gradients.norms import Tensors
from lightning_gradclip.gradients.read import Meter, exact_norms
from lightning_gradclip.gradients.reduce import Reduced, Reducer, reduced
from lightning_gradclip.gradients.write import Change, Clamp, ClampBeside, Scale, ScaleAll
from lightning_gradclip.limit.expected import Expected
from lightning_gradclip.limit.learned import Learned
from lightning_gradclip.methods.method import ClipMethod, coefs_of
from lightning_gradclip.methods.numbers import divide
from lightning_gradclip.record.step import Row, row_of, unchanged
from lightning_gradclip.select import layout
from lightning_gradclip.select.parameters import Selection
from lightning_gradclip.select.scopes import Scopes, Units


@dataclass(slots=True)
class Outcome:
    """One step before anything is done about it."""

    sizes: Any  # statistic of each scope, `(S,)`, or the float of the only one
    limits: Any  # the same
    change: Change | None  # how the gradients are to be written; None: not at all
    row: Row | Tensor  # of a step that goes ahead; on the host where the host decides
    measured: Tensor | None  # norms of the scopes that `measure_per` asked for, NaN for absent ones
    nothing: bool  # whether this rank has no gradient, and no other rank has
    each: Tensor | None = None  # norms of the parameters, `(P,)`, where they are known anyway

    @property
    def finite(self) -> float | Tensor:
        """Whether all gradients are finite, 1 or 0, where the row is."""
        return self.row.finite if isinstance(self.row, Row) else self.row[Row._fields.index("finite")]

    @property
    def norm(self) -> float | Tensor:
        """The norm of all gradients, where the row is."""
        return self.row.norm if isinstance(self.row, Row) else self.row[Row._fields.index("norm")]

    def excess(self, scopes: Scopes | Units) -> str:
        """What is furthest over its limit, in words; only of a row on the host."""
        if isinstance(self.change, Clamp):
            clipped = self.row.clipped if isinstance(self.row, Row) else math.nan
            share = "some" if math.isnan(clipped) else f"{clipped:.3g}"
            return f"{share} of the entries lie outside [{self.change.low:g}, {self.change.high:g}]"
        if isinstance(self.change, ClampBeside):
            clipped = self.row.clipped if isinstance(self.row, Row) else math.nan
            return f"{clipped:.3g} of the entries are spikes beside what the optimizer knows of them"
        sizes, limits, worst = self.sizes, self.limits, 0
        if isinstance(sizes, Tensor):
            worst = int((sizes / limits).nan_to_num(0.0).argmax())
            sizes, limits = sizes[worst].item(), limits[worst].item()
        return f"the size {sizes:g} of scope {scopes.names[worst]!r} is over its limit {limits:g}"


@dataclass(slots=True)
class Sizes:
    """What was measured."""

    norms: Tensor  # of the scopes, `(S,)`
    joint: Tensor  # of all together, 0-d
    sizes: Tensor  # the statistic that the method limits, of each scope
    weights: Tensor | None  # the same of the weights, where the method wants it
    measured: Tensor | None  # as in `Outcome`
    known: Reduced  # what all ranks know of it
    each: Tensor | None = None  # the same


class Limiter(ABC):
    """Runs one method over the parameters of one optimizer.

    Args:
        method: The method.
        measure_per: Kind of the scopes whose norms are recorded as well, if any.
        optimizer: Of the parameters, for methods that limit by what it remembers.

    Attributes:
        learned: The method and what it has learned.
        served: The parameters that are limited, on whichever ranks they are.
        scopes: Where the method measures.
        measured: The scopes that `measure_per` asked for.
        tells_groups: Whether some of these scopes are parameter groups.
        adaptive: Whether there is anything to learn.
    """

    served: Selection
    scopes: Scopes | Units
    measured: Scopes | None

    def __init__(self, method: ClipMethod, measure_per: str | None, optimizer: Optimizer | None = None) -> None:
        self._method, self._measure_per = method, measure_per
        self._expected = Expected(method, optimizer) if method.needs_moments else None
        self.learned = Learned(method)
        self._seen: torch.device | None = None
        self.tells_groups = "group" in (method.per, measure_per)
        self.adaptive = self.learned.adaptive

    @final
    def serve(self, selection: Selection, reducer: Reducer | None = None) -> None:
        """Take over these parameters; a reducer joins what the ranks know of them, where ranks hold pieces."""
        self._params, self._names, self._reducer, self._seen = selection.params, selection.names, reducer, None
        self.served = selection if reducer is None else reducer.everything
        self.measured = self.served.scopes(self._measure_per) if self._measure_per else None
        self.scopes = self._serve(self.served)

    @abstractmethod
    def _serve(self, served: Selection) -> Scopes | Units:
        """The scopes of the method among the parameters of all ranks."""

    @abstractmethod
    def judge(
        self, gradients: Tensors, step: int, scale: float | Tensor = 1.0, *, on_host: bool, detailed: bool
    ) -> Outcome:
        """Measure, reduce and limit; once more in wide arithmetic when the fast sum left its range.

        Args:
            gradients: What this rank holds of the gradient of each selected parameter, None where absent.
            step: Steps taken before this one.
            scale: What the gradients are still multiplied by.
            on_host: Whether the host reads the row on devices where that makes it wait.
            detailed: Whether to find out what costs passes of its own.
        """

    @final
    def learn(self, outcome: Outcome, *, whole: bool | Tensor) -> None:
        """Let the method learn from a step, unless some scope of it was not finite (`whole` is false)."""
        if self.adaptive and whole is not False:
            self.learned.learn(outcome.sizes, outcome.limits, whole)

    @final
    def threshold(self, outcome: Outcome, step: int) -> Any:
        """From which size on each scope is clipped, `(S,)`, or the float of the only one; before it is learned from."""
        return self.learned.rule.threshold(outcome.sizes, outcome.limits, step)

    @final
    def anywhere(self, flags: Sequence[bool]) -> Sequence[bool]:
        """For each parameter that is served whether its flag is up on some rank; all ranks ask together."""
        return flags if self._reducer is None else self._reducer.anywhere(flags)

    @final
    def _limited(
        self, gradients: Tensors, found: Sizes, step: int, change: Callable[[Tensor], Change], *, on_host: bool
    ) -> Outcome:
        """From sizes to an outcome, as tensors; `change` is what coefficients, `(S,)`, do to the gradients."""
        method, sizes = self._method, found.sizes
        self.learned.arrange(self.scopes, sizes)
        limits = method.limit(sizes, found.weights, step)
        if self.adaptive:
            # A scope that was absent so far has learned no limit yet: it must not be frozen at zero.
            limits = torch.where(limits > 0, limits, math.inf)
        limit = limits.view(-1)[0] if limits.numel() == 1 else math.nan
        # On CPU the host looks for free, and most steps have nothing to be scaled.
        looks = sizes.is_cpu and not method.may_grow
        if looks and math.isfinite(norm := found.joint.item()) and not (sizes > limits).any():
            row = unchanged(norm, float(limit))
            return Outcome(sizes, limits, None, row, found.measured, found.known.nothing, found.each)
        wide, finite = norms.widest(sizes.device), torch.isfinite(sizes)
        coefs = torch.where(finite, coefs_of(method, sizes.to(wide), limits.to(wide), step), 1.0)
        some = coefs.numel() > 0
        row = row_of(
            found.joint,
            norms.joint_norm(found.norms * coefs, method.norm_type),
            limit=limit,
            coef=coefs.amin() if some else 1.0,
            clipped=((sizes > limits) & finite).to(wide).sum() / self._scopes_there(gradients, found.known),
            changed=(coefs != 1).any(),
        )
        row = read_row(row, on_host)
        return Outcome(sizes, limits, change(coefs), row, found.measured, found.known.nothing, found.each)

    @final
    def _scopes_there(self, gradients: Tensors, known: Reduced) -> int | Tensor:
        """The number of scopes of which some parameter has a gradient, at least 1; without looking at a device."""
        scopes = self.scopes
        if known.present is not None:
            there = (known.present > 0).to(known.present)
            index = scopes.index_on(there.device)
            in_scopes = there[index] if isinstance(scopes, Units) else _any_of(there, index, scopes.count)
            return in_scopes.sum().clamp_min(1.0)
        if type(None) not in set(map(type, gradients)):
            return max(1, scopes.count)
        present = [place for place, one in enumerate(gradients) if one is not None]
        if isinstance(scopes, Units):
            return max(1, sum(scopes.counts[place] for place in present))
        return max(1, len({scopes.index[place] for place in present}))

    @final
    def _is_lost(self, outcome: Outcome) -> bool:
        """Whether the joint norm of a step on a device left the range of the fast sum, as far as the host has seen."""
        on_device = isinstance(outcome.sizes, Tensor) and not outcome.sizes.is_cpu
        return on_device and isinstance(outcome.row, Row) and norms.is_suspect(outcome.row.norm, self._method.norm_type)

    @final
    def _home(self) -> torch.device:
        """Where numbers belong, whichever gradients there are in a step; modules move as a whole."""
        if self._reducer is not None:
            return self._reducer.device
        first = self._params[0].device if self._params else norms.CPU
        if first != self._seen:
            self._seen, self._found = first, norms.home(self._params)
        return self._found

    @final
    def _held(self) -> Tensors:
        """What this rank holds of the parameters."""
        return self._params if self._reducer is None else [layout.local(one) for one in self._params]

    @final
    def _present(self, gradients: Tensors, known: Reduced, like: Tensor) -> Tensor:
        """For each parameter 1 if there is a gradient of it, else 0, `(P,)`."""
        if known.present is not None:
            return (known.present > 0).to(like)
        return norms.integers_on(tuple(int(one is not None) for one in gradients), like.device).to(like.dtype)

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
        index, present = self.measured.index_on(found.device), self._present(gradients, known, found)
        return found.where(_any_of(present, index, len(found)) > 0, math.nan)


def _any_of(flags: Tensor, index: Tensor, count: int) -> Tensor:
    """For each of `count` groups 1 if a flag of it is, else 0, `(count,)`, from flags and the group of each, `(P,)`."""
    return flags.new_zeros(count).index_add_(0, index, flags).clamp_max_(1.0)


def read_row(row: Tensor, on_host: bool) -> Row | Tensor:
    """The row on the host where that is wanted, or costs nothing."""
    return Row(*row.cpu().tolist()) if on_host or row.is_cpu else row


@final
class ScopeLimiter(Limiter):
    """Runs a method over scopes that are made of whole parameters.

    Most runs limit one joint norm. Its handful of numbers costs more as tensors than the gradients of a small model
    cost to measure, so that on CPU rules that are written for floats as well are given floats. Where the gradients are
    on a device, and for rules that want tensors, one scope is as several.
    """

    def __init__(self, method: ClipMethod, measure_per: str | None, optimizer: Optimizer | None = None) -> None:
        super().__init__(method, measure_per, optimizer)
        self._gradients, self._weighing = Meter(method.norm_type), Meter(method.norm_type)
        self.takes_floats = method.takes_floats and method.per == "model"

    def _serve(self, served: Selection) -> Scopes:
        self._scopes = served.scopes(self._method.per)
        self._here = self._scopes.index if self._reducer is None else self._reducer.here(self._scopes.index)
        return self._scopes

    def judge(
        self, gradients: Tensors, step: int, scale: float | Tensor = 1.0, *, on_host: bool, detailed: bool
    ) -> Outcome:
        in_floats = self.takes_floats and self._home() == norms.CPU
        outcome = self._judge_in_floats(gradients, step, scale) if in_floats else None
        if outcome is None:
            sizes = self._sizes(gradients, self._gradients.each(gradients), scale)
            outcome = self._limited(gradients, sizes, step, self._change, on_host=on_host)
            if self._is_lost(outcome):
                sizes = self._sizes(gradients, exact_norms(gradients, self._method.norm_type), scale)
                outcome = self._limited(gradients, sizes, step, self._change, on_host=on_host)
        return outcome

    def _change(self, coefs: Tensor) -> Change:
        return ScaleAll(coefs) if len(coefs) == 1 else Scale(coefs, self._here)

    def _sizes(self, gradients: Tensors, local: Tensor, scale: float | Tensor) -> Sizes:
        method, p = self._method, self._method.norm_type
        local = local.to(self._home())
        vectors = [local, self._weighing.each(self._held())] if method.needs_weight else [local]
        if self._expected is not None:
            vectors += self._surprises(gradients, local, self._expected)
        known = reduced(self._reducer, gradients, vectors, p)
        each = known.norms[0]
        if isinstance(scale, Tensor) or scale != 1.0:
            each = each / scale
        of_scopes = norms.scope_norms(each, self._scopes, p)
        sizes = of_scopes / self._root_counts(gradients, known, each) if method.statistic == "rms" else of_scopes
        if self._expected is not None:
            surprises, counts = (norms.scope_norms(one, self._scopes, p) for one in known.norms[-2:])
            sizes = surprises / scale / counts.clamp_min(1.0)
        weights = norms.scope_norms(known.norms[1], self._scopes, p) if method.needs_weight else None
        joint = of_scopes[0] if len(of_scopes) == 1 else norms.joint_norm(each, p)
        measured = self._measured_norms(gradients, known, each)
        return Sizes(of_scopes, joint, sizes, weights, measured, known, each)

    def _surprises(self, gradients: Tensors, like: Tensor, expected: Expected) -> list[Tensor]:
        """Of each parameter the 2-norm of its gradient beside what is expected, and the root of its count, `(P,)` both.

        Both are 0 where the optimizer does not know enough yet.
        """
        moments = expected.of(self._params, self._names)
        known = seasoned(moments, like, self._method.least_steps)
        there = [one if moment is not None else None for one, moment in zip(gradients, moments, strict=True)]
        counts = norms.integers_on(tuple(0 if one is None else one.numel() for one in there), like.device)
        found = surprises(there, moments, ripeness(moments, like))
        # A mean that is not there has a share of 0, by which nothing is to be divided.
        return [found.where(known > 0, 0.0), counts.to(like).sqrt() * known]

    def _root_counts(self, gradients: Tensors, known: Reduced, like: Tensor) -> Tensor:
        """Square root of the number of elements of each scope that have a gradient, `(S,)`; at least 1."""
        counts = self._counts(like) * self._present(gradients, known, like)
        sums = like.new_zeros(self._scopes.count).index_add_(0, self._scopes.index_on(like.device), counts)
        return sums.clamp_min(1.0).sqrt()

    def _judge_in_floats(self, gradients: Tensors, step: int, scale: float | Tensor) -> Outcome | None:
        """`judge` for a single scope; None unless it is on CPU."""
        norm, known = self._joint(gradients)
        if norm is None:
            return None
        learned, method, measured = self.learned, self.learned.rule, None
        if known is not None:
            measured = self._measured_norms(gradients, known, known.norms[0] / float(scale))
        if scale != 1.0:
            # A GradScaler that never finds a finite step ends at 0.
            norm = float(divide(norm, float(scale)))
        size = norm / self._root_count(gradients, known) if method.statistic == "rms" else norm
        if learned.adaptive:
            learned.arrange_floats(self._scopes)
        limit = method.limit(size, None, step)
        if learned.adaptive and not limit > 0:
            limit = math.inf
        nothing, each = (False, None) if known is None else (known.nothing, known.norms[0])
        over = size > limit and norm < math.inf
        if not (over or method.may_grow):
            return Outcome(size, limit, None, unchanged(norm, limit), measured, nothing, each)
        coef = coefs_of(method, size, limit, step) if math.isfinite(norm) else 1.0
        row = row_of(norm, norm * coef, limit=limit, coef=coef, clipped=float(over), changed=float(coef != 1.0))
        return Outcome(size, limit, ScaleAll(coef) if coef != 1.0 else None, row, measured, nothing, each)

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
