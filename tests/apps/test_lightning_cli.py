"""The callback from the flags and files of a LightningCLI, and from hydra-zen."""

import csv
import dataclasses
import inspect
import math
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from lightning.pytorch import Callback
from omegaconf import OmegaConf

import lightning_gradclip
from kit.guides import blocks, commands, page
from kit.root import ROOT
from lightning_gradclip import ClipMethod, GradientClipping, NormClip, ZClip

jsonargparse = pytest.importorskip("jsonargparse", reason="LightningCLI needs the cli extra")
hydra_zen = pytest.importorskip("hydra_zen", reason="hydra-zen is not installed")

# Lightning 2.6 calls what jsonargparse 4.49 has renamed.
pytestmark = pytest.mark.filterwarnings(r"ignore:(?s)\s+.*(only one Jsonargparse|was deprecated in v4)")

PUBLIC = [getattr(lightning_gradclip, name) for name in lightning_gradclip.__all__]
METHODS = [one for one in PUBLIC if isinstance(one, type) and issubclass(one, ClipMethod) and one is not ClipMethod]
FIT, CALLBACK_HELP, METHOD_HELP = (shlex.split(command)[1:] for command in commands("python examples/cli.py"))
# What is wrong, the flags that say so, and what the message has to name.
MISTAKES = {
    "wrong type": (["method=ZClip", "method.z_threshold=abc"], ["z_threshold", "abc", "float"]),
    "unknown method": (["method=ZClp"], ["lightning_gradclip.ZClp", "has no attribute 'ZClp'"]),
    "unknown setting": (["method=NormClip", "method.max_nrm=1"], ["max_nrm"]),
    "out of range": (["method=ZClip", "method.z_threshold=-3"], ["z_threshold must be > 0, got -3.0"]),
    "unknown word": (["method=ZClip", "action=clp"], ["action must be one of 'clip', 'skip', 'observe', got 'clp'"]),
    "no method": ([], ["GradientClipping needs a method; write method=NormClip(max_norm=1.0), or method=None"]),
}


def start(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    script, *rest = arguments
    program = [sys.executable, str(ROOT / script), *rest]
    return subprocess.run(program, cwd=folder, capture_output=True, text=True, timeout=120)


def test_flags_choose_what_a_file_then_repeats(tmp_path: Path) -> None:
    """What the first run saved starts a second one that saves the same and logs the same."""
    short = ["--trainer.max_steps=3", "--trainer.log_every_n_steps=1", "--trainer.logger=CSVLogger"]
    done = start(tmp_path, *FIT, *short, "--trainer.logger.save_dir=first")
    assert done.returncode == 0, done.stderr
    (saved,) = (tmp_path / "first").rglob("config.yaml")
    (node,) = yaml.safe_load(saved.read_text())["trainer"]["callbacks"]
    method = node["init_args"]["method"]
    assert method == {"class_path": "lightning_gradclip.ZClip", "init_args": dataclasses.asdict(ZClip(z_threshold=3.0))}
    again = start(tmp_path, FIT[0], "fit", f"--config={saved}", "--trainer.logger.save_dir=second")
    assert again.returncode == 0, again.stderr
    (twin,) = (tmp_path / "second").rglob("config.yaml")
    assert saved.read_text().replace("first", "second") == twin.read_text()
    logs = []
    for log in sorted(tmp_path.rglob("metrics.csv")):
        with log.open(newline="") as file:
            logs.append([row for row in csv.DictReader(file) if row["gradclip/norm"]])
    assert logs[0] == logs[1]
    assert len(logs[0]) == 3
    assert all(float(row["gradclip/norm"]) > 0 for row in logs[0])


@pytest.fixture
def cli(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[list[str]], None]:
    """`examples/cli.py` in this process."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(ROOT / "examples"))

    def run(arguments: list[str]) -> None:
        monkeypatch.setattr(sys, "argv", ["cli.py", *arguments])
        import cli

        cli.main()

    return run


@pytest.mark.parametrize(("arguments", "cls"), [(CALLBACK_HELP, GradientClipping), (METHOD_HELP, ZClip)])
def test_help_explains_every_setting(
    arguments: list[str], cls: type, cli: Callable[[list[str]], None], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        cli(arguments[1:])
    assert not end.value.code
    text = " ".join(capsys.readouterr().out.split())
    assert cls.__doc__.splitlines()[0].rstrip(".") in text
    for name in inspect.signature(cls).parameters:
        (explanation,) = re.findall(rf"^    {name}: (.*)$", inspect.cleandoc(cls.__doc__), re.MULTILINE)
        assert re.search(rf"--\S*{name}\+? [^-]*{re.escape(explanation)}", text), name


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_named(mistake: str, cli: Callable[[list[str]], None], capsys: pytest.CaptureFixture[str]) -> None:
    flags, words = MISTAKES[mistake]
    flags = [flag.replace("method=", "method=lightning_gradclip.") for flag in flags]
    arguments = ["fit", "--trainer.callbacks+=lightning_gradclip.GradientClipping"]
    with pytest.raises((SystemExit, TypeError, ValueError)) as end:
        cli([*arguments, *(f"--trainer.callbacks.{flag}" for flag in flags)])
    said = capsys.readouterr().err + str(end.value)
    for word in words:
        assert word in said


def test_the_file_in_the_guide(tmp_path: Path) -> None:
    (callback,) = yaml.safe_load(blocks("yaml", page("cli"))[-1])["trainer"]["callbacks"]
    assert parsed(callback).method == ZClip(z_threshold=3.0)


def parsed(callback: dict) -> Callback:
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--callback", type=Callback)
    return parser.instantiate_classes(parser.parse_object({"callback": callback})).callback


@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_made_from_its_name(method: type[ClipMethod]) -> None:
    init = {"method": {"class_path": f"lightning_gradclip.{method.__name__}"}}
    callback = parsed({"class_path": "lightning_gradclip.GradientClipping", "init_args": init})
    assert type(callback) is GradientClipping
    assert callback.method == method()
    built = hydra_zen.builds(method, populate_full_signature=True)
    assert instantiate(built()) == method()
    from_yaml = OmegaConf.create(hydra_zen.to_yaml(built()))
    assert instantiate(from_yaml) == method()


def test_a_schedule_is_a_mapping() -> None:
    limits = {0: 10.0, 1000: 1.0}
    init = {"method": {"class_path": "lightning_gradclip.NormClip", "init_args": {"max_norm": limits}}}
    callback = parsed({"class_path": "lightning_gradclip.GradientClipping", "init_args": init})
    assert callback.method == NormClip(max_norm=limits)
    built = hydra_zen.builds(NormClip, populate_full_signature=True)
    assert instantiate(built(max_norm=limits)) == NormClip(max_norm=limits)


def test_measuring_alone_is_written_out() -> None:
    callback = parsed({"class_path": "lightning_gradclip.GradientClipping", "init_args": {"method": None}})
    assert callback.method is None
    clipping = hydra_zen.builds(GradientClipping, populate_full_signature=True)
    assert instantiate(clipping(method=None)).method is None
    with pytest.raises(InstantiationException, match="GradientClipping needs a method"):
        instantiate(clipping())


def test_hydra_zen_checks_types_before_anything_runs() -> None:
    built = hydra_zen.builds(ZClip, populate_full_signature=True)
    with pytest.raises(Exception, match="z_threshold"):
        instantiate(built(z_threshold="abc"))
    with pytest.raises(TypeError, match="z_thresold"):
        built(z_thresold=3.0)


@pytest.mark.parametrize(
    "line", ["max_norm={0:inf,1000:0.5}", "max_norm={0: .inf, 1000: 0.5}", "max_norm={'0': inf, '1000': 0.5}"]
)
def test_a_schedule_is_written_as_on_either_command_line(line: str) -> None:
    assert flagged("NormClip", line).method == NormClip(max_norm={0: math.inf, 1000: 0.5})


@pytest.mark.parametrize("line", ["norm_type=inf", "norm_type=.inf"])
def test_infinity_is_written_as_on_either_command_line(line: str) -> None:
    assert flagged("NormClip", line).method == NormClip(norm_type=math.inf)


def flagged(method: str, *lines: str) -> Callback:
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--callback", type=Callback)
    flags = [f"--callback.method.{line}" for line in lines]
    chosen = ["--callback=lightning_gradclip.GradientClipping", f"--callback.method={method}"]
    return parser.instantiate_classes(parser.parse_args([*chosen, *flags])).callback


def test_every_method_is_found_by_its_short_name(tmp_path: Path) -> None:
    """In a process that has imported none."""
    code = """
import sys, jsonargparse
from lightning.pytorch import Callback
parser = jsonargparse.ArgumentParser()
parser.add_argument("--callback", type=Callback)
for name in sys.argv[1:]:
    line = ["--callback=lightning_gradclip.GradientClipping", f"--callback.method={name}"]
    print(parser.parse_args(line).callback.init_args.method.class_path)
"""
    names = [method.__name__ for method in METHODS]
    done = subprocess.run(
        [sys.executable, "-c", code, *names], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert done.stdout.split() == [f"lightning_gradclip.{name}" for name in names], done.stderr
