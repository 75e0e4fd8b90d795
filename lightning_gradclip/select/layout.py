"""How a parameter is laid out over the ranks: whole, cut by FSDP, or a DTensor on a mesh.

What a tensor or module is made of says so itself: nothing of torch.distributed is imported before some of it is there.
"""

import math
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class Layout:
    """How one parameter, and with it its gradient, is laid out over the ranks."""

    numel: int | None = None  # entries over all ranks; None: as many as on this one
    pieces: int = 1  # into which it is cut; 1: every rank holds all of it
    piece: int = 0  # which of them this rank holds; -1: none
    together: tuple[int, ...] = ()  # ranks that share it, cut or kept alike by torch; empty: nobody but this one
    ranks: tuple[int, ...] | None = None  # among which it is cut or copied; None: all of the run
    flattened: bool = False  # whether the pieces are cut from a flat vector, so that rows fall into several
    joined: bool = False  # whether several parameters of the model were joined into this one
    distributed: bool = False  # whether it is a DTensor
    ignored: bool = False  # whether DDP was told to leave it alone


def layouts(names: Sequence[str], params: Sequence[Tensor], module: nn.Module | None) -> tuple[Layout, ...]:
    """The layout of each parameter; those that FSDP has flattened are refused unless the module holds them."""
    flat = {} if module is None else _flattened(module)
    ignored = set[int]() if module is None else _ignored(module)
    meshes: dict[int, tuple[tuple[int, ...], tuple[int, ...]]] = {}
    return tuple(
        _mesh_layout(parameter, meshes) if is_distributed(parameter) else _layout(name, parameter, flat, ignored)
        for name, parameter in zip(names, params, strict=True)
    )


def is_distributed(tensor: Tensor) -> TypeGuard[Any]:
    """Whether this is a DTensor, which type checkers know nothing about."""
    return type(tensor) is not Tensor and _is_distributed(type(tensor))


@lru_cache(maxsize=64)
def _is_distributed(kind: type[Tensor]) -> bool:
    # Importing the class would cost half a second, and most runs have none.
    return any(base.__name__ == "DTensor" for base in kind.__mro__)


def meshes(given: Iterable[object], params: Iterable[Tensor]) -> list[Any]:
    """The device meshes among what is given, and the whole ones that parameters lie on a part of."""
    found = [one for one in given if any(base.__name__ == "DeviceMesh" for base in type(one).__mro__)]
    found += [_root(parameter.device_mesh) for parameter in params if is_distributed(parameter)]
    return list({id(one): one for one in found}.values())


def _root(mesh: Any) -> Any:
    # There is no public way from a part of a mesh to the whole.
    return getattr(mesh, "_get_root_mesh", lambda: mesh)()


def local(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor, sharing its memory."""
    if not is_distributed(tensor):
        return tensor
    piece = (tensor.detach() if tensor.requires_grad else tensor).to_local()
    # A collective that still runs in the background hands out a tensor that waits for it.
    return piece if type(piece) is Tensor else getattr(piece, "wait", lambda: piece)()


def with_local(tensor: Tensor, piece: Tensor) -> Tensor:
    """A tensor like this one of which this rank holds this piece."""
    if not is_distributed(tensor):
        return piece
    like = {"shape": tensor.shape, "stride": tensor.stride()}
    return type(tensor).from_local(piece, tensor.device_mesh, tensor.placements, run_check=False, **like)


def slices(parameter: Tensor) -> Tensor | None:
    """Which slices along dim 0 this rank holds at least a part of, `(n,)`; None: all."""
    if not is_distributed(parameter) or parameter.ndim < 2:
        return None
    from torch.distributed.tensor import DTensor, Replicate

    mesh = parameter.device_mesh
    if mesh.get_coordinate() is None:
        # What lies elsewhere is flat and empty here, which counts as a single slice.
        return torch.zeros(1, dtype=torch.long, device=mesh.device_type)
    # What the mesh does to the rows it does to their numbers, and taking a part of what is whole communicates nothing.
    along = [one if getattr(one, "dim", None) == 0 else Replicate() for one in parameter.placements]
    numbers = torch.arange(parameter.shape[0], device=mesh.device_type)
    whole = DTensor.from_local(numbers, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return local(whole.redistribute(placements=along))


def _mesh_layout(parameter: Any, meshes: dict[int, tuple[tuple[int, ...], tuple[int, ...]]]) -> Layout:
    """The layout of a DTensor; `meshes` has the ranks of each mesh, and of the whole that it is a part of."""
    mesh = parameter.device_mesh
    if id(mesh) not in meshes:
        # The other parts of the whole hold copies, or what they have to be told apart from.
        together, ranks = (tuple(one.mesh.flatten().tolist()) for one in (mesh, _root(mesh)))
        # A mesh that was put together from others may be no part of the whole.
        meshes[id(mesh)] = together, tuple(sorted({*together, *ranks}))
    together, ranks = meshes[id(mesh)]
    cut = [dim for dim, one in enumerate(parameter.placements) if not one.is_replicate()]
    pieces = math.prod(map(mesh.size, cut))
    coordinate = mesh.get_coordinate()
    piece = -1 if coordinate is None else 0
    for dim in cut:
        piece = piece if coordinate is None else piece * mesh.size(dim) + coordinate[dim]
    return Layout(parameter.numel(), pieces, piece, together, ranks, distributed=True)


def _layout(name: str, parameter: Tensor, flat: Mapping[int, Layout], ignored: Set[int]) -> Layout:
    if id(parameter) in flat:
        return flat[id(parameter)]
    if getattr(parameter, "_fsdp_flattened", False):
        raise ValueError(
            f"parameter {name!r} is flattened by FSDP, and only the module knows the ranks that share it; "
            "pass the module wrapped in FSDP instead of its named parameters: Clipper(model, ...)"
        )
    # Those of lazy modules have no size yet.
    return Layout(ignored=id(parameter) in ignored)


def _ignored(module: nn.Module) -> set[int]:
    """The ids of the parameters that DDP was told to leave alone, by a list of names that it knows and no other way."""
    found = set[int]()
    for one in module.modules():
        if names := set[str](getattr(one, "_ddp_params_and_buffers_to_ignore", ())):
            found |= {id(parameter) for name, parameter in one.named_parameters() if name in names}
    return found


def _flattened(module: nn.Module) -> dict[int, Layout]:
    """Layouts of the parameters that FSDP flattened, by their ids."""
    if not any(base.__name__ == "FullyShardedDataParallel" for one in module.modules() for base in type(one).__mro__):
        return {}
    from torch.distributed import get_process_group_ranks
    from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy

    found: dict[int, Layout] = {}
    for one in FullyShardedDataParallel.fsdp_modules(module):
        # There is no public way from a wrapped module to the parameters that it flattened itself.
        handle: Any = one._handle  # pyright: ignore[reportPrivateUsage]
        if handle is None:
            continue
        group: Any = one.process_group
        whole = one.sharding_strategy is ShardingStrategy.NO_SHARD
        pieces, piece = (1, 0) if whole else (group.size(), group.rank())
        together = tuple(get_process_group_ranks(group))
        # The hybrid ones have copies outside the group.
        ranks = None if "HYBRID" in one.sharding_strategy.name else together
        numels = handle.flat_param._numels
        found[id(handle.flat_param)] = Layout(sum(numels), pieces, piece, together, ranks, flattened=True, joined=True)
        for parameter, numel in zip(handle.flat_param._params or (), numels, strict=False):
            found[id(parameter)] = Layout(numel, pieces, piece, together, ranks, flattened=not whole)
    return found
