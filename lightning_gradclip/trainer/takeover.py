"""The clipping that a trainer is told to do by its own arguments, done by a callback in its place."""

import math

from lightning_utilities.core.rank_zero import rank_zero_warn

from lightning_gradclip.methods.method import ClipMethod
from lightning_gradclip.methods.norm import NormClip
from lightning_gradclip.methods.value import ValueClip
from lightning_gradclip.trainer.lightning import Trainer

# What stands for the method until there is a trainer to ask.
NO_LIMIT = NormClip(max_norm=math.inf)


class Takeover:
    """Takes the limit from a trainer before a fit and gives it back after, where it is `on`."""

    def __init__(self) -> None:
        self.on = False
        self._had: tuple[int | float | None] | None = None

    def take(self, trainer: Trainer, method: ClipMethod | None) -> ClipMethod | None:
        """What the trainer is told to clip by, and is told no more; where it is not on, the method that is given."""
        if not self.on:
            return method
        value = trainer.gradient_clip_val
        self._had, trainer.gradient_clip_val = (value,), None
        if not value:
            rank_zero_warn(
                "GradientClipping.from_trainer() does what the trainer is told, and "
                f"Trainer(gradient_clip_val={value}) is told nothing, so that no norm is limited; set "
                "gradient_clip_val, or give a method: GradientClipping(NormClip(max_norm=1.0))"
            )
            return NO_LIMIT
        # An enumeration of words, or None for the usual one.
        algorithm = getattr(trainer.gradient_clip_algorithm, "value", trainer.gradient_clip_algorithm)
        return ValueClip(max_value=float(value)) if algorithm == "value" else NormClip(max_norm=float(value))

    def give_back(self, trainer: Trainer) -> None:
        """Leave the trainer as it was."""
        if self._had is not None:
            (trainer.gradient_clip_val,), self._had = self._had, None
