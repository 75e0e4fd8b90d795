"""Clipping relative to an exponential mean of past clipped norms.

Rule: after the warm-up the limit of a scope is ratio * gamma, and gamma = beta * gamma + (1 - beta) * v with v the size
after clipping. During the first `warmup` sizes gamma is the smallest v, and all scopes share one coefficient, that of
clipping their joint norm to `warmup_max_norm`, if there is any. The level can rise by (1 - beta) * (ratio - 1) a step:
by default a lasting shift to twice the level takes about 1,800 steps, to four times 3,600; raise `ratio` or lower
`beta` for faster.

Source: G. Wang, S. Li, C. Chen, J. Zeng et al., "AdaGC: Enhancing LLM Pretraining Stability via Adaptive Gradient
Clipping", arXiv 2502.11034, 2025, algorithm 1, which is per="parameter" (the option `adagc`); as
`pytorch_optimizer`'s `AdaGC` publishes it, whose warmup_steps is one more.

Deviations: nothing is clipped during the warm-up unless `warmup_max_norm` says so, where the published rule limits the
joint norm to 1 (as the option `adagc` does): where norms are larger, gamma starts at 1 and rises as slowly as said
above, and layers whose gradients are small beside the others' may get too little for Adam to feel. Sizes that are not
finite, or exactly zero, are never remembered: in the published implementation a tensor whose gradient is zero once
during the warm-up (an unused embedding, LoRA's A) gets gamma 0 and never moves again. The warm-up counts each scope's
own sizes, so that scopes that appear later have one too.

Suggested values: ratio 1.04 (lambda_rel of Wang et al.), beta 0.99, warmup 100; where the first steps
need a guard, warmup_max_norm 1.0 (lambda_abs, the usual limit of language models, whose norms are about as large).
"""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lightning_gradclip import checks
from lightning_gradclip.methods.method import ClipMethod
from lightning_gradclip.methods.numbers import Number, Truth, divide, minimum, together, where


@dataclass(kw_only=True)
class EmaClip(ClipMethod):
    """Scale gradients down when their norm exceeds `ratio` times an exponential mean of the clipped norms.

    Args:
        ratio: Limit over exponential mean, > 0: below 1 every step is clipped and the level sinks; inf never clips.
        beta: Share of the old mean that is kept at each step, in [0, 1).
        warmup: How many norms the mean starts from, >= 1.
        warmup_max_norm: Limit of the joint norm of all scopes until then, > 0; inf for none. Below the usual norm it
            is what the level starts from; under action="skip" every step above it is dropped.
        per: Where the norm is taken, remembered and kept: "model", "group", "layer" or "parameter".

    Raises:
        TypeError: If a number is not a number.
        ValueError: If a number is out of range, or `per` is unknown.
    """

    epsilon = 0.0
    on_floats = True
    ratio: float = field(default=1.04, kw_only=False)
    beta: float = 0.99
    warmup: int = 100
    warmup_max_norm: checks.Unbounded = math.inf
    per: str = "model"

    def __post_init__(self) -> None:
        remedy, start = "with 1 nothing would be learned after the warm-up", "inf does not clip during the warm-up"
        self.ratio = checks.number("ratio", self.ratio, above=0.0)
        self.beta = checks.number("beta", self.beta, at_least=0.0, below=1.0, remedy=remedy)
        self.warmup = checks.integer("warmup", self.warmup, at_least=1, remedy="the mean must start from something")
        self.warmup_max_norm = checks.number("warmup_max_norm", self.warmup_max_norm, above=0.0, remedy=start)
        checks.choice("per", self.per, self.scopes)

    def fresh_state(self, size: Tensor) -> dict[str, Tensor]:
        return {"gamma": torch.zeros_like(size), "count": torch.zeros_like(size, dtype=torch.long)}

    def limit(self, size: Number, weight: Tensor | None, step: int) -> Number:
        learned = self.ratio * self.state["gamma"]
        joint = together(size)
        # The 1e-6 is that of the clipping by norm which the warm-up is.
        shared = where(joint > self.warmup_max_norm, divide(self.warmup_max_norm, joint + 1e-6), math.inf)
        return where(self.state["count"] < self.warmup, size * shared, learned)

    def update(self, size: Number, limit: Number, active: Truth) -> None:
        gamma, count = self.state["gamma"], self.state["count"]
        clipped = minimum(size, limit)
        least = where(count > 0, minimum(gamma, clipped), clipped)
        new = where(count < self.warmup, least, self.beta * gamma + (1.0 - self.beta) * clipped)
        self.state = {"gamma": where(active, new, gamma), "count": count + active}
