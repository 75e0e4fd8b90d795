"""Handing the coefficient to a fused optimizer instead of writing the gradients: one pass over the memory less.

Fused optimizers of torch divide the gradients by their attribute `grad_scale`, and leave out the step where `found_inf`
is 1, while they read the gradients anyway. GradScaler multiplies its own scale into a `grad_scale` that is there. Other
optimizers ignore the attributes, or raise, so they are refused.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_gradclip.act import left_out
from lightning_gradclip.gradients.write import Change, ScaleAll
from lightning_gradclip.select.parameters import Selection


class Fold:
    """Hands coefficients to one optimizer, and refuses one that would ignore them."""

    def __init__(self, optimizer: Optimizer | None) -> None:
        if optimizer is None:
            raise ValueError(
                "fold=True hands the coefficient to the optimizer, but this clipper has none; pass optimizer= to "
                "Clipper"
            )
        # Wrappers such as Fabric's keep attributes to themselves.
        self._optimizer: Any = getattr(optimizer, "optimizer", optimizer)
        self._handed = self._scaled = False
        require_fused(self._optimizer)
        self._optimizer.register_step_post_hook(self._take_back)

    def can_leave_out(self, *, alike: bool) -> bool:
        """Whether a step that the optimizer leaves out changes nothing; see `left_out`."""
        return left_out.changes_nothing(self._optimizer, alike=alike)

    def hand(self, change: Change | None, drops: Tensor | None, *, scaled: bool) -> None:
        """Have the next step multiply all gradients by one coefficient, if any, and leave itself out if `drops` is 1.

        `drops`, 0-d, else 0, does not count where a GradScaler steps the optimizer: it decides by itself.
        """
        require_fused(self._optimizer)
        if getattr(self._optimizer, "grad_scale", None) is not None:
            raise RuntimeError(
                f"{type(self._optimizer).__name__}.grad_scale is set already, so another clipper has handed this "
                "optimizer a coefficient for the same step; fold=True serves one clipper for each optimizer"
            )
        self._scaled = scaled
        coef = change.coef if isinstance(change, ScaleAll) else None
        if isinstance(coef, Tensor):
            self._optimizer.grad_scale = coef.reciprocal().to(torch.float32).view(())
        elif coef is not None:
            inverse = 1.0 / coef if coef else math.inf
            self._optimizer.grad_scale = torch.tensor(inverse, dtype=torch.float32, device="cpu")
        self._handed = True
        if drops is not None and not scaled:
            self._optimizer.found_inf = drops.to(torch.float32)

    def withdraw(self) -> None:
        """Take back what the next step would have used, if that is ours."""
        if self._handed:
            self._handed = False
            for name in ("grad_scale", "found_inf"):
                vars(self._optimizer).pop(name, None)

    def _take_back(self, *_: Any) -> None:
        if self._scaled:
            # The scaler removes the attributes itself, and would miss them.
            self._handed = False
        else:
            self.withdraw()


def require_fused(optimizer: Any) -> None:
    """Refuse an optimizer that would ignore a coefficient."""
    supported = getattr(optimizer, "_step_supports_amp_scaling", False)
    if not supported or not all(group.get("fused") for group in optimizer.param_groups):
        raise ValueError(
            f"fold=True hands the coefficient to a fused optimizer, but {type(optimizer).__name__} would ignore it; "
            "use torch.optim.Adam, AdamW, SGD or Adagrad with fused=True, or fold=False, which writes the gradients"
        )


def require_all(selection: Selection) -> None:
    """Refuse patterns that leave out a parameter: the optimizer would divide its gradient as well."""
    chosen = set(map(id, selection.params))
    if left := sum(id(parameter) not in chosen for parameter in selection.owned):
        raise ValueError(
            f"fold=True scales all gradients of the optimizer, but include and exclude leave out {left} of its "
            f"{len(selection.owned)} parameters; use fold=False, or admit all"
        )
