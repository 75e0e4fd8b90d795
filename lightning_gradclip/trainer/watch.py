"""What a callback cannot see from its own hooks: steps that pass it by, and who writes gradients after it.

Both are looked for in the first steps of each optimizer, and writes once more after a log event, by two hooks that
torch calls for every optimizer; at other steps these are not there. Lightning runs backward and the hooks of its
callbacks inside the closure that an optimizer is given, so the gradients are compared at the end of that closure: what
the optimizer itself then writes is its own affair. Under a GradScaler there is none, and the hook comes right before
the step.
"""

import contextlib
from collections.abc import Callable, Mapping
from typing import Any, cast
from weakref import WeakKeyDictionary

from lightning_utilities.core.rank_zero import rank_zero_warn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle

from lightning_gradclip.act.policy import Options
from lightning_gradclip.clipper import Clipper
from lightning_gradclip.gradients import versions
from lightning_gradclip.select.parameters import Selection
from lightning_gradclip.trainer import conflicts
from lightning_gradclip.trainer.lightning import LightningModule, Trainer, overrides, position

# How many steps of each optimizer are watched.
FIRST = 20
# How many batches lie at least between two later looks.
_PAUSE = 50


class Watch:
    """Watches the optimizers of a fit for one callback; `close` it at the end, whatever the end is.

    Args:
        trainer: The trainer of the fit.
        module: Its module.
        callback: The callback, which has a name.
        served: By index the parameters of the optimizers that it serves.
        disclaimed: Of which of these it does not claim to know the norm that they receive, which is added to.
        options: What the callback is told to do.
    """

    def __init__(
        self,
        trainer: Trainer,
        module: LightningModule,
        callback: Any,
        served: Mapping[int, Selection],
        disclaimed: set[int],
        options: Options,
    ) -> None:
        self._trainer, self._module, self._callback, self._options = trainer, module, callback, options
        self._name = f"{type(callback).__name__}(name={callback.name!r})"
        self._kinds = [type(optimizer).__name__ for optimizer in trainer.optimizers]
        self._disclaimed, self._writes = disclaimed, options.policy.writes
        self._deed = "clipped" if self._writes else "measured"
        # By index: the steps to come that are watched, and those that the callback was told of.
        self._left = dict.fromkeys(served, FIRST)
        self._told = dict.fromkeys(served, 0)
        # Those of which a gradient was clipped, or of which it was said that none is.
        self._settled: set[int] = set()
        self._steps: WeakKeyDictionary[Optimizer, int] = WeakKeyDictionary()
        self._owners: WeakKeyDictionary[Optimizer, int | None] = WeakKeyDictionary()
        # Looking takes time for each parameter, so that more of them are looked at less often.
        self._due, self._pause = 0, max(_PAUSE, 2 * sum(len(one.params) for one in served.values()))
        self._held: tuple[int, Clipper, versions.Marks] | None = None
        self._last: RemovableHandle | None = None
        self._handles: list[RemovableHandle] = []
        self.on = False
        self._open()

    def __reduce__(self) -> Any:
        """A copy of a callback watches nothing before its own fit: None."""
        return type(None), ()

    def saw(self, index: int, clipper: Clipper, *, acted: bool) -> None:
        """Take note of a step that the callback was told of, once its clipper `acted` or found no gradient."""
        if not self._left.get(index):
            self._rest()
            return
        self._left[index] -= 1
        self._told[index] += 1
        if acted:
            self._settled.add(index)
        elif self._told[index] == FIRST and index not in self._settled:
            self._say_nothing_was_done(index, FIRST)
        if self._writes and index not in self._disclaimed:
            self._hold(index, clipper)

    def look_again(self, at: int) -> None:
        """Watch one more step of each optimizer after this batch, unless that was done a short while ago."""
        if at < self._due:
            return
        self._due = at + self._pause
        self._left = {index: max(left, 1) for index, left in self._left.items()}
        self._let_go()
        self._open()

    def conclude(self, batches: int) -> None:
        """Say at the end of a fit of so many batches what was not served, and has not been spoken of."""
        for index in self._left if batches else ():
            if index not in self._settled:
                steps = max((n for one, n in self._steps.items() if self._owners.get(one) == index), default=0)
                self._say_nothing_was_done(index, steps or self._told[index], batches)

    def close(self) -> None:
        """Watch no more."""
        self._let_go()
        self.on = False
        while self._handles:
            self._handles.pop().remove()

    def _open(self) -> None:
        if not self.on:
            self._handles = [
                register_optimizer_step_pre_hook(self._before),
                register_optimizer_step_post_hook(self._after),
            ]
            self.on = True

    def _rest(self) -> None:
        if self._settled >= self._left.keys() and not any(self._left.values()):
            self.close()

    def _hold(self, index: int, clipper: Clipper) -> None:
        """Compare later what the gradients of this clipper are now; where there is no closure, by the last hook."""
        self._let_go()
        selection = clipper.selection
        self._held = index, clipper, versions.marks(selection.params, others=_leaves_out(selection))
        # Wrappers around an optimizer may have no such hooks.
        with contextlib.suppress(AttributeError):
            self._last = cast("Optimizer", clipper.optimizer).register_step_pre_hook(self._right_before)

    def _let_go(self) -> None:
        self._held = None
        if self._last is not None:
            self._last.remove()
            self._last = None

    def _before(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Have the gradients compared where the closure of this step ends."""
        own, *rest = args
        if kwargs.get("closure") is not None:
            kwargs = {**kwargs, "closure": self._compared(kwargs["closure"])}
        elif rest and rest[0] is not None:
            rest[0] = self._compared(rest[0])
        return (own, *rest), kwargs

    def _compared(self, closure: Callable[..., Any]) -> Callable[..., Any]:
        def compared(*args: Any, **kwargs: Any) -> Any:
            # What is left of a step that was never taken belongs to no other.
            self._let_go()
            result = closure(*args, **kwargs)
            self._compare()
            return result

        return compared

    def _right_before(self, *_: Any) -> None:
        self._compare()

    def _compare(self) -> None:
        held = self._held
        self._let_go()
        if held is None:
            return
        index, clipper, then = held
        selection = clipper.selection
        if places := versions.written_since(selection.params, then, others=_leaves_out(selection)):
            self._disclaimed.add(index)
            clipper.disclaim()
            self._say_who_wrote(index, conflicts.listed([selection.names[place] for place in places]))

    def _say_who_wrote(self, index: int, names: str) -> None:
        rank_zero_warn(
            f"after {self._name} had clipped, gradients of {self._optimizer(index)} were written once more, those of "
            f"{names}, by {self._writers()}. The optimizer does not receive what was clipped, so norm_clipped is left "
            "out from here on. Let one of the two clip: remove the other, or watch it with action='observe'; what "
            "changes gradients for another purpose goes before the callback"
        )

    def _after(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        """Count a step that the callback may not have been told of."""
        if optimizer not in self._owners:
            self._owners[optimizer] = self._owner(optimizer)
        index = self._owners[optimizer]
        if index not in self._left or index in self._settled:
            return
        steps = self._steps[optimizer] = self._steps.get(optimizer, 0) + 1
        if steps == FIRST:
            self._say_nothing_was_done(index, steps)

    def _owner(self, optimizer: Optimizer) -> int | None:
        """The index of the optimizer; of one inside another, that of the other; None if it is none of the trainer's."""
        known = position(self._trainer, optimizer)
        if known is not None:
            return known
        own = _parameters(optimizer)
        for index, other in enumerate(self._trainer.optimizers):
            if own & _parameters(other):
                return index
        self._say_of_stranger(optimizer)
        return None

    def _say_of_stranger(self, optimizer: Optimizer) -> None:
        if self._callback.optimizer is not None:
            return
        (selection,) = conflicts.selections(self._trainer, self._module, self._options, [optimizer])
        known = set(map(id, self._module.parameters()))
        pairs = zip(selection.params, selection.names, strict=True)
        if names := [name for parameter, name in pairs if id(parameter) in known]:
            rank_zero_warn(
                f"{type(optimizer).__name__} steps {conflicts.listed(names)} but is none of the trainer's optimizers, "
                f"so nothing of that is {self._deed} by {self._name}; return it from configure_optimizers"
            )

    def _say_nothing_was_done(self, index: int, steps: int, batches: int = 0) -> None:
        self._settled.add(index)
        in_all = f"{steps} steps" if steps else f"{batches} batches"
        rank_zero_warn(
            f"{self._name} has {self._deed} nothing in {in_all} of {self._optimizer(index)}: "
            f"{self._reason(index, steps)}"
        )

    def _reason(self, index: int, steps: int) -> str:
        automatic = self._module.automatic_optimization
        if self._told[index]:
            remedy = "return a loss from training_step" if automatic else "call manual_backward() before the step"
            return (
                f"no parameter that it serves had a gradient; {remedy}, zero_grad() not in between, and give the "
                "optimizer parameters that the loss depends on"
            )
        if not steps:
            return "it was never stepped; step it, or name the optimizer to serve by optimizer="
        if self._callback not in cast("list[Any]", self._trainer.callbacks):  # type: ignore[attr-defined]
            return "they were taken without the callbacks of the trainer, as those of a LearningRateFinder are"
        if not automatic:
            return "it was told of none of them; step the optimizers that self.optimizers() returns"
        if overrides(self._module, "optimizer_step"):
            return (
                f"{type(self._module).__name__}.optimizer_step takes them past the hooks of Lightning; write "
                "optimizer.step(closure=optimizer_closure) there"
            )
        return "it was told of none of them; leave stepping to the trainer"

    def _optimizer(self, index: int) -> str:
        return f"optimizer {index} ({self._kinds[index]})"

    def _writers(self) -> str:
        """Who may have written, as text."""
        trainer, hook = self._trainer, "on_before_optimizer_step"
        callbacks = cast("list[Any]", trainer.callbacks)  # type: ignore[attr-defined]
        found = [type(one).__name__ for one in _behind(callbacks, self._callback) if overrides(one, hook)]
        found += [
            f"{type(self._module).__name__}.{name}"
            for name in (hook, "configure_gradient_clipping")
            if overrides(self._module, name)
        ]
        if value := trainer.gradient_clip_val:
            found.append(f"trainer.gradient_clip_val, which is {value} by now")
        return " or ".join(found) or "a hook of the optimizer"


def _leaves_out(selection: Selection) -> bool:
    return len(selection.params) < len(selection.owned)


def _behind(callbacks: list[Any], callback: Any) -> list[Any]:
    return callbacks[callbacks.index(callback) + 1 :] if callback in callbacks else []


def _parameters(optimizer: Any) -> set[int]:
    return {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
