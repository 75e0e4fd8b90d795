"""Clipping in a loop of Lightning's Fabric: one call in place of `fabric.clip_gradients`."""

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer

from lightning_gradclip.clipper import Clipper
from lightning_gradclip.methods.method import ClipMethod
from lightning_gradclip.record.step import StepStats

# Where an optimizer keeps the clipper that was made for it: what is kept elsewhere would keep both alive.
_KEPT = "_gradclip_of_fabric"
# Strategies under which others own the gradients, by the beginnings of their names: Fabric has two packages.
_ENGINES = ("DeepSpeed", "XLA")


def clip_gradients(
    fabric: Any,
    module: Iterable[tuple[str, Tensor]] | nn.Module,
    optimizer: Optimizer,
    method: ClipMethod | None,
    **options: Any,
) -> StepStats:
    """Clip once; it stands where `fabric.clip_gradients(module, optimizer, max_norm=1.0)` would.

    The first call makes a clipper, those that follow use it; `clipper_for` of the same arguments returns it.

    Args:
        fabric: That of the loop.
        module: What `fabric.setup` returned, or names and parameters of it.
        optimizer: What `fabric.setup_optimizers` returned.
        method: How to clip, the same at each call; None measures only.
        options: The others of `Clipper`, the same at each call.

    Returns:
        What was done.

    Raises:
        ValueError: If the strategy clips by itself, or earlier calls had another method or other options.
    """
    return clipper_for(fabric, module, optimizer, method, **options).step()


def clipper_for(
    fabric: Any,
    module: Iterable[tuple[str, Tensor]] | nn.Module,
    optimizer: Optimizer,
    method: ClipMethod | None,
    **options: Any,
) -> "FabricClipper":
    """The clipper of `clip_gradients`: for its metrics, and to be saved and loaded with the rest of a run.

    `fabric.save(path, {"model": model, "clipper": clipper})` and `fabric.load` take it as they take a model.

    Args:
        fabric: As of `clip_gradients`.
        module: The same.
        optimizer: The same.
        method: The same.
        options: The same.
    """
    inner = getattr(optimizer, "optimizer", optimizer)
    made, clipper = getattr(inner, _KEPT, (None, None))
    told = (method, options)
    if clipper is None:
        clipper = FabricClipper(fabric, module, method, optimizer=inner, **options)
        setattr(inner, _KEPT, (told, clipper))
    elif made != told:
        raise ValueError(
            f"this {type(inner).__name__} is clipped by {made} already, got {told}; pass the same at each call, and "
            "for a limit that changes a schedule, such as NormClip(max_norm={0: 1.0, 1000: 0.5})"
        )
    return clipper


class FabricClipper(Clipper):
    """A clipper that knows the GradScaler of a Fabric; `clipper_for` makes it."""

    def __init__(
        self,
        fabric: Any,
        named_parameters: Iterable[tuple[str, Tensor]] | nn.Module,
        method: ClipMethod | None,
        *,
        optimizer: Optimizer,
        **options: Any,
    ) -> None:
        strategy = fabric.strategy
        if type(strategy).__name__.startswith(_ENGINES):
            raise ValueError(
                f"under {type(strategy).__name__} others own the gradients, and a clipper would see none; set "
                "gradient_clipping in DeepSpeed's configuration, or train with DDP or FSDP"
            )
        self._precision = strategy.precision
        super().__init__(named_parameters, method, optimizer=optimizer, **options)

    def step(self, scaler: GradScaler | None = None, **more: Any) -> StepStats:
        """As of `Clipper`.

        Args:
            scaler: None: that of the precision, if it has one.
            more: The others of `Clipper.step`.
        """
        return super().step(getattr(self._precision, "scaler", None) if scaler is None else scaler, **more)
