"""Loops of others in two processes."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kit.language import Sequences, tiny_gpt2
from kit.workers import run_fresh
from lightning_gradclip import NormClip, ZClip

pytest.importorskip("accelerate", reason="needs accelerate: pip install 'lightning-gradclip[accelerate]'")

from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType

from lightning_gradclip.accelerate import accelerated

pytestmark = [pytest.mark.distributed, pytest.mark.filterwarnings("default")]

_PLUGINS: dict[int, dict[str, Any]] = {
    1: {"auto_wrap_policy": "NO_WRAP", "use_orig_params": True, "sync_module_states": False},
    2: {"reshard_after_forward": True},
}


def sharded(version: int) -> Accelerator:
    """An accelerator that shards. It does so for devices only: what is prepared is prepared as it is there."""
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=version, cpu_ram_efficient_loading=False, **_PLUGINS[version]
    )
    accelerator = Accelerator(cpu=True, fsdp_plugin=plugin)
    # Of which the second is read again by whoever asks for the first.
    for state in (AcceleratorState._shared_state, PartialState._shared_state):
        state.update(distributed_type=DistributedType.FSDP, device=torch.device("cpu"))
    accelerator.state.fsdp_plugin = plugin
    return accelerator


def batches(count: int = 20) -> Tensor:
    return torch.randn(count, 8, 4, generator=torch.Generator().manual_seed(1))


def loss_of(net: nn.Module, batch: Tensor) -> Tensor:
    return (net(batch) - 10 * batch.sum(1, keepdim=True)).square().mean()


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))


def trained_alone() -> tuple[dict[str, float], list[Tensor]]:
    os.environ["ACCELERATE_USE_CPU"] = "true"
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(cpu=True)
    net, optimizer = accelerator.prepare(net := network(), torch.optim.SGD(net.parameters(), lr=0.01))
    clipper = accelerated(accelerator, net, ZClip(warmup=5, z_threshold=0.5), optimizer=optimizer)
    for batch in batches():
        accelerator.backward(loss_of(net, batch))
        clipper.step()
        optimizer.step()
        optimizer.zero_grad()
    return clipper.metrics(), [one.detach() for one in net.parameters()]


@pytest.mark.parametrize("version", [1, 2])
def test_shards_of_accelerate_are_clipped_as_one_process_clips(version: int, tmp_path: Path) -> None:
    def work(rank: int) -> Any:
        accelerator = sharded(version)
        net, optimizer = accelerator.prepare(net := network(), torch.optim.SGD(net.parameters(), lr=0.01))
        clipper = accelerated(accelerator, net, ZClip(warmup=5, z_threshold=0.5), optimizer=optimizer)
        for batch in batches():
            accelerator.backward(loss_of(net, batch[rank::2]))
            clipper.step()
            optimizer.step()
            optimizer.zero_grad()
        metrics = clipper.metrics()
        if version == 2:
            accelerator.save_state(str(tmp_path))
            known = clipper.state_dict()
            clipper.load_state_dict(known | {"step": 0})
            accelerator.load_state(str(tmp_path))
            assert clipper.state_dict()["step"] == 20
        return metrics

    expected, _ = run_fresh(lambda rank: trained_alone(), world=1)[0]
    for metrics in run_fresh(work):
        assert metrics == pytest.approx(expected, rel=1e-5)
