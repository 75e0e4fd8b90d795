"""What every clipping method is: a scope to measure and a limit to keep."""

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import ClassVar

import torch
from torch import Tensor


class ClipMethod:
    """Base class of the clipping methods; a subclass is a rule and nothing else.

    A method sees sizes and answers with limits. It never sees a gradient, a rank, a logger or Lightning: selecting
    parameters, measuring, reducing over ranks, guarding against non-finite values, writing, logging and saving are
    shared. Shapes below: `S` is the number of scopes; all sizes are global (already reduced over ranks), float64
    (float32 on devices without it) and on the gradients' device.

    Attributes:
        per: Where to measure: "model", "group", "layer" or "parameter"; "unit" for each slice of a weight along dim 0
            (a bias is one unit), "element" for methods that give bounds instead of limits.
        norm_type: The p of the p-norm, in (0, inf].
        statistic: "norm", or "rms" for the norm divided by the square root of the number of elements.
        scopes: The values of `per` that the method accepts.
        may_grow: Whether a gradient may be scaled up.
        needs_weight: Whether `limit` wants the sizes of the weights.
        epsilon: What `coef` adds to the size before dividing by it.
        state: Learned values, each of shape `(S, ...)`; see `fresh_state`.
    """

    per: str = "model"
    norm_type: float = 2.0
    statistic: str = "norm"
    may_grow: bool = False
    scopes: ClassVar[tuple[str, ...]] = ("model", "group", "layer", "parameter")
    needs_weight: ClassVar[bool] = False
    # That of torch.nn.utils.clip_grad_norm_. It matters where sizes are as small: rules that follow them have none.
    epsilon: float = 1e-6
    state: Mapping[str, Tensor] = MappingProxyType({})

    def limit(self, size: Tensor, weight: Tensor | None, step: int) -> Tensor:
        """How large each scope may be.

        Args:
            size: What was measured, `(S,)`.
            weight: Sizes of the weights of the same scopes, `(S,)`; None unless `needs_weight`.
            step: Steps this clipper took before this one, for schedules.

        Returns:
            Limits, `(S,)`; +inf where there is nothing to do.
        """
        raise NotImplementedError(f"{type(self).__name__} does not define limit(size, weight, step)")

    def coef(self, size: Tensor, limit: Tensor) -> Tensor:
        """The factor for each scope, `(S,)`: limit / (size + epsilon) above the limit and exactly 1 within."""
        return torch.where(size > limit, limit / (size + self.epsilon), 1.0)

    def bounds(self, step: int) -> tuple[float, float]:
        """The smallest and largest entry allowed, for per="element" only, where it takes the place of `coef`."""
        raise NotImplementedError(f"{type(self).__name__} does not define bounds(step)")

    def fresh_state(self, size: Tensor) -> dict[str, Tensor]:
        """Learned values of scopes that were never seen, each of shape `(S, ...)` on the device of `size`.

        Called before the first `limit` and whenever scopes join; the result becomes `state`. Default: nothing.
        """
        del size
        return {}

    def update(self, size: Tensor, limit: Tensor, active: Tensor) -> None:
        """Learn from this step, after acting; the only place where `state` changes. Default: nothing.

        Args:
            size: What was measured, `(S,)`, before clipping.
            limit: What was allowed, `(S,)`.
            active: Boolean `(S,)`, true where the size is finite and greater than zero; write
                `torch.where(active, new, old)`. Not called with any true entry when some scope is not finite.
        """

    def state_dict(self) -> dict[str, Tensor]:
        """Learned values by name, each of shape `(S, ...)`."""
        return dict(self.state)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over learned values whose rows are already in the order of this run's scopes."""
        self.state = dict(state)

    @property
    def adaptive(self) -> bool:
        """Whether the limit is learned from the run."""
        return type(self).update is not ClipMethod.update


class Unlimited(ClipMethod):
    """Measures and limits nothing: what `method=None` stands for."""

    def limit(self, size: Tensor, weight: Tensor | None, step: int) -> Tensor:
        return torch.full_like(size, math.inf)
