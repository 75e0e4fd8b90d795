"""From what a step would do to what is done: guard, write, learn. The only place that decides about a step."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer

from lightning_gradclip.act import scaler as scaling
from lightning_gradclip.act import skips as words
from lightning_gradclip.act.fold import Fold
from lightning_gradclip.act.policy import Policy
from lightning_gradclip.act.skips import Skips
from lightning_gradclip.gradients import ranks, write
from lightning_gradclip.limit.limiter import Limiter, Outcome
from lightning_gradclip.record.step import Row, amended, dropped, overflowing
from lightning_gradclip.select.parameters import Selection


@dataclass(slots=True)
class Verdict:
    """What was done.

    Attributes:
        outcome: What was measured, once more where entries were replaced.
        row: What is to be recorded.
        then: What is to follow once it is recorded, and may raise.
    """

    outcome: Outcome
    row: Row | Tensor
    then: Callable[[], None] | None = None


class Actor:
    """Acts on the gradients of one optimizer as its policy says.

    Args:
        policy: What may be done.
        limiter: Measures once more where entries were replaced, and learns.
        skips: Counts dropped steps.
        fold: Takes coefficients instead of the gradients, if any.
        optimizer: The optimizer that is served, if any.
    """

    def __init__(
        self, policy: Policy, limiter: Limiter, skips: Skips, fold: Fold | None, optimizer: Optimizer | None
    ) -> None:
        self._policy, self._writes = policy, policy.writes
        self._limiter = limiter
        self._skips = skips
        self._fold = fold
        self._optimizer = optimizer

    def serve(self, selection: Selection) -> None:
        """Take over the parameters of this selection."""
        self._selection = selection
        if self._fold is not None:
            self._fold.require_all(selection)

    def act(self, outcome: Outcome, step: int, scaler: GradScaler | None, *, detailed: bool) -> Verdict:
        """Guard, write and learn. Only a host row can stop or change what happens next.

        Args:
            outcome: What was measured.
            step: Steps taken before this one.
            scaler: An enabled scaler that steps the optimizer, if any.
            detailed: Whether to find out what costs passes of its own, where it is measured once more.
        """
        row = outcome.row
        if isinstance(row, Tensor):
            return self._act_on_device(outcome, row, scaled=scaler is not None)
        if not row.finite and scaler is not None:
            # The scaler calibrates itself by overflowing: it drops the step, and nothing is to be learned from it.
            return Verdict(outcome, overflowing(row))
        if not row.finite and self._policy.nonfinite != "ignore":
            return self._mend(outcome, row, step, detailed=detailed)
        whole = bool(row.finite)
        if self._policy.action == "skip" and row.clipped:
            self._limiter.learn(outcome, whole=whole)
            if scaler is not None and self._optimizer is not None:
                # A scaler without any gradient to look at refuses to step.
                scaling.unscale_(scaler, self._optimizer)
            return self._drop(outcome, row, self._excess, step, scaled=scaler is not None)
        if row.changed:
            self._write(outcome, None, scaled=scaler is not None)
        if self._skips.in_a_row or self._skips.noted is not None:
            self._skips.reset()
        if self._limiter.adaptive:
            self._limiter.learn(outcome, whole=whole)
        return Verdict(outcome, row)

    def _act_on_device(self, outcome: Outcome, row: Tensor, *, scaled: bool) -> Verdict:
        """The same without looking: what is decided, the device decides."""
        finite, clipped = (row[Row._fields.index(name)] for name in ("finite", "clipped"))
        drops = None
        if self._fold is not None and not scaled:
            drops = 1 - finite if self._policy.nonfinite == "skip" else torch.zeros_like(finite)
            if self._policy.action == "skip":
                drops = torch.maximum(drops, (clipped > 0).to(drops))
            self._skips.note(drops)
            row = dropped(row, drops)
        self._write(outcome, drops, scaled=scaled)
        self._limiter.learn(outcome, whole=finite != 0)
        return Verdict(outcome, overflowing(row) if scaled else row)

    def _mend(self, outcome: Outcome, row: Row, step: int, *, detailed: bool) -> Verdict:
        """Apply `nonfinite` to a step with non-finite gradients; nothing is learned from such a step."""
        if self._policy.nonfinite == "raise":
            return Verdict(outcome, row, self._raising(step))
        if self._policy.nonfinite == "skip":
            reason = "non-finite gradients in "
            return self._drop(outcome, row, lambda _: reason + self._culprits(), step, scaled=False)
        params = self._selection.params
        write.zero_nonfinite_(params)
        outcome = self._limiter.judge(self._selection.gradients(), step, on_host=True, detailed=detailed)
        row = outcome.row if isinstance(outcome.row, Row) else row
        if self._policy.action == "skip" and row.clipped:
            return self._drop(outcome, amended(row, finite=0.0), self._excess, step, scaled=False)
        if row.changed:
            self._write(outcome, None, scaled=False)
        self._skips.reset()
        return Verdict(outcome, amended(row, finite=0.0, changed=1.0))

    def _write(self, outcome: Outcome, drops: Tensor | None, *, scaled: bool) -> None:
        if self._fold is not None:
            self._fold.hand(outcome.change, drops, scaled=scaled)
        elif self._writes and outcome.change is not None:
            outcome.change.apply(self._selection.params)

    def _excess(self, outcome: Outcome) -> str:
        return outcome.excess(self._limiter.scopes)

    def _drop(self, outcome: Outcome, row: Row, why: Callable[[Outcome], str], step: int, *, scaled: bool) -> Verdict:
        reason = why(outcome) if self._skips.speaks(bounded=not scaled) else ""
        write.drop_(self._selection.owned)

        def count() -> None:
            self._skips.add(step, reason, warn=ranks.is_first_rank(), bounded=not scaled)

        # Where nobody looks at the norm after clipping, dropped steps do not count as ones that were looked at.
        unknown = row.finite and math.isnan(row.norm_clipped)
        after = math.nan if unknown else 0.0
        return Verdict(outcome, amended(row, skipped=1.0, changed=1.0, coef=0.0, norm_clipped=after), count)

    def _raising(self, step: int) -> Callable[[], None]:
        error = words.error(step, self._culprits())

        def raise_it() -> None:
            raise error

        return raise_it

    def _culprits(self) -> str:
        bad = [gradient is not None and not words.is_finite(gradient) for gradient in self._selection.gradients()]
        return words.offenders(self._selection.names, self._limiter.anywhere(bad))
