"""Gradient normalization: every scope is rescaled to one norm, upward too.

Rule: with x the norm of a scope, its gradients are multiplied by target / (x + smoothing). Only their direction is
left: the step size is that of the learning rate.

Source: g / (a + x) with a = smoothing and target 1 is `optax.normalize_by_update_norm`; E. Hazan, K. Levy, S.
Shalev-Shwartz, "Beyond Convexity: Stochastic Quasi-Convex Optimization", NeurIPS 2015, algorithm 1 (normalized gradient
descent), has smoothing 0; per="layer" is that by blocks of A. W. Yu et al., "Block-Normalized Gradient Method", 2017.

Deviations: scopes whose gradient is exactly zero stay as they are.

Suggested values: target 1.0, with a learning rate for steps of that length. Where `smoothing` is far above the usual
norm the method multiplies by the constant target / smoothing; far below, vanishing gradients and noise get full length.
"""

from dataclasses import dataclass, field

from torch import Tensor

from lightning_gradclip import checks
from lightning_gradclip.methods.method import ClipMethod
from lightning_gradclip.methods.numbers import Number, divide, full, largest, minimum, where
from lightning_gradclip.methods.schedule import Scheduled, scheduled, value_at


@dataclass(kw_only=True)
class Normalize(ClipMethod):
    """Rescale gradients to the norm `target` at every step, whether they are larger or smaller.

    Args:
        target: The norm to rescale to, > 0 and finite, in units of the gradient. A mapping from optimizer step to
            value, such as {0: 0.1, 1000: 1.0}, is interpolated linearly.
        smoothing: Added to the norm before dividing, >= 0, in units of the gradient: norms far below it are not
            raised to the target. 0 normalizes however small the gradient is.
        norm_type: The p of the p-norm, in (0, inf].
        per: Where the norm is taken and set: "model", "group", "layer" or "parameter".

    Raises:
        TypeError: If a number is not a number.
        ValueError: If a number is out of range, or `per` is unknown.
    """

    may_grow = True
    on_floats = True
    target: Scheduled = field(default=1.0, kw_only=False)
    smoothing: float = 1e-6
    norm_type: checks.Unbounded = 2.0
    per: str = "model"

    def __post_init__(self) -> None:
        self.target = scheduled("target", self.target, above=0.0, finite=True)
        self.smoothing = checks.number("smoothing", self.smoothing, at_least=0.0, finite=True)
        self.norm_type = checks.number("norm_type", self.norm_type, above=0.0, remedy="the usual norm is norm_type=2")
        checks.choice("per", self.per, self.scopes)

    def limit(self, size: Number, weight: Tensor | None, step: int) -> Number:
        return full(size, value_at(self.target, step))

    def coef(self, size: Number, limit: Number) -> Number:
        # A norm near the smallest number has no finite factor.
        return where(size > 0, minimum(divide(limit, size + self.smoothing), largest(size)), 1.0)
