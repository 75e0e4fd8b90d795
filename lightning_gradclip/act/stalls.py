"""Whether clipping leaves an optimizer gradients that it cannot feel.

An optimizer of Adam's kind steps by g / (sqrt(v) + eps), with v the mean square of the gradients that it was given. A
constant factor on them means nothing to it until sqrt(v) comes near eps: from there on the steps shrink with it, and
nothing shows that a part of the model stands still. A limit on the joint norm does that to small layers beside large
ones. What is left of the movement of a parameter is s / (s + eps) with s the root mean square that the optimizer has
seen, over the same of what it would have seen.
"""

import warnings
from typing import NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_gradclip.gradients import ranks
from lightning_gradclip.gradients.moments import felt_beside, keeps_any, moments_of, numbers_on, ripeness
from lightning_gradclip.gradients.norms import Tensors
from lightning_gradclip.gradients.read import Meter
from lightning_gradclip.gradients.reduce import Reducer, reduced
from lightning_gradclip.methods.ema import EmaClip
from lightning_gradclip.methods.method import ClipMethod
from lightning_gradclip.record.step import Row
from lightning_gradclip.select.parameters import Selection

# Where s is 10 eps, a large gradient has lost as much of its movement.
_FELT = 10 / 11
_HALF = 0.5
_LEAST = 1e-19


class _Seen(NamedTuple):
    """A look: of each parameter the root mean square before clipping and as the optimizer has seen it, `(P,)`."""

    before: Tensor
    after: Tensor
    eps: Tensor  # NaN where nothing is known
    norm: float | Tensor
    limit: float | Tensor

    def kept(self) -> Tensor:
        """The share of the movement that clipping has left of each, `(P,)`; 1 where nothing is known or moves."""
        kept = (self.after / (self.after + self.eps)) / (self.before / (self.before + self.eps))
        return kept.where((self.after > 0) & (self.before > 0) & torch.isfinite(kept), 1.0)


class Stalls:
    """Looks now and then at what one optimizer feels of the gradients that one method clips."""

    def __init__(self, optimizer: Optimizer, method: ClipMethod) -> None:
        self._optimizer, self._method = optimizer, method
        self._meter, self._squares = Meter(2.0), Meter(1.0)
        self._seen: _Seen | None = None
        self._share: float | None = None
        self._warned = False

    def serve(self, selection: Selection, reducer: Reducer | None) -> None:
        """Take over the parameters of this selection."""
        self._selection, self._reducer = selection, reducer
        self._seen = None

    def look(self, gradients: Tensors, scale: float | Tensor, row: Row | Tensor) -> None:
        """Measure what the optimizer has been given, beside gradients that are about to be clipped; ranks together.

        Args:
            gradients: What this rank holds of each gradient, not clipped yet.
            scale: What they are still multiplied by.
            row: What clipping comes to; on a device nobody looks at it.
        """
        if not keeps_any(self._optimizer) or (isinstance(row, Row) and not row.finite):
            return
        moments = moments_of(self._optimizer, self._selection.params)
        if self._reducer is None and all(one is None for one in moments):
            return
        if isinstance(row, Row) and not row.changed:
            self._seen, self._share = None, 0.0
            return
        now = self._meter.each(gradients)
        sums = self._squares.each([None if one is None else one.square for one in moments]).to(now)
        ripe = ripeness(moments, now)
        known = reduced(self._reducer, gradients, [now / scale, (sums / ripe).sqrt()], 2.0)
        # Where ranks serve different parameters, each looks at its own.
        fresh, given = known.norms if self._reducer is None else map(self._reducer.own, known.norms)
        counts = numbers_on(self._counts(), fresh.device, fresh.dtype).sqrt()
        fresh, given = fresh / counts, given / counts
        norm, after, limit = (row[Row._fields.index(name)] for name in ("norm", "norm_clipped", "limit"))
        clipped = fresh * (after / norm)
        # Of what is smaller float32 squares keep nothing.
        given = given.where((given > 0) | (clipped > _LEAST), clipped)
        # Not clipped it would have been that much larger; where this gradient is smaller, it is not due to clipping.
        before = torch.minimum(fresh, given * (norm / after))
        self._seen = _Seen(before, given, felt_beside(moments, ripe), norm, limit)

    def lost(self) -> tuple[int, str] | None:
        """Of how many parameters less than half of the movement is left, and the name of the worst; None of none."""
        if self._seen is None:
            return None
        kept = self._seen.kept()
        count = int((kept < _HALF).sum())
        return (count, self._selection.names[int(kept.argmin())]) if count else None

    def share(self) -> float | None:
        """The share of the parameters of which clipping takes what was to be felt; None: nothing is known.

        Makes the host wait for the device, and warns the first time that a parameter is left less than half.
        """
        if self._seen is not None:
            seen, self._seen = self._seen, None
            kept = seen.kept()
            self._share = (kept < _FELT).sum().item() / max(1, len(kept))
            if lost := int((kept < _HALF).sum()):
                self._warn(seen, lost, int(kept.argmin()))
        return self._share

    def _counts(self) -> tuple[float, ...]:
        if self._reducer is not None:
            return tuple(float(max(1, one)) for one in self._reducer.here(self._reducer.numels))
        return tuple(float(max(1, one.numel())) for one in self._selection.params)

    def _warn(self, seen: "_Seen", lost: int, worst: int) -> None:
        if self._warned or not ranks.is_first_rank():
            return
        self._warned = True
        names = self._selection.names
        before, after, eps = (numbers[worst].item() for numbers in (seen.before, seen.after, seen.eps))
        optimizer = type(getattr(self._optimizer, "optimizer", self._optimizer)).__name__
        warnings.warn(
            f"clipping by {self._method!r} leaves {lost} of {len(names)} parameters less than half of their movement: "
            f"of {names[worst]!r} {optimizer} is given gradients of {after:.2g} (root mean square) instead of "
            f"{before:.2g}, and cannot feel them beside its eps={eps:g}. {self._remedy(seen, worst)}, or lower the eps "
            f"of {optimizer}. The metric `stalled` counts such parameters",
            RuntimeWarning,
            stacklevel=2,
        )

    def _remedy(self, seen: "_Seen", worst: int) -> str:
        """What to write instead of this method."""
        method, norm = self._method, float(seen.norm)
        if isinstance(method, EmaClip) and method.warmup_max_norm < norm:
            return f"Set warmup_max_norm near the usual norm, which is {norm:.2g} at this step, or to inf"
        usual = f"take a limit near the usual size, as the joint norm of {norm:.2g} at this step"
        # By itself it is cut to the limit at most, if there is only one.
        felt = not float(seen.limit) / self._counts()[worst] ** 0.5 < 10 * seen.eps[worst].item()
        if method.per in ("model", "group") and "layer" in method.scopes and felt:
            return f"Limit each layer by itself with per='layer', or {usual}"
        return usual[0].upper() + usual[1:]
