"""Adaptive gradient clipping (AGC): the gradient of each unit is limited relative to the unit's weights.

Rule: with x the 2-norm of a unit's gradient and w that of its weights, the limit is T = clip_factor * max(w, eps);
where x > T the unit's gradient is multiplied by T / max(x, 1e-6). A unit is a slice along dim 0 of a weight, one for
each output of a linear or convolutional layer and each row of an embedding; a bias or scalar is one unit.

Source: A. Brock, S. De, S. L. Smith, K. Simonyan, "High-Performance Large-Scale Image Recognition Without
Normalization", ICML 2021, section 4.1, equation 3; as `timm.utils.agc.adaptive_clip_grad` and
`optax.adaptive_grad_clip` publish it. `eps` lets units initialised with zeros learn.

Deviations: norms are accumulated in float32 or wider where timm stays in float16 or bfloat16. per="parameter" is
ours. Nothing is left out by position: exclude the final classifier by its name, exclude="head.*", as the paper
recommends. (In optax the outputs are on the last dim, as JAX lays them out.) Exclude scalar gains that start at zero
(SkipInit) as well: `eps` lets them learn, in steps of clip_factor * eps times the learning rate. So too transposed
convolutions, or use per="parameter": their outputs are on dim 1, and the rule over dim 0 limits by inputs, as timm's.

Suggested values: clip_factor 0.01 at batch size 4096, larger ones at smaller batches, where the paper tries up to
0.16; eps 1e-3 (Brock et al., section 4.1). They train with SGD and Nesterov momentum.
"""

from dataclasses import dataclass, field

from torch import Tensor

from lightning_gradclip import checks
from lightning_gradclip.methods.method import ClipMethod
from lightning_gradclip.methods.schedule import MEASURE, Scheduled, scheduled, value_at


@dataclass(kw_only=True)
class AGC(ClipMethod):
    """Scale down the gradients of units that are large beside the units' weights.

    Args:
        clip_factor: Largest ratio of gradient norm to weight norm, > 0; near 0 every step is tied to the weights, inf
            never clips. A mapping from optimizer step to value, as {0: 0.001, 1000: 0.01}, is interpolated linearly.
        eps: The weight norm counts as at least this, > 0, so that units initialised with zeros can learn.
        per: "unit": each output of a layer by itself; "parameter": each tensor.

    Raises:
        TypeError: If a number is not a number.
        ValueError: If a number is out of range, or `per` is unknown.
    """

    scopes = ("unit", "parameter")
    needs_weight = True
    clip_factor: Scheduled = field(default=0.01, kw_only=False)
    eps: float = 1e-3
    per: str = "unit"

    def __post_init__(self) -> None:
        remedy = "without it a unit of zero weights could never learn; the paper has 1e-3"
        self.clip_factor = scheduled("clip_factor", self.clip_factor, above=0.0, remedy=MEASURE)
        self.eps = checks.number("eps", self.eps, above=0.0, remedy=remedy)
        checks.choice("per", self.per, self.scopes)

    def limit(self, size: Tensor, weight: Tensor | None, step: int) -> Tensor:
        if weight is None:
            raise ValueError("AGC needs the norms of the weights; pass weight")
        return weight.clamp_min(self.eps) * value_at(self.clip_factor, step)

    def coef(self, size: Tensor, limit: Tensor) -> Tensor:
        return (limit / size.clamp_min(1e-6)).where(size > limit, 1.0)
