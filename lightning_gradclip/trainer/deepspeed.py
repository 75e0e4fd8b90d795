"""Under DeepSpeed: the engine owns the gradients, so that it has to clip them, and says what their norm was.

In the hook before the optimizer step the parameters have no gradients, and under accumulation it is called for every
batch. The engine clips the joint 2-norm by torch's formula, which is `NormClip`'s; whatever else is refused.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor

from lightning_gradclip.act.policy import Options
from lightning_gradclip.methods.method import ClipMethod
from lightning_gradclip.methods.norm import NormClip
from lightning_gradclip.record.context import UNKNOWN, Context, number
from lightning_gradclip.record.step import Row, amended, overflowing, row_of
from lightning_gradclip.record.window import Reader, Recorded, Window
from lightning_gradclip.trainer.lightning import MisconfigurationException, Trainer

_KEY = "gradient_clipping"
# What the engine does as these say, or has no part in.
_ALLOWED: Mapping[str, tuple[Any, ...]] = {
    "action": ("clip", "observe"),
    "nonfinite": (None, "ignore"),
    "include": (("*",),),
    "exclude": ((),),
    "measure_per": (None,),
    "fold": (False,),
    "process_group": (None,),
    "scale_free": ("warn", "clip"),
    "centralize": (False,),
}


class Handover:
    """Hands the limit to the trainer before its strategy makes DeepSpeed's engine, and takes it back after the fit.

    Refuses what the engine cannot do, and an engine that is told to clip elsewhere too.
    """

    def __init__(self, trainer: Trainer, options: Options) -> None:
        self._trainer = trainer
        for option, allowed in _ALLOWED.items():
            if getattr(options, option) not in allowed:
                raise _refusal(f"{option}={getattr(options, option)!r}")
        self.limit = _limit(options.method)
        self._had = trainer.gradient_clip_val
        self._clips = options.action == "clip" and math.isfinite(self.limit)
        config = getattr(trainer.strategy, "config", None)
        self._config: dict[str, Any] = config if isinstance(config, dict) else {}
        if self._clips:
            self._refuse_theirs(options.method)
            # Read by the strategy when it makes the engine.
            trainer.gradient_clip_val = self.limit

    def take_back(self) -> None:
        """Leave trainer and strategy as they were, so that another fit does not find our limit."""
        if self._clips:
            self._trainer.gradient_clip_val = self._had
            self._config.pop(_KEY, None)

    def _refuse_theirs(self, method: ClipMethod | None) -> None:
        if theirs := self._config.get(_KEY):
            raise MisconfigurationException(
                f"both DeepSpeed's configuration ({_KEY}={theirs}) and GradientClipping({method!r}) clip; remove "
                f"{_KEY} from the configuration, or watch its clipping with GradientClipping(None)"
            )


class Delegated(Recorded):
    """Stands in for a clipper, from before the first batch: records the norms that DeepSpeed's engine measured."""

    def __init__(self, trainer: Trainer, limit: float, readers: Iterable[Reader]) -> None:
        super().__init__(Window(*readers))
        self._engine: Any = trainer.strategy.deepspeed_engine  # type: ignore[attr-defined]
        self._limit = limit
        self._done, self._dropped = self._engine.global_steps, self._engine.skipped_steps

    def record(self, at: int, told: Callable[[], Mapping[str, Any]]) -> None:
        """Look at what the engine did in the batch of this number that ends, which may only have accumulated.

        If it took a step, `told` says what the history wants to know of it.
        """
        engine = self._engine
        if engine.global_steps == self._done:
            return
        skipped = engine.skipped_steps > self._dropped
        self._done, self._dropped = engine.global_steps, engine.skipped_steps
        # A step that the engine drops leaves the norm of an earlier one behind.
        norm: Any = math.inf if skipped else engine.get_global_grad_norm()
        if norm is not None:
            self._window.add(at, self._row(float(norm), skipped=skipped), context=_context(**told()))
            self._steps += 1

    def _row(self, norm: float, *, skipped: bool) -> Row:
        over = math.isfinite(norm) and norm > self._limit
        coef = self._limit / (norm + 1e-6) if over else 1.0
        row = row_of(norm, norm * coef, limit=self._limit, coef=coef, clipped=float(over), changed=float(over))
        return amended(overflowing(row), changed=1.0) if skipped else row


def _context(loss: Tensor | None = None, **known: Any) -> Context:
    return Context(loss=UNKNOWN if loss is None else number(loss), **known)


def _limit(method: ClipMethod | None) -> float:
    match method:
        case None:
            return math.inf
        case NormClip(per="model", norm_type=2.0, statistic="norm", min_norm=0.0, max_norm=float(limit)):
            return limit
        case _:
            raise _refusal(repr(method))


def _refusal(what: str) -> MisconfigurationException:
    return MisconfigurationException(
        f"{what} does not work under DeepSpeed, whose engine keeps the gradients to itself and clips their joint "
        "2-norm only; use NormClip(max_norm=...) with a constant limit and no other option, or train with "
        "strategy='fsdp' or ModelParallelStrategy, which shard too and support every method"
    )
