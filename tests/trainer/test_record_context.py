"""What a history says of a step besides its norms: loss, learning rate, batch, threshold, and layers of a spike."""

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule

from kit.boring import ENCODER, HEAD, Batches, Manual, Prescribed, Validated, fit, gradients, norm
from lightning_gradclip import AGC, Clipper, GradientClipping, History, NormClip, QuantileClip, ZClip
from lightning_gradclip.record.context import FIELDS
from lightning_gradclip.record.history import CONTEXT

pytestmark = [pytest.mark.filterwarnings("ignore:The number of training batches:UserWarning")]


class Told(LightningModule):
    """Two layers; the loss of a batch `x` is 3 x, and its gradient in the second layer is ten times as large."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = torch.nn.Linear(1, 2, bias=False), torch.nn.Linear(1, 2, bias=False)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        still = self.first.weight.sum() + 10 * self.second.weight.sum()
        return {"loss": 3 * batch + batch * (still - still.detach()), "other": 1}

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.5)
        return [optimizer], [{"scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.1), "interval": "step"}]


def test_the_two_lists_of_what_is_told_agree() -> None:
    assert FIELDS == CONTEXT


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_step_has_its_loss_learning_rate_epoch_and_first_batch(tmp_path: Path, precision: str) -> None:
    given = [torch.tensor(float(value)) for value in (1, 2, 3, 4, 5)]
    options = {"max_epochs": 2, "accumulate_grad_batches": 2, "precision": precision}
    fit(Told(), given, GradientClipping(NormClip(max_norm=1.0), history=tmp_path), **options)
    rows = History(tmp_path).steps
    # The last step of an epoch has one batch: its loss is that one's.
    assert rows["loss"].tolist() == [4.5, 10.5, 15.0] * 2
    assert rows["epoch"].tolist() == [0, 0, 0, 1, 1, 1]
    assert rows["batch"].tolist() == [0, 2, 4] * 2
    assert rows["lr"] == pytest.approx([0.5, 0.5, 0.05, 0.05, 0.005, 0.005])
    assert rows["threshold"].tolist() == [1.0] * 6


def test_several_steps_of_a_batch_have_each_its_loss(tmp_path: Path) -> None:
    given = gradients(4)
    losses: list[float] = []

    class Noting(Manual):
        def manual_backward(self, loss: Any, *args: Any, **kwargs: Any) -> None:
            losses.append(loss.item())
            super().manual_backward(loss, *args, **kwargs)

    fit(Noting(), [given[:2], given[2:]], GradientClipping(None, history=tmp_path))
    rows = History(tmp_path).steps
    assert rows["loss"] == pytest.approx(losses)
    assert rows["batch"].tolist() == [0, 0, 1, 1]


def test_a_plain_loop_has_a_history(tmp_path: Path) -> None:
    model = torch.nn.Linear(3, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.25)
    clipper = Clipper(model, NormClip(max_norm=1.0), optimizer=optimizer, history=tmp_path / "it")
    for batch in range(6):
        loss = model(torch.full((1, 3), float(batch))).sum()
        loss.backward()
        clipper.step(loss=loss, batch=batch, epoch=7)
        optimizer.zero_grad()
    # A second run gets a folder of its own.
    other = Clipper(model, NormClip(max_norm=1.0), history=tmp_path / "it")
    clipper.look()
    model(torch.ones(1, 3)).sum().backward()
    other.step()
    with pytest.warns(UserWarning, match="belongs to this process"):
        other.close()
    clipper.close()
    rows = History(tmp_path / "it").steps
    assert rows["batch"].tolist() == rows["step"].tolist() == [*range(6)]
    assert set(rows["epoch"].tolist()) == {7}
    assert set(rows["lr"].tolist()) == {0.25}
    assert rows["loss"][0] == pytest.approx(model.bias.item())
    assert len(History(tmp_path / "it-2").steps) == 1
    assert math.isnan(History(tmp_path / "it-2").steps["loss"][0])


@pytest.mark.processes
def test_what_is_pending_is_written_when_the_process_ends(tmp_path: Path) -> None:
    code = f"""
import torch
from lightning_gradclip import Clipper, NormClip
weight = torch.nn.Parameter(torch.zeros(1))
clipper = Clipper([("weight", weight)], NormClip(max_norm=1.0), history={str(tmp_path / "it")!r})
for _ in range(5):
    weight.grad = torch.ones(1)
    clipper.step()
"""
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert len(History(tmp_path / "it").steps) == 5


def test_a_plain_loop_names_its_folder() -> None:
    with pytest.raises(ValueError, match=r"history=True is for a Trainer.*history='logs/gradclip'"):
        Clipper(torch.nn.Linear(1, 1), None, history=True)


@pytest.mark.parametrize("mode", ["reciprocal", "max"])
def test_the_threshold_in_force_is_recorded_at_every_step(tmp_path: Path, mode: str) -> None:
    weight = torch.nn.Parameter(torch.zeros(1))
    rng = np.random.default_rng(0)
    clipper = Clipper([("w", weight)], ZClip(warmup=5, mode=mode, max_norm=100.0), history=tmp_path)
    for size in np.exp(rng.normal(size=200)):
        weight.grad = torch.tensor([float(size)])
        clipper.step()
    clipper.close()
    rows = History(tmp_path).steps
    assert set(rows["threshold"][:5].tolist()) == {100.0}
    over = rows["norm"] > rows["threshold"]
    assert 3 < over.sum() < 100
    # What is over it is what was clipped.
    assert over.tolist() == (rows["clipped"] > 0).tolist()


@pytest.mark.parametrize("method", [QuantileClip(q=0.5, per="layer"), AGC()])
def test_scopes_have_thresholds_of_their_own(tmp_path: Path, method: Any) -> None:
    given = gradients(12)
    fit(Prescribed(), given, GradientClipping(method, history=tmp_path), log_every_n_steps=5)
    history = History(tmp_path)
    names, thresholds = history.scope_thresholds()
    assert np.isnan(history.steps["threshold"]).all()
    assert names == (("encoder", "head") if method.per == "layer" else tuple(given[0]))
    if method.per == "layer":
        for column, of in zip(thresholds.T, (ENCODER, HEAD), strict=True):
            sizes = [norm(gradient, of) for gradient in given]
            wanted = [np.inf] + [np.quantile(sizes[:step], 0.5) for step in range(1, 12)]
            assert column == pytest.approx(wanted, rel=1e-6)
    else:
        assert (thresholds >= 0.01 * 1e-3 * (1 - 1e-6)).all()


@pytest.mark.parametrize("per", ["model", "layer"])
def test_a_step_that_stands_out_names_its_layers(tmp_path: Path, per: str) -> None:
    given = [torch.tensor(1.0)] * 30
    given[20] = torch.tensor(50.0)
    fit(Told(), given, GradientClipping(NormClip(max_norm=1.0, per=per), history=tmp_path))
    (share,) = History(tmp_path).shares
    assert share["row"] == 20
    assert share["scope"].tolist() == [b"second", b"first", b""]
    assert share["share"] == pytest.approx([100 / 101, 1 / 101, 0])


def test_a_step_that_is_not_finite_names_its_layers(tmp_path: Path) -> None:
    given = gradients(6)
    given[2]["head.bias"][0] = torch.nan
    with pytest.warns(RuntimeWarning, match="dropped optimizer step 2"):
        fit(Prescribed(), given, GradientClipping(NormClip(), history=tmp_path))
    (share,) = (one for one in History(tmp_path).shares if one["row"] == 2)
    assert share["scope"].tolist() == [b"head", b"", b""]
    assert np.isnan(share["share"][0])


def test_recording_changes_nothing_and_validation_is_no_step(tmp_path: Path) -> None:
    given = gradients(6)
    options = {"val_dataloaders": Batches(given[:2]), "val_check_interval": 2}
    modules = [Validated(), Validated()]
    for module, history in zip(modules, (tmp_path, False), strict=True):
        fit(module, given, GradientClipping(ZClip(warmup=2), history=history), **options)
    assert all(torch.equal(*pair) for pair in zip(*(one.parameters() for one in modules), strict=True))
    assert History(tmp_path).steps["batch"].tolist() == [*range(6)]


@pytest.mark.parametrize("name", ["../x", "/x", "a/../../x"])
def test_a_name_does_not_leave_the_folder_of_the_logger(name: str) -> None:
    with pytest.raises(ValueError, match=r"is a path, and must be one word"):
        GradientClipping(None, name=name)


@pytest.mark.processes
def test_it_lies_beside_the_checkpoints_where_a_logger_has_no_folder_of_a_run(tmp_path: Path) -> None:
    pytest.importorskip("mlflow", reason="the extra loggers is not installed")
    from lightning.pytorch.loggers import MLFlowLogger

    logger = MLFlowLogger("some", tracking_uri=f"sqlite:///{tmp_path}/mlflow.db")
    options = {"logger": logger, "default_root_dir": tmp_path / "root", "enable_checkpointing": True}
    fit(Prescribed(), gradients(3), GradientClipping(NormClip(), history=True), **options)
    (checkpoints,) = tmp_path.rglob("checkpoints")
    assert len(History(checkpoints.parent / "gradclip").steps) == 3
