"""What a callback cannot work beside: refused before training begins, with the way out."""

from collections.abc import Collection
from typing import Any, cast

from torch.optim import Optimizer

from lightning_gradclip.trainer.lightning import LightningModule, MisconfigurationException, Trainer, is_any, is_fsdp1

# Their precision plugins average the gradients over the ranks only after the hook.
# By name, so that those of the package pytorch_lightning are known too.
_UNSUPPORTED = {"XLAStrategy", "XLAFSDPStrategy"}
_JOINED = ("layer", "parameter", "unit")
_APART = "shard with FSDP2, in Lightning ModelParallelStrategy"


def refuse(trainer: Trainer, module: LightningModule, callback: Any, *, measure_per: str | None, writes: bool) -> None:
    """Refuse a trainer or other callbacks that a clipping callback would collide with.

    Args:
        trainer: The trainer, in `setup`.
        module: What it trains.
        callback: The callback.
        measure_per: The scope that it measures besides its method's.
        writes: Whether it may change gradients.

    Raises:
        MisconfigurationException: If there is a conflict.
    """
    kind = type(callback).__name__
    clip_val = trainer.gradient_clip_val
    if clip_val and writes:
        raise MisconfigurationException(
            f"both Trainer(gradient_clip_val={clip_val}) and {kind}({callback.method!r}) clip; remove "
            "gradient_clip_val from the Trainer, or watch its clipping with action='observe'"
        )
    if is_any(trainer.strategy, *_UNSUPPORTED):
        raise MisconfigurationException(
            f"{kind} does not support {type(trainer.strategy).__name__}, under which gradients are averaged over the "
            "ranks only after it has seen them; use Trainer(gradient_clip_val=...)"
        )
    scopes = {measure_per, None if callback.method is None else callback.method.per}
    if lost := _lost_scopes(trainer.strategy, module, scopes):
        raise MisconfigurationException(f"{kind}({callback.method!r}) cannot work: {lost}")
    callbacks = cast("list[Any]", trainer.callbacks)  # type: ignore[attr-defined]
    twins = [one for one in callbacks if isinstance(one, type(callback)) and one.name == callback.name]
    if len(twins) > 1:
        raise MisconfigurationException(
            f"{len(twins)} {kind} callbacks are named {callback.name!r}; give each a name of its own, "
            f"such as name={callback.name + '_2'!r}"
        )


def refuse_unknown(index: int | None, count: int) -> None:
    """Refuse to serve an optimizer that the module has not configured.

    Raises:
        ValueError: If there are some, and none has this index.
    """
    if index is not None and count and index >= count:
        known = "optimizer 0 only" if count == 1 else f"optimizers 0 to {count - 1}"
        raise ValueError(
            f"optimizer={index} does not exist: the module configures {known}; "
            "use one of these, or optimizer=None for every optimizer"
        )


def refuse_stranger(optimizer: Optimizer, *, writes: bool) -> None:
    """Refuse to leave the gradients of an optimizer that the trainer does not know as they are.

    Raises:
        MisconfigurationException: If something is to be written.
    """
    if writes:
        raise MisconfigurationException(
            f"{type(optimizer).__name__} is stepped but is none of the trainer's optimizers; "
            "return it from configure_optimizers"
        )


def _lost_scopes(strategy: Any, module: LightningModule, scopes: Collection[str | None]) -> str | None:
    """Why one of these scopes cannot be measured under this strategy, and what can; None: nothing is known against it.

    Where the module wraps parts of itself, or has FSDP ignore some, only the laid out parameters can tell: the clipper
    looks at them before its first step.
    """
    wraps_itself = type(module).configure_model is not LightningModule.configure_model
    if not is_fsdp1(strategy) or wraps_itself or {"ignored_modules", "ignored_states"} & set(strategy.kwargs):
        return None
    name = type(strategy).__name__
    joined = next((scope for scope in _JOINED if scope in scopes), None)
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
