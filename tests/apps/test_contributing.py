"""CONTRIBUTING.md: the ways through the rooms are those that a run takes; the walk-through works in a copy."""

import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from kit.rooms import covers, section
from kit.root import ROOT

GUIDE = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    found = re.findall(rf"^   ```{language}\n(.*?)^   ```", GUIDE, re.MULTILINE | re.DOTALL)
    return [textwrap.dedent(block) for block in found]


def insert_before(path: Path, mark: str, line: str) -> None:
    before, found, after = path.read_text(encoding="utf-8").partition(mark)
    assert found
    path.write_text(before + line + found + after, encoding="utf-8")


# Composes and instantiates the option of the guide, trains three steps with it, and prints the order in which files of
# the package were entered, from the command line to the first step and in the last one.
RUN = """
import sys
from pathlib import Path
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate

folder, package, *words = sys.argv[1:]
entered = []


def note(frame, event, argument):
    path = frame.f_code.co_filename
    if event == "call" and path.startswith(package) and not imported(frame):
        entered.append(Path(path).relative_to(package).as_posix())


def imported(frame):
    while frame is not None and frame.f_code.co_name != "<module>":
        frame = frame.f_back
    return frame is not None and frame.f_code.co_filename.startswith(package)


def print_ways():
    print(*dict.fromkeys(entered))
    entered.clear()


sys.setprofile(note)
Path(folder, "train.yaml").touch()
with initialize_config_dir(config_dir=folder, version_base="1.3"):
    callback = instantiate(compose("train", overrides=words)).callbacks.gradclip
sys.setprofile(None)

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger


class Module(LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(4, 1)

    def training_step(self, batch, batch_idx):
        # The norm is over any limit.
        return 1e3 * self.layer(batch).square().sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 1e-6)


class Watch(Callback):
    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        sys.setprofile(note if batch_idx in (0, 2) else None)

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        sys.setprofile(None)
        if batch_idx != 1:
            print_ways()


options = dict.fromkeys(["enable_progress_bar", "enable_model_summary", "enable_checkpointing"], False)
options |= {"accelerator": "cpu", "max_steps": 3, "log_every_n_steps": 1, "logger": CSVLogger(folder)}
Trainer(callbacks=[callback, Watch()], **options).fit(Module(), torch.utils.data.DataLoader(torch.ones(3, 4)))
"""


@pytest.fixture(scope="module")
def ways(tmp_path_factory: pytest.TempPathFactory) -> list[list[str]]:
    """The files that a run enters, in that order: until it has taken a first step, and in a later step."""
    (words,) = re.findall(r"`(\+callbacks/.*)`", section(GUIDE, "The way of one option"))
    folder = tmp_path_factory.mktemp("run")
    arguments = [folder, ROOT / "lightning_gradclip", *words.split(), "callbacks.gradclip.history=true"]
    command = [sys.executable, "-c", RUN, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return [line.split() for line in done.stdout.splitlines() if ".py" in line]


@pytest.mark.parametrize(("title", "part"), [("The way of one option", 0), ("The way of one norm", 1)])
def test_a_way_is_the_one_that_a_run_takes(title: str, part: int, ways: list[list[str]]) -> None:
    named = re.findall(r"^\d+\. `([\w/.]+)`", section(GUIDE, title), re.MULTILINE)
    assert len(named) == 10
    entered = [one for path in ways[part] for one in named if covers(one, path)]
    # What stands in YAML is read by Hydra.
    assert list(dict.fromkeys(entered)) == [one for one in named if not one.endswith(".yaml")]


@pytest.mark.parametrize("title", ["The rooms", "The way of one norm", "The way of one option"])
def test_every_file_that_is_named_is_there(title: str) -> None:
    named = re.findall(r"`([\w./]+(?:/|\.py|\.yaml|\.toml))`", section(GUIDE, title))
    assert named
    for one in named:
        assert (ROOT / "lightning_gradclip" / one).exists() or (ROOT / one).exists(), one


def test_a_method_costs_three_files_a_line_and_a_row(tmp_path: Path) -> None:
    for folder in ("lightning_gradclip", "conf", "tests"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / file, tmp_path)
    (rule, test, line), (option,), (row,) = blocks("python"), blocks("yaml"), blocks("markdown")
    (tmp_path / "lightning_gradclip/methods/peak.py").write_text(rule, encoding="utf-8")
    (tmp_path / "tests/methods/test_peak.py").write_text(test, encoding="utf-8")
    (tmp_path / "conf/callbacks/gradclip/peak.yaml").write_text(option, encoding="utf-8")
    insert_before(
        tmp_path / "lightning_gradclip/__init__.py", "    from lightning_gradclip.record", f"    {line.strip()}\n"
    )
    insert_before(tmp_path / "README.md", "| `None` | `monitor` |", row)
    tests = ["tests/contract/test_methods.py", "tests/methods/test_peak.py", "-k", "Peak or peak or limit_is_half"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests],
        cwd=tmp_path,
        env={"PYTHONPATH": str(tmp_path), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed
    assert int(passed[1]) > 50
