"""Clipping from inside the optimizer's step, for loops that cannot be edited."""

import weakref
from collections.abc import Callable, Iterable, Mapping
from inspect import unwrap
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_gradclip.clipper import Clipper
from lightning_gradclip.gradients.write import ScaleAll
from lightning_gradclip.methods.method import ClipMethod

_Hook: TypeAlias = Callable[[Optimizer, tuple[Any, ...], dict[str, Any]], tuple[tuple[Any, ...], dict[str, Any]] | None]


def attach(
    optimizer: Optimizer,
    named_parameters: Iterable[tuple[str, Tensor]] | nn.Module,
    method: ClipMethod | None,
    **options: Any,
) -> "Attached":
    """Clip the gradients of an optimizer whenever it steps, whoever makes it step.

    Args:
        optimizer: A `torch.optim.Optimizer`, or a wrapper that holds one as `optimizer`, as those of Fabric and
            Accelerate do, or as `opt`, as fastai's does.
        named_parameters: As of `Clipper`: the model, or names and parameters.
        method: How to clip; None measures only.
        options: Those of `Clipper`, but for `optimizer` and `fold`.

    Returns:
        A `Clipper` that steps by itself: at the beginning of the optimizer's step, or, where that is given a closure,
        each time the closure has made gradients. Under a GradScaler, too: steps that it leaves out are not seen.

    Raises:
        TypeError: If the optimizer is none of torch's kind, or its steps call no hooks.
        ValueError: If this optimizer has a clipper attached already, or an option does not fit.
    """
    return Attached(optimizer, named_parameters, method, **options)


class Attached(Clipper):
    """A clipper that the optimizer's step calls; `attach` makes it."""

    def __init__(
        self,
        optimizer: Optimizer,
        named_parameters: Iterable[tuple[str, Tensor]] | nn.Module,
        method: ClipMethod | None,
        **options: Any,
    ) -> None:
        if "fold" in options:
            raise ValueError(
                "fold hands a coefficient to the optimizer, which an attached clipper does not; leave it out, or call "
                "Clipper(..., fold=True).step() in a loop of your own"
            )
        inner = _with_hooks(optimizer)
        super().__init__(named_parameters, method, optimizer=inner, **options)
        # A compiled step would take the hook into its graphs, and compile it anew where a step takes another way.
        hook = cast("_Hook", torch.compiler.disable(self._before_step))
        # The optimizer holds the hook: without it, nobody would hold the clipper.
        self._handle = inner.register_step_pre_hook(hook)
        self._written: list[tuple[Callable[[], Tensor | None], int]] = []

    def detach(self) -> None:
        """Leave the optimizer alone from now on; what was recorded stays."""
        self._handle.remove()

    def _before_step(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        closure = next(iter(args[1:]), kwargs.get("closure"))
        if closure is None:
            self._clip(optimizer)
            return None

        def clipped() -> Any:
            loss = closure()
            self._clip(optimizer)
            return loss

        return (args[0], clipped, *args[2:]), {name: value for name, value in kwargs.items() if name != "closure"}

    def _clip(self, optimizer: Optimizer) -> None:
        # An optimizer that steps by way of its base class calls its hooks for each of the two.
        nested = _hooked(optimizer) > 1
        if nested and self._written and self._written == _versions(optimizer):
            return
        if self._unscaled(optimizer):
            self.step()
        self._written = _versions(optimizer) if nested else []

    def _unscaled(self, optimizer: Any) -> bool:
        """Unscale gradients that a GradScaler left to a fused optimizer to unscale; whether the step takes place."""
        scale: Tensor | None = getattr(optimizer, "grad_scale", None)
        if scale is None:
            return True
        if optimizer.found_inf.item():
            return False
        params = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        inverse = scale.double().reciprocal()
        with torch.no_grad():
            ScaleAll(inverse.item() if inverse.is_cpu else inverse).apply(params)
        # The scaler deletes it after the step.
        optimizer.grad_scale = None
        return True


def _with_hooks(optimizer: object) -> Optimizer:
    """The optimizer itself, out of the wrappers of Fabric, Accelerate and fastai, if its steps call hooks."""
    inner = optimizer
    while isinstance(held := getattr(inner, "optimizer", getattr(inner, "opt", None)), Optimizer):
        inner = held
    if not isinstance(inner, Optimizer):
        raise TypeError(
            f"attach() hooks into the step of a torch.optim.Optimizer, got {inner!r} ({type(inner).__name__}); pass "
            "the optimizer that it steps, or call Clipper(...).step() before its step"
        )
    if not _hooked(inner) or not hasattr(inner, "_optimizer_step_pre_hooks"):
        raise TypeError(
            f"the steps of {type(inner).__name__} call no hooks, so that nothing would be clipped; call "
            "Clipper(...).step() before its step"
        )
    hooks = cast("Mapping[int, Any]", inner._optimizer_step_pre_hooks)  # pyright: ignore[reportPrivateUsage]
    if any(isinstance(getattr(unwrap(hook), "__self__", None), Attached) for hook in hooks.values()):
        raise ValueError(
            f"this {type(inner).__name__} has a clipper attached already, and gradients would be clipped twice; "
            "detach() that first"
        )
    return inner


def _hooked(optimizer: Optimizer) -> int:
    """How many of its classes have a step that calls hooks."""
    return sum(getattr(vars(kind).get("step"), "hooked", False) for kind in type(optimizer).__mro__)


def _versions(optimizer: Optimizer) -> list[tuple[Callable[[], Tensor | None], int]]:
    """The gradients, without keeping them alive, and how often each was written."""
    params = (parameter for group in optimizer.param_groups for parameter in group["params"])
    return [(weakref.ref(one.grad), one.grad._version) for one in params if one.grad is not None]
