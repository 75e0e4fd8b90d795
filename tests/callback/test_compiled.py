"""Optimizers and modules that torch compiles: clipping stays outside their graphs."""

from collections.abc import Iterator

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.utils.data import DataLoader

from kit.boring import make_trainer
from lightning_gradclip import GradientClipping, ZClip

# torch says so of what Lightning does around a compiled step.
pytestmark = pytest.mark.filterwarnings("default")


class Compiled(LightningModule):
    def __init__(self, *, optimizer: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
        self.compiled = self.net if optimizer else torch.compile(self.net, backend="eager")
        self.compiles_optimizer = optimizer

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return (self.compiled(batch) - 10 * batch.sum(1, keepdim=True)).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        optimizer = torch.optim.AdamW(self.net.parameters(), lr=torch.tensor(0.01))
        if self.compiles_optimizer:
            optimizer.step = torch.compile(optimizer.step, backend="eager")
        return optimizer


@pytest.fixture(autouse=True)
def _afresh() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def graphs(steps: int, *callbacks: GradientClipping, optimizer: bool) -> tuple[int, int]:
    """How many graphs torch has made after so many steps, and how often it left one while it made them."""
    torch.compiler.reset()
    counters.clear()
    module = Compiled(optimizer=optimizer)
    data = DataLoader(torch.randn(8 * steps, 4, generator=torch.Generator().manual_seed(1)), batch_size=8)
    make_trainer(*callbacks, max_steps=steps).fit(module, data)
    assert not counters["recompiles"]
    return counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())


def test_a_compiled_module_has_the_graphs_that_it_has_without() -> None:
    bare = graphs(12, optimizer=False)
    assert graphs(12, GradientClipping(ZClip(warmup=3)), optimizer=False) == bare == (1, 0)


def test_nothing_is_compiled_anew_at_a_later_step_of_a_compiled_optimizer() -> None:
    """When the hook was traced this ended in an error of torch, or in six times as many graphs, more at each step."""
    early, late = (graphs(steps, GradientClipping(ZClip(warmup=3)), optimizer=True) for steps in (4, 9))
    assert early == late
