"""The commands and programs of README.md and CONTRIBUTING.md do what they say."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))


def blocks(language: str, text: str = README) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def commands(program: str) -> list[str]:
    lines = (line.split("  #")[0].strip() for block in blocks("bash") for line in block.splitlines())
    return [line for line in lines if line.startswith(program)]


def run(arguments: list[str], folder: Path) -> str:
    done = subprocess.run([sys.executable, *arguments], cwd=folder, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("program", blocks("python"))
def test_programs_run(program: str, tmp_path: Path) -> None:
    run(["-c", program], tmp_path)


@pytest.mark.parametrize("command", commands("make"))
def test_make_targets_exist(command: str) -> None:
    assert command.split()[1] in TARGETS


def stands_alone(command: str) -> bool:
    """Sweeps and their table are for test_tuning.py, flags for test_cli.py."""
    return not re.search(r" -m |results\.py|cli\.py", command)


@pytest.mark.parametrize("command", [*filter(stands_alone, commands("python examples/"))])
def test_example_commands_run(command: str, tmp_path: Path) -> None:
    _, script, *arguments = shlex.split(command)
    short = ["trainer.max_steps=3", "callbacks/sample=none"] if script == "examples/train.py" else []
    run([str(ROOT / script), *arguments, *short], tmp_path)


@pytest.mark.parametrize("command", commands("python train.py"))
def test_foreign_commands_compose(command: str, tmp_path: Path) -> None:
    """`train.py` stands for the reader's application, with the configuration that the README showed last."""
    arguments = shlex.split(command)[2:]
    added = any(argument.startswith("+callbacks/gradclip=") for argument in arguments)
    shown = blocks("yaml", README[: README.index(command)])
    (tmp_path / "train.yaml").write_text("defaults:\n  - _self_\n" if added else shown[-1])
    (tmp_path / "train.py").write_text(
        "import hydra\n"
        "@hydra.main(version_base='1.3', config_path='.', config_name='train')\n"
        "def main(config):\n"
        "    callbacks = config.callbacks\n"
        "    for node in callbacks if 'ListConfig' in type(callbacks).__name__ else callbacks.values():\n"
        "        print('made', type(hydra.utils.instantiate(node)).__name__)\n"
        "main()\n"
    )
    assert "made" in run([str(tmp_path / "train.py"), *arguments], tmp_path)


def test_the_examples_beside_the_demo_run(tmp_path: Path) -> None:
    others = sorted(path for path in (ROOT / "examples").glob("*.py") if path.name in ("minimal.py", "plain.py"))
    assert len(others) == 2
    outputs = [run([str(path)], tmp_path) for path in others]
    assert "gradclip/norm" in outputs[0]
    assert "norm_clipped" in outputs[1]
