"""Clipping by norm: a scope whose p-norm exceeds a constant is scaled down to it.

Rule: with x the norm of a scope and T = max_norm, the gradients are multiplied by T / (x + 1e-6) where x > T and left
untouched elsewhere. With `min_norm`, scopes with 0 < x < min_norm are multiplied by min_norm / x.

Source: R. Pascanu, T. Mikolov, Y. Bengio, "On the difficulty of training recurrent neural networks", ICML 2013,
algorithm 1. The 1e-6 is that of `torch.nn.utils.clip_grad_norm_`, which this method equals for per="model".
`statistic="rms"` with per="parameter" is the block rule of `optax.clip_by_block_rms`.

Deviations: gradients within the limit are not written at all (torch multiplies them by 1); norms are exact to 1e-6
(torch's float32 sum reads 1 % low at 1e8 elements). The lower limit is ours.

Suggested values: max_norm 1.0 for transformers (GPT-2, LLaMA), 0.25 to 5 for recurrent networks (Pascanu et al. tune
it near the average norm of an unclipped run; `method=None` measures that).
"""

from dataclasses import dataclass, field

from torch import Tensor

from lightning_gradclip import checks
from lightning_gradclip.methods.method import ClipMethod
from lightning_gradclip.methods.numbers import Number, full
from lightning_gradclip.methods.schedule import MEASURE, Scheduled, greatest, least, scheduled, value_at


@dataclass(kw_only=True)
class NormClip(ClipMethod):
    """Scale gradients down when their norm exceeds `max_norm`.

    Args:
        max_norm: Largest norm allowed, > 0, in units of the gradient; inf never clips, near 0 every step is normalized.
            A mapping from optimizer step to value, such as {0: 10.0, 1000: 1.0}, is interpolated linearly.
        norm_type: The p of the p-norm, in (0, inf]; inf limits the largest absolute entry.
        min_norm: Smallest norm allowed, >= 0, or a mapping: smaller scopes that are not zero are scaled up to it.
        per: Where the norm is taken and kept: "model", "group", "layer" or "parameter".
        statistic: "norm", or "rms": the 2-norm divided by the square root of the number of elements, so that one limit
            suits tensors of every size.

    Raises:
        TypeError: If a number is not a number.
        ValueError: If a number is out of range, a word is unknown, or `min_norm` exceeds `max_norm`.
    """

    on_floats = True
    max_norm: Scheduled = field(default=1.0, kw_only=False)
    norm_type: checks.Unbounded = 2.0
    min_norm: Scheduled = 0.0
    per: str = "model"
    statistic: str = "norm"

    def __post_init__(self) -> None:
        self.max_norm = scheduled("max_norm", self.max_norm, above=0.0, remedy=MEASURE)
        self.min_norm = scheduled("min_norm", self.min_norm, at_least=0.0, remedy="0 scales nothing up")
        self.norm_type = checks.number("norm_type", self.norm_type, above=0.0, remedy="the usual norm is norm_type=2")
        checks.choice("per", self.per, self.scopes)
        checks.choice("statistic", self.statistic, ("norm", "rms"))
        if self.statistic == "rms" and self.norm_type != 2.0:
            raise ValueError(
                f"statistic='rms' is defined for norm_type=2, got norm_type={self.norm_type:g}; "
                "use norm_type=2 or statistic='norm'"
            )
        if greatest(self.min_norm) > least(self.max_norm):
            raise ValueError(
                f"min_norm={self.min_norm!r} exceeds max_norm={self.max_norm!r}; keep it smaller at every step"
            )
        self.may_grow = greatest(self.min_norm) > 0.0
        if self.statistic == "rms":
            # optax has none here, and root mean squares are often as small as torch's 1e-6.
            self.epsilon = 0.0

    def limit(self, size: Number, weight: Tensor | None, step: int) -> Number:
        return full(size, value_at(self.max_norm, step))

    def floor_at(self, step: int) -> float:
        return value_at(self.min_norm, step)
