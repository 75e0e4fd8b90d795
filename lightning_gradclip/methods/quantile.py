"""Clipping at a quantile of past norms: the largest few per cent of the steps are cut, whatever their scale.

Rule: with h the sizes of a scope in earlier steps, the limit is the q-quantile of h by linear interpolation; none
before the first step. `window` sizes are remembered; `include_current` puts this step's size among them first. A
lasting shift of the level, by any factor, is followed within `window` steps (None: all so far): after (1 - q) * window
of them and one more the limit is a norm of the new level (q * window downward), after all of them its q-quantile.

Source: P. Seetharaman, G. Wichern, B. Pardo, J. Le Roux, "AutoClip: Adaptive Gradient Clipping for Source Separation
Networks", MLSP 2020: include_current=True, window=None, q=0.10 (the option `autoclip`). With the defaults it is
`autoclip` 0.2.1's `QuantileClip` (per="parameter" there unless global_threshold=True).

Deviations: sizes that are not finite, or exactly zero, are never remembered: one NaN makes the published
implementations produce NaN gradients from then on. No 1e-6 is added to the size before dividing. With window=None all
sizes are kept, 8 bytes a step and scope, and the quantile stays exact at a cost per step that hardly grows.

Suggested values: q 0.9 cuts the largest tenth. AutoClip's q 0.10 cuts nine steps of ten, by design: it is closer to
normalization than to clipping (Seetharaman et al., for source separation with Adam).
"""

from dataclasses import dataclass, field

from torch import Tensor

from lightning_gradclip import checks
from lightning_gradclip.methods.memory import AllSizes, LastSizes
from lightning_gradclip.methods.method import Remembering
from lightning_gradclip.methods.numbers import Number


@dataclass(kw_only=True)
class QuantileClip(Remembering):
    """Scale gradients down when their norm exceeds a quantile of the norms so far.

    Args:
        q: The quantile, in [0, 1]: 0.9 limits to what nine tenths of the remembered norms stay within, 0 to the
            smallest of them, 1 to the largest.
        window: How many norms are remembered, >= 1; None: all of them, exactly, which takes 8 bytes a step and scope.
        include_current: Whether this step's norm counts before the quantile is taken.
        per: Where the norm is taken, remembered and kept: "model", "group", "layer" or "parameter".
        norm_type: The p of the p-norm, in (0, inf].

    Raises:
        TypeError: If an argument is of the wrong kind.
        ValueError: If a number is out of range, or `per` is unknown.
    """

    epsilon = 0.0
    on_floats = True
    q: float = field(default=0.9, kw_only=False)
    window: int | None = 1000
    include_current: bool = False
    per: str = "model"
    norm_type: checks.Unbounded = 2.0

    def __post_init__(self) -> None:
        self.q = checks.number("q", self.q, at_least=0.0, at_most=1.0, remedy="0.9 stands for the 90th percentile")
        if self.window is not None:
            self.window = checks.integer("window", self.window, at_least=1, remedy="None remembers all norms")
        self._memory = AllSizes if self.window is None else LastSizes
        checks.flag("include_current", self.include_current)
        checks.choice("per", self.per, self.scopes)
        self.norm_type = checks.number("norm_type", self.norm_type, above=0.0, remedy="the usual norm is norm_type=2")

    def fresh_state(self, size: Tensor) -> dict[str, Tensor]:
        return AllSizes.fresh(size, self.state_dict()) if self.window is None else LastSizes.fresh(size, self.window)

    def limit(self, size: Number, weight: Tensor | None, step: int) -> Number:
        return self._memory.quantile(self.state, self.q, size if self.include_current else None)
