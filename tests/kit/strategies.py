"""Lightning's strategies on CPU processes, and one small module that each of them can spread over its ranks."""

import re
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.plugins.precision import FSDPPrecision
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy, Strategy
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    FullOptimStateDictConfig,
    FullStateDictConfig,
    FullyShardedDataParallel,
    OptimStateKeyType,
    StateDictType,
    fully_shard,
)
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.optim import SGD, Optimizer

from kit import layouts
from lightning_gradclip.select.layout import is_distributed

Batch = tuple[Tensor, Tensor]
Cut = Callable[[nn.Module, Any], None]
Make = Callable[[list[dict[str, Any]]], Optimizer]


def quieten_torch() -> None:
    """For the rest of this process: what torch says about its own FSDP is no news here."""
    warnings.filterwarnings("ignore", module=r"torch\.")
    warnings.filterwarnings("ignore", "The `NO_SHARD` sharding strategy is deprecated", FutureWarning)


def momentum(groups: list[dict[str, Any]]) -> Optimizer:
    return SGD(groups, lr=0.1, momentum=0.9)


class AsItIs(FSDPPrecision):
    """Leaves float64 alone, which FSDP's other precisions know nothing of."""

    def __init__(self) -> None:
        super().__init__("32-true")

    def convert_module(self, module: nn.Module) -> nn.Module:
        return module

    def convert_input(self, data: Any) -> Any:
        return data

    def tensor_init_context(self) -> Any:
        return nullcontext()

    forward_context = tensor_init_context


class CpuFSDP(FSDPStrategy):
    """FSDP on CPUs: Lightning passes on the index of a device only, and they have none."""

    def __init__(self, sharding_strategy: str, *, shape: tuple[int, int] | None = None, **options: Any) -> None:
        super().__init__(sharding_strategy=sharding_strategy, precision_plugin=AsItIs(), **options)
        self._shape = shape

    def _setup_model(self, model: nn.Module) -> nn.Module:
        options = {"sharding_strategy": self.sharding_strategy, "device_id": torch.device("cpu"), **self.kwargs}
        if self._shape is not None:
            options["device_mesh"] = init_device_mesh("cpu", self._shape, mesh_dim_names=("replica", "shard"))
        return FullyShardedDataParallel(model, **options)

    def lightning_module_state_dict(self) -> dict[str, Any]:
        if self._state_dict_type == "sharded":
            return super().lightning_module_state_dict()
        with self._copying():
            return self.model.state_dict()

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        if self._state_dict_type == "sharded":
            return super().optimizer_state(optimizer)
        with self._copying():
            state = FullyShardedDataParallel.optim_state_dict(self.model, getattr(optimizer, "optimizer", optimizer))
        if self.global_rank == 0:
            state = FullyShardedDataParallel.rekey_optim_state_dict(state, OptimStateKeyType.PARAM_ID, self.model)
        return state

    def _copying(self) -> Any:
        """Moving to a CPU copies nothing where all is on one, and FSDP frees the memory or uses it again."""
        return FullyShardedDataParallel.state_dict_type(
            self.model,
            StateDictType.FULL_STATE_DICT,
            FullStateDictConfig(offload_to_cpu=False, rank0_only=True),
            FullOptimStateDictConfig(offload_to_cpu=False, rank0_only=True),
        )


class Fitted(LightningModule):
    """The network of `layouts`, fitted to random targets; one optimizer, automatic optimization."""

    def __init__(self, dtype: torch.dtype = torch.float64, optimizer: Make = momentum) -> None:
        super().__init__()
        self.net = layouts.net(dtype)
        self.make_optimizer = optimizer

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        # Lies on Lightning's own step axis, for comparison.
        self.log("x", float(batch_idx), on_step=True, on_epoch=False, batch_size=1)
        inputs, targets = batch
        return nn.functional.mse_loss(self.net(inputs), targets)

    def configure_optimizers(self) -> Optimizer:
        # FSDP may have joined the module's parameters into others.
        named = list(self.trainer.strategy.model.named_parameters())
        layers = [parameter for name, parameter in named if re.search("embed|up|down|head", name)]
        others = [parameter for name, parameter in named if not re.search("embed|up|down|head", name)]
        return self.make_optimizer([{"params": layers}, {"params": others}])


def spreading(module: LightningModule, cut: Cut | None) -> LightningModule:
    """The module as ModelParallelStrategy wants it: one that spreads its own network over the mesh."""
    if cut is not None:

        def configure_model() -> None:
            if module.device_mesh is not None and not any(map(is_distributed, module.parameters())):
                cut(module.net, module.device_mesh)

        module.configure_model = configure_model
    return module


class Way(NamedTuple):
    """A way to train on several ranks.

    Attributes:
        world: How many ranks.
        parts: Into how many parts each batch is cut.
        strategy: Makes the strategy.
        cut: Spreads the network, where the strategy leaves that to the module.
    """

    world: int
    parts: int
    strategy: Callable[..., Strategy]
    cut: Cut | None = None

    def share(self, batches: list[Batch], rank: int) -> list[Batch]:
        """What a rank trains on: neighbours in a tensor-parallel group get the same."""
        size = len(batches[0][0]) // self.parts
        start = rank * self.parts // self.world * size
        return [tuple(part[start : start + size] for part in batch) for batch in batches]


def shard(net: nn.Module, mesh: Any) -> None:
    fully_shard(net.up, mesh=mesh["data_parallel"])
    fully_shard(net, mesh=mesh["data_parallel"])


def _tensor(net: nn.Module, mesh: Any) -> None:
    """An ordinary LayerNorm, embedding and head beside two layers that are cut."""
    parallelize_module(net, mesh["tensor_parallel"], {"up": ColwiseParallel(), "down": RowwiseParallel()})


def _tensor_and_shard(net: nn.Module, mesh: Any) -> None:
    _tensor(net, mesh)
    fully_shard(net, mesh=mesh["data_parallel"])


def _sequence(net: nn.Module, mesh: Any) -> None:
    # The batch is cut along the sequence only from the normalization to the layer behind it.
    cut = PrepareModuleInput(input_layouts=Replicate(), desired_input_layouts=Shard(1))
    parallelize_module(net.norm, mesh["tensor_parallel"], cut)
    plan = {"norm": SequenceParallel(), "up": ColwiseParallel(input_layouts=Shard(1)), "down": RowwiseParallel()}
    parallelize_module(net, mesh["tensor_parallel"], plan)


def _model_parallel(data: int, tensor: int) -> Callable[..., Strategy]:
    return lambda **options: ModelParallelStrategy(data_parallel_size=data, tensor_parallel_size=tensor, **options)


def _fsdp1(kind: str, **settings: Any) -> Callable[..., Strategy]:
    return lambda **options: CpuFSDP(kind, **settings, **options)


_LAYERS = {"auto_wrap_policy": {nn.Linear}}

WAYS = {
    "ddp": Way(2, 2, DDPStrategy),
    "fsdp1_full": Way(2, 2, _fsdp1("FULL_SHARD", **_LAYERS)),
    "fsdp1_flat": Way(2, 2, _fsdp1("FULL_SHARD", use_orig_params=False, **_LAYERS)),
    "fsdp1_grad_op": Way(2, 2, _fsdp1("SHARD_GRAD_OP")),
    "fsdp1_none": Way(2, 2, _fsdp1("NO_SHARD")),
    "fsdp1_hybrid": Way(4, 4, _fsdp1("HYBRID_SHARD", shape=(2, 2), **_LAYERS)),
    "fsdp2": Way(2, 2, _model_parallel(2, 1), shard),
    "fsdp2_4": Way(4, 4, _model_parallel(4, 1), shard),
    "tensor": Way(2, 1, _model_parallel(1, 2), _tensor),
    "tensor_data": Way(4, 2, _model_parallel(2, 2), _tensor_and_shard),
    "sequence": Way(2, 1, _model_parallel(1, 2), _sequence),
}
if not layouts.FSDP2_ON_CPU:
    WAYS = {name: way for name, way in WAYS.items() if way.cut not in (shard, _tensor_and_shard)}


def known(*names: str) -> list[str]:
    """Those of the ways that this release of torch knows on CPUs."""
    return [name for name in names if name in WAYS]


def batches(count: int, dtype: torch.dtype = torch.float64, *, seed: int = 0) -> list[Batch]:
    """Eight sequences of four, whose gradients differ in size from batch to batch."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda size: torch.randn(8, 4, size, generator=generator, dtype=torch.float64)  # noqa: E731
    pairs = [(draw(layouts.WIDTHS["features"]), (1 + i) * draw(layouts.WIDTHS["outputs"])) for i in range(count)]
    return [tuple(part.to(dtype) for part in pair) for pair in pairs]


def whole(trainer: Any) -> dict[str, Tensor]:
    """The weights after training, by their names in the module; all ranks ask together."""
    return layouts.whole(trainer.strategy.model, gradients=False)
