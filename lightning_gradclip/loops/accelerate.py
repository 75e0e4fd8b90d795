"""Clipping in a loop of Hugging Face Accelerate: one call in place of `accelerator.clip_grad_norm_`."""

# Accelerate is not installed where types are checked.
# pyright: reportMissingImports=false, reportMissingTypeStubs=false, reportUnknownMemberType=false
# pyright: reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportUnknownParameterType=false, reportUntypedBaseClass=false

from collections.abc import Iterable
from typing import Any

from accelerate.accelerator import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer

from lightning_gradclip.clipper import Clipper
from lightning_gradclip.methods.method import ClipMethod
from lightning_gradclip.record.step import StepStats

# Engines that clip by themselves, before anybody sees the gradients.
_ENGINES = (DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM)


def accelerated(
    accelerator: Accelerator,
    named_parameters: Iterable[tuple[str, Tensor]] | nn.Module,
    method: ClipMethod | None,
    *,
    optimizer: Optimizer,
    **options: Any,
) -> "AcceleratedClipper":
    """A clipper for a loop of Accelerate, whose checkpoints then hold what it has learned.

    Args:
        accelerator: That of the loop.
        named_parameters: The model that `accelerator.prepare` returned, or names and parameters of it.
        method: How to clip; None measures only.
        optimizer: The optimizer that `accelerator.prepare` returned.
        options: The others of `Clipper`.

    Returns:
        A `Clipper` whose `step()` stands where `accelerator.clip_grad_norm_` would: it does nothing while gradients
        are accumulated, and knows the accelerator's GradScaler.

    Raises:
        ValueError: If the optimizer was not prepared, or a strategy clips by itself.
    """
    return AcceleratedClipper(accelerator, named_parameters, method, optimizer=optimizer, **options)


class AcceleratedClipper(Clipper):
    """A clipper that asks an accelerator whether it is time; `accelerated` makes it."""

    def __init__(
        self,
        accelerator: Accelerator,
        named_parameters: Iterable[tuple[str, Tensor]] | nn.Module,
        method: ClipMethod | None,
        *,
        optimizer: Optimizer,
        **options: Any,
    ) -> None:
        if accelerator.distributed_type in _ENGINES:
            raise ValueError(
                f"under {accelerator.distributed_type.value} the engine steps and clips, and a clipper would see no "
                "gradients; set the engine's own gradient_clipping, or train with DDP or FSDP"
            )
        inner = getattr(optimizer, "optimizer", None)
        if not isinstance(inner, Optimizer):
            raise ValueError(
                f"the optimizer was not prepared, got {type(optimizer).__name__}; write "
                "model, optimizer = accelerator.prepare(model, optimizer) before accelerated(...)"
            )
        self._accelerator = accelerator
        super().__init__(named_parameters, method, optimizer=inner, **options)
        accelerator.register_for_checkpointing(self)

    def step(self, scaler: GradScaler | None = None, **more: Any) -> StepStats:
        """As of `Clipper`; while the accelerator accumulates nothing is done, and nothing recorded.

        Args:
            scaler: None: that of the accelerator.
            more: The others of `Clipper.step`.
        """
        if not self._accelerator.sync_gradients:
            return StepStats.of_nothing(self._limiter.scopes)
        return super().step(self._accelerator.scaler if scaler is None else scaler, **more)
