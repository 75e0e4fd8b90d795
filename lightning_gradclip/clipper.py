"""The pipeline without a framework: select, measure, reduce, guard, limit, act, record."""

import copy
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer

from lightning_gradclip import amp, checks, learned, measure, nonfinite, reduce, write
from lightning_gradclip.methods.method import ClipMethod, Unlimited
from lightning_gradclip.nonfinite import Skips
from lightning_gradclip.policy import Policy
from lightning_gradclip.select import Names, Scopes, Selection
from lightning_gradclip.stats import Outcome, Row, StepStats, pack
from lightning_gradclip.window import Window

_MEASURES = ("group", "layer", "parameter")


class Clipper:
    """Clips the gradients of one optimizer and keeps statistics, in any training loop.

    Args:
        named_parameters: Names and parameters, as from `model.named_parameters()`; the patterns are checked against
            these names.
        method: How to clip; None measures only. The clipper works on a copy of its own.
        optimizer: The optimizer whose parameters are served, groups added later included; None: every named
            parameter, as one group.
        action: "clip"; "skip" drops the step when any scope is over its limit; "observe" reports what would happen
            and writes nothing.
        nonfinite: On NaN or infinite gradients "skip" drops the step, "zero" replaces the entries, "raise" raises
            and "ignore" goes on. None: "skip" where the clipper writes, "ignore" where it observes.
        max_consecutive_skips: How many steps in a row may be dropped; None sets no bound.
        include: Shell pattern or patterns over parameter names, admitting parameters.
        exclude: Pattern or patterns taken out of what `include` admits.
        measure_per: "group", "layer" or "parameter": also record the norms of these scopes.
        fold: Hand the coefficient to a fused optimizer; not available in this version.

    Raises:
        TypeError: If an argument is of the wrong kind.
        ValueError: If an argument is out of range, or a pattern matches no parameter.
        NotImplementedError: If a parameter is sharded over ranks.
    """

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, Tensor]],
        method: ClipMethod | None,
        *,
        optimizer: Optimizer | None = None,
        action: str = "clip",
        nonfinite: str | None = None,
        max_consecutive_skips: int | None = 20,
        include: str | Sequence[str] = "*",
        exclude: str | Sequence[str] = (),
        measure_per: str | None = None,
        fold: bool = False,
    ) -> None:
        self._policy = Policy.of(method, action, nonfinite, max_consecutive_skips)
        self._method = Unlimited() if method is None else copy.deepcopy(method)
        self._norm_type = self._method.norm_type
        check_options(measure_per=measure_per, fold=fold)
        self._measure_per = measure_per
        self._optimizer = optimizer
        self._names = Names(
            named_parameters,
            checks.patterns("include", include),
            checks.patterns("exclude", exclude),
        )
        self._steps = 0
        self._window = Window()
        self._skips = Skips(self._policy.max_consecutive_skips)
        self._learned_scopes: tuple[str, ...] = ()
        self._arranged: Scopes | None = None
        self._select()

    @property
    def optimizer(self) -> Optimizer | None:
        """The optimizer that is served."""
        return self._optimizer

    def step(self, scaler: GradScaler | None = None) -> StepStats:
        """Clip once; call it between `loss.backward()` and `optimizer.step()`.

        Args:
            scaler: The GradScaler that scaled the loss, if any. Gradients that it has not unscaled yet are unscaled
                here, as `scaler.unscale_(optimizer)` does.

        Returns:
            What was done. A step in which no selected parameter has a gradient changes and records nothing.

        Raises:
            FloatingPointError: If gradients are not finite under nonfinite="raise", or more than
                `max_consecutive_skips` steps in a row were dropped.
        """
        with torch.no_grad():
            if self._groups_changed():
                self._select()
            scale = self._unscale(scaler)
            gradients = [parameter.grad for parameter in self._selection.params]
            if all(gradient is None for gradient in gradients):
                return self._nothing()
            outcome = self._judge(gradients, scale)
            return self._act(outcome, overflows=amp.is_enabled(scaler))

    def metrics(self) -> dict[str, float]:
        """The window since the last call, aggregated over all its steps, and cleared.

        Returns:
            `norm`, `norm_clipped` (means over the finite steps), `norm_max`, `limit` (with one finite limit),
            `coef_min`, `clip_rate` (share of the steps that changed anything), `skipped` and `nonfinite` (counts since
            the start), `overflows` (the same, under a GradScaler), `norm/<scope>` with `measure_per`. Without a
            finite step the norms are left out.
        """
        result = self._window.compute()
        self._window.clear()
        return result

    def peek(self) -> dict[str, float]:
        """`metrics()` without clearing the window."""
        return self._window.compute()

    @property
    def has_news(self) -> bool:
        """Whether a step was recorded since the last `metrics()`."""
        return not self._window.is_empty

    def state_dict(self) -> dict[str, Any]:
        """Step, counters, open window and learned values; tensors and plain types only, no configuration."""
        return {
            "step": self._steps,
            "skips_in_a_row": self._skips.in_a_row,
            "window": self._window.state_dict(),
            "learned": learned.save(self._method, self._learned_scopes),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` left off; learned values find their scopes by name at the next step.

        Raises:
            ValueError: If the learned values belong to a differently configured method.
        """
        learned.require_same_meaning(self._method, state["learned"])
        self._steps = state["step"]
        self._skips.in_a_row = state["skips_in_a_row"]
        self._window.load_state_dict(state["window"])
        self._learned_scopes = tuple(state["learned"]["scopes"])
        self._method.load_state_dict(state["learned"]["values"])
        self._arranged = None

    def _groups_changed(self) -> bool:
        if self._optimizer is None:
            return False
        groups = [group["params"] for group in self._optimizer.param_groups]
        return len(groups) != len(self._seen) or any(
            now is not then or len(now) != count for now, (then, count) in zip(groups, self._seen, strict=True)
        )

    def _select(self) -> None:
        groups = [] if self._optimizer is None else self._optimizer.param_groups
        self._seen = [(group["params"], len(group["params"])) for group in groups]
        self._selection: Selection = self._names.select(self._optimizer)
        reduce.require_whole(zip(self._selection.names, self._selection.params, strict=True))
        self._scopes = self._selection.scopes(self._method.per)
        self._measured = self._selection.scopes(self._measure_per) if self._measure_per else None

    def _unscale(self, scaler: GradScaler | None) -> float | Tensor:
        """Unscale the gradients, or where nothing may be written say what they are still multiplied by."""
        if scaler is None or self._optimizer is None or not scaler.is_enabled():
            return 1.0
        if not self._policy.writes:
            return amp.pending_scale(scaler, self._optimizer)
        amp.unscale_(scaler, self._optimizer)
        return 1.0

    def _judge(self, gradients: Sequence[Tensor | None], scale: float | Tensor) -> Outcome:
        """Measure, reduce and limit; once more in wide arithmetic when the fast sum left its range."""
        outcome = self._outcome(gradients, measure.parameter_norms(gradients, self._norm_type), scale)
        row, device = outcome.row, outcome.norms.device
        if device.type != "cpu" and isinstance(row, Row) and measure.is_suspect(row.norm, self._norm_type):
            outcome = self._outcome(gradients, measure.exact_norms(gradients, self._norm_type), scale)
        return outcome

    def _outcome(self, gradients: Sequence[Tensor | None], local_norms: Tensor, scale: float | Tensor = 1.0) -> Outcome:
        method, p = self._method, self._norm_type
        norms = reduce.global_sizes(local_norms)
        if scale != 1.0:
            norms = norms / scale
        scope_norms = measure.scope_norms(norms, self._scopes, p)
        sizes = scope_norms
        if method.statistic == "rms":
            sizes = scope_norms / self._root_counts(gradients, norms)
        self._arrange(sizes)
        weight = self._weights() if method.needs_weight else None
        limits = method.limit(sizes, weight, self._steps)
        if method.adaptive:
            # A scope that was absent so far has learned no limit yet: it must not be frozen at zero.
            limits = torch.where(limits > 0, limits, math.inf)
        coefs = torch.where(torch.isfinite(sizes), method.coef(sizes, limits), 1.0)
        row: Row | Tensor = pack(measure.joint_norm(norms, p), scope_norms, sizes, limits, coefs, p)
        if row.device.type == "cpu" or self._policy.decides_on_host:
            row = Row(*row.tolist())
        return Outcome(norms, sizes, limits, coefs, row, self._measured_norms(gradients, norms))

    def _act(self, outcome: Outcome, *, overflows: bool) -> StepStats:
        """Guard, write, learn and record. Only a host row can stop or change what happens next."""
        self._steps += 1
        row = outcome.row
        if isinstance(row, Tensor):
            self._write(outcome)
            flags = row[Row._fields.index("finite")]
            self._learn(outcome, whole=flags != 0)
            if overflows:
                row[Row._fields.index("overflow")] = 1 - flags
            return self._record(outcome, row)
        if not row.finite and overflows:
            # The scaler calibrates itself by overflowing: it drops the step, and nothing is to be learned from it.
            return self._record(outcome, row._replace(skipped=1.0, changed=0.0, overflow=1.0))
        if not row.finite and self._policy.nonfinite != "ignore":
            return self._mend(outcome, row)
        if self._policy.action == "skip" and row.clipped:
            dropped = row._replace(skipped=1.0, changed=1.0, coef=0.0, norm_clipped=0.0)
            self._learn(outcome, whole=bool(row.finite))
            return self._drop(outcome, dropped, f"norm {row.norm:g} is over its limit {row.limit:g}")
        if row.changed:
            self._write(outcome)
        self._skips.reset()
        self._learn(outcome, whole=bool(row.finite))
        return self._record(outcome, row)

    def _mend(self, outcome: Outcome, row: Row) -> StepStats:
        """Apply `nonfinite` to a step with non-finite gradients; nothing is learned from such a step."""
        policy = self._policy.nonfinite
        culprits = nonfinite.offenders(self._selection.names, outcome.norms.tolist())
        if policy == "raise":
            self._record(outcome, row)
            raise nonfinite.error(self._steps - 1, culprits)
        if policy == "skip":
            row = row._replace(skipped=1.0, changed=1.0, coef=0.0, norm_clipped=0.0)
            return self._drop(outcome, row, f"non-finite gradients in {culprits}")
        write.zero_nonfinite_(self._selection.params)
        gradients = [parameter.grad for parameter in self._selection.params]
        outcome = self._outcome(gradients, measure.parameter_norms(gradients, self._norm_type))
        row = outcome.row if isinstance(outcome.row, Row) else row
        if self._policy.action == "skip" and row.clipped:
            row = row._replace(finite=0.0, skipped=1.0, changed=1.0, coef=0.0, norm_clipped=0.0)
            return self._drop(outcome, row, f"norm {row.norm:g} is over its limit {row.limit:g}")
        if row.changed:
            self._write(outcome)
        self._skips.reset()
        return self._record(outcome, row._replace(finite=0.0, changed=1.0))

    def _write(self, outcome: Outcome) -> None:
        if not self._policy.writes:
            return
        coefs = outcome.coefs.unbind()
        by_parameter = [coefs[scope] for scope in self._scopes.index]
        params: Sequence[Tensor] = self._selection.params
        if len(coefs) > 1 and outcome.coefs.device.type == "cpu":
            # Gradients within their limit are not written.
            touched = [i for i, coef in enumerate(by_parameter) if coef != 1]
            params, by_parameter = [params[i] for i in touched], [by_parameter[i] for i in touched]
        write.scale_(params, by_parameter)

    def _drop(self, outcome: Outcome, row: Row, reason: str) -> StepStats:
        write.drop_(self._selection.owned)
        stats = self._record(outcome, row)
        self._skips.add(self._steps - 1, reason, warn=reduce.is_first_rank())
        return stats

    def _learn(self, outcome: Outcome, *, whole: bool | Tensor) -> None:
        if whole is False or not self._method.adaptive:
            return
        active = torch.isfinite(outcome.sizes) & (outcome.sizes > 0)
        self._method.update(outcome.sizes, outcome.limits, active if whole is True else active & whole)

    def _record(self, outcome: Outcome, row: Row | Tensor) -> StepStats:
        self._window.add(row)
        if self._measured is not None and outcome.measured is not None:
            self._window.add_scopes(self._measured.names, outcome.measured)
        return StepStats(row, outcome.sizes, outcome.limits, self._scopes.names)

    def _nothing(self) -> StepStats:
        sizes = torch.zeros(len(self._scopes.names), dtype=torch.float64)
        limits = torch.full_like(sizes, math.inf)
        row = Row(0.0, 0.0, math.inf if len(sizes) == 1 else math.nan, 1.0, 0.0, 1.0, 0.0, 0.0, 0.0)
        return StepStats(row, sizes, limits, self._scopes.names)

    def _measured_norms(self, gradients: Sequence[Tensor | None], norms: Tensor) -> Tensor | None:
        """Norms of the `measure_per` scopes, NaN where a scope has no gradient."""
        if self._measured is None:
            return None
        members = self._measured.members
        absent = [s for s, ones in enumerate(members) if all(gradients[i] is None for i in ones)]
        result = measure.scope_norms(norms, self._measured, self._norm_type)
        if absent:
            result = result.clone()
            result[absent] = math.nan
        return result

    def _root_counts(self, gradients: Sequence[Tensor | None], norms: Tensor) -> Tensor:
        """Square root of the number of elements of each scope that have a gradient, `(S,)`; at least 1."""
        counts = [0 if gradient is None else gradient.numel() for gradient in gradients]
        sums = [max(1, sum(counts[i] for i in members)) for members in self._scopes.members]
        return torch.tensor([math.sqrt(one) for one in sums], dtype=norms.dtype, device=norms.device)

    def _weights(self) -> Tensor:
        norms = reduce.global_sizes(measure.parameter_norms(self._selection.params, self._norm_type))
        return measure.scope_norms(norms, self._scopes, self._norm_type)

    def _arrange(self, sizes: Tensor) -> None:
        if self._arranged is not self._scopes:
            learned.arrange(self._method, self._learned_scopes, self._scopes.names, sizes)
            self._learned_scopes = self._scopes.names
            self._arranged = self._scopes


def check_options(*, measure_per: str | None, fold: bool) -> None:
    """Check what a clipper takes besides its policy and its patterns."""
    if measure_per is not None:
        checks.choice(
            "measure_per",
            measure_per,
            _MEASURES,
            remedy="None measures the method's own scope only",
        )
    if checks.flag("fold", fold):
        raise ValueError("fold=True is not available in this version; use fold=False, which writes the gradients")
