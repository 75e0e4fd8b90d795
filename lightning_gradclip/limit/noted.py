"""What a history wants to know about a step besides its row: thresholds, and where a step that stands out comes from.

Only the rank that writes a history asks, so that nothing here asks other ranks: what only they know is left out.
"""

import math
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from lightning_gradclip.gradients import norms
from lightning_gradclip.gradients.norms import Tensors
from lightning_gradclip.gradients.read import Meter
from lightning_gradclip.limit.limiter import Limiter, Outcome
from lightning_gradclip.methods.method import ClipMethod
from lightning_gradclip.record.context import UNKNOWN, Context, largest_shares, number
from lightning_gradclip.record.step import Row
from lightning_gradclip.select.parameters import Selection
from lightning_gradclip.select.scopes import Scopes, Units

# Of a norm so many times the level before it, on a log scale, it is known at once where it came from: whoever reads the
# history then has both sides to compare with, and calls fewer of them a spike.
_NOTABLE = math.log(2.0)
# The level follows by a tenth of the difference, and of a jump by a tenth of this much.
_FOLLOWS, _JUMP = 0.1, 1.0


class Observer:
    """Notes for the record of one clipper what its steps were cut by."""

    def __init__(self, limiter: Limiter, method: ClipMethod, optimizer: Optimizer | None) -> None:
        self._limiter, self._method, self._optimizer = limiter, method, optimizer
        self._moves = type(method).threshold is not ClipMethod.threshold
        self._level: float | None = None

    def serve(self, selection: Selection, *, alone: bool) -> None:
        """Take over these parameters; `alone`: no other rank holds a part of them."""
        joined = any(one.joined for one in selection.layouts)
        self._selection, self._alone = selection, alone
        self._layers = Scopes.of(selection.names) if joined else selection.scopes("layer")
        self._meter = Meter(self._method.norm_type)

    def note(self, outcome: Outcome, gradients: Tensors, step: int, loss: Any, batch: Any, epoch: Any) -> Context:
        """What is known about a step before anything is done about it, and learned from it."""
        groups = [] if self._optimizer is None else self._optimizer.param_groups
        threshold, scopes, thresholds, shares = UNKNOWN, (), None, None
        if self._limiter.scopes.count > 1:
            scopes, thresholds = self._thresholds(outcome, step)
        elif self._moves:
            found = self._limiter.threshold(outcome, step)
            threshold = found[0] if isinstance(found, Tensor) and found.ndim else found
        if isinstance(outcome.row, Row) and self._stands_out(outcome.row.norm):
            shares = self._shares(outcome, gradients)
        return Context(
            threshold,
            UNKNOWN if loss is None else number(loss),
            number(groups[0]["lr"]) if groups else UNKNOWN,
            UNKNOWN if epoch is None else epoch,
            UNKNOWN if batch is None else batch,
            scopes,
            thresholds,
            shares,
        )

    def _thresholds(self, outcome: Outcome, step: int) -> tuple[tuple[str, ...], Tensor]:
        """Of each scope; of units, of which there may be millions, the lowest in each parameter."""
        places, found = self._limiter.scopes, self._limiter.threshold(outcome, step)
        if not isinstance(places, Units):
            return places.names, found
        lowest = found.new_full((len(places.parameters),), math.inf)
        return places.parameters, lowest.scatter_reduce(0, places.index_on(found.device), found, "amin")

    def _stands_out(self, norm: float) -> bool:
        """Whether a norm is far above the level of those before it, which it then moves a little."""
        if not math.isfinite(norm):
            return True
        if norm <= 0:
            return False
        log = math.log(norm)
        difference = log - (log if self._level is None else self._level)
        self._level = log - difference + _FOLLOWS * max(-_JUMP, min(difference, _JUMP))
        return difference > _NOTABLE

    def _shares(self, outcome: Outcome, gradients: Tensors) -> Any:
        of_parameters = self._parameter_norms(outcome, gradients)
        if of_parameters is None:
            return None
        layers = norms.scope_norms(of_parameters, self._layers, self._method.norm_type)
        return largest_shares(layers, self._layers.names)

    def _parameter_norms(self, outcome: Outcome, gradients: Tensors) -> Tensor | None:
        if outcome.each is not None:
            return outcome.each
        if self._alone:
            return self._meter.each(gradients).to(norms.home(self._selection.params))
        places = self._limiter.scopes
        if isinstance(places, Units) and self._method.statistic == "norm":
            sizes = outcome.sizes
            index = places.index_on(sizes.device)
            return norms.grouped_norms(sizes, index, len(places.parameters), self._method.norm_type)
        return None
