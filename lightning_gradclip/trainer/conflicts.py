"""What a callback cannot work beside: refused before training begins, with the way out."""

from typing import Any, cast

from torch.optim import Optimizer

from lightning_gradclip.trainer import strategy
from lightning_gradclip.trainer.lightning import LightningModule, MisconfigurationException, Trainer

# Their precision plugins average the gradients over the ranks only after the hook.
# By name, so that those of the package pytorch_lightning are known too.
_UNSUPPORTED = {"XLAStrategy", "XLAFSDPStrategy"}


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
    if strategy.is_any(trainer.strategy, *_UNSUPPORTED):
        raise MisconfigurationException(
            f"{kind} does not support {type(trainer.strategy).__name__}, under which gradients are averaged over the "
            "ranks only after it has seen them; use Trainer(gradient_clip_val=...)"
        )
    scopes = {measure_per, None if callback.method is None else callback.method.per}
    if lost := strategy.lost_scopes(trainer.strategy, module, scopes):
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
