"""Single entries beside what the optimizer expects of them: each is brought to a bound of its own."""

import math
from typing import final

from torch import Tensor

from lightning_gradclip.gradients import moments, norms
from lightning_gradclip.gradients.norms import Tensors
from lightning_gradclip.gradients.read import Meter, exact_norms
from lightning_gradclip.gradients.reduce import reduced
from lightning_gradclip.gradients.write import ClampBeside
from lightning_gradclip.limit.limiter import Limiter, Outcome, read_row
from lightning_gradclip.record.step import row_of
from lightning_gradclip.select.parameters import Selection
from lightning_gradclip.select.scopes import Scopes


@final
class SpikeLimiter(Limiter):
    """Runs a method over single entries in units of the root of their mean square.

    The one size is the joint norm; there is no one limit.
    """

    def _serve(self, served: Selection) -> Scopes:
        self._meter = Meter(self._method.norm_type)
        return served.scopes(self._method.per)

    def judge(
        self, gradients: Tensors, step: int, scale: float | Tensor = 1.0, *, on_host: bool, detailed: bool
    ) -> Outcome:
        local = self._meter.each(gradients).to(self._home())
        outcome = self._outcome(gradients, local, step, scale, on_host=on_host)
        if self._is_lost(outcome):
            local = exact_norms(gradients, self._method.norm_type).to(self._home())
            outcome = self._outcome(gradients, local, step, scale, on_host=on_host)
        return outcome

    def _outcome(
        self, gradients: Tensors, local: Tensor, step: int, scale: float | Tensor, *, on_host: bool
    ) -> Outcome:
        p, (_, high) = self._method.norm_type, self._method.bounds(step)
        known = self._expected.of(self._params, self._names) if self._expected else [None] * len(gradients)
        seasoned = moments.seasoned(known, local, self._method.least_steps) > 0
        bounds = (seasoned.new_full((), high, dtype=local.dtype) * scale).where(seasoned, math.inf)
        counts, clamped = moments.spikes(gradients, known, bounds, local)
        told = reduced(self._reducer, gradients, [local, clamped], p, [counts])
        each, outside = told.norms[0] / scale, told.totals[0]
        joint, after = norms.joint_norm(each, p), norms.joint_norm(told.norms[1] / scale, p)
        # Their sums are rounded apart.
        after = after.minimum(joint).where(outside > 0, joint)
        share = outside / (self._counts(each) * self._present(gradients, told, each)).sum().clamp_min(1.0)
        row = row_of(joint, after, limit=math.nan, coef=math.nan, clipped=share, changed=outside > 0)
        written = counts.tolist() if counts.is_cpu else [1.0] * len(gradients)
        change = ClampBeside(bounds, known, [place for place, count in enumerate(written) if count])
        sizes, limits = joint.view(1), joint.new_full((1,), math.inf)
        measured = self._measured_norms(gradients, told, each)
        return Outcome(sizes, limits, change, read_row(row, on_host), measured, told.nothing, each)
