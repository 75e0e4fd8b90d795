"""Steps that a fused optimizer leaves out by itself, and the first one of SGD, of which more is left than nothing.

Where `found_inf` is 1 fused optimizers of torch write nothing. But in its first step fused SGD takes memory for its
momentum, which it then leaves as it found it, and takes for momentum ever after. Who drops that step has to do so
before the optimizer is called.
"""

from typing import Any

from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer

from lightning_gradclip.act import scaler as scaling
from lightning_gradclip.gradients import write


def changes_nothing(optimizer: Optimizer, *, alike: bool = False) -> bool:
    """Whether a step that the optimizer leaves out changes nothing.

    Where the answer must be `alike` on all ranks, it does not depend on which gradients are here.
    """
    # Wrappers such as Fabric's keep attributes to themselves.
    inner: Any = getattr(optimizer, "optimizer", optimizer)
    for group in inner.param_groups:
        if not (group.get("fused") and group.get("momentum")):
            continue
        first = next((one for one in group["params"] if one.grad is not None), None)
        if alike or (first is not None and not inner.state.get(first)):
            return False
    return True


def spare_first_(scaler: GradScaler, optimizer: Optimizer) -> None:
    """Remove the gradients if the scaler will drop this step and the optimizer would not leave it at that.

    The host waits for a device in first steps of fused SGD with momentum only.
    """
    if changes_nothing(optimizer):
        return
    # A scaler without any gradient to look at refuses to step.
    scaling.unscale_(scaler, optimizer)
    if scaling.overflows(scaler, optimizer):
        write.drop_(parameter for group in optimizer.param_groups for parameter in group["params"])
