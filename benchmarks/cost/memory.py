"""Peak memory beyond the gradients of one step of each method.

    python benchmarks/cost/memory.py    # writes results/memory.md and memory.json

A dispatch mode sees every storage that an operation makes, and when it is freed. What an operation holds only while it
runs stays unseen.
"""

import weakref
from collections.abc import Callable
from typing import Any

import sets
import timing
import torch
from timing import table
from torch import Tensor
from torch.nn.utils import clip_grad_norm_, clip_grad_value_
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightning_gradclip import AGC, ClipMethod, Clipper, EmaClip, NormClip, QuantileClip, SigmaClip, ValueClip, ZClip

METHODS: dict[str, Callable[[], ClipMethod]] = {
    "NormClip()": lambda: NormClip(max_norm=0.1),
    "NormClip(per='parameter')": lambda: NormClip(max_norm=0.01, per="parameter"),
    "NormClip(norm_type=inf)": lambda: NormClip(max_norm=1e-3, norm_type=float("inf")),
    "QuantileClip()": QuantileClip,
    "SigmaClip()": SigmaClip,
    "ZClip()": ZClip,
    "EmaClip()": EmaClip,
    "ValueClip()": lambda: ValueClip(max_value=2e-3),
    "AGC()": AGC,
}


class Peak(TorchDispatchMode):
    """Bytes of the storages that were made and are still alive, and their peak."""

    def __init__(self, known: list[Tensor]) -> None:
        super().__init__()
        self._seen = {one.untyped_storage()._cdata for one in known}
        self._now = self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for one in tree_leaves(result):
            if isinstance(one, Tensor) and one.layout is torch.strided:
                self._note(one)
        return result

    def _note(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._seen or not size:
            return
        self._seen.add(key)
        self._now += size
        self.bytes = max(self.bytes, self._now)
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self._now -= size


def peak(params: list[Any], step: Callable[[], Any]) -> int:
    step()  # plans and histories are made by the first step
    for one in params:
        one.grad.normal_(std=1e-3)
    known = [tensor for one in params for tensor in (one.data, one.grad)]
    with Peak(known) as found:
        step()
    return found.bytes


def main() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    where, rows, data = timing.machine(), [], {}
    models = {"ResNet-50": sets.RESNET50, "2,000 of 1,000": sets.MANY}
    for model, shapes in models.items():
        params = sets.parameters(shapes)
        for one in params:
            one.data.normal_(std=0.05)
        total = sum(one.grad.nbytes for one in params)
        cases: dict[str, Callable[[], Any]] = {
            name: Clipper(sets.named(params), method()).step for name, method in METHODS.items()
        }
        cases["torch's clip_grad_norm_"] = lambda params=params: clip_grad_norm_(params, 0.1)
        cases["torch's clip_grad_value_"] = lambda params=params: clip_grad_value_(params, 2e-3)
        for name, step in cases.items():
            found = peak(params, step)
            rows.append([model, name, f"{found / 2**20:.2f}", f"{found / total:.2%}"])
            data[f"{model}, {name}"] = {"bytes": found, "share": found / total}
    text = "Peak of the tensors that a second step makes, beyond the gradients (ResNet-50: 98 MiB, the other 7.6).\n\n"
    head = ["gradients", "method", "MiB", "share of the gradients' bytes"]
    timing.write("memory", "Memory", text + table(head, rows), data, where)


if __name__ == "__main__":
    main()
