"""How a parameter is laid out over the ranks: whole, cut by FSDP, or a DTensor on a mesh."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class Layout:
    """How one parameter, and with it its gradient, is laid out over the ranks.

    Attributes:
        pieces: How many different pieces it is cut into; 1: every rank holds all of it.
        flattened: Whether the pieces are cut from a flat vector, so that rows fall into several pieces.
        joined: Whether several parameters of the model were joined into this one.
        distributed: Whether it is a DTensor.
    """

    pieces: int
    flattened: bool = False
    joined: bool = False
    distributed: bool = False


def layouts(named: Mapping[str, Tensor], module: nn.Module | None) -> tuple[Layout, ...]:
    """The layout of each parameter.

    Args:
        named: Parameters by name.
        module: The module that holds them; FSDP's own parameters do not know which ranks share them.

    Raises:
        ValueError: If a parameter was flattened by FSDP and the module is not known or does not hold it.
    """
    flat = {} if module is None else _flattened(module)
    return tuple(_layout(name, parameter, flat) for name, parameter in named.items())


def is_distributed(tensor: Tensor) -> bool:
    """Whether this is a DTensor; importing the class would cost half a second, and most runs have none."""
    return type(tensor) is not Tensor and any(base.__name__ == "DTensor" for base in type(tensor).__mro__)


def local(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor, sharing its memory."""
    if not is_distributed(tensor):
        return tensor
    distributed: Any = tensor.detach() if tensor.requires_grad else tensor
    piece = distributed.to_local()
    # A collective that still runs in the background hands out a tensor that waits for it.
    wait = getattr(piece, "wait", None)
    return piece if wait is None else wait()


def settled(gradient: Tensor, parameter: Tensor) -> Tensor:
    """A gradient laid out like its parameter: what is still to be added up over ranks is added up, by a collective."""
    if not is_distributed(gradient):
        return gradient
    distributed: Any = gradient
    wanted = getattr(parameter, "placements", distributed.placements)
    return gradient if distributed.placements == wanted else distributed.redistribute(placements=wanted)


def rows(parameter: Tensor) -> Tensor | None:
    """Which slices along dim 0 this rank holds at least a part of, `(n,)`; None: all."""
    if not is_distributed(parameter) or parameter.ndim < 2:
        return None
    from torch.distributed.tensor import DTensor, Replicate

    distributed: Any = parameter
    mesh = distributed.device_mesh
    # What the mesh does to the rows it does to their numbers, and taking a part of what is whole communicates nothing.
    along = [one if getattr(one, "dim", None) == 0 else Replicate() for one in distributed.placements]
    numbers = torch.arange(parameter.shape[0], device=local(parameter).device)
    whole = DTensor.from_local(numbers, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return local(whole.redistribute(placements=along))


def _layout(name: str, parameter: Tensor, flat: Mapping[int, Layout]) -> Layout:
    if is_distributed(parameter):
        distributed: Any = parameter
        pieces = 1
        for dim, placement in enumerate(distributed.placements):
            if not placement.is_replicate():
                pieces *= distributed.device_mesh.size(dim)
        return Layout(pieces, distributed=True)
    if id(parameter) in flat:
        return flat[id(parameter)]
    if getattr(parameter, "_fsdp_flattened", False):
        raise ValueError(
            f"parameter {name!r} is flattened by FSDP, and only the module knows the ranks that share it; "
            "pass the module wrapped in FSDP instead of its named parameters: Clipper(model, ...)"
        )
    return Layout(1)


def _flattened(module: nn.Module) -> dict[int, Layout]:
    """Layouts of the parameters that FSDP flattened, by their ids."""
    if not any(base.__name__ == "FullyShardedDataParallel" for one in module.modules() for base in type(one).__mro__):
        return {}
    from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy

    found: dict[int, Layout] = {}
    for one in FullyShardedDataParallel.fsdp_modules(module):
        # There is no public way from a wrapped module to the parameters that it flattened itself.
        handle: Any = one._handle  # pyright: ignore[reportPrivateUsage]
        if handle is None:
            continue
        ranks: Any = one.process_group
        whole = one.sharding_strategy is ShardingStrategy.NO_SHARD
        pieces = 1 if whole else ranks.size()
        found[id(handle.flat_param)] = Layout(pieces, flattened=True, joined=True)
        for parameter in handle.flat_param._params or ():
            found[id(parameter)] = Layout(pieces, flattened=not whole)
    return found
