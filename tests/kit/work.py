"""What torch does while a block runs: its operations, and the largest tensor that it makes."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Work(TorchDispatchMode):
    """Counts operations other than views, and remembers the bytes of the largest new tensor.

    Attributes:
        operations: Their names, in order.
        largest: Bytes of the largest new tensor, copies that an operation makes for itself included.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[str] = []
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        given = {_memory(one) for one in _dense(tree_leaves((args, kwargs)))}
        new = [one for one in _dense(tree_leaves(out)) if _memory(one) not in given]
        if new or not func._schema.name.endswith(("view", "slice", "select", "unbind", "split")):
            self.operations.append(func._schema.name)
        self.largest = max(self.largest, *(one.numel() * one.element_size() for one in new), 0)
        if "vector_norm" in func._schema.name and kwargs.get("dtype") not in (None, args[0].dtype):
            # torch converts all entries first.
            self.largest = max(self.largest, args[0].numel() * kwargs["dtype"].itemsize)
        return out


def _dense(values: Iterable[Any]) -> list[Tensor]:
    return [one for one in values if isinstance(one, Tensor) and one.layout is torch.strided]


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
