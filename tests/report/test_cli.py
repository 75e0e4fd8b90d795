"""The command line: what it accepts, and one line for what it cannot use."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path

import numpy as np
import pytest

from kit.extras import needs_report, needs_tensorboard
from kit.histories import record
from kit.root import ROOT
from lightning_gradclip.record.history import History
from lightning_gradclip.report.cli import main

NORMS = np.exp(np.random.default_rng(0).normal(size=300))

# The command where a package is not installed.
WITHOUT = """
import sys
sys.modules[{0!r}] = None
from lightning_gradclip.report.cli import main
sys.exit(main(sys.argv[1:]))
"""


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one line on stderr of a command that exits with 2."""
    try:
        status = main([str(one) for one in arguments])
    except SystemExit as stop:
        status = stop.code
    printed = capsys.readouterr()
    assert status == 2
    assert printed.out == ""
    (line,) = printed.err.splitlines()
    assert line.startswith("lightning-gradclip")
    assert "error: " in line
    return line


def execute(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "error", "-c", code, *(str(argument) for argument in arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


@pytest.mark.processes
def test_help_needs_neither_torch_nor_numpy() -> None:
    code = (
        "import sys\nfrom lightning_gradclip.cli import main\n"
        "try: main(['--help'])\nexcept SystemExit as stop: print(stop.code, *sorted(sys.modules))\n"
    )
    done = execute(code)
    assert done.returncode == 0, done.stderr
    help_text, _, modules = done.stdout.rpartition("\n0 ")
    assert {"report", "advise"} <= set(help_text.split())
    assert not {"torch", "lightning", "hydra", "plotly", "numpy"} & set(modules.split())


@needs_report
@pytest.mark.processes
def test_both_commands_work_without_torch(tmp_path: Path) -> None:
    record(tmp_path / "run", NORMS, limit=1.0)
    for arguments in (["report", tmp_path / "run", "--out", tmp_path / "page.html"], ["advise", tmp_path / "run"]):
        done = execute(WITHOUT.format("torch"), *arguments)
        assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "page.html").stat().st_size > 1e6


def test_the_script_is_installed() -> None:
    (script,) = entry_points(group="console_scripts", name="lightning-gradclip")
    assert script.load() is main


@needs_report
def test_the_page_is_written_where_it_was_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record(tmp_path / "run", NORMS, limit=1.0)
    out = tmp_path / "page.html"
    out.write_text("old")
    assert main(["report", str(tmp_path / "run"), "--out", str(out)]) == 0
    assert capsys.readouterr().out.startswith(f"wrote {out} (")
    assert out.read_text(encoding="utf-8").startswith("<!doctype html>")
    # No temporary file is left beside it.
    assert sorted(path.name for path in tmp_path.iterdir()) == ["page.html", "run"]


@pytest.mark.processes
def test_without_the_extra_it_is_named(tmp_path: Path) -> None:
    record(tmp_path / "run", NORMS)
    code = WITHOUT.format("plotly")
    done = execute(code, "report", tmp_path / "run", "--out", tmp_path / "page.html")
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert "pip install 'lightning-gradclip[report]'" in line
    assert not (tmp_path / "page.html").exists()
    # Advice does without it.
    assert execute(code, "advise", tmp_path / "run").returncode == 0


@pytest.mark.processes
def test_without_tensorboard_its_extra_is_named(tmp_path: Path) -> None:
    (tmp_path / "events.out.tfevents.1.host").write_bytes(b"")
    done = execute(WITHOUT.format("tensorboard"), "report", tmp_path)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert "pip install 'lightning-gradclip[tensorboard]'" in line


@needs_report
def test_a_page_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record(tmp_path / "run", NORMS)
    for out in (tmp_path / "missing" / "page.html", tmp_path):
        assert f"cannot write {out}: " in refused(capsys, "report", tmp_path / "run", "--out", out)


def truncated(path: Path) -> None:
    (path / "steps.npy").write_bytes((path / "steps.npy").read_bytes()[:100])


def emptied(path: Path) -> None:
    (path / "steps.npy").write_bytes(b"")


def foreign(path: Path) -> None:
    np.save(path / "steps.npy", np.arange(100.0))


def without_meta(path: Path) -> None:
    (path / "meta.json").unlink()


def of_tomorrow(path: Path) -> None:
    meta = json.loads((path / "meta.json").read_text())
    (path / "meta.json").write_text(json.dumps(meta | {"version": 99}))


def half_meta(path: Path) -> None:
    (path / "meta.json").write_text((path / "meta.json").read_text()[:80])


def without_steps(path: Path) -> None:
    (path / "steps.npy").unlink()


def without_rows(path: Path) -> None:
    shutil.rmtree(path)
    record(path, NORMS[:0])


def without_names(path: Path) -> None:
    (path / "scopes.0.json").write_text("{}")


def other_names(path: Path) -> None:
    (path / "scopes.0.json").write_text('{"first_row": 0, "names": ["a", "b"]}')


def other_files(path: Path) -> None:
    shutil.rmtree(path)
    path.mkdir()
    (path / "notes.txt").write_text("nothing")
    (path / "meta.json").write_text('{"of": "something else"}')
    (path / "metrics.csv").write_text("step,loss\n1,0.5\n")


def table_of_words(path: Path) -> None:
    shutil.rmtree(path)
    path.mkdir()
    (path / "metrics.csv").write_text("step,gradclip/clip_rate\n1,often\n")


def table_without_steps(path: Path) -> None:
    shutil.rmtree(path)
    path.mkdir()
    (path / "metrics.csv").write_text("epoch,gradclip/clip_rate\n1,0.5\n")


def table_without_values(path: Path) -> None:
    shutil.rmtree(path)
    path.mkdir()
    (path / "metrics.csv").write_text("step,gradclip/clip_rate\n1,\n")


def table_of_bytes(path: Path) -> None:
    shutil.rmtree(path)
    path.mkdir()
    (path / "metrics.csv").write_bytes(bytes(range(256)) * 9)


def no_events(path: Path) -> None:
    shutil.rmtree(path)
    path.mkdir()
    (path / "events.out.tfevents.1.host").write_bytes(bytes(range(256)) * 9)


def gone(path: Path) -> None:
    shutil.rmtree(path)


@needs_tensorboard
@pytest.mark.parametrize("command", ["report", "advise"])
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (truncated, "steps.npy is cut off: 100 bytes, where the header alone has 512"),
        (emptied, "steps.npy is cut off: 0 bytes"),
        (foreign, "its header is not ours"),
        (without_meta, "is not a history: it has no meta.json"),
        (of_tomorrow, "is a history of version 99"),
        (half_meta, "meta.json is damaged"),
        (without_steps, "holds no steps: "),
        (without_rows, "holds no steps yet"),
        (without_names, "scopes.0.json is damaged"),
        (other_names, "its header is not ours"),
        (other_files, "holds no gradient clipping"),
        (table_of_words, "is no table of numbers by step"),
        (table_without_steps, "is no table of numbers by step"),
        (table_without_values, "holds no value of it"),
        (table_of_bytes, "is damaged or no table"),
        (no_events, "holds no gradient clipping"),
        (gone, "does not exist"),
    ],
)
def test_what_is_no_run_costs_one_line(
    command: str,
    spoil: Callable[[Path], None],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = record(tmp_path / "run", NORMS, scopes={"layer": NORMS})
    spoil(path)
    monkeypatch.chdir(tmp_path)
    assert message in refused(capsys, command, path)
    assert not (tmp_path / "gradclip.html").exists()


@pytest.mark.parametrize("name", ["steps.npy", "meta.json", "scopes.0.npy", "scopes.0.json"])
def test_a_truncated_history_never_ends_in_a_traceback(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = record(tmp_path / "run", NORMS, scopes={"layer": NORMS}) / name
    whole = path.read_bytes()
    for length in range(0, len(whole), 1 + len(whole) // 40):
        path.write_bytes(whole[:length])
        status = main(["advise", str(tmp_path / "run")])
        printed = capsys.readouterr()
        assert status == (2 if printed.err else 0)
        assert len(printed.err.splitlines()) == status / 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "required: COMMAND"),
        (["report"], "required: RUN"),
        (["repot", "x"], "invalid choice: 'repot'"),
        (["advise", "x", "--rate", "5"], "must be between 0 and 1, such as 0.05, got '5'"),
        (["advise", "x", "--rate", "ten"], "must be between 0 and 1, such as 0.05, got 'ten'"),
    ],
)
def test_a_wrong_command_line_costs_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    line = refused(capsys, *arguments)
    assert message in line
    assert line.endswith("--help")


def test_an_unreadable_file_costs_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = record(tmp_path / "run", NORMS)
    (path / "steps.npy").unlink()
    (path / "steps.npy").mkdir()
    assert f"cannot read {path / 'steps.npy'}: Is a directory" in refused(capsys, "report", path)


def test_reading_changes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = record(tmp_path / "run", NORMS)
    before = {one.name: (one.read_bytes(), one.stat().st_mtime_ns) for one in path.iterdir()}
    assert main(["advise", str(path)]) == 0
    assert before == {one.name: (one.read_bytes(), one.stat().st_mtime_ns) for one in path.iterdir()}
    assert len(History(path).steps) == 300


@pytest.mark.processes
def test_a_reader_who_stops_reading_gets_no_traceback(tmp_path: Path) -> None:
    record(tmp_path / "run", NORMS)
    code = "import sys\nfrom lightning_gradclip.cli import main\nsys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "advise", str(tmp_path / "run")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == ""
        assert process.wait(60) == 1


README = (ROOT / "README.md").read_text(encoding="utf-8")


@needs_report
@pytest.mark.parametrize("line", re.findall(r"^lightning-gradclip .*", README, re.MULTILINE))
def test_the_commands_of_the_readme_work(
    line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("observed", "clipped"):
        record(tmp_path / "outputs" / name / "gradclip", np.tile(NORMS, 5), 1.0)
    monkeypatch.chdir(tmp_path)
    assert main(shlex.split(line.partition("  #")[0])[1:]) == 0
    assert capsys.readouterr().err == ""
