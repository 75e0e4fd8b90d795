"""The ways to a name: what the package offers itself, and the paths by which users knew it before."""

import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

from lightning_gradclip.methods import numbers

# An earlier path, and where the name is today.
MOVED = {
    "lightning_gradclip.history:History": "lightning_gradclip:History",
    "lightning_gradclip.history:HistoryFormatError": "lightning_gradclip.record.history:HistoryFormatError",
    "lightning_gradclip.history_writer:HistoryWriter": "lightning_gradclip:HistoryWriter",
    "lightning_gradclip.stats:Row": "lightning_gradclip:Row",
    "lightning_gradclip.stats:StepStats": "lightning_gradclip:StepStats",
    "lightning_gradclip.cli:main": "lightning_gradclip.report.cli:main",
}
ARITHMETIC = [name for name, value in vars(numbers).items() if getattr(value, "__module__", "") == numbers.__name__]

# Writes a history and reads it, by names that are imported here, where torch and Lightning cannot be.
WITHOUT_TORCH = """
import sys
sys.modules.update(dict.fromkeys(["torch", "lightning", "pytorch_lightning", "lightning_fabric"]))
{}
columns = ["norm", "norm_clipped", "limit", "coef", "clipped", "finite", "skipped", "changed", "overflow"]
with HistoryWriter(sys.argv[1], columns=columns) as history:
    history.append([0, 1], [[5.0, 1.0, 1.0, 0.2, 1, 1, 0, 1, 0], [0.5, 0.5, 1.0, 1.0, 0, 1, 0, 0, 0]])
print(*History(sys.argv[1]).steps["norm"])
"""


def execute(*arguments: object) -> str:
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(("before", "now"), MOVED.items())
def test_a_name_that_moved_is_found_where_it_was(before: str, now: str) -> None:
    assert pkgutil.resolve_name(before) is pkgutil.resolve_name(now)


@pytest.mark.parametrize("name", ARITHMETIC)
def test_arithmetic_of_rules_is_found_where_it_was(name: str) -> None:
    assert pkgutil.resolve_name(f"lightning_gradclip.arithmetic:{name}") is getattr(numbers, name)


@pytest.mark.processes
@pytest.mark.parametrize(
    "imports",
    [
        "from lightning_gradclip import History, HistoryWriter",
        "from lightning_gradclip.history import History\nfrom lightning_gradclip.history_writer import HistoryWriter",
    ],
    ids=["by the package", "by the paths before"],
)
def test_histories_need_no_torch(imports: str, tmp_path: Path) -> None:
    assert execute("-c", WITHOUT_TORCH.format(imports), tmp_path / "run") == "5.0 0.5\n"


@pytest.mark.processes
def test_the_command_line_is_found_where_it_was() -> None:
    shown = execute("-W", "error", "-m", "lightning_gradclip.cli", "--help")
    assert {"report", "advise"} <= set(shown.split())
