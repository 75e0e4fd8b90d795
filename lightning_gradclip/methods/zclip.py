"""ZClip: norms whose z-score is high are spikes, and clipped the harder the higher it is.

Rule: the first `warmup` sizes of a scope give the mean mu and the population variance; then z = (x - mu) / (s + 1e-6)
with s the standard deviation, and where z > z_threshold the limit is
- mode="reciprocal": clip_factor * (mu + z_threshold * s / (z / z_threshold)),
- mode="mean": clip_factor * mu,
- mode="max": clip_factor * (mu + z_threshold * s), where x exceeds mu + z_threshold * s.
Where x is no spike the limit is the largest size that is none. A `max_norm` limits in addition, during the warm-up
too. After acting, with v the size to remember, mu = alpha * mu + (1 - alpha) * v, then variance = alpha * variance +
(1 - alpha) * (v - mu)**2.

Source: A. Kumar, L. Owen, N. R. Chowdhury, F. Güra, "ZClip: Adaptive Spike Mitigation for LLM Pre-Training", arXiv
2504.02507, 2025; memory="faithful" equals `zclip` 1.0.0, whose names are "zscore" with "adaptive_scaling" or "mean",
and "percentile" for our "max". Its max_grad_norm of 1.0 is max_norm here, off by default.

Deviations: memory="faithful" remembers the limit of a clipped step: after a lasting shift of the level by ten
standard deviations it clips every later step ("max" follows it where there is noise). memory="winsorized", the
default, remembers min(x, mu + z_threshold * s) instead, with s at least 1 % of mu, and follows a shift to as much as
ten times the level within 100 steps. Sizes that are not finite, or exactly zero, are never remembered: one NaN, or
one infinite norm during the warm-up, disables the published implementation for good. `clip_factor` has no effect on
"mean" and "max" there. The 1e-6 is theirs: where norms are far below it, "reciprocal" and "mean" see no spikes.

Suggested values: z_threshold 2.5, alpha 0.97, warmup 25 (Kumar et al.: 1B language models, learning rate of 3e-3).
"""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lightning_gradclip import checks
from lightning_gradclip.methods.method import ClipMethod
from lightning_gradclip.methods.numbers import Number, Truth, divide, maximum, minimum, real, sqrt, where
from lightning_gradclip.methods.schedule import Scheduled, scheduled, value_at


@dataclass(kw_only=True)
class ZClip(ClipMethod):
    """Scale gradients down when the z-score of their norm exceeds `z_threshold`.

    Args:
        z_threshold: Standard deviations above the mean from which on a norm is a spike, > 0; inf never clips.
        alpha: Share of the old mean and variance that is kept at each step, in [0, 1): near 1 they change slowly.
        warmup: How many norms give the first mean and variance, >= 2; nothing but `max_norm` limits until then.
        mode: What a spike is cut to: "reciprocal", the further the lower; "mean"; or "max", the largest norm that
            is no spike.
        clip_factor: Multiplies that, > 0; below 1 spikes are cut harder.
        max_norm: A limit that always holds, > 0; None: none. A mapping of step to value is interpolated linearly.
        memory: What is remembered of a spike: "winsorized", the largest norm that is none; "faithful", what it was
            cut to, as published.
        per: Where the norm is taken, remembered and kept: "model", "group", "layer" or "parameter".

    Raises:
        TypeError: If a number is not a number.
        ValueError: If a number is out of range, or a word is unknown.
    """

    epsilon = 0.0
    on_floats = True
    z_threshold: float = field(default=2.5, kw_only=False)
    alpha: float = 0.97
    warmup: int = 25
    mode: str = "reciprocal"
    clip_factor: float = 1.0
    max_norm: Scheduled | None = None
    memory: str = "winsorized"
    per: str = "model"

    def __post_init__(self) -> None:
        remedy = "with 1 nothing would be learned after the warm-up"
        self.z_threshold = checks.number("z_threshold", self.z_threshold, above=0.0)
        self.alpha = checks.number("alpha", self.alpha, at_least=0.0, below=1.0, remedy=remedy)
        self.warmup = checks.integer("warmup", self.warmup, at_least=2, remedy="one norm has no variance")
        checks.choice("mode", self.mode, ("reciprocal", "mean", "max"))
        self.clip_factor = checks.number("clip_factor", self.clip_factor, above=0.0, finite=True)
        if self.max_norm is not None:
            self.max_norm = scheduled("max_norm", self.max_norm, above=0.0, remedy="None sets no limit of this kind")
        checks.choice("memory", self.memory, ("winsorized", "faithful"))
        checks.choice("per", self.per, self.scopes)

    def fresh_state(self, size: Tensor) -> dict[str, Tensor]:
        zeros = torch.zeros_like(size)
        return {"mean": zeros, "var": zeros, "count": torch.zeros_like(size, dtype=torch.long)}

    def limit(self, size: Number, weight: Tensor | None, step: int) -> Number:
        is_spike, cut, highest = self._judged(size)
        # Rounding must not put a size that is no spike over its limit.
        limit = where(is_spike, cut, maximum(highest, size))
        limit = where(self.state["count"] >= self.warmup, limit, math.inf)
        return limit if self.max_norm is None else minimum(limit, value_at(self.max_norm, step))

    def threshold(self, size: Number, limit: Number, step: int) -> Number:
        mean, std = self.state["mean"], sqrt(self.state["var"])
        highest = mean + self.z_threshold * (std if self.mode == "max" else std + 1e-6)
        found = where(self.state["count"] >= self.warmup, highest, math.inf)
        return found if self.max_norm is None else minimum(found, value_at(self.max_norm, step))

    def update(self, size: Number, limit: Number, active: Truth) -> None:
        mean, var, count = self.state["mean"], self.state["var"], self.state["count"]
        warm = count < self.warmup
        if self.memory == "winsorized":
            # Without noise there would be nothing to winsorize at, and the level could never rise.
            spread = maximum(sqrt(var), 0.01 * mean)
            kept = minimum(size, mean + self.z_threshold * spread)
        else:
            is_spike, cut, _ = self._judged(size)
            kept = where(is_spike, cut, size)
        # Running moments of the first sizes, exponential ones of the later: both move by a share of the difference.
        share = where(warm, divide(1.0, real(count + 1, mean)), 1.0 - self.alpha)
        difference = where(warm, size, kept) - mean
        spread = share * (difference * difference) * where(warm, 1.0, 1.0 - share)
        self.state = {
            "mean": where(active, mean + share * difference, mean),
            "var": where(active, (1.0 - share) * (var + spread), var),
            "count": count + active,
        }

    def _judged(self, size: Number) -> tuple[Truth, Number, Number]:
        """Whether sizes are spikes, what they are cut to then, and the largest size that is none; `(S,)` each."""
        mean, std = self.state["mean"], sqrt(self.state["var"])
        if self.mode == "max":
            highest = mean + self.z_threshold * std
            return size > highest, self.clip_factor * highest, highest
        z = divide(size - mean, std + 1e-6)
        cut = mean
        if self.mode == "reciprocal":
            cut = mean + self.z_threshold * std * divide(self.z_threshold, z)
        return z > self.z_threshold, self.clip_factor * cut, mean + self.z_threshold * (std + 1e-6)
