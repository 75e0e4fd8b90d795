"""Centralized gradients are those of one process, also where ranks hold pieces of a row."""

from typing import Any

import pytest
import torch

from kit import layouts, workers
from kit.sharded import Spread
from lightning_gradclip import Clipper, NormClip

pytestmark = pytest.mark.distributed

REFUSED = "fsdp1"


@workers.once
def gradients() -> dict[str, list[Any]]:
    """By layout, what each rank says of the gradients after a step, or why there is none."""

    def work(rank: int, name: str) -> Any:
        spread = Spread(name, rank, torch.float64)
        spread.give()
        try:
            Clipper(spread.module, NormClip(max_norm=0.2), optimizer=spread.optimizer, centralize=True).step()
        except ValueError as error:
            return str(error)
        return spread.whole()

    return workers.run_each(work, {name: way.world for name, way in layouts.SPREADS.items()})


def test_one_process_takes_the_means_of_rows() -> None:
    for name, gradient in gradients()["ddp"][0].items():
        if gradient is not None and gradient.ndim > 1:
            assert gradient.flatten(1).mean(1).abs().max() < 1e-15, name
            assert gradient.abs().max() > 1e-4


@pytest.mark.parametrize("name", layouts.SPREADS)
def test_gradients_are_those_under_ddp(name: str) -> None:
    expected = gradients()["ddp"][0]
    for found in gradients()[name]:
        if isinstance(found, str):
            assert name.startswith(REFUSED)
            assert found.endswith("or leave out centralize=True")
        else:
            torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    assert name != "fsdp2" or not isinstance(gradients()[name][0], str)
