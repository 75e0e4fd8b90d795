"""Under DeepSpeed: the engine owns the gradients, so that it has to clip them, and says what their norm was.

In the hook before the optimizer step the parameters have no gradients, and under accumulation it is called for every
batch. The engine clips the joint 2-norm by torch's formula, which is `NormClip`'s; whatever else is refused.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

from lightning_gradclip.methods.method import ClipMethod
from lightning_gradclip.methods.norm import NormClip
from lightning_gradclip.record.step import Row, StepStats
from lightning_gradclip.record.window import Window
from lightning_gradclip.select.scopes import Scopes
from lightning_gradclip.trainer.lightning import MisconfigurationException, Trainer, is_any

_KEY = "gradient_clipping"
# What the engine does as these say, or has no part in.
_ALLOWED: Mapping[str, tuple[Any, ...]] = {
    "action": ("clip", "observe"),
    "nonfinite": (None, "ignore"),
    "include": (("*",),),
    "exclude": ((),),
    "measure_per": (None,),
    "fold": (False,),
}


def is_delegated(trainer: Trainer) -> bool:
    """Whether the trainer's strategy is DeepSpeed."""
    return is_any(trainer.strategy, "DeepSpeedStrategy")


class Delegated:
    """Stands in for a clipper: hands the limit to DeepSpeed's engine and records the norms that it measured.

    Args:
        trainer: The trainer, before its strategy makes the engine.
        method: `NormClip` over the whole model with a constant limit, or None to measure only.
        options: The other options of the callback.

    Attributes:
        listener: Called with every step that was recorded, if any.

    Raises:
        MisconfigurationException: If the engine cannot do what is asked for, or is told to clip elsewhere too.
    """

    serves_any = True

    def __init__(self, trainer: Trainer, method: ClipMethod | None, options: Mapping[str, Any]) -> None:
        self._trainer, self._method = trainer, method
        for option, allowed in _ALLOWED.items():
            if options[option] not in allowed:
                raise _refusal(f"{option}={options[option]!r}")
        self._limit = _limit(method)
        self._clips = options["action"] == "clip" and math.isfinite(self._limit)
        self._window = Window()
        self._scopes = Scopes(("model",), (0,))
        self._steps = self._done = self._dropped = 0
        self.listener: Callable[[StepStats], None] | None = None
        self._had = trainer.gradient_clip_val
        if self._clips:
            self._hand_over()

    def start(self) -> None:
        """Note where the engine stands, before the first batch."""
        self._done, self._dropped = self._engine.global_steps, self._engine.skipped_steps

    def record(self) -> None:
        """Look at what the engine did in the batch that ends, which may only have accumulated."""
        if self._engine.global_steps == self._done:
            return
        skipped = self._engine.skipped_steps > self._dropped
        self.start()
        # A step that the engine drops leaves the norm of an earlier one behind.
        norm: Any = math.inf if skipped else self._engine.get_global_grad_norm()
        if norm is None:
            return
        row = self._row(float(norm), overflow=float(skipped))
        self._window.add(row)
        self._steps += 1
        if self.listener is not None:
            self.listener(StepStats(row, row.norm, self._limit, self._scopes))

    def take_back(self) -> None:
        """Leave trainer and strategy as they were, so that another fit does not find our limit."""
        if self._clips:
            self._trainer.gradient_clip_val = self._had
            config = getattr(self._trainer.strategy, "config", None)
            if isinstance(config, dict):
                config.pop(_KEY, None)

    @property
    def has_news(self) -> bool:
        """Whether a step was recorded since the last `metrics()`."""
        return not self._window.is_empty

    def metrics(self) -> dict[str, float]:
        """The window since the last call, aggregated over all its steps, and cleared."""
        result = self._window.compute()
        self._window.clear()
        return result

    def peek(self) -> dict[str, float]:
        """`metrics()` without clearing the window."""
        return self._window.compute()

    def state_dict(self) -> dict[str, Any]:
        """Step and open window."""
        return {"step": self._steps, "window": self._window.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` left off, or a clipper under another strategy, whose window is the same."""
        self._steps = state["step"]
        self._window.load_state_dict(state["window"])

    @property
    def _engine(self) -> Any:
        return self._trainer.strategy.deepspeed_engine  # type: ignore[attr-defined]

    def _hand_over(self) -> None:
        config = getattr(self._trainer.strategy, "config", None)
        theirs = config.get(_KEY) if isinstance(config, dict) else None
        if theirs:
            raise MisconfigurationException(
                f"both DeepSpeed's configuration ({_KEY}={theirs}) and GradientClipping({self._method!r}) clip; remove "
                f"{_KEY} from the configuration, or watch its clipping with GradientClipping(None)"
            )
        # Read by the strategy when it makes the engine.
        self._trainer.gradient_clip_val = self._limit

    def _row(self, norm: float, *, overflow: float) -> Row:
        finite = math.isfinite(norm)
        over = finite and norm > self._limit
        coef = self._limit / (norm + 1e-6) if over else 1.0
        return Row(
            norm,
            norm * coef,
            self._limit,
            coef,
            float(over),
            float(finite),
            overflow,
            max(float(over), overflow),
            overflow,
        )


def _limit(method: ClipMethod | None) -> float:
    if method is None:
        return math.inf
    plain = isinstance(method, NormClip) and (method.per, method.norm_type, method.statistic) == ("model", 2.0, "norm")
    if not isinstance(method, NormClip) or not plain or method.min_norm != 0 or not isinstance(method.max_norm, float):
        raise _refusal(repr(method))
    return method.max_norm


def _refusal(what: str) -> MisconfigurationException:
    return MisconfigurationException(
        f"{what} does not work under DeepSpeed, whose engine keeps the gradients to itself and clips their joint "
        "2-norm only; use NormClip(max_norm=...) with a constant limit and no other option, or train with "
        "strategy='fsdp' or ModelParallelStrategy, which shard too and support every method"
    )
