"""The clipper in Fabric's loops and in plain PyTorch ones, on two ranks, beside one process."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from lightning.fabric import Fabric
from lightning.fabric.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.optim import SGD

from kit import layouts, workers
from kit.boring import equal
from kit.strategies import batches, quieten_torch, shard
from lightning_gradclip import AGC, ClipMethod, Clipper, EmaClip, NormClip
from lightning_gradclip.select.names import clean_names

pytestmark = pytest.mark.distributed

METHODS: dict[str, Callable[[], ClipMethod]] = {
    "norm": lambda: NormClip(max_norm=0.3),
    "layers, learned": lambda: EmaClip(warmup=1, per="layer"),
    "units": lambda: AGC(clip_factor=0.1),
}


def loop(model: nn.Module, optimizer: Any, clipper: Clipper, data: Any, backward: Callable[[Tensor], None]) -> Any:
    for inputs, targets in data:
        optimizer.zero_grad()
        backward(nn.functional.mse_loss(model(inputs), targets))
        clipper.step()
        optimizer.step()
    weights = layouts.whole(model, gradients=False)
    weights = dict(zip(clean_names(list(weights)), weights.values(), strict=True))
    return weights, clipper.metrics(), clipper.state_dict()["learned"]["values"]


def with_fabric(kind: str, method: ClipMethod, rank: int) -> Any:
    strategy: Any = "ddp"
    if kind == "fsdp2":
        strategy = ModelParallelStrategy(_parallelized, data_parallel_size=2, tensor_parallel_size=1)
    fabric = Fabric(accelerator="cpu", devices=2, strategy=strategy)
    fabric.launch()
    module = layouts.net(torch.float64)
    if kind == "ddp":
        model, optimizer = fabric.setup(module, SGD(module.parameters(), lr=0.1))
    else:
        model = fabric.setup_module(module)
        optimizer = fabric.setup_optimizers(SGD(model.parameters(), lr=0.1))
    clipper = Clipper(model, method, optimizer=optimizer, include=["up.*", "head.weight"])
    return loop(model, optimizer, clipper, _half(rank), fabric.backward)


def _parallelized(module: nn.Module, mesh: Any) -> nn.Module:
    shard(module, mesh)
    return module


def plain(kind: str, method: ClipMethod, rank: int) -> Any:
    model = layouts.net(torch.float64)
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo")
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    optimizer = SGD(model.parameters(), lr=0.1)
    clipper = Clipper(model.named_parameters(), method, optimizer=optimizer, include=["up.*", "head.weight"])
    return loop(model, optimizer, clipper, _half(rank), Tensor.backward)


def _half(rank: int) -> Iterator[tuple[Tensor, Tensor]]:
    for inputs, targets in batches(4):
        yield inputs[4 * rank : 4 * rank + 4], targets[4 * rank : 4 * rank + 4]


@pytest.mark.parametrize("kind", ["ddp", *(["fsdp2", "plain"] if layouts.FSDP2_ON_CPU else [])])
def test_two_ranks_train_like_one_process(kind: str) -> None:
    def work(rank: int) -> dict[str, Any]:
        quieten_torch()
        train = plain if kind == "plain" else with_fabric
        return {name: train(kind, make(), rank) for name, make in METHODS.items()}

    first, second = workers.run(work)
    assert equal(first, second)
    for name, make in METHODS.items():
        model = layouts.net(torch.float64)
        optimizer = SGD(model.parameters(), lr=0.1)
        clipper = Clipper(model.named_parameters(), make(), optimizer=optimizer, include=["up.*", "head.weight"])
        expected = loop(model, optimizer, clipper, batches(4), Tensor.backward)
        assert expected[1]["clip_rate"] > 0
        torch.testing.assert_close(first[name], expected, rtol=1e-6, atol=1e-12)


def test_the_scopes_have_the_modules_own_names() -> None:
    def work(rank: int) -> Any:
        fabric = Fabric(accelerator="cpu", devices=2, strategy="ddp")
        fabric.launch()
        module = layouts.net()
        model, optimizer = fabric.setup(module, SGD(module.parameters(), lr=0.1))
        clipper = Clipper(model, NormClip(per="parameter"), optimizer=optimizer)
        model(torch.ones(2, 3, layouts.WIDTHS["features"])).sum().backward()
        return clipper.step().scopes, clipper.optimizer is optimizer

    names, same = workers.run(work)[0]
    assert list(names) == [name for name, _ in layouts.net().named_parameters()]
    assert same


def test_fabrics_optimizer_is_handed_a_coefficient() -> None:
    """With fold=True the gradients stay as they are, and the fused optimizer scales them."""
    fabric = Fabric(accelerator="cpu", devices=1)
    results = []
    for fold in (False, True):
        module = layouts.net()
        model, optimizer = fabric.setup(module, SGD(module.parameters(), lr=0.1, fused=True))
        clipper = Clipper(model, NormClip(max_norm=0.1), optimizer=optimizer, fold=fold)
        data = [tuple(part.float() for part in batch) for batch in batches(3)]
        results.append(loop(model, optimizer, clipper, data, fabric.backward)[0])
    assert not equal(results[0], dict(layouts.net().state_dict()))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-7)
