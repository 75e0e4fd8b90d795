"""The recipe for Ray Train in docs/ranks.md, as it stands there, in two workers on this machine.

`test_packaging.py` installs Ray beside the tests and runs this; elsewhere it is left out.
"""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from kit.guides import blocks
from kit.root import ROOT
from lightning_gradclip import History

pytest.importorskip("ray", reason="ray is not installed")

pytestmark = [pytest.mark.distributed, pytest.mark.processes]

(RECIPE,) = [one for one in blocks("python", (ROOT / "docs" / "ranks.md").read_text()) if "TorchTrainer" in one]
# On CPUs Lightning gives FSDP no device.
CPU_FSDP = """
import torch
from ray.train.lightning import RayFSDPStrategy
from torch.distributed.fsdp import FullyShardedDataParallel


class CpuFSDP(RayFSDPStrategy):
    def _setup_model(self, model):
        return FullyShardedDataParallel(model, device_id=torch.device("cpu"), **self.kwargs)

"""


def run(folder: Path, recipe: str, **changes: str) -> dict[str, float]:
    """Its last metrics, with two CPUs for Ray and other words in the recipe."""
    recipe = recipe.replace('if __name__ == "__main__":\n', 'if __name__ == "__main__":\n    ray.init(num_cpus=2)\n')
    for word, other in {"max_epochs=1": "max_epochs=1, limit_train_batches=4", **changes}.items():
        assert word in recipe
        recipe = recipe.replace(word, other)
    (folder / "recipe.py").write_text(recipe)
    done = subprocess.run([sys.executable, "recipe.py"], cwd=folder, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    (printed,) = re.findall(r"^\{.*\}$", done.stdout, re.MULTILINE)
    return eval(printed)


def norms(folder: Path, strategy: str) -> list[float]:
    """What the first steps of the same training come to without Ray."""
    text = RECIPE.replace("import ray.train\n", "").replace("RayTrainReportCallback()", "")
    text = re.sub(r"^from ray.*\n", "", text, flags=re.MULTILINE).partition("if __name__")[0]
    text = text.replace("RayDDPStrategy()", repr(strategy)).replace("[RayLightningEnvironment()]", "[]")
    text = text.replace("prepare_trainer(", "(").replace("(checkpoint := ray.train.get_checkpoint())", "None")
    text = text.replace("max_epochs=1", "max_epochs=2, limit_train_batches=4, accelerator='cpu', devices=2")
    (folder / "plain.py").write_text(f"{text}\nif __name__ == '__main__':\n    train({{'history': 'plain'}})\n")
    subprocess.run([sys.executable, "plain.py"], cwd=folder, check=True, capture_output=True, timeout=120)
    return History(folder / "plain").steps["norm"].tolist()


TWO_EPOCHS = {"max_epochs=1": "max_epochs=2, limit_train_batches=4"}


def recorded(folder: Path) -> list[float]:
    return History(folder / "ray" / "history").steps["norm"].tolist()


def test_the_recipe_trains_and_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    first = run(tmp_path, RECIPE)
    assert (first["epoch"], first["step"]) == (0, 4)
    second = run(tmp_path, RECIPE, **TWO_EPOCHS)
    assert (second["epoch"], second["step"]) == (1, 8)
    found = recorded(tmp_path)
    assert found == pytest.approx(norms(tmp_path, "ddp"), rel=1e-6)
    assert second["gradclip/norm"] == pytest.approx(sum(found[4:]) / 4, rel=1e-6)


def test_the_recipe_shards_a_model(tmp_path: Path) -> None:
    """With sharded checkpoints, as on CPUs torch crashes when it puts a whole one together.

    It does not go on from them, since torch refuses those of an optimizer without a state, such as this one's.
    """
    recipe = RECIPE.replace("RayDDPStrategy()", "CpuFSDP(state_dict_type='sharded')")
    last = run(tmp_path, CPU_FSDP + recipe, **TWO_EPOCHS)
    assert last["step"] == 8
    assert recorded(tmp_path) == pytest.approx(norms(tmp_path, "ddp"), rel=1e-6)
