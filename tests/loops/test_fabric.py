"""Clipping in a loop of Fabric."""

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric import Fabric
from lightning.fabric.plugins import MixedPrecision
from torch import Tensor, nn

from lightning_gradclip import Clipper, NormClip, ZClip
from lightning_gradclip.fabric import clip_gradients, clipper_for


def fabric_of(scaler: torch.amp.GradScaler | None = None) -> tuple[Fabric, Any, Any]:
    plugins = [] if scaler is None else [MixedPrecision("16-mixed", "cpu", scaler=scaler)]
    fabric = Fabric(accelerator="cpu", devices=1, plugins=plugins)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
    return fabric, *fabric.setup(net, torch.optim.SGD(net.parameters(), lr=0.01))


def loss_of(net: nn.Module, batch: Tensor) -> Tensor:
    return (net(batch) - 10 * batch.sum(1, keepdim=True)).square().mean()


def batches(count: int) -> list[Tensor]:
    return list(torch.randn(count, 8, 4, generator=torch.Generator().manual_seed(1)))


def test_a_call_stands_where_that_of_fabric_would() -> None:
    weights = []
    for ours in (True, False):
        fabric, net, optimizer = fabric_of()
        for batch in batches(20):
            optimizer.zero_grad()
            fabric.backward(loss_of(net, batch))
            if ours:
                stats = clip_gradients(fabric, net, optimizer, NormClip(max_norm=0.5))
                assert float(stats.norm_clipped) == pytest.approx(0.5)
            else:
                fabric.clip_gradients(net, optimizer, max_norm=0.5)
            optimizer.step()
        weights.append([one.detach() for one in net.parameters()])
        if ours:
            assert clipper_for(fabric, net, optimizer, NormClip(max_norm=0.5)).steps == 20
    for one, other in zip(*weights, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


def test_the_scaler_of_the_precision_unscales() -> None:
    fabric, net, optimizer = fabric_of(torch.amp.GradScaler("cpu", init_scale=1024.0))
    for number, batch in enumerate(batches(4)):
        optimizer.zero_grad()
        fabric.backward(loss_of(net, batch) * (float("inf") if number == 1 else 1.0))
        clip_gradients(fabric, net, optimizer, None)
        optimizer.step()
    metrics = clipper_for(fabric, net, optimizer, None).metrics()
    assert metrics["overflows"] == 1
    assert metrics["norm_max"] < 1024


@pytest.mark.parametrize("one_call", [True, False])
def test_it_is_saved_and_loaded_with_the_rest(tmp_path: Path, one_call: bool) -> None:
    def made() -> tuple[Fabric, Any, Any, Clipper]:
        fabric, net, optimizer = fabric_of()
        method = ZClip(warmup=5)
        clipper = clipper_for(fabric, net, optimizer, method) if one_call else Clipper(net, method, optimizer=optimizer)
        return fabric, net, optimizer, clipper

    fabric, net, optimizer, clipper = made()
    for batch in batches(12):
        optimizer.zero_grad()
        fabric.backward(loss_of(net, batch))
        clipper.step()
        optimizer.step()
    fabric.save(tmp_path / "saved.ckpt", {"model": net, "optimizer": optimizer, "clipper": clipper})
    again, net, optimizer, resumed = made()
    again.load(tmp_path / "saved.ckpt", {"model": net, "optimizer": optimizer, "clipper": resumed})
    known, expected = (one.state_dict()["learned"]["values"] for one in (resumed, clipper))
    assert expected
    assert all(torch.equal(known[name], expected[name]) for name in expected)
    assert resumed.steps == 12


def test_another_method_at_a_later_call_is_refused() -> None:
    fabric, net, optimizer = fabric_of()
    clipper_for(fabric, net, optimizer, NormClip(max_norm=1.0))
    with pytest.raises(ValueError, match=r"this SGD is clipped by .*max_norm=1\.0.* got .*max_norm=2\.0.* a schedule"):
        clip_gradients(fabric, net, optimizer, NormClip(max_norm=2.0))


def test_it_ends_with_its_optimizer() -> None:
    fabric, net, optimizer = fabric_of()
    clipper = weakref.ref(clipper_for(fabric, net, optimizer, NormClip(max_norm=1.0)))
    del fabric, net, optimizer
    gc.collect()
    assert clipper() is None
