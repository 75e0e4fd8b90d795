"""Clipping what surprises the optimizer: limits in units of the gradients that it remembers.

Rule: with v the mean square that Adam keeps for each entry, corrected for its start, the size of a tensor's gradient
is the root of the mean of g**2 / v over its entries, 1 for a gradient like those before; where it is over k the
gradient is multiplied by k / size. v is that of the steps before this one, counts as no less than eps**2, and has to be
from `warmup` steps. Nothing is remembered beside it.

Source: the update clipping of AdaFactor (N. Shazeer, M. Stern, "Adafactor: Adaptive Learning Rates with Sublinear
Memory Cost", 2018, section 6), which StableAdamW brought to AdamW (M. Wortsman et al., "Stable and low-precision
training for large-scale vision-language models", 2023, section 3.5); the size is that of `pytorch_optimizer`, given
the same v.

Deviations: both shorten the step after v has taken in the gradient, whatever its size, and by k = 1; here the gradient
is shortened before, so that neither v nor the momentum sees the spike. Then v must be that of the steps before: with
the gradient in it, no size exceeds 1 / sqrt(1 - beta2), however large a spike is. And k must be over 1: since a clipped
gradient adds k**2 v to the mean of v at most, with k = 1 v could never grow again. With k > 1 it follows a lasting rise
by a factor of 1 + (1 - beta2) (k**2 - 1) a step: at k = 2 and beta2 = 0.999 a hundredfold rise takes some 3,100 steps,
at beta2 = 0.95 some 66. Entries without any gradient so far (v = 0) do not count as surprising. Of a v from few steps
single entries are near 0 by chance, hence the warm-up: from n steps sizes are near sqrt(n / (n - 2)), 1.04 at 25.

Suggested values: k 2, which a tensor of many entries does not reach by chance; single numbers do in one step of twenty.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from lightning_gradclip import checks
from lightning_gradclip.methods.method import ClipMethod


@dataclass(kw_only=True)
class SurpriseClip(ClipMethod):
    """Scale down gradients that are large beside what an optimizer of Adam's kind remembers of them.

    Args:
        k: Largest root mean square of g / sqrt(v), > 1; 1 is the usual size, inf never clips. The nearer to 1, the
            longer it takes until a lasting rise of the gradients is followed.
        warmup: How many steps of the optimizer v has to be from, >= 3.
        per: Where the root mean square is taken: "model", "group", "layer" or "parameter".

    Raises:
        TypeError: If a number is not a number.
        ValueError: If a number is out of range, or `per` is unknown; by the clipper, if there is no optimizer or it
            keeps no such squares.
    """

    needs_moments = True
    epsilon = 0.0
    k: float = field(default=2.0, kw_only=False)
    warmup: int = 25
    per: str = "parameter"

    def __post_init__(self) -> None:
        follow = "at 1 what the optimizer remembers could never grow again; 2 lets through what is usual"
        self.k = checks.number("k", self.k, above=1.0, remedy=follow)
        self.warmup = checks.integer("warmup", self.warmup, at_least=3, remedy="fewer steps have no mean to speak of")
        checks.choice("per", self.per, self.scopes)

    @property
    def least_steps(self) -> int:
        return self.warmup

    def limit(self, size: Tensor, weight: Tensor | None, step: int) -> Tensor:
        return torch.full_like(size, self.k)
