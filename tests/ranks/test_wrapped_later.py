"""A clipper that was made before the model was sharded follows it, or refuses."""

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.optim import SGD

from kit import layouts, workers
from kit.pieces import mesh, random
from lightning_gradclip import Clipper, NormClip

pytestmark = pytest.mark.distributed


def backward(module: nn.Module) -> None:
    module.zero_grad()
    module(random(4, 6)).square().sum().backward()


def dense() -> float:
    module = layouts.net()
    backward(module)
    return Clipper(module, None).step().norm.item()


@pytest.mark.skipif(not layouts.FSDP2_ON_CPU, reason="this torch knows FSDP2 on GPUs only")
@pytest.mark.parametrize("steps", [0, 1])
def test_fsdp2_after_the_clipper_is_followed(steps: int) -> None:
    def work(rank: int) -> list[float]:
        module = layouts.net()
        clippers = [Clipper(module, NormClip(max_norm=0.1)), Clipper(module.named_parameters(), None)]
        for _ in range(steps):
            backward(module)
            [clipper.step() for clipper in clippers]
        fully_shard(module, mesh=mesh(2))
        backward(module)
        first, second = (clipper.step().norm.item() for clipper in clippers)
        return [first, second, Clipper(module, None).step().norm.item()]

    (one, other) = workers.run(work)
    assert one == other
    assert one == pytest.approx([dense(), 0.1, 0.1], rel=1e-5)


@pytest.mark.skipif(not layouts.FSDP2_ON_CPU, reason="this torch knows FSDP2 on GPUs only")
def test_an_optimizer_that_fsdp2_left_behind_is_refused() -> None:
    def work(rank: int) -> None:
        module = layouts.net()
        optimizer = SGD(module.parameters(), lr=0.1)
        clipper = Clipper(module, NormClip(), optimizer=optimizer)
        fully_shard(module, mesh=mesh(2))
        backward(module)
        with pytest.raises(RuntimeError, match=r"the model has replaced embed\.weight .* fully_shard do, .*; make the"):
            clipper.step()

    workers.run(work)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("original", [True, False])
@pytest.mark.parametrize("given", ["model", "named", "pairs"])
def test_fsdp1_after_the_clipper_is_refused(original: bool, given: str) -> None:
    def work(rank: int) -> None:
        mesh(2)
        module = layouts.net()
        names = {"model": module, "named": module.named_parameters(), "pairs": [*module.named_parameters()]}[given]
        clipper = Clipper(names, NormClip())
        wrapped = FullyShardedDataParallel(module, device_id=torch.device("cpu"), use_orig_params=original)
        backward(wrapped)
        if given == "pairs" and not original:
            with pytest.warns(RuntimeWarning, match=r"has a gradient"):
                clipper.step()
            return
        for _ in range(2):
            with pytest.raises(ValueError, match=r"is flattened by FSDP, .* Clipper\(model, "):
                clipper.step()

    workers.run(work)
