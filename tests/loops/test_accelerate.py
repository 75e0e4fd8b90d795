"""Clipping in a loop of Accelerate."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_gradclip import NormClip, ZClip

pytest.importorskip("accelerate", reason="accelerate not installed: make test-loops")

from accelerate import Accelerator
from accelerate.state import AcceleratorState

from lightning_gradclip.accelerate import accelerated


@pytest.fixture(autouse=True)
def _apart() -> Any:
    """Accelerators share their state within a process."""
    AcceleratorState._reset_state(reset_partial_state=True)


def net_of(accelerator: Accelerator, **options: Any) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
    return accelerator.prepare(net, torch.optim.SGD(net.parameters(), lr=0.01, **options))


def batches(count: int) -> list[Tensor]:
    return list(torch.randn(count, 8, 4, generator=torch.Generator().manual_seed(1)))


def loss_of(net: nn.Module, batch: Tensor) -> Tensor:
    return (net(batch) - 10 * batch.sum(1, keepdim=True)).square().mean()


@pytest.mark.parametrize("accumulate", [1, 4])
def test_a_call_stands_where_clip_grad_norm_would(accumulate: int) -> None:
    weights = []
    for ours in (True, False):
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulate)
        net, optimizer = net_of(accelerator)
        clipper = accelerated(accelerator, net, NormClip(max_norm=0.5), optimizer=optimizer) if ours else None
        for batch in batches(24):
            with accelerator.accumulate(net):
                accelerator.backward(loss_of(net, batch))
                if clipper is not None:
                    clipper.step()
                elif accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(net.parameters(), 0.5)
                optimizer.step()
                optimizer.zero_grad()
        weights.append([one.detach() for one in net.parameters()])
        if clipper is not None:
            assert clipper.state_dict()["step"] == 24 // accumulate
            assert clipper.metrics()["clip_rate"] == 1
    for one, other in zip(*weights, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


def test_gradients_are_unscaled_by_the_scaler_of_the_accelerator() -> None:
    accelerator = Accelerator(cpu=True)
    # Accelerate makes one for devices only, and then does with it what it does there.
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    net, optimizer = net_of(accelerator)
    clipper = accelerated(accelerator, net, NormClip(max_norm=1e9), optimizer=optimizer)
    for number, batch in enumerate(batches(4)):
        accelerator.backward(loss_of(net, batch) * (float("inf") if number == 1 else 1.0))
        clipper.step()
        optimizer.step()
        assert optimizer.step_was_skipped == (number == 1)
        optimizer.zero_grad()
    metrics = clipper.metrics()
    assert metrics["overflows"] == 1
    assert metrics["norm_max"] < 1024


def test_checkpoints_hold_what_it_has_learned(tmp_path: Path) -> None:
    accelerator = Accelerator(cpu=True)
    net, optimizer = net_of(accelerator)
    clipper = accelerated(accelerator, net, ZClip(warmup=5), optimizer=optimizer)
    for batch in batches(12):
        accelerator.backward(loss_of(net, batch))
        clipper.step()
        optimizer.step()
        optimizer.zero_grad()
    accelerator.save_state(str(tmp_path / "saved"))
    AcceleratorState._reset_state(reset_partial_state=True)
    again = Accelerator(cpu=True)
    net, optimizer = net_of(again)
    resumed = accelerated(again, net, ZClip(warmup=5), optimizer=optimizer)
    again.load_state(str(tmp_path / "saved"))
    known, expected = (one.state_dict()["learned"]["values"] for one in (resumed, clipper))
    assert known.keys() == expected.keys()
    assert all(torch.equal(known[name], expected[name]) for name in expected)
    assert resumed.state_dict()["step"] == 12


def test_an_optimizer_that_was_not_prepared_is_refused() -> None:
    accelerator = Accelerator(cpu=True)
    net = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"the optimizer was not prepared, got SGD; write model, optimizer = "):
        accelerated(accelerator, net, NormClip(), optimizer=torch.optim.SGD(net.parameters(), lr=0.1))
