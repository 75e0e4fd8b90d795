"""A Trainer whose ranks hold different parts of a model: the callback finds the ranks by the name of a dimension."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.optim import SGD
from torch.utils.data import DataLoader

from kit import strategies, workers
from kit.layouts import net
from kit.pieces import random
from lightning_gradclip import EmaClip, GradientClipping, History, NormClip

pytestmark = pytest.mark.distributed

STEPS = 8


def gradients(stage: int, step: int) -> list[torch.Tensor]:
    return [random(*one.shape, seed=20 * step + 10 * stage + i) for i, one in enumerate(net().up.parameters())]


class Stage(LightningModule):
    """A layer that only this rank has; its gradients are given, as a schedule of a pipeline would leave them."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def configure_model(self) -> None:
        if not hasattr(self, "layer"):
            self.layer = nn.Linear(*net().up.weight.shape[::-1])
            self.layer.load_state_dict(net().up.state_dict())

    def training_step(self, batch: Any, batch_idx: int) -> None:
        for one, gradient in zip(self.layer.parameters(), gradients(self.global_rank, batch_idx), strict=True):
            one.grad = gradient
        self.optimizers().step()

    def configure_optimizers(self) -> Any:
        return SGD(self.parameters(), lr=0.1)


def fitted(callback: GradientClipping, folder: Path, **options: Any) -> Stage:
    module = Stage()
    trainer = Trainer(
        accelerator="cpu",
        devices=2,
        strategy=ModelParallelStrategy(data_parallel_size=1, tensor_parallel_size=2),
        max_steps=STEPS,
        callbacks=[callback],
        logger=CSVLogger(folder),
        log_every_n_steps=1,
        default_root_dir=folder,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        **options,
    )
    trainer.fit(module, DataLoader([torch.zeros(1)] * STEPS, batch_size=1))
    return module


def test_stages_are_clipped_by_their_joint_norm(tmp_path: Path) -> None:
    def work(rank: int) -> Any:
        strategies.quieten_torch()
        callback = GradientClipping(
            NormClip(max_norm=1.0), process_group="tensor_parallel", measure_per="parameter", history=True
        )
        module = fitted(callback, tmp_path, enable_checkpointing=False)
        return [one.detach() for one in module.parameters()], callback.state_dict()["clippers"][0]["step"]

    answers = workers.run_fresh(work)
    joint = [math.hypot(*(one.norm().item() for stage in (0, 1) for one in gradients(stage, i))) for i in range(STEPS)]
    for stage, (weights, steps) in enumerate(answers):
        assert steps == STEPS
        expected = [one.detach().double() for one in net().up.parameters()]
        for i, norm in enumerate(joint):
            for one, gradient in zip(expected, gradients(stage, i), strict=True):
                one -= 0.1 * gradient.double() * min(1.0, 1.0 / (norm + 1e-6))
        torch.testing.assert_close([one.double() for one in weights], expected, rtol=1e-5, atol=1e-6)
    (folder,) = tmp_path.rglob("gradclip")
    history = History(folder)
    assert history.steps["norm"].tolist() == pytest.approx(joint, rel=1e-6)


def test_what_was_learned_goes_on_from_a_checkpoint(tmp_path: Path) -> None:
    def work(rank: int) -> Any:
        strategies.quieten_torch()
        callback = GradientClipping(EmaClip(warmup=2, per="parameter"), process_group="tensor_parallel")
        module = fitted(callback, tmp_path, enable_checkpointing=False)
        state = callback.state_dict()["clippers"][0]["learned"]
        return state, [one.detach() for one in module.parameters()]

    (first, _), (second, _) = workers.run_fresh(work)
    assert first["scopes"] == second["scopes"]
    assert len(first["scopes"]) == 4
    assert all(torch.equal(one, second["values"][name]) for name, one in first["values"].items())


def test_a_dimension_that_no_mesh_has_is_refused_with_those_that_are_there(tmp_path: Path) -> None:
    def work(rank: int) -> str:
        strategies.quieten_torch()
        with pytest.raises(MisconfigurationException, match="process_group") as error:
            fitted(GradientClipping(NormClip(), process_group="pp"), tmp_path, enable_checkpointing=False)
        return str(error.value)

    first, second = workers.run_fresh(work)
    assert first == second
    assert "'data_parallel', 'tensor_parallel'" in first


def test_what_is_no_group_is_refused_at_once() -> None:
    with pytest.raises(TypeError, match=r"process_group must be a ProcessGroup or a DeviceMesh, got 3"):
        GradientClipping(NormClip(), process_group=3)
