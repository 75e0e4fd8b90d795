"""Clipping by value: every entry of the gradient is clamped to fixed bounds.

Rule: g becomes min(max(g, min_value), max_value), entry by entry. Without `min_value` the bounds are [-c, c] with c =
max_value: zero-centered gradient clipping. The direction changes: large entries are cut, small ones stay. Clipping by
the infinity norm scales all alike: with a limit of 1, [3, -0.5] becomes [1, -0.5] here and [1, -0.167] there.

Source: `torch.nn.utils.clip_grad_value_` and `torch.clamp`, equal bit for bit; T. Mikolov, "Statistical Language Models
Based on Neural Networks", PhD thesis, Brno University of Technology, 2012, for recurrent networks.

Deviations: gradients without an entry outside the bounds are not written at all. Bounds that do not hold zero between
them are refused: they would turn a zero gradient into a step.

Suggested values: 15 for recurrent networks whose loss is summed over time (Mikolov), 0.01 to 1 where it is averaged.
The median of `gradclip/norm` (with log_every_n_steps=1) divided by the square root of the number of weights is the
size of a typical entry; a bound of ten times that cuts outliers only.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from lightning_gradclip.methods.method import ClipMethod
from lightning_gradclip.methods.schedule import MEASURE, Scheduled, greatest, least, scheduled, value_at


@dataclass(kw_only=True)
class ValueClip(ClipMethod):
    """Clamp every entry of the gradients to [`min_value`, `max_value`].

    Args:
        max_value: Largest entry allowed, in units of the gradient: > 0, or >= 0 beside a `min_value`; inf sets no
            bound. A mapping from optimizer step to value, such as {0: 1.0, 1000: 0.1}, is interpolated linearly.
        min_value: Smallest entry allowed, <= 0; None: -max_value, the zero-centered form. A mapping works too.

    Raises:
        TypeError: If a number is not a number; at the first step, if a parameter is complex.
        ValueError: If the bounds do not hold zero between them, or both reach it.
    """

    scopes = ("element",)
    per = "element"
    max_value: Scheduled = field(default=0.5, kw_only=False)
    min_value: Scheduled | None = None

    def __post_init__(self) -> None:
        if self.min_value is None:
            self.max_value = scheduled("max_value", self.max_value, above=0.0, remedy=MEASURE)
            return
        between = "the bounds must hold zero between them"
        self.max_value = scheduled("max_value", self.max_value, at_least=0.0, remedy=between)
        self.min_value = scheduled("min_value", self.min_value, at_most=0.0, remedy=between)
        if least(self.max_value) == 0 == greatest(self.min_value):
            raise ValueError(
                f"min_value={self.min_value!r} and max_value={self.max_value!r} both reach 0, "
                "which would set every gradient to zero; keep one of them away from it"
            )

    def bounds(self, step: int) -> tuple[float, float]:
        high = value_at(self.max_value, step)
        return -high if self.min_value is None else value_at(self.min_value, step), high

    def limit(self, size: Tensor, weight: Tensor | None, step: int) -> Tensor:
        return torch.full_like(size, value_at(self.max_value, step))
