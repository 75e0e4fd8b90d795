"""What a callback cannot work beside: refused before training begins, with the way out."""

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import wraps
from typing import Any, TypeVar, cast

from lightning_utilities.core.rank_zero import rank_zero_warn
from torch.optim import Optimizer

from lightning_gradclip.act.fold import require_all, require_fused
from lightning_gradclip.act.policy import Options
from lightning_gradclip.limit.expected import require_squares
from lightning_gradclip.select.parameters import Names, Selection
from lightning_gradclip.trainer.lightning import (
    Callback,
    LightningModule,
    MisconfigurationException,
    Trainer,
    is_any,
    overrides,
    whole_model,
)

# Their precision plugins average the gradients over the ranks only after the hook.
# By name, so that those of the package pytorch_lightning are known too.
_UNSUPPORTED = {"XLAStrategy", "XLAFSDPStrategy"}
_NAMED = 3
_Method = TypeVar("_Method", bound=Callable[..., Any])
_APART = "shard with FSDP2, in Lightning ModelParallelStrategy"


def of_instances(hook: Callable[..., None]) -> Callable[..., None]:
    """A hook that says so where the class itself stands among the callbacks, and is asked instead of one of it."""

    @wraps(hook)
    def checked(self: Any, *arguments: Any, **named: Any) -> None:
        if not isinstance(self, Callback):
            raise TypeError(
                "callbacks=[...] holds the class GradientClipping instead of a callback; write "
                "callbacks=[GradientClipping(NormClip(max_norm=1.0))]"
            )
        hook(self, *arguments, **named)

    return checked


def refused_with_name(state_dict: _Method) -> _Method:
    """A `state_dict` whose callbacks a trainer leaves to `refuse` where two have one name.

    Its own refusal, of keys that are the same, would come first and name neither. It looks at callbacks that override
    this method only, and takes a function that wraps another for that one.
    """
    vars(state_dict)["__wrapped__"] = Callback.state_dict
    return state_dict


def refuse(trainer: Trainer, module: LightningModule, callback: Any, options: Options) -> None:
    """Refuse, in `setup`, a trainer or other callbacks that a clipping callback would collide with."""
    kind = type(callback).__name__
    refuse_second_clipping(trainer, module, callback, options)
    if is_any(trainer.strategy, *_UNSUPPORTED):
        raise MisconfigurationException(
            f"{kind} does not support {type(trainer.strategy).__name__}, under which gradients are averaged over the "
            "ranks only after it has seen them; use Trainer(gradient_clip_val=...)"
        )
    scopes = {options.measure_per, None if options.method is None else options.method.per}
    if lost := _lost_scopes(trainer.strategy, module, scopes):
        raise MisconfigurationException(f"{kind}({callback.method!r}) cannot work: {lost}")
    callbacks = cast("list[Any]", trainer.callbacks)  # type: ignore[attr-defined]
    twins = [one for one in callbacks if isinstance(one, type(callback)) and one.name == callback.name]
    if len(twins) > 1:
        raise MisconfigurationException(
            f"{len(twins)} {kind} callbacks are named {callback.name!r}; give each a name of its own, "
            f"such as name={callback.name + '_2'!r}"
        )
    _refuse_name_of_scopes(callbacks, callback, options)
    if options.policy.writes:
        _warn_of_finder(callbacks, kind)


def refuse_second_clipping(trainer: Trainer, module: LightningModule, callback: Any, options: Options) -> None:
    """Refuse a trainer or a module that clips too, after the callback, if that writes."""
    if not options.policy.writes:
        return
    ours = f"{type(callback).__name__}({callback.method!r})"
    if clip_val := trainer.gradient_clip_val:
        raise MisconfigurationException(
            f"both Trainer(gradient_clip_val={clip_val}) and {ours} clip; remove gradient_clip_val from the Trainer, "
            "or watch its clipping with action='observe'"
        )
    # Under manual optimization nobody calls it.
    if module.automatic_optimization and overrides(module, "configure_gradient_clipping"):
        name = type(module).__name__
        raise MisconfigurationException(
            f"both {name}.configure_gradient_clipping and {ours} clip; remove the method from {name}, or where it is "
            "not yours write configure_gradient_clipping = LightningModule.configure_gradient_clipping in a subclass; "
            "or watch its clipping with action='observe'"
        )


def selections(
    trainer: Trainer, module: LightningModule, options: Options, optimizers: Sequence[Optimizer]
) -> list[Selection]:
    """What is served of these optimizers; refused if a pattern matches no parameter of the module."""
    # Other ranks may hold what a pattern is about.
    alone, kept = options.process_group is None, options.scale_free != "exclude"
    names = Names(whole_model(trainer, module), options.include, options.exclude, complete=alone, scale_free=kept)
    return [names.select(optimizer) for optimizer in optimizers]


def served(trainer: Trainer, module: LightningModule, options: Options, only: int | None) -> dict[int, Selection]:
    """By index what is served of the trainer's optimizers, as soon as they are there, or a refusal that names why not.

    With `only` one of them is served.
    """
    found = selections(trainer, module, options, trainer.optimizers)
    chosen = {index: one for index, one in enumerate(found) if one.params and only in (None, index)}
    for index in chosen:
        require_squares(options.method, trainer.optimizers[index])
    for index, selection in chosen.items() if options.fold else ():
        require_fused(trainer.optimizers[index])
        require_all(selection)
    return chosen


def warn_of_overlap(
    first: str, second: str, of_first: Mapping[int, Selection], of_second: Mapping[int, Selection]
) -> set[int]:
    """Of which optimizers two callbacks clip the same parameters, one after the other; said with both names."""
    shared = {
        index: [name for one, name in zip(mine.params, mine.names, strict=True) if any(one is p for p in theirs.params)]
        for index, mine in of_first.items()
        if (theirs := of_second.get(index)) is not None
    }
    names = [name for of_one in shared.values() for name in of_one]
    if names:
        rank_zero_warn(
            f"two callbacks clip the same parameters: {listed(names)} by name={first!r} and then by name={second!r}. "
            f"norm_clipped of {first!r} is left out, since the optimizer receives what the other leaves; have them "
            "share nothing by include= and exclude=, or let one watch with action='observe'"
        )
    return {index for index, of_one in shared.items() if of_one}


def listed(names: Sequence[str]) -> str:
    """The first names, and how many more there are."""
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more


def _refuse_name_of_scopes(callbacks: Sequence[Any], callback: Any, options: Options) -> None:
    """Refuse a callback whose name is what another's norms of scopes begin with."""
    kind, name = type(callback), f"{callback.name}_norm"
    if options.measure_per and any(isinstance(one, kind) and one.name == name for one in callbacks):
        raise MisconfigurationException(
            f"a {kind.__name__} callback is named {name!r}, under which {callback.name!r} logs its norms per "
            f"{options.measure_per}; give it another name, such as name={callback.name + '_2'!r}"
        )


def refuse_unknown(index: int | None, count: int) -> None:
    """Refuse to serve an optimizer that the module has not configured, if it has configured any."""
    if index is not None and count and index >= count:
        known = "optimizer 0 only" if count == 1 else f"optimizers 0 to {count - 1}"
        raise ValueError(
            f"optimizer={index} does not exist: the module configures {known}; "
            "use one of these, or optimizer=None for every optimizer"
        )


def refuse_stranger(optimizer: Optimizer, *, writes: bool) -> None:
    """Refuse to leave the gradients of an optimizer that the trainer does not know as they are, if any are written."""
    if writes:
        raise MisconfigurationException(
            f"{type(optimizer).__name__} is stepped but is none of the trainer's optimizers; "
            "return it from configure_optimizers"
        )


def _warn_of_finder(callbacks: Sequence[Any], kind: str) -> None:
    if any(is_any(one, "LearningRateFinder") for one in callbacks):
        rank_zero_warn(
            f"LearningRateFinder, which lr_find uses, trains without callbacks, so it searches without {kind} and "
            "suggests a learning rate for gradients that are not clipped; search with a Trainer of its own that clips "
            "by itself, Tuner(Trainer(gradient_clip_val=1.0)).lr_find(model)"
        )


def _lost_scopes(strategy: Any, module: LightningModule, scopes: Collection[str | None]) -> str | None:
    """Why one of these scopes cannot be measured under this strategy, and what can; None: nothing is known against it.

    Where the module wraps parts of itself, or has FSDP ignore some, only the laid out parameters can tell: the clipper
    looks at them before its first step.
    """
    is_fsdp1 = is_any(strategy, "FSDPStrategy")
    if (
        not is_fsdp1
        or overrides(module, "configure_model")
        or {"ignored_modules", "ignored_states"} & set(strategy.kwargs)
    ):
        return None
    name = type(strategy).__name__
    joined = next((scope for scope in ("layer", "parameter", "unit") if scope in scopes), None)
    if not strategy.kwargs.get("use_orig_params") and joined is not None:
        remedy = _APART if joined == "unit" else "set use_orig_params=True, or use per='model' or 'group'"
        reason = f"{name}(use_orig_params=False) joins parameters, so that there is nothing to tell each {joined} by"
        return f"{reason}; {remedy}"
    if "unit" in scopes and strategy.sharding_strategy.name != "NO_SHARD":
        return (
            f"{name}(sharding_strategy={strategy.sharding_strategy.name!r}) cuts parameters without regard to their "
            f"rows, so that no rank can measure an output unit; {_APART}, or use per='parameter'"
        )
    return None
