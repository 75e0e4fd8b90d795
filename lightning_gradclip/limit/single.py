"""One scope whose gradients are on CPU: the same step in plain floats.

Most runs limit one joint norm. Its handful of numbers costs more as tensors than the gradients of a small model cost to
measure, so rules that are written for floats as well are given floats here. Where the gradients are on a device, and
for rules that want tensors, everything is as for several scopes.
"""

import math
from typing import Any

import torch
from torch import Tensor

from lightning_gradclip.gradients import write
from lightning_gradclip.gradients.norms import joint_norm
from lightning_gradclip.gradients.ranks import Reduced
from lightning_gradclip.gradients.read import Meter
from lightning_gradclip.limit.limiter import Gradients, Limiter, Outcome
from lightning_gradclip.methods.method import ClipMethod
from lightning_gradclip.methods.numbers import divide
from lightning_gradclip.record.step import Row


class SingleLimiter(Limiter):
    """Runs a rule with `on_floats` over all parameters together."""

    def __init__(self, method: ClipMethod, measure_per: str | None, *, on_host: bool) -> None:
        super().__init__(method, measure_per, on_host=on_host)
        self._meter = Meter(method.norm_type)
        # The same method, which here takes floats.
        self._rule: Any = method
        self._in_floats = False

    def judge(self, gradients: Gradients, step: int, scale: float | Tensor = 1.0) -> Outcome:
        norm, known = self._norm(gradients)
        if norm is None:
            self._turn(in_floats=False)
            return super().judge(gradients, step, scale)
        if scale != 1.0:
            scale = float(scale)
            # A GradScaler that never finds a finite step ends at 0.
            norm = divide(norm, scale)
        self._turn(in_floats=True)
        measured = None if known is None else self._measured_norms(gradients, known, known.norms[0] / scale)
        outcome = self._limited(gradients, known, norm, step)
        outcome.measured, outcome.nothing = measured, known is not None and known.nothing
        return outcome

    def write(self, outcome: Outcome) -> None:
        if isinstance(outcome.coefs, float):
            write.scale_all_(self._params, outcome.coefs)
        else:
            super().write(outcome)

    def excess(self, outcome: Outcome) -> str:
        if isinstance(outcome.sizes, float):
            return f"the size {outcome.sizes:g} of scope {self.scopes.names[0]!r} is over its limit {outcome.limits:g}"
        return super().excess(outcome)

    def learn(self, outcome: Outcome, *, whole: bool | Tensor) -> None:
        if not isinstance(outcome.sizes, float):
            super().learn(outcome, whole=whole)
        elif whole and self._adaptive and outcome.sizes > 0:
            self._rule.update(outcome.sizes, outcome.limits, True)

    def _norm(self, gradients: Gradients) -> tuple[float | None, Reduced | None]:
        """The joint norm, None unless on CPU, and where those of the parameters are wanted too, what is known."""
        if self._reducer is None and self.measured is None:
            return self._meter.joint(gradients), None
        # Whether a rank goes this way must not depend on the gradients that it happens to have.
        on_cpu = self._reducer is None or self._reducer.device.type == "cpu"
        norms = self._meter.each_on_host(gradients) if on_cpu else None
        if norms is None:
            return None, None
        known = self._reduced(gradients, [norms])
        return joint_norm(known.norms[0], self._method.norm_type).item(), known

    def _limited(self, gradients: Gradients, known: Reduced | None, norm: float, step: int) -> Outcome:
        method = self._rule
        size = norm
        if method.statistic == "rms":
            size = norm / self._root_count(gradients, known)
        if self._adaptive and self._arranged is not self.scopes:
            self._arrange(torch.zeros(1, dtype=torch.float64, device="cpu"))
            method.to_floats()
        limit = method.limit(size, None, step)
        if self._adaptive and not limit > 0:
            limit = math.inf
        finite = math.isfinite(norm)
        over = finite and size > limit
        coef = method.coef(size, limit) if over or (finite and method.may_grow) else 1.0
        row = Row(norm, norm * coef, limit, coef, float(over), float(finite), 0.0, float(coef != 1.0), 0.0)
        return Outcome(size, limit, coef if coef != 1.0 else None, row, None, nothing=False)

    def _root_count(self, gradients: Gradients, known: Reduced | None) -> float:
        if known is None:
            return math.sqrt(max(1, self._meter.count(gradients)))
        return self._root_counts(gradients, known, known.norms[0]).item()

    def _turn(self, *, in_floats: bool) -> None:
        """Have the learned values put in order anew when the gradients have moved to or from the host."""
        if in_floats is not self._in_floats:
            self._in_floats = in_floats
            self._arranged = None
