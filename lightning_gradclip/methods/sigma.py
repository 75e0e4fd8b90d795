"""Clipping at k standard deviations above the mean of the last norms.

Rule: with m and s the mean and the sample standard deviation (over n - 1) of a scope's last `window` sizes, this step's
not among them, the limit is m + k * s; none before `warmup` sizes were seen. A spike in the window raises m and s
itself: with more than one in 1 + k**2 sizes the rule stops seeing them.

Source: the rule by which OLMo-core's `SkipStepOptimizer` drops steps (Team OLMo, "2 OLMo 2 Furious", 2025; there for
the loss too): action="skip", k=6, window=128, warmup=63 (the option `skip_spikes`), decision for decision for the norm,
and with loss=True for both: a step is dropped where its norm or its loss exceeds its own limit, and learned from.

Deviations: sizes that are not finite, or exactly zero, are never remembered: one NaN blocks every step of the
published rule until it has left the window (some versions of OLMo-core leave it out as well). Sizes are remembered
as they were measured, also of steps that were clipped or dropped, so that a lasting shift is followed once it fills
the window, within `window` steps. `max_consecutive_skips` ends a run that is dropped step after step.

Suggested values: k 3 to clip; k 6 to drop steps (OLMo 2).
"""

import math
from dataclasses import dataclass, field

from torch import Tensor

from lightning_gradclip import checks
from lightning_gradclip.methods.memory import LastSizes
from lightning_gradclip.methods.method import Remembering
from lightning_gradclip.methods.numbers import Number, where


@dataclass(kw_only=True)
class SigmaClip(Remembering):
    """Scale gradients down when their norm exceeds mean + `k` standard deviations of the last norms.

    Args:
        k: Standard deviations above the mean, >= 0; 0 limits to the mean, inf never clips.
        window: How many norms are remembered, >= 2.
        warmup: How many norms are wanted before anything is limited, from 2 to `window`.
        per: Where the norm is taken, remembered and kept: "model", "group", "layer" or "parameter".
        norm_type: The p of the p-norm, in (0, inf].
        loss: Whether steps whose loss exceeds mean + k standard deviations of the last losses are dropped too, for
            action="skip"; of several ranks the mean counts. A plain loop gives it: `clipper.step(loss=loss)`.

    Raises:
        TypeError: If a number is not a number.
        ValueError: If a number is out of range, or `per` is unknown.
    """

    epsilon = 0.0
    on_floats = True
    _memory = LastSizes
    k: float = field(default=3.0, kw_only=False)
    window: int = 128
    warmup: int = 64
    per: str = "model"
    norm_type: checks.Unbounded = 2.0
    loss: bool = False

    def __post_init__(self) -> None:
        self.k = checks.number("k", self.k, at_least=0.0, remedy="k counts standard deviations above the mean")
        self.window = checks.integer("window", self.window, at_least=2)
        self.warmup = checks.integer("warmup", self.warmup, at_least=2, remedy="one norm has no standard deviation")
        if self.warmup > self.window:
            raise ValueError(
                f"warmup={self.warmup} exceeds window={self.window}, so that nothing would ever be limited; "
                "use a warmup of at most the window"
            )
        checks.choice("per", self.per, self.scopes)
        self.norm_type = checks.number("norm_type", self.norm_type, above=0.0, remedy="the usual norm is norm_type=2")
        self.loss = checks.flag("loss", self.loss)

    @property
    def needs_loss(self) -> bool:
        return self.loss

    def fresh_state(self, size: Tensor) -> dict[str, Tensor]:
        return LastSizes.fresh(size, self.window)

    def limit(self, size: Number, weight: Tensor | None, step: int) -> Number:
        mean, std = LastSizes.mean_and_std(self.state)
        return where(LastSizes.count(self.state) >= self.warmup, mean + self.k * std, math.inf)
