"""Loops of others in two processes."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor

from kit.extras import require_loops
from kit.language import Sequences, tiny_gpt2
from kit.workers import run_fresh
from lightning_gradclip import ZClip

pytest.importorskip("accelerate", reason="accelerate not installed: make test-loops")

from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType

from lightning_gradclip.accelerate import accelerated

pytestmark = [pytest.mark.distributed, pytest.mark.filterwarnings("default")]


@pytest.fixture(autouse=True)
def _apart() -> None:
    """Processes that are forked begin without what accelerators of this one share."""
    AcceleratorState._reset_state(reset_partial_state=True)


_PLUGINS: dict[int, dict[str, Any]] = {
    1: {"auto_wrap_policy": "NO_WRAP", "use_orig_params": True, "sync_module_states": False},
    2: {"reshard_after_forward": True},
}


def sharded(version: int) -> Accelerator:
    plugin = FullyShardedDataParallelPlugin(fsdp_version=version, cpu_ram_efficient_loading=False, **_PLUGINS[version])
    return sharding(Accelerator(cpu=True, fsdp_plugin=plugin), plugin)


def sharding(accelerator: Accelerator, plugin: FullyShardedDataParallelPlugin) -> Accelerator:
    """Make it shard on CPUs, where Accelerate passes over the plugin; what it prepares it prepares as on devices."""
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


def trained_alone() -> dict[str, float]:
    accelerator = Accelerator(cpu=True)
    net, optimizer = accelerator.prepare(net := network(), torch.optim.SGD(net.parameters(), lr=0.01))
    clipper = accelerated(accelerator, net, ZClip(warmup=5, z_threshold=0.5), optimizer=optimizer)
    for batch in batches():
        accelerator.backward(loss_of(net, batch))
        clipper.step()
        optimizer.step()
        optimizer.zero_grad()
    return clipper.metrics()


@pytest.mark.parametrize("version", [1, 2])
def test_shards_of_accelerate_are_clipped_as_one_process_clips(version: int, tmp_path: Path) -> None:
    def work(rank: int) -> Any:
        accelerator = sharded(version)
        net, optimizer = accelerator.prepare(net := network(), torch.optim.SGD(net.parameters(), lr=0.01))
        assert isinstance(net, (FullyShardedDataParallel, FSDPModule)[version - 1])
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

    (expected,) = run_fresh(lambda rank: trained_alone(), world=1)
    for metrics in run_fresh(work):
        assert metrics == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("way", ["ddp", "fsdp2"])
def test_a_trainer_in_two_processes_trains_as_in_one(way: str, tmp_path: Path) -> None:
    require_loops("transformers")
    (expected, weights) = run_fresh(lambda rank: trained(tmp_path / "one", "alone"), world=1)[0]
    for metrics, found in run_fresh(lambda rank: trained(tmp_path / "two", way)):
        assert len(metrics) == len(expected) == 4
        for ours, other in zip(metrics, expected, strict=True):
            assert ours == pytest.approx(other, rel=1e-4)
        for one, other in zip(found, weights, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def trained(folder: Path, way: str) -> tuple[list[dict[str, float]], list[Tensor]]:
    """What was logged, and the weights, of 20 steps that accumulate twice; sequences are of one length."""
    from transformers import Trainer, TrainingArguments

    from lightning_gradclip.transformers import GradientClippingCallback

    class Sharded(Trainer):
        def create_accelerator_and_postprocess(self) -> None:
            super().create_accelerator_and_postprocess()
            if way == "fsdp2":
                sharding(self.accelerator, FullyShardedDataParallelPlugin(**self.args.fsdp_plugin_args))
                self.is_fsdp_enabled = True

    args = TrainingArguments(
        str(folder),
        use_cpu=True,
        max_steps=20,
        per_device_train_batch_size=4 if way == "alone" else 2,
        gradient_accumulation_steps=2,
        learning_rate=0.1,
        optim="sgd",
        logging_steps=5,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=1,
        fsdp="full_shard" if way == "fsdp2" else None,
        fsdp_config={"transformer_layer_cls_to_wrap": ["GPT2Block"]} if way == "fsdp2" else None,
    )
    callback = GradientClippingCallback(ZClip(warmup=5, z_threshold=0.5), measure_per="layer")
    trainer = Sharded(model=tiny_gpt2(), args=args, train_dataset=Sequences(), callbacks=[callback])
    trainer.train()
    logged = [{k: v for k, v in one.items() if "gradclip" in k} for one in trainer.state.log_history if "loss" in one]
    assert all(isinstance(one, DTensor) == (way == "fsdp2") for one in trainer.model.parameters())
    whole = [one.full_tensor() if isinstance(one, DTensor) else one for one in trainer.model.parameters()]
    return logged, [one.detach() for one in whole]
