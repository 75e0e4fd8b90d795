"""Parameters and gradients cut by hand: DTensors of given values, and steps that say what they communicated."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch._dynamo  # what FSDP imports when it is first used, which each worker would take seconds over
import torch.distributed as dist
import torch.distributed.fsdp  # and this before workers are forked
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.debug import CommDebugMode
from torch.nn import Parameter

from lightning_gradclip import Clipper, StepStats

ROWS, COLUMNS, WHOLE = Shard(0), Shard(1), Replicate()

Named = list[tuple[str, Parameter]]


def mesh(*shape: int) -> DeviceMesh:
    """All ranks of this run, or the first of them, in this shape."""
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    return init_device_mesh("cpu", shape, mesh_dim_names=("data", "tensor")[-len(shape) :])


def cut(whole: Tensor, where: DeviceMesh, *placements: Any) -> DTensor:
    """This tensor, which all ranks hold, cut into pieces."""
    copies = [Replicate()] * where.ndim
    return DTensor.from_local(whole.clone(), where, copies, run_check=False).redistribute(placements=placements)


def parameter(weight: Tensor, gradient: Tensor | None, where: DeviceMesh | None = None, *placements: Any) -> Parameter:
    """A parameter and its gradient, cut alike; without a mesh plain tensors."""
    both = [
        None if one is None else one.clone() if where is None else cut(one, where, *placements)
        for one in (weight, gradient)
    ]
    result = Parameter(both[0])
    result.grad = both[1]
    return result


def held(tensor: Tensor) -> Tensor:
    """What this rank holds of it."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor | None) -> Tensor | None:
    """All of it; all ranks ask together."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def communicated(clipper: Clipper, scaler: Any = None) -> tuple[StepStats, dict[str, int]]:
    """One step, and how often it called which collective."""
    with CommDebugMode() as mode:
        stats = clipper.step(scaler)
    return stats, {str(name): count for name, count in mode.get_comm_counts().items()}


def plain(gradients: Mapping[str, Tensor | None], weights: Mapping[str, Tensor]) -> Named:
    """The same parameters on one process."""
    return [(name, parameter(weights[name], gradients[name])) for name in weights]


def digest(*values: Any) -> bytes:
    """The bits of tensors, wherever they are in lists and dictionaries, and what else there is."""
    found: list[Any] = []

    def walk(value: Any) -> None:
        if isinstance(value, Mapping):
            for key in value:
                found.append(key)
                walk(value[key])
        elif isinstance(value, Sequence) and not isinstance(value, str):
            for one in value:
                walk(one)
        elif isinstance(value, Tensor):
            found.extend(
                [
                    str(value.dtype),
                    tuple(value.shape),
                    value.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes(),
                ]
            )
        else:
            found.append(repr(value))

    walk(list(values))
    return repr(found).encode()
