"""Unusual loops on two ranks, under DDP and FSDP2: what one process gives.

A training_step that returns None is none of them: Lightning refuses it where there are several ranks.
"""

from functools import cache
from typing import Any

import pytest
import torch
import torch._dynamo  # once, and not in every process
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import BackboneFinetuning
from torch import nn
from torch.optim import LBFGS, SGD, Optimizer

from kit import workers
from kit.boring import equal, fit
from kit.strategies import WAYS, Batch, Fitted, batches, known, quieten_torch, spreading, whole
from lightning_gradclip import EmaClip, GradientClipping, NormClip

pytestmark = pytest.mark.distributed


def sgd(params: Any) -> SGD:
    return SGD(params, lr=0.1, momentum=0.9)


class Adversarial(Fitted):
    """Two optimizers in turns under manual optimization; both backward passes reach all parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        for sign, optimizer in zip((1.0, -0.1), self.optimizers(), strict=True):
            optimizer.zero_grad()
            self.manual_backward(sign * super().training_step(batch, batch_idx))
            optimizer.step()

    def configure_optimizers(self) -> list[Optimizer]:
        head = list(self.net.head.parameters())
        return [sgd(head), sgd([p for name, p in self.net.named_parameters() if "head" not in name])]


class Untrained(Fitted):
    def configure_optimizers(self) -> None: ...


class Quasi(Fitted):
    def configure_optimizers(self) -> Optimizer:
        return LBFGS(self.parameters(), lr=0.1, max_iter=3)


class Thawed(Fitted):
    """Trains its head first and joins the rest in the second epoch."""

    @property
    def backbone(self) -> nn.Module:
        return self.net.up

    def configure_optimizers(self) -> Optimizer:
        return SGD([p for p in self.parameters() if p.requires_grad], lr=0.1)


class Frozen(Fitted):
    """Freezes a layer in its first epoch, which the optimizer has from the start."""

    def on_train_epoch_start(self) -> None:
        self.net.up.requires_grad_(self.current_epoch > 0)


class Compiled(Fitted):
    def __init__(self) -> None:
        super().__init__()
        self.net.up = torch.compile(self.net.up, backend="eager")


def clippings() -> list[GradientClipping]:
    """Two that share out the parameters, and one that looks at what they leave."""
    return [
        GradientClipping(NormClip(max_norm=0.1), name="head", include="net.head.*"),
        GradientClipping(EmaClip(warmup=1, per="layer"), name="body", exclude="net.head.*"),
        GradientClipping(None, name="left"),
    ]


LOOPS: dict[str, tuple[type[LightningModule], dict[str, Any]]] = {
    "two optimizers": (Adversarial, {}),
    "accumulation": (Fitted, {"accumulate_grad_batches": 2}),
    "no optimizer": (Untrained, {}),
    "LBFGS": (Quasi, {}),
    "thawed": (Thawed, {"max_epochs": 2}),
    "frozen": (Frozen, {"max_epochs": 2}),
    "compiled": (Compiled, {}),
}


def train(name: str, rank: int | None = None, way: str = "ddp") -> tuple[Any, ...]:
    kind, options = LOOPS[name]
    module, data, callbacks = kind(), batches(4), clippings()
    if rank is not None:
        spread = WAYS[way]
        module, data = spreading(module, spread.cut), spread.share(data, rank)
        strategy = spread.strategy(**({"find_unused_parameters": True} if way == "ddp" else {}))
        options = {**options, "strategy": strategy, "devices": 2, "use_distributed_sampler": False}
    extra = [BackboneFinetuning(unfreeze_backbone_at_epoch=1, train_bn=False, backbone_initial_lr=0.01)]
    trainer = fit(module, data, *callbacks, *(extra if name == "thawed" else []), log_every_n_steps=1, **options)
    shown = {key: value for key, value in trainer.callback_metrics.items() if key != "x"}
    learned = [one["learned"]["values"] for one in callbacks[1].state_dict()["clippers"].values()]
    return {key.replace("_orig_mod.", ""): value for key, value in whole(trainer).items()}, shown, learned


@cache
def alone(name: str) -> tuple[Any, ...]:
    return train(name)


# LBFGS joins all parameters into one vector, which pieces on a mesh cannot be. DDP averages what was trainable when it
# was set up: Lightning's finetuning joins the backbone later, and then each rank trains its own, clipped or not.
LEFT_OUT = {"ddp": {"thawed"}, "fsdp2": {"LBFGS"}}


@pytest.mark.filterwarnings("ignore:.*this fit will run with no optimizer:UserWarning")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # torch's compiler looks at it
@pytest.mark.filterwarnings("ignore:The dirpath has changed:UserWarning")
@pytest.mark.parametrize("way", known("ddp", "fsdp2"))
def test_two_ranks_do_what_one_process_does(way: str) -> None:
    def work(rank: int) -> dict[str, Any]:
        quieten_torch()
        return {name: train(name, rank, way) for name in LOOPS if name not in LEFT_OUT[way]}

    # First, so that the processes find imported what torch.compile wants.
    expected = {name: alone(name) for name in LOOPS if name not in LEFT_OUT[way]}
    first, second = workers.run(work)
    assert [name for name in first if not equal(first[name], second[name])] == []
    for name in first:
        try:
            torch.testing.assert_close(first[name], expected[name], rtol=1e-6, atol=1e-12, equal_nan=True)
        except AssertionError as error:
            raise AssertionError(name) from error
    assert first["two optimizers"][1].keys() > {"body/1/norm", "left/0/norm"}
    assert first["compiled"][1]["head/clip_rate"] == 1.0
