"""The commands and programs of README.md and docs/ do what they say."""

import ast
import re
import shlex
from pathlib import Path

import pytest

from kit import scripts
from kit.application import Application
from kit.extras import needs, require
from kit.guides import blocks, commands, page
from kit.root import ROOT

TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))


def run(arguments: list[str], folder: Path) -> str:
    done = scripts.run(arguments, folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def imports(block: str) -> bool:
    """What imports nothing is an excerpt: it stands in a program of the reader's."""
    return any(isinstance(node, ast.Import | ast.ImportFrom) for node in ast.parse(block).body)


@pytest.mark.parametrize("program", [*filter(imports, blocks("python"))])
def test_programs_run(program: str, tmp_path: Path) -> None:
    require(*{"hydra_zen", "pandas", "ray"} & {*re.findall(r"\w+", program)})
    run(["-c", program], tmp_path)


@pytest.mark.parametrize("command", commands("make"))
def test_make_targets_exist(command: str) -> None:
    assert command.split()[1] in TARGETS


def stands_alone(command: str) -> bool:
    """Sweeps and their table are for test_tuning.py, flags for test_lightning_cli.py."""
    return not re.search(r" -m |results\.py|cli\.py", command)


@needs("gymnasium", "rich", "sklearn", "tensorboard", extra="examples")
@pytest.mark.parametrize("command", [*filter(stands_alone, commands("python examples/"))])
def test_example_commands_run(command: str, tmp_path: Path) -> None:
    _, script, *arguments = shlex.split(command)
    short = ["trainer.max_steps=3", "callbacks/sample=none"] if script == "examples/train.py" else []
    run([str(ROOT / script), *arguments, *short], tmp_path)


def blocks_in_files(folder: Path) -> None:
    """Writes the page's YAML into an application: its defaults list and an option of the reader's own."""
    primary, _, option, *_ = blocks("yaml", page("hydra"))
    (folder / "configs" / "train.yaml").write_text(primary)
    (folder / "configs" / "callbacks" / "gradclip" / "mine.yaml").write_text(option)


@pytest.mark.parametrize("command", [one for one in commands("python train.py") if "@" not in one])
def test_foreign_commands_compose(command: str, tmp_path: Path) -> None:
    """`train.py` stands for the reader's application."""
    application = Application.copied(tmp_path)
    arguments = shlex.split(command)[2:]
    if not arguments[0].startswith("+"):
        blocks_in_files(application.folder)
    assert (
        application.composed(*arguments)["callbacks"]["gradclip"]["_target_"] == "lightning_gradclip.GradientClipping"
    )


@pytest.mark.parametrize("command", [one for one in commands("python train.py") if "@" in one])
def test_a_host_whose_callbacks_are_a_list(command: str, tmp_path: Path) -> None:
    """With the configuration that the page shows last before the command."""
    (tmp_path / "train.yaml").write_text(blocks("yaml", page("hydra").partition(command)[0])[-1])
    (tmp_path / "train.py").write_text(
        "import hydra\n"
        "@hydra.main(version_base='1.3', config_path='.', config_name='train')\n"
        "def main(config):\n"
        "    for node in config.callbacks:\n"
        "        print('made', type(hydra.utils.instantiate(node)).__name__)\n"
        "main()\n"
    )
    assert "made GradientClipping" in run([str(tmp_path / "train.py"), *shlex.split(command)[2:]], tmp_path)


def command_line_forms() -> list[str]:
    """What the first table of docs/hydra.md shows, one a row."""
    table = page("hydra").partition("| write after `python train.py` |")[2].partition("\n\n")[0]
    return re.findall(r"^\| [^|`]+ \| `([^`]+)`", table, re.MULTILINE)


@pytest.mark.parametrize("form", command_line_forms())
def test_command_line_forms_compose(form: str, tmp_path: Path) -> None:
    application = Application.copied(tmp_path)
    arguments = shlex.split(form)
    # Which of the three applications a row speaks of.
    adds = arguments[0].startswith("+")
    flags = ["--config-name=" + ("train" if adds else "template" if "default" in form else "clipped")]
    if not {"-m", "--cfg=job"} & set(arguments):
        flags.append("--cfg=job")
    shown = application.shown(*arguments, *flags).stdout
    assert "lightning_gradclip." in shown


def test_an_experiment_of_the_guide_exchanges_the_option(tmp_path: Path) -> None:
    application = Application.copied(tmp_path)
    (application.folder / "configs" / "experiment" / "guide.yaml").write_text(blocks("yaml", page("hydra"))[1])
    node = application.composed("experiment=guide", "--config-name=clipped")["callbacks"]["gradclip"]
    assert node["method"]["_target_"] == "lightning_gradclip.ZClip"


@needs("sklearn", extra="examples")
@pytest.mark.parametrize(
    ("program", "shown"),
    [
        ("minimal.py", "gradclip/norm"),
        ("plain.py", "norm_clipped"),
        ("fabric.py --steps 50", "step 50: loss"),
        ("fabric.py --steps 50 --strategy fsdp2", "step 50: loss"),
        ("fsdp2.py", "gradclip_norm/blocks.1.linear2"),
        ("gan.py", "critic/norm"),
    ],
)
def test_the_examples_beside_the_demo_run(program: str, shown: str, tmp_path: Path) -> None:
    script, *arguments = program.split()
    assert f"`examples/{script}`" in page("examples")
    assert shown in run([str(ROOT / "examples" / script), *arguments], tmp_path)
