"""What the optimizer expects of a gradient, for rules that limit by it; and what is said where it expects nothing."""

import warnings
from collections.abc import Sequence

from torch import Tensor
from torch.optim import Optimizer

from lightning_gradclip.gradients import ranks
from lightning_gradclip.gradients.moments import Moment, keeps_any, means_of
from lightning_gradclip.methods.method import ClipMethod

_REMEDY = "limit by what the clipper remembers itself, as ZClip or QuantileClip"


def require_squares(method: ClipMethod | None, optimizer: Optimizer | None) -> None:
    """Refuse a rule about the squares of an optimizer where there is no optimizer, or one that keeps none."""
    if method is None or not method.needs_moments:
        return
    if optimizer is None:
        raise ValueError(
            f"{method!r} limits by what the optimizer remembers, and this clipper has none; write optimizer=..., "
            f"or {_REMEDY}"
        )
    if not keeps_any(optimizer):
        name = type(getattr(optimizer, "optimizer", optimizer)).__name__
        raise ValueError(
            f"{method!r} limits by the mean squares of an optimizer of Adam's kind, and {name} keeps none; {_REMEDY}"
        )


class Expected:
    """Asks one optimizer for the mean squares of the gradients that it was given."""

    def __init__(self, method: ClipMethod, optimizer: Optimizer | None) -> None:
        require_squares(method, optimizer)
        self._method, self._optimizer = method, optimizer
        self._warned = False

    def of(self, params: Sequence[Tensor], names: Sequence[str]) -> list[Moment | None]:
        """What is known of each; None before its first step."""
        if self._optimizer is None:
            return [None] * len(params)
        moments = means_of(self._optimizer, params)
        if not self._warned:
            inner = getattr(self._optimizer, "optimizer", self._optimizer)
            stepped = [bool(inner.state.get(one)) for one in params]
            if any(stepped):
                self._warned = True
                pairs = zip(names, stepped, moments, strict=True)
                self._warn(type(inner).__name__, [name for name, one, moment in pairs if one and moment is None], names)
        return moments

    def _warn(self, optimizer: str, lost: Sequence[str], names: Sequence[str]) -> None:
        if lost and ranks.is_first_rank():
            warnings.warn(
                f"{self._method!r} leaves {len(lost)} of {len(names)} parameters, such as {lost[0]!r}, as they are, "
                f"since {optimizer} keeps no mean squares of their gradients, or keeps them factored or quantized; "
                f"leave them out with exclude=, or {_REMEDY}",
                RuntimeWarning,
                stacklevel=2,
            )
