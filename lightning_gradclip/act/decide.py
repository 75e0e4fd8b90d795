"""From what a step would do, which its outcome says, to what is done: guard, write or drop, learn."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer

from lightning_gradclip.act import left_out, skips
from lightning_gradclip.act import scaler as scaling
from lightning_gradclip.act.fold import Fold, require_all
from lightning_gradclip.act.losses import Losses
from lightning_gradclip.act.policy import Policy
from lightning_gradclip.act.skips import Skips
from lightning_gradclip.gradients import ranks, read, write
from lightning_gradclip.limit.limiter import Limiter, Outcome
from lightning_gradclip.record.step import Row, amended, dropped, overflowing
from lightning_gradclip.select.parameters import Selection


@dataclass(slots=True)
class Verdict:
    """What was measured, once more where entries were replaced; what to record of it; what then follows, or raises.

    A step that is `refused` is not taken, and counts as none.
    """

    outcome: Outcome
    row: Row | Tensor
    then: Callable[[], None] | None = None
    refused: bool = False


class Actor:
    """Acts as a policy says on the gradients, or where there is a fold by way of its coefficient."""

    def __init__(
        self,
        policy: Policy,
        limiter: Limiter,
        skips: Skips,
        fold: Fold | None,
        optimizer: Optimizer | None,
        losses: Losses | None = None,
        *,
        triton: bool,
    ) -> None:
        self._losses, self._triton = losses, triton
        self._policy, self._writes = policy, policy.writes
        self._limiter, self._skips, self._fold, self._optimizer = limiter, skips, fold, optimizer

    def serve(self, selection: Selection) -> None:
        """Take over the parameters of this selection."""
        self._selection = selection
        if self._fold is not None:
            require_all(selection)

    def act(
        self, outcome: Outcome, step: int, scaler: GradScaler | None, *, detailed: bool, loss: Any = None
    ) -> Verdict:
        """Guard, write and learn.

        A scaler is one that is enabled; `detailed` counts where it is measured once more; a loss is asked for by those
        who look at losses.
        """
        if self._losses is None:
            verdict = self._act(outcome, step, scaler, detailed=detailed)
        else:
            value = self._losses.of(loss)
            against = self._losses.excess(value)
            verdict = self._act(outcome, step, scaler, detailed=detailed, against=against)
            if outcome.finite:
                self._losses.learn(value)
        if scaler is not None and self._writes and self._optimizer is not None:
            left_out.spare_first_(scaler, self._optimizer)
        return verdict

    def _act(
        self, outcome: Outcome, step: int, scaler: GradScaler | None, *, detailed: bool, against: str | None = None
    ) -> Verdict:
        """Only a host row can stop or change what happens next."""
        row = outcome.row
        if isinstance(row, Tensor):
            return self._act_on_device(outcome, row, scaled=scaler is not None)
        if not row.finite and scaler is not None:
            # The scaler calibrates itself by overflowing: it drops the step, and nothing is to be learned from it.
            return Verdict(outcome, overflowing(row))
        if not row.finite and self._policy.nonfinite != "ignore":
            return self._mend(outcome, row, step, detailed=detailed)
        whole = bool(row.finite)
        if self._policy.action == "skip" and (row.clipped or against):
            self._limiter.learn(outcome, whole=whole)
            if scaler is not None and self._optimizer is not None:
                # A scaler without any gradient to look at refuses to step.
                scaling.unscale_(scaler, self._optimizer)
            excess = partial(outcome.excess, self._limiter.scopes) if row.clipped else partial(str, against)
            return self._drop(outcome, row, excess, step)
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
            return Verdict(outcome, row, partial(skips.fail, step, self._culprits()), refused=True)
        if self._policy.nonfinite == "skip":
            return self._drop(outcome, row, lambda: f"non-finite gradients in {self._culprits()}", step)
        write.zero_nonfinite_(self._selection.params)
        outcome = self._limiter.judge(
            read.gradients_of(self._selection, settled=True), step, on_host=True, detailed=detailed
        )
        row = outcome.row if isinstance(outcome.row, Row) else row
        if self._policy.action == "skip" and row.clipped:
            excess = partial(outcome.excess, self._limiter.scopes)
            return self._drop(outcome, amended(row, finite=0.0), excess, step)
        if row.changed:
            self._write(outcome, None, scaled=False)
        self._skips.reset()
        return Verdict(outcome, amended(row, finite=0.0, changed=1.0))

    def _write(self, outcome: Outcome, drops: Tensor | None, *, scaled: bool) -> None:
        if self._fold is not None:
            self._fold.hand(outcome.change, drops, scaled=scaled)
        elif self._writes and outcome.change is not None:
            outcome.change.apply(self._selection.params, triton=self._triton)

    def _drop(self, outcome: Outcome, row: Row, why: Callable[[], str], step: int) -> Verdict:
        reason = why() if self._skips.speaks() else ""
        write.drop_(self._selection.owned)
        count = partial(self._skips.add, step, reason, warn=ranks.is_first_rank())
        return Verdict(outcome, dropped(row), count)

    def _culprits(self) -> str:
        gradients = read.gradients_of(self._selection, settled=self._writes)
        bad = [gradient is not None and not read.is_finite(gradient) for gradient in gradients]
        return skips.offenders(self._limiter.served.names, self._limiter.anywhere(bad))
