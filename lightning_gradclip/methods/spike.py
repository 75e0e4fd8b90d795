"""Clipping single entries that are large beside what the optimizer remembers of each.

Rule: with v the mean square that Adam keeps for an entry, an entry with g**2 > theta * v becomes sign(g) * sqrt(theta *
v). v is that of the steps before this one, as Adam keeps it, not corrected for its start, and has to be from `warmup`
steps. Nothing is remembered beside it, and nothing is exchanged between ranks in order to clip.

Source: T. Huang et al., "SPAM: Spike-Aware Adam with Momentum Reset for Stable LLM Training", ICLR 2025, equation 1;
with `torch.optim.Adam` weight for weight that of the optimizer in `pytorch_optimizer` between its resets. SPAM also
sets the momentum back every 500 steps, which is up to the optimizer.

Deviations: the published rule sets entries that have never had a gradient (v = 0) to zero, for good; here they pass.
`warmup` counts steps that v has seen: the published rule begins with 19, at its 20th step.

Suggested values: theta 5000 (Huang et al.; a spike is some 70 times the usual entry), warmup 20.
"""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lightning_gradclip import checks
from lightning_gradclip.methods.method import ClipMethod


@dataclass(kw_only=True)
class SpikeClip(ClipMethod):
    """Cut single entries that are spikes beside what an optimizer of Adam's kind remembers of them.

    Args:
        theta: Largest ratio of an entry's square to its mean square, > 1; near 1 a third of all entries is cut, inf
            cuts none.
        warmup: How many steps of the optimizer the mean square has to be from, >= 1.

    Raises:
        TypeError: If a number is not a number.
        ValueError: If a number is out of range; by the clipper, if there is no optimizer or it keeps no such squares.
    """

    scopes = ("element",)
    per = "element"
    needs_moments = True
    theta: float = field(default=5000.0, kw_only=False)
    warmup: int = 20

    def __post_init__(self) -> None:
        self.theta = checks.number("theta", self.theta, above=1.0, remedy="at 1 usual entries are cut; SPAM has 5000")
        self.warmup = checks.integer("warmup", self.warmup, at_least=1, remedy="before it there is no mean square")

    @property
    def least_steps(self) -> int:
        return self.warmup

    def bounds(self, step: int) -> tuple[float, float]:
        bound = math.sqrt(self.theta)
        return -bound, bound

    def limit(self, size: Tensor, weight: Tensor | None, step: int) -> Tensor:
        return torch.full_like(size, math.inf)
