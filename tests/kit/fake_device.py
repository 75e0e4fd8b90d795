"""An accelerator for machines without one, which notices whenever the host waits for it.

Tensors on it are real: they hold their values in memory of the host, so that results can be compared. What differs is
that every operation for which CUDA makes the host wait is noted, with the line that asked for it:

- numbers read from tensors: `item`, `bool`, `float`, `tolist`, `equal`;
- results whose shape depends on values: `nonzero`, `masked_select`, masks as indices, `unique`;
- copies from the device, and copies to it from memory that is not pinned, which no tensor here is.

What CUDA refuses is refused: tensors of the host among those of the device, unless they are single numbers.

    with attached() as device:
        gradient = device.put(torch.ones(3))
        total = gradient.sum()
        assert device.waits == []
        total.item()
        assert len(device.waits) == 1
"""

import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

NAME = "fakegpu"
AVAILABLE = hasattr(backend_registration, "_setup_privateuseone_for_python_backend")

# The shape of what these return, or the number, depends on values.
_READING = {
    "_local_scalar_dense",
    "_unique2",
    "bincount",
    "equal",
    "is_nonzero",
    "item",
    "masked_select",
    "nonzero",
    "unique_consecutive",
    "unique_dim",
}
_INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_"}
_registered = False


class DeviceTensor(Tensor):
    """A tensor that says it is on the device and keeps its values in `values`, on the host."""

    values: Tensor

    @staticmethod
    def __new__(cls, values: Tensor) -> "DeviceTensor":
        wrapper = Tensor._make_wrapper_subclass(
            cls,
            values.size(),
            strides=values.stride(),
            storage_offset=values.storage_offset(),
            dtype=values.dtype,
            device=f"{NAME}:0",
        )
        wrapper.values = values
        return wrapper

    __torch_function__ = torch._C._disabled_torch_function_impl

    def __repr__(self) -> str:
        return f"DeviceTensor({self.values})"

    def tolist(self) -> Any:
        return self.cpu().tolist()

    @classmethod
    def __torch_dispatch__(cls, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise RuntimeError(f"{operation} was called on a tensor of a device that is not attached any more")


class Device(TorchDispatchMode):
    """Runs operations on device tensors, and notes in `waits` what would have made the host wait.

    Attributes:
        waits: What was asked for, and by which line outside torch, in order.
    """

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []

    def put(self, tensor: Tensor) -> Tensor:
        """The same tensor on the device; putting it there is not noted."""
        return DeviceTensor(tensor.detach().clone())

    def get(self, tensor: Tensor) -> Tensor:
        """A copy on the host; fetching it is not noted."""
        return tensor.values.detach().clone() if isinstance(tensor, DeviceTensor) else tensor.detach().clone()

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, DeviceTensor)]
        asked = kwargs.get("device")
        names_device = asked is not None and torch.device(asked).type == NAME
        if not given and not names_device:
            return operation(*args, **kwargs)
        name = operation._schema.name.removeprefix("aten::")
        if reason := _why_it_waits(name, args, kwargs, to_device=names_device if asked is not None else bool(given)):
            self.waits.append(f"{reason} at {_asking_line()}")
        _refuse_mixture(name, args, kwargs)
        result = operation(*tree_map(_on_host, args), **_on_host_device(tree_map(_on_host, kwargs)))
        stays = names_device if name == "_to_copy" and asked is not None else True
        if not stays:
            return result
        # What was written in place is returned as the object it was.
        known = {id(tensor.values): tensor for tensor in given}
        return tree_map(lambda leaf: known.get(id(leaf), _on_device(leaf)), result)


def _why_it_waits(name: str, args: Sequence[Any], kwargs: dict[str, Any], *, to_device: bool) -> str:
    if name in _READING:
        return name
    if name == "_to_copy":
        if isinstance(args[0], DeviceTensor):
            return "" if to_device else "copy from the device"
        return "copy to the device" if to_device else ""
    if name == "copy_" and isinstance(args[0], DeviceTensor) is not isinstance(args[1], DeviceTensor):
        return "copy between host and device"
    if name in _INDEXING:
        indices = [one for one in args[1] if isinstance(one, Tensor)]
        if any(one.dtype in (torch.bool, torch.uint8) for one in indices):
            return f"{name} with a mask"
        if not all(isinstance(one, DeviceTensor) for one in indices):
            return f"{name} with indices on the host"
    if name == "repeat_interleave" and kwargs.get("output_size") is None:
        return name
    return ""


def _refuse_mixture(name: str, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
    if name in ("_to_copy", "copy_", *_INDEXING):
        return
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    strangers = [one for one in tensors if not isinstance(one, DeviceTensor) and (one.ndim or name in ("cat", "stack"))]
    if strangers and len(strangers) < len(tensors):
        raise RuntimeError(f"{name} was given tensors on {NAME} and on {strangers[0].device}")


def _asking_line() -> str:
    """The innermost line that is neither torch's nor ours."""
    ours = [
        frame for frame in traceback.extract_stack() if "/torch/" not in frame.filename and frame.filename != __file__
    ]
    return f"{Path(ours[-1].filename).name}:{ours[-1].lineno} {ours[-1].line}" if ours else "?"


def _on_host(leaf: Any) -> Any:
    return leaf.values if isinstance(leaf, DeviceTensor) else leaf


def _on_host_device(kwargs: dict[str, Any]) -> dict[str, Any]:
    if kwargs.get("device") is not None:
        kwargs["device"] = torch.device("cpu")
    return kwargs


def _on_device(leaf: Any) -> Any:
    return DeviceTensor(leaf) if isinstance(leaf, Tensor) and not isinstance(leaf, DeviceTensor) else leaf


def _register() -> None:
    """Make the name known to torch, for as long as the process lives."""

    class Unplugged(backend_registration._DummyBackendModule):
        """To those who look for accelerators, such as `fork_rng` in other tests, there is none."""

        def is_available(self) -> bool:
            return False

        def device_count(self) -> int:
            return 0

    backend_registration._setup_privateuseone_for_python_backend(NAME, backend_module=Unplugged())


@contextmanager
def attached() -> Iterator[Device]:
    """Attach the device; tensors on it can be used while it is."""
    global _registered
    if not _registered:
        _register()
        _registered = True
    # Else torch.tensor(..., device=...) would look for kernels of the device, past the mode.
    before = torch._C._only_lift_cpu_tensors()
    torch._C._set_only_lift_cpu_tensors(True)
    try:
        with Device() as device:
            yield device
    finally:
        torch._C._set_only_lift_cpu_tensors(before)
