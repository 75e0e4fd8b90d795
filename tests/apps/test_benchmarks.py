"""The benchmarks: their README names every command, and what compares two versions of the package runs on both."""

import ast
import re
import subprocess
import sys

import pytest

from kit.root import ROOT

BENCHMARKS = ROOT / "benchmarks"
COST = sorted(path.stem for path in (BENCHMARKS / "cost").glob("*.py"))
# Where names that are no part of the top level have been public since 0.1.0.
PUBLIC = {"lightning_gradclip", "lightning_gradclip.history_writer", "lightning_gradclip.stats"}


def printed(script: str, *arguments: str) -> str:
    command = [sys.executable, str(BENCHMARKS / "cost" / script), *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_table_has_every_command() -> None:
    scripts = {path for path in BENCHMARKS.rglob("*.py") if "__main__" in path.read_text(encoding="utf-8")}
    told = re.findall(r"^\| `([a-z_/]+\.py)", (BENCHMARKS / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(told) == sorted(path.relative_to(BENCHMARKS).as_posix() for path in scripts)


@pytest.mark.parametrize("name", COST)
def test_costs_are_measured_through_public_names(name: str) -> None:
    tree = ast.parse((BENCHMARKS / "cost" / f"{name}.py").read_text(encoding="utf-8"))
    modules = {node.module for node in tree.body if isinstance(node, ast.ImportFrom)}
    modules |= {one.name for node in tree.body if isinstance(node, ast.Import) for one in node.names}
    assert {one for one in modules if one.startswith("lightning_gradclip")} <= PUBLIC


def test_the_way_of_a_step_is_counted() -> None:
    text = printed("path.py", "NormClip", "--list")
    way = text.partition("NormClip\n")[2].partition("\n\n")[0].splitlines()
    assert way[0].startswith("clipper.py: ")
    assert any(line.startswith("methods/norm.py: ") for line in way)
    calls, changes, files = map(int, re.findall(r"^\| NormClip \| (\d+) \| (\d+) \| (\d+) \|", text, re.MULTILINE)[0])
    assert calls == sum(line.count(", ") + 1 for line in way)
    assert changes == len(way) - 1
    assert files == len({line.partition(":")[0] for line in way})


def test_a_checkout_costs_about_as_much_as_itself() -> None:
    text = printed("against.py", ".", ".", "--only", "^step, MLP", "--rounds", "1")
    [ratio] = re.findall(r"^\| step, MLP, 3 tensors, 362 \| [\d.]+ \| [\d.]+ \| ([\d.]+) ", text, re.MULTILINE)
    assert 0.2 < float(ratio) < 5
