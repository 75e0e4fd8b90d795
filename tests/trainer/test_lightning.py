"""The package `pytorch_lightning`, which holds Lightning a second time, without importing it a first time."""

import subprocess
import sys
from pathlib import Path

import pytest

from kit.extras import needs

PROGRAM = """
import logging
import sys
import warnings

import pytorch_lightning as pl
import torch

warnings.simplefilter("ignore")
logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
from lightning_gradclip import GradientClipping, NormClip
from lightning_gradclip.hydra.none import no_clipping

class Regression(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(3, 1)

    def training_step(self, batch, batch_idx):
        return 100 * self.layer(batch).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)

    def train_dataloader(self):
        return torch.utils.data.DataLoader(torch.randn(12, 3, generator=torch.Generator().manual_seed(1)), batch_size=4)

class Asking(pl.Callback):
    told = []

    def on_train_batch_end(self, trainer, *_):
        self.told.append(float(trainer.callback_metrics["gradclip/norm"]))

def fit(**options):
    clipping = GradientClipping(NormClip(max_norm=1.0), measure_per="layer")
    when = {"monitor": "gradclip/norm", "save_on_train_epoch_end": True}
    saving = pl.callbacks.ModelCheckpoint("saved", filename="one", **when)
    quiet = {"enable_progress_bar": False, "enable_model_summary": False}
    options = {"accelerator": "cpu", "devices": 1, "max_epochs": 1, "log_every_n_steps": 1, **quiet, **options}
    trainer = pl.Trainer(callbacks=[clipping, no_clipping(), saving, Asking()], **options)
    trainer.fit(Regression())
    return trainer
"""
TRAINS = """
trainer = fit(logger=pl.loggers.CSVLogger("logs"))
metrics = trainer.callback_metrics
assert abs(metrics["gradclip/norm_clipped"] - 1) < 1e-5 < metrics["gradclip/norm"] - 1, metrics
saved = torch.load("saved/one.ckpt", weights_only=True)["callbacks"]["GradientClipping{'name': 'gradclip'}"]
assert saved["clippers"][0]["step"] == 3, saved
Asking.told.clear()
fit(logger=pl.loggers.CSVLogger("seldom"), log_every_n_steps=50)
# Of a window that has not been logged yet.
assert len(set(Asking.told)) == 3, Asking.told
assert "lightning" not in sys.modules, "both packages were imported"
print("trained")
"""
REFUSES = """
try:
    fit(logger=False, gradient_clip_val=1.0)
except pl.utilities.exceptions.MisconfigurationException as error:
    print("refused:", error)
"""
COMMAND_LINE = """
from pytorch_lightning.cli import LightningCLI

LightningCLI(Regression, save_config_callback=None, trainer_defaults={"max_epochs": 1, "logger": False})
print("fitted")
"""


def run(program: str, folder: Path, *arguments: str) -> str:
    (folder / "program.py").write_text(PROGRAM + program)
    done = subprocess.run(
        [sys.executable, "program.py", *arguments], cwd=folder, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.processes
def test_its_trainer_clips_logs_saves_and_gets_an_error_of_its_own(tmp_path: Path) -> None:
    trained, refused = run(TRAINS + REFUSES, tmp_path).splitlines()
    assert trained == "trained"
    assert "norm_clipped" in next(tmp_path.rglob("metrics.csv")).read_text()
    assert refused.startswith("refused: both Trainer(gradient_clip_val=1.0) and GradientClipping(")


@needs("jsonargparse", extra="cli")
@pytest.mark.processes
def test_its_command_line_takes_the_callback(tmp_path: Path) -> None:
    flags = ["--trainer.callbacks+=lightning_gradclip.GradientClipping", "--trainer.accelerator=cpu"]
    method = "--trainer.callbacks.method=lightning_gradclip.NormClip"
    assert run(COMMAND_LINE, tmp_path, "fit", *flags, method).endswith("fitted\n")
