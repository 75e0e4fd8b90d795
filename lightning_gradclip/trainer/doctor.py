"""What is wrong with the clipping of a run, whoever does it: measured at the gradients, and said at the end.

Of each step the joint norm is taken three times: after backward, in the hook before the optimizer's step, and where the
optimizer is about to read the gradients. What lies between the first two was done by the module's own code, what lies
between the last two by the trainer or by callbacks that come later. Under sharding each rank measures what it holds.
"""

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from lightning_utilities.core.rank_zero import rank_zero_info
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_gradclip.act import scaler as scaling
from lightning_gradclip.act.stalls import Stalls
from lightning_gradclip.gradients import read
from lightning_gradclip.gradients.read import Meter
from lightning_gradclip.methods.norm import NormClip
from lightning_gradclip.record.rule import limit_for
from lightning_gradclip.record.step import row_of
from lightning_gradclip.select.parameters import Names, Selection
from lightning_gradclip.trainer.lightning import Callback, LightningModule, Trainer, is_any, position

# A factor that is none: what rounding and the small addend in torch's formula make of 1.
_ROUNDING = 1e-4
# Of fewer steps nothing is said about always and never.
_FEW = 20
# How often what the optimizer feels is looked at.
_EVERY = 50


@dataclass
class _Seen:
    """What was seen of one optimizer."""

    kind: str
    selection: Selection
    meter: Meter
    stalls: Stalls
    norms: list[float] = field(default_factory=list[float])
    own: list[float] = field(default_factory=list[float])  # what the module's code left of each norm
    later: list[float] = field(default_factory=list[float])  # what others left of that
    scaled: int = 0
    after_backward: float = 0.0
    before: float = 0.0
    lost: tuple[int, str] | None = None


class Doctor(Callback):
    """Says at the end of a fit what is wrong with its clipping: put it first among the callbacks; it changes nothing.

    Noticed are two that clip the same gradients, gradients that are clipped while a GradScaler still scales them, a
    limit that acts on no step or on every step, parameters that clipping leaves too little for the optimizer to feel,
    and a search for a learning rate whose steps are not clipped.

    Attributes:
        findings: What was found in the last fit, a sentence or two each, with what to write.
    """

    def __init__(self) -> None:
        self.findings: list[str] = []
        self._seen: dict[int, _Seen] = {}
        self._handles: list[RemovableHandle] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit" and any(is_any(one, "LearningRateFinder") for one in _callbacks(trainer)):
            rank_zero_info(
                "Doctor: LearningRateFinder trains without callbacks, so what callbacks clip is not clipped there and "
                "the rate is one for unclipped steps; search with Tuner(Trainer(gradient_clip_val=...)).lr_find(model)"
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.findings, self._seen = [], {}
        self._close()
        names = Names(pl_module)
        for index, optimizer in enumerate(trainer.optimizers):
            selection = names.select(optimizer)
            stalls = Stalls(optimizer, NormClip())
            stalls.serve(selection, None)
            self._seen[index] = _Seen(type(optimizer).__name__, selection, Meter(2.0), stalls)
            self._handles.append(optimizer.register_step_pre_hook(self._at_step(index)))

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for seen in self._seen.values():
            seen.after_backward = _norm(seen)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        seen = self._seen.get(-1 if (index := position(trainer, optimizer)) is None else index)
        if seen is None:
            return
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        scale = float(scaler.get_scale()) if scaler is not None and scaling.is_enabled(scaler) else 1.0
        seen.before = _norm(seen)
        first = seen.after_backward / scale
        seen.norms.append(first)
        if not 0 < first < float("inf"):
            seen.before = 0.0
            return
        seen.own.append(seen.before / first)
        seen.scaled += scale != 1.0 and seen.before / first < 1 - _ROUNDING

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._close()
        for index, seen in self._seen.items():
            of = f" of optimizer {index} ({seen.kind})" if len(self._seen) > 1 else ""
            self.findings += _findings(seen, of)
        steps = max((len(one.norms) for one in self._seen.values()), default=0)
        told = "".join(f"\n  {number}. {one}" for number, one in enumerate(self.findings, 1)) or " nothing is wrong"
        rank_zero_info(f"Doctor, after {steps} steps:{told}")

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._close()

    def _close(self) -> None:
        while self._handles:
            self._handles.pop().remove()

    def _at_step(self, index: int) -> Callable[..., Any]:
        """A hook that measures where the optimizer reads gradients: at the end of its closure, if it has one."""

        def at_step(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            own, *rest = args
            given = kwargs.get("closure") or (rest[0] if rest else None)
            if given is None:
                self._measure(index)
                return None

            def closure() -> Any:
                result = given()
                self._measure(index)
                return result

            return (own,), {**kwargs, "closure": closure}

        return at_step

    @torch.no_grad()
    def _measure(self, index: int) -> None:
        seen = self._seen[index]
        if not 0 < seen.before < float("inf"):
            return
        after = _norm(seen)
        seen.later.append(after / seen.before)
        kept = seen.own[-1] * seen.later[-1] if seen.own else 1.0
        if len(seen.later) % _EVERY == _EVERY - 1 and 0 < kept < 1 - _ROUNDING:
            row = row_of(after / kept, after, limit=after, coef=kept, clipped=1.0, changed=1.0)
            seen.stalls.look(_gradients(seen), kept, row)
            seen.lost = seen.stalls.lost() or seen.lost


def _findings(seen: _Seen, of: str) -> list[str]:
    found: list[str] = []
    own, later = ([one < 1 - _ROUNDING for one in kept] for kept in (seen.own, seen.later))
    if any(own) and any(later):
        found.append(
            f"Two clip the gradients{of}: the module's own code in {sum(own)} steps, before the hook "
            f"on_before_optimizer_step, and the trainer or a callback in {sum(later)} after it. Keep one of them."
        )
    if seen.scaled:
        found.append(
            f"The module clips gradients{of} that the GradScaler still scales, in {seen.scaled} steps, so that the "
            "limit means another one at every change of the scale. Leave clipping to GradientClipping(NormClip(...)), "
            "which sees them unscaled."
        )
    found += _of_the_limit(seen, of, sum(one or other for one, other in zip(own, later, strict=False)))
    if seen.lost:
        count, name = seen.lost
        found.append(
            f"Clipping leaves {count} of {len(seen.selection.params)} parameters{of}, such as {name!r}, less than half "
            f"of their movement: {seen.kind} cannot feel gradients so small beside its eps. Limit each layer by "
            "itself, NormClip(per='layer'), or take a limit near the usual norm."
        )
    return found


def _of_the_limit(seen: _Seen, of: str, acts: int) -> Iterator[str]:
    """Whether it acts in some steps, and not in all."""
    steps, finite = len(seen.later), [one for one in seen.norms if 0 < one < float("inf")]
    if steps < _FEW or not finite:
        return
    sizes = f"The norms{of} are {statistics.median(finite):.3g} in the median and {max(finite):.3g} at most"
    limit = f"NormClip({limit_for(np.array(finite)):g})"
    if acts == 0:
        yield (
            f"Nothing is clipped in {steps} steps{of}. {sizes}: a limit guards only below the largest; for insurance "
            f"write {limit}, the norm that one step in ten is over."
        )
    elif acts == steps:
        kept = statistics.median([one * other for one, other in zip(seen.own, seen.later, strict=False)])
        yield (
            f"Every one of {steps} steps{of} is clipped, to {kept:.2g} of its norm in the median, which is a smaller "
            f"learning rate by another name. {sizes}: write {limit} to cut what stands out only, or keep it and know "
            "that the limit sets the length of the steps."
        )


def _callbacks(trainer: Trainer) -> Sequence[Any]:
    return trainer.callbacks  # type: ignore[attr-defined]


def _gradients(seen: _Seen) -> list[Tensor | None]:
    return read.gradients_of(seen.selection, settled=False)


def _norm(seen: _Seen) -> float:
    return float(torch.linalg.vector_norm(seen.meter.each(_gradients(seen))))
