"""The pack in an application laid out like lightning-hydra-template, and in one whose callbacks are a list."""

import csv
import re
import subprocess
import sys
from importlib.resources import files
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.errors import ConfigCompositionException
from hydra.utils import instantiate
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback, LearningRateMonitor
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from omegaconf import DictConfig

from lightning_gradclip import GradientClipping, ZClip

PACK = files("lightning_gradclip.conf") / "callbacks" / "gradclip"
OPTIONS = {file.name.removesuffix(".yaml") for file in PACK.iterdir() if re.match(r"[a-z].*\.yaml", file.name)}

# Nodes without `_target_` are left out, and no callbacks at all are no mistake: as the template's users are used to.
TRAIN = """
import hydra
from hydra.utils import instantiate
from omegaconf import DictConfig


def make_callbacks(nodes):
    nodes = nodes or {}
    return [instantiate(node) for node in nodes.values() if isinstance(node, DictConfig) and "_target_" in node]


@hydra.main(version_base="1.3", config_path="../configs", config_name="train")
def main(config):
    model = instantiate(config.model)
    loggers = [instantiate(node) for node in config.logger.values()]
    trainer = instantiate(config.trainer, callbacks=make_callbacks(config.get("callbacks")), logger=loggers)
    trainer.fit(model, instantiate(config.data))
    return float(trainer.callback_metrics["train_loss"])


main()
"""
CONFIGS = {
    "train.yaml": """
defaults:
  - _self_
  - data: random
  - model: boring
  - callbacks: default
  - callbacks/gradclip: norm
  - logger: csv
  - trainer: default
  - paths: default
  - experiment: null
  - debug: null
task_name: train
""",
    "data/random.yaml": "_target_: lightning.pytorch.demos.boring_classes.BoringDataModule\n",
    "model/boring.yaml": "_target_: boring_model.Boring\n",
    "callbacks/default.yaml": "defaults: [model_summary, _self_]\nunused: {note: none}\n",
    "callbacks/model_summary.yaml": """
model_summary:
  _target_: lightning.pytorch.callbacks.ModelSummary
  max_depth: 1
""",
    "logger/csv.yaml": """
csv:
  _target_: lightning.pytorch.loggers.CSVLogger
  save_dir: ${paths.output_dir}
  name: csv
  version: ""
""",
    "trainer/default.yaml": """
_target_: lightning.pytorch.Trainer
default_root_dir: ${paths.output_dir}
accelerator: cpu
max_steps: 3
limit_val_batches: 0
log_every_n_steps: 1
enable_progress_bar: false
""",
    "paths/default.yaml": "output_dir: ${hydra:runtime.output_dir}\n",
    "experiment/example.yaml": "# @package _global_\ntrainer: {gradient_clip_val: 0.5}\n",
    "experiment/adaptive.yaml": """
# @package _global_
defaults:
  - override /callbacks/gradclip: zclip
callbacks: {gradclip: {method: {z_threshold: 3}}}
""",
    "debug/default.yaml": "# @package _global_\ncallbacks: null\n",
}
MODEL = """
from lightning.pytorch.demos.boring_classes import BoringModel


class Boring(BoringModel):
    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)["loss"]
        self.log("train_loss", loss)
        return loss
"""


def write(folder: Path, texts: dict[str, str]) -> None:
    for name, text in texts.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text.lstrip("\n"))


@pytest.fixture(scope="module")
def application(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("application")
    write(root / "configs", CONFIGS)
    write(root / "src", {"train.py": TRAIN, "boring_model.py": MODEL})
    return root


def run(application: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    arguments = [sys.executable, "src/train.py", *overrides]
    return subprocess.run(arguments, cwd=application, capture_output=True, text=True, timeout=120)


def composed(folder: Path, *overrides: str) -> DictConfig:
    with initialize_config_dir(str(folder), version_base="1.3"):
        return compose("train", list(overrides))


def logged(folder: Path) -> dict[str, list[float]]:
    with (folder / "csv" / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    return {key: [float(row[key]) for row in rows if row[key]] for key in rows[0]}


def test_every_option_trains(application: Path, tmp_path: Path) -> None:
    # Its optimizer is SGD, which has no squares to limit by.
    squared = {"spike", "surprise"}
    every = f"callbacks/gradclip=glob(*,exclude=[{','.join(sorted(squared))}])"
    done = run(application, "-m", every, f"hydra.sweep.dir={tmp_path}")
    assert done.returncode == 0, done.stderr
    folders = {}
    for file in tmp_path.rglob(".hydra/overrides.yaml"):
        (option,) = re.findall(r"callbacks/gradclip=(\w+)", file.read_text())
        folders[option] = file.parents[1]
    assert set(folders) == OPTIONS - squared
    for option, folder in folders.items():
        metrics = logged(folder)
        assert len(metrics["train_loss"]) == 3
        assert ("gradclip/norm" in metrics) == (option != "none")
        assert option == "none" or len(metrics["gradclip/norm"]) == 3


def test_the_example_experiment_clips_already(application: Path) -> None:
    """Its `gradient_clip_val` and the callback exclude each other, and the message says what to write."""

    def trainer(*overrides: str) -> Trainer:
        cfg = composed(application / "configs", "experiment=example", "trainer.default_root_dir=.", *overrides)
        callbacks = [instantiate(cfg.callbacks.gradclip)]
        return instantiate(cfg.trainer, max_steps=1, callbacks=callbacks, logger=False, enable_checkpointing=False)

    with pytest.raises(MisconfigurationException, match=r"remove gradient_clip_val from the Trainer"):
        trainer().fit(BoringModel())
    clipped = trainer("trainer.gradient_clip_val=null")
    clipped.fit(BoringModel())
    assert clipped.callback_metrics["gradclip/norm_clipped"] <= 1


def test_an_experiment_chooses_and_sets_an_option(application: Path) -> None:
    callbacks = composed(application / "configs", "experiment=adaptive").callbacks
    assert callbacks.gradclip.method == {**callbacks.gradclip.method, "z_threshold": 3}
    assert isinstance(instantiate(callbacks.gradclip).method, ZClip)
    assert list(callbacks) == ["model_summary", "unused", "gradclip"]


def test_debugging_switches_all_callbacks_off(application: Path) -> None:
    assert composed(application / "configs", "debug=default").callbacks is None
    again = composed(application / "configs", "debug=default", "+callbacks/gradclip@callbacks.mine=norm")
    assert list(again.callbacks) == ["mine"]


LIST = """
defaults:
  - callbacks/gradclip@gradclip: norm
  - _self_
callbacks:
  - _target_: lightning.pytorch.callbacks.LearningRateMonitor
  - ${gradclip}
"""
BARE_LIST = "callbacks:\n  - _target_: lightning.pytorch.callbacks.LearningRateMonitor\n"


def test_a_list_of_callbacks_refers_to_the_group_at_another_key(tmp_path: Path) -> None:
    write(tmp_path, {"train.yaml": LIST})
    cfg = composed(tmp_path, "callbacks/gradclip@gradclip=zclip", "gradclip.method.z_threshold=3")
    monitor, clipping = instantiate(cfg.callbacks)
    assert isinstance(monitor, LearningRateMonitor)
    assert isinstance(clipping, GradientClipping)
    assert clipping.method == ZClip(z_threshold=3.0)
    assert type(instantiate(composed(tmp_path, "callbacks/gradclip@gradclip=none").callbacks)[1]) is Callback


def test_a_list_of_callbacks_takes_the_node_in_code(tmp_path: Path) -> None:
    write(tmp_path, {"train.yaml": BARE_LIST})
    cfg = composed(tmp_path, "+callbacks/gradclip@gradclip=norm")
    callbacks = [*instantiate(cfg.callbacks), instantiate(cfg.gradclip)]
    assert [type(one) for one in callbacks] == [LearningRateMonitor, GradientClipping]
    assert composed(tmp_path, "callbacks.0._target_=x").callbacks[0]._target_ == "x"


def test_a_list_of_callbacks_does_not_take_the_group_itself(tmp_path: Path) -> None:
    write(tmp_path, {"train.yaml": BARE_LIST})
    with pytest.raises(ConfigCompositionException, match="is a list without 'gradclip'; choose another place"):
        composed(tmp_path, "+callbacks/gradclip=norm")
    # A value like any other, also where the pack is installed.
    assert composed(tmp_path, "callbacks=[]").callbacks == []
