"""The weights after clipped steps of Adam are those under DDP, however the module is spread over the ranks."""

from functools import partial
from typing import Any

import pytest
import torch
from torch.optim import Adam

from kit import layouts, workers
from kit.sharded import Spread
from lightning_gradclip import AGC, Clipper, NormClip, SpikeClip, SurpriseClip, ValueClip

pytestmark = pytest.mark.distributed

METHODS = {
    "norm": partial(NormClip, max_norm=0.2),
    "norm of each parameter": partial(NormClip, max_norm=0.1, per="parameter"),
    "value": partial(ValueClip, max_value=0.01),
    "agc": partial(AGC, clip_factor=0.05, per="parameter"),
    "surprise": partial(SurpriseClip, k=1.1, warmup=3, per="model"),
    "spike": partial(SpikeClip, theta=1.1, warmup=1),
    "nothing": None,
}


@workers.once
def weights() -> dict[str, list[Any]]:
    """By layout, what each rank says of the weights after four steps with each method."""

    def work(rank: int, name: str) -> dict[str, Any]:
        found = {}
        for label, make in METHODS.items():
            spread = Spread(name, rank, torch.float64)
            # A first step of Adam does not see the size of a gradient, unless eps is not small beside it.
            optimizer = Adam(spread.params, lr=0.1, eps=0.05)
            clipper = Clipper(spread.module, make and make(), optimizer=optimizer)
            for factor in (1.0, 1.0, 1.0, 30.0):
                spread.give(factor)
                clipper.step()
                optimizer.step()
            found[label] = layouts.whole(spread.module, gradients=False)
        return found

    return workers.run_each(work, {name: way.world for name, way in layouts.SPREADS.items()})


@pytest.mark.parametrize("label", METHODS)
@pytest.mark.parametrize("name", layouts.SPREADS)
def test_weights_are_those_under_ddp(name: str, label: str) -> None:
    expected = weights()["ddp"][0][label]
    for of_rank in weights()[name]:
        torch.testing.assert_close(of_rank[label], expected, rtol=1e-9, atol=1e-12)
    if label != "nothing":
        # It would show if nothing had been clipped.
        assert not torch.allclose(expected["up.weight"], weights()["ddp"][0]["nothing"]["up.weight"], rtol=1e-3)
