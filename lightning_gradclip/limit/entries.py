"""Single entries as scopes: bounds that every entry of a gradient is clamped to."""

import math
from typing import final

from torch import Tensor

from lightning_gradclip.gradients import entries, norms
from lightning_gradclip.gradients.norms import Tensors
from lightning_gradclip.gradients.read import Meter, exact_norms
from lightning_gradclip.gradients.reduce import reduced
from lightning_gradclip.gradients.write import Clamp
from lightning_gradclip.limit.limiter import Limiter, Outcome, read_row
from lightning_gradclip.record.step import row_of
from lightning_gradclip.select.parameters import Selection
from lightning_gradclip.select.scopes import Scopes


@final
class EntryLimiter(Limiter):
    """Runs a method over single entries. The one size is the joint norm, the one limit the upper bound."""

    def _serve(self, served: Selection) -> Scopes:
        for name, parameter in zip(served.names, served.params, strict=True):
            if parameter.is_complex():
                raise TypeError(
                    f"parameter {name!r} is complex, and complex numbers have no order to clamp by; "
                    f"leave it out with exclude={name!r}, or clip it by norm"
                )
        self._meter = Meter(self._method.norm_type)
        return served.scopes(self._method.per)

    def judge(
        self, gradients: Tensors, step: int, scale: float | Tensor = 1.0, *, on_host: bool, detailed: bool
    ) -> Outcome:
        local = self._meter.each(gradients).to(self._home())
        outcome = self._outcome(gradients, local, step, scale, on_host=on_host, detailed=detailed)
        if self._is_lost(outcome):
            local = exact_norms(gradients, self._method.norm_type).to(self._home())
            outcome = self._outcome(gradients, local, step, scale, on_host=on_host, detailed=detailed)
        return outcome

    def _outcome(
        self, gradients: Tensors, local: Tensor, step: int, scale: float | Tensor, *, on_host: bool, detailed: bool
    ) -> Outcome:
        p = self._method.norm_type
        low, high = self._method.bounds(step)
        device = local.device if self._reducer is None else self._reducer.device
        on_cpu = device.type == "cpu"
        if on_cpu:
            scale = float(scale)
            # Not written is what has no entry outside.
            places = entries.with_outside(gradients, local.tolist(), low * scale, high * scale)
        else:
            places = tuple(place for place, gradient in enumerate(gradients) if gradient is not None)
        bounds = low * scale, high * scale
        if detailed:
            found = entries.compared(gradients, places, local, *bounds, p)
        else:
            found = entries.flagged(gradients, places, local, *bounds)
        vectors = [local] if found.clamped is None else [local, found.clamped]
        known = reduced(self._reducer, gradients, vectors, p, [found.counts])
        each = known.norms[0] / scale
        joint, outside = norms.joint_norm(each, p), known.totals[0]
        if detailed:
            after = norms.joint_norm(known.norms[1] / scale, p)
            clipped = outside / (self._counts(each) * self._present(gradients, known, each)).sum().clamp_min(1.0)
        else:
            # Nobody has looked closely at those that have some outside.
            within = outside == 0
            after, clipped = joint.where(within, math.nan), outside.where(within, math.nan)
        row = row_of(joint, after, limit=high, coef=math.nan, clipped=clipped, changed=outside > 0)
        measured = self._measured_norms(gradients, known, each)
        change = Clamp(low, high, places)
        row = read_row(row, on_host)
        if on_cpu:
            return Outcome(joint.item(), high, change, row, measured, known.nothing, each)
        return Outcome(joint.view(1), joint.new_full((1,), high), change, row, measured, known.nothing, each)
