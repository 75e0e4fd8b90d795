"""One small network under every way to spread it over ranks, and how to get whole gradients back from each."""

import warnings
from collections.abc import Callable
from copy import deepcopy
from functools import cache
from typing import Any, NamedTuple

import torch

# Imported before workers are forked: each of them would take seconds over what FSDP imports when it is first used.
import torch._dynamo
import torch.distributed as dist
import torch.distributed.fsdp
import torch.distributed.tensor.parallel
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

# Rows that no number of ranks divides, and a bias that is shorter than four ranks.
WIDTHS = {"features": 6, "model": 10, "hidden": 12, "outputs": 3}


class Net(nn.Module):
    """Residual, with a normalization, so that tensor parallelism meets parameters it leaves alone."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(WIDTHS["features"], WIDTHS["model"])
        self.norm = nn.LayerNorm(WIDTHS["model"])
        self.up = nn.Linear(WIDTHS["model"], WIDTHS["hidden"])
        self.down = nn.Linear(WIDTHS["hidden"], WIDTHS["model"])
        self.head = nn.Linear(WIDTHS["model"], WIDTHS["outputs"])

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        x = x + self.down(torch.relu(self.up(self.norm(x))))
        return self.head(x)


def net(dtype: torch.dtype = torch.float32) -> Net:
    """The same weights in every process."""
    return deepcopy(_net()).to(dtype)


@cache
def _net() -> Net:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return Net()


class Spread(NamedTuple):
    """A way to spread a module over ranks.

    Attributes:
        world: How many ranks.
        parts: Into how many parts each batch is cut.
        apply: What makes it so, called with the rank in every process; returns the module to be called.
    """

    world: int
    parts: int
    apply: Callable[[nn.Module], nn.Module]

    def part(self, rank: int) -> int:
        """Which part of the batch a rank gets: neighbours in a tensor-parallel group get the same."""
        return rank * self.parts // self.world


def _start(world: int) -> None:
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    assert dist.get_world_size() == world


def _fsdp1(
    strategy: str, *, original: bool = True, world: int = 2, wrap: bool = True, inner: str = ""
) -> Callable[[nn.Module], nn.Module]:
    def apply(module: nn.Module) -> nn.Module:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy

        kind = ShardingStrategy[strategy]
        options: dict[str, Any] = {
            "sharding_strategy": kind,
            "use_orig_params": original,
            "device_id": torch.device("cpu"),
        }
        if strategy == "HYBRID_SHARD":
            options["device_mesh"] = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("replica", "shard"))
        if wrap:
            for name in ("up", "down"):
                of_it = {"sharding_strategy": ShardingStrategy[inner]} if inner and name == "up" else {}
                setattr(module, name, FullyShardedDataParallel(getattr(module, name), **options | of_it))
        return FullyShardedDataParallel(module, **options)

    return apply


def _fsdp2(*shape: int, leave_out: str = "") -> Callable[[nn.Module], nn.Module]:
    def apply(module: nn.Module) -> nn.Module:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replica", "shard")[-len(shape) :])
        fully_shard(module.up, mesh=mesh)
        ignored = set(getattr(module, leave_out).parameters()) if leave_out else set()
        for parameter in ignored:
            # What FSDP leaves alone is the user's to average.
            parameter.register_post_accumulate_grad_hook(_average)
        fully_shard(module, mesh=mesh, **({"ignored_params": ignored} if leave_out else {}))
        return module

    return apply


def _average(parameter: Tensor) -> None:
    dist.all_reduce(parameter.grad)
    parameter.grad /= dist.get_world_size()


def _tensor(data: int, sequence: bool = False) -> Callable[[nn.Module], nn.Module]:
    def apply(module: nn.Module) -> nn.Module:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard
        from torch.distributed.tensor import Replicate, Shard
        from torch.distributed.tensor.parallel import (
            ColwiseParallel,
            PrepareModuleInput,
            RowwiseParallel,
            SequenceParallel,
            parallelize_module,
        )

        size = dist.get_world_size() // data
        mesh = init_device_mesh("cpu", (data, size), mesh_dim_names=("data", "tensor"))
        plan: dict[str, Any] = {"up": ColwiseParallel(), "down": RowwiseParallel()}
        if sequence:
            # Only once it is cut along the sequence.
            cut = PrepareModuleInput(input_layouts=Replicate(), desired_input_layouts=Shard(1))
            parallelize_module(module.norm, mesh["tensor"], cut)
            plan["norm"] = SequenceParallel()
            plan["up"] = ColwiseParallel(input_layouts=Shard(1))
        parallelize_module(module, mesh["tensor"], plan)
        if data > 1:
            fully_shard(module, mesh=mesh["data"])
        return module

    return apply


SPREADS = {
    "ddp": Spread(2, 2, DistributedDataParallel),
    "fsdp1_full": Spread(2, 2, _fsdp1("FULL_SHARD")),
    "fsdp1_grad_op": Spread(2, 2, _fsdp1("SHARD_GRAD_OP")),
    "fsdp1_none": Spread(2, 2, _fsdp1("NO_SHARD")),
    "fsdp1_mixed": Spread(2, 2, _fsdp1("FULL_SHARD", inner="NO_SHARD")),
    "fsdp1_hybrid": Spread(4, 4, _fsdp1("HYBRID_SHARD", world=4)),
    "fsdp1_full_4": Spread(4, 4, _fsdp1("FULL_SHARD")),
    "fsdp2": Spread(2, 2, _fsdp2(2)),
    "fsdp2_4": Spread(4, 4, _fsdp2(4)),
    "fsdp2_hybrid": Spread(4, 4, _fsdp2(2, 2)),
    "fsdp2_left_out": Spread(2, 2, _fsdp2(2, leave_out="head")),
    "tensor": Spread(2, 1, _tensor(1)),
    "tensor_4": Spread(4, 1, _tensor(1)),
    "tensor_data": Spread(4, 2, _tensor(2)),
    "sequence": Spread(2, 1, _tensor(1, sequence=True)),
}

# Older releases of torch know FSDP2 on GPUs only.
FSDP2_ON_CPU = hasattr(torch.cpu.Stream, "record_event")
if not FSDP2_ON_CPU:
    SPREADS = {name: way for name, way in SPREADS.items() if not name.startswith("fsdp2") and name != "tensor_data"}


def spread(name: str, module: nn.Module) -> nn.Module:
    """The module, spread over the ranks of this run."""
    way = SPREADS[name]
    _start(way.world)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return way.apply(module)


def whole(module: nn.Module, *, gradients: bool) -> dict[str, Tensor | None]:
    """Whole gradients or parameters by their names in `Net`; all ranks ask together."""
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.tensor import DTensor

    def read() -> dict[str, Tensor | None]:
        found: dict[str, Tensor | None] = {}
        for name, parameter in module.named_parameters():
            value = parameter.grad if gradients else parameter.detach()
            if isinstance(value, DTensor):
                value = value.full_tensor()
            plain = name.replace("_fsdp_wrapped_module.", "").removeprefix("module.")
            found[plain] = None if value is None else value.clone()
        return found

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if isinstance(module, FullyShardedDataParallel):
            with FullyShardedDataParallel.summon_full_params(module, with_grads=gradients, writeback=False):
                return read()
        return read()
