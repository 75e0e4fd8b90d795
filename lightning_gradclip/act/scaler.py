"""What a GradScaler has done to the gradients so far."""

from typing import Any

import torch
from torch.amp.grad_scaler import GradScaler, OptState
from torch.optim import Optimizer

from lightning_gradclip.gradients import write
from lightning_gradclip.select import layout


def is_enabled(scaler: GradScaler | None) -> bool:
    """Whether losses are scaled at all, and overflowing steps skipped by the scaler."""
    return scaler is not None and scaler.is_enabled()


def is_unscaled(scaler: GradScaler, optimizer: Optimizer) -> bool:
    """Whether `scaler.unscale_(optimizer)` was called since the last step."""
    # The stage has no public accessor, and calling unscale_ twice raises.
    states: dict[int, dict[str, Any]] = scaler._per_optimizer_states  # pyright: ignore[reportPrivateUsage]
    return states[id(optimizer)]["stage"] is not OptState.READY


def unscale_(scaler: GradScaler, optimizer: Optimizer, *, together: bool = False) -> None:
    """Unscale the gradients unless that is done already, or there are none.

    With `together` also where this rank has none: FSDP's scaler asks the other ranks meanwhile.
    """
    params = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    present = together or any(parameter.grad is not None for parameter in params)
    if present and not is_unscaled(scaler, optimizer):
        write.resolve_(params)
        scaler.unscale_(optimizer)


def unscaled(scaler: GradScaler, optimizer: Optimizer | None, *, writes: bool, together: bool) -> float | torch.Tensor:
    """Unscale the gradients, or where nothing is to be written say what they are still multiplied by."""
    if optimizer is None:
        raise ValueError(
            "step() was given a GradScaler, which unscales an optimizer's gradients, but this clipper has none; "
            "pass optimizer= to Clipper, or unscale first and call step() without the scaler"
        )
    if not writes:
        return pending_scale(scaler, optimizer)
    unscale_(scaler, optimizer, together=together)
    return 1.0


def agree(scaler: GradScaler, optimizer: Optimizer, finite: float | torch.Tensor) -> None:
    """Have the scaler drop the step where some rank's gradients are not finite.

    torch's looks at what its own rank holds, and on meshes of two dimensions asks only some of the others: one rank
    would drop a step that another takes.
    """
    found: dict[torch.device, torch.Tensor]
    found = scaler._per_optimizer_states[id(optimizer)]["found_inf_per_device"]  # pyright: ignore[reportPrivateUsage]
    for device, shared in found.items():
        # FSDP's scaler keeps one number in a vector, which fused optimizers refuse.
        one = layout.local(shared)
        if one is shared and one.ndim:
            one = found[device] = one.view(())
        if isinstance(finite, torch.Tensor):
            one.copy_(torch.maximum(one, (1 - finite).to(one)))
        elif not finite:
            one.fill_(1.0)


def overflows(scaler: GradScaler, optimizer: Optimizer) -> bool:
    """Whether the scaler has found that it will drop this step, which makes the host wait for the device."""
    found = scaler._per_optimizer_states[id(optimizer)]["found_inf_per_device"]  # pyright: ignore[reportPrivateUsage]
    return any(bool(layout.local(one).any()) for one in found.values())


def pending_scale(scaler: GradScaler, optimizer: Optimizer) -> float | torch.Tensor:
    """The factor that the gradients still carry: on a device a tensor, which makes nobody wait."""
    if is_unscaled(scaler, optimizer):
        return 1.0
    gradients = (p.grad for group in optimizer.param_groups for p in group["params"])
    device = next((gradient.device for gradient in gradients if gradient is not None), torch.device("cpu"))
    if device.type == "cpu":
        return scaler.get_scale()
    # What the scaler makes of 1.
    return scaler.scale(torch.ones((), device=device))
