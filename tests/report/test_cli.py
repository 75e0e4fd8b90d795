"""The command line: what it accepts, and one line for what it cannot use."""

import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path

import numpy as np
import pytest

import lightning_gradclip
from kit.extras import needs_report, needs_tensorboard
from kit.guides import commands
from kit.histories import record
from lightning_gradclip.record.files import HEADER_BYTES
from lightning_gradclip.record.history import STEP, History
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
    assert 1e6 < (tmp_path / "page.html").stat().st_size < 2.2e6


@pytest.mark.processes
@pytest.mark.parametrize("words", [["-m", "lightning_gradclip"], ["-m", "lightning_gradclip.cli"]])
def test_it_runs_as_a_module_and_says_its_version(words: list[str]) -> None:
    done = subprocess.run([sys.executable, *words, "--version"], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"lightning-gradclip {lightning_gradclip.__version__}\n"


def test_the_script_is_installed() -> None:
    (script,) = entry_points(group="console_scripts", name="lightning-gradclip")
    assert script.load() is main


@needs_report
def test_the_page_is_written_where_it_was_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record(tmp_path / "run", NORMS, limit=1.0)
    out = tmp_path / "page.html"
    out.write_text("<!doctype html><title>Gradient clipping: old")
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
        (of_tomorrow, "is a history of version 99"),
        (without_steps, "holds no steps: "),
        (without_rows, "holds no steps yet"),
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
        # A JSON file is whole without its last line end.
        lines = printed.err.splitlines() or ["lightning-gradclip: damaged: nothing"]
        assert lines[-1].startswith("lightning-gradclip: " + ("damaged: " if status == 0 else "error: "))
        assert len(lines) <= 2
        assert bool(printed.err) or length == len(whole) - 1
        assert bool(printed.out) is (status == 0)


def cut(path: Path) -> None:
    with (path / "steps.npy").open("r+b") as file:
        file.truncate(HEADER_BYTES + 105 * STEP.itemsize)


def zeroed(path: Path) -> None:
    """What a power failure leaves behind: rows that no run wrote."""
    with (path / "steps.npy").open("r+b") as file:
        file.seek(HEADER_BYTES + 10 * STEP.itemsize)
        file.write(bytes(40 * STEP.itemsize))


def twice(path: Path) -> None:
    for suffix in ("json", "npy"):
        shutil.copy(path / f"scopes.0.{suffix}", path / f"scopes.1.{suffix}")


def part_gone(path: Path) -> None:
    twice(path)
    for suffix in ("json", "npy"):
        (path / f"scopes.0.{suffix}").unlink()


def before_the_first(path: Path) -> None:
    (path / "scopes.0.json").write_text('{"first_row": -5, "names": ["layer"]}')


def no_segment(path: Path) -> None:
    meta = json.loads((path / "meta.json").read_text())
    (path / "meta.json").write_text(json.dumps(meta | {"segments": [3, *meta["segments"]]}))


def deep(path: Path) -> None:
    (path / "meta.json").write_text("[" * 100_000)


def piped(path: Path) -> None:
    (path / "scopes.0.json").unlink()
    os.mkfifo(path / "scopes.0.json")


@pytest.mark.parametrize("command", ["report", "advise"])
@pytest.mark.parametrize(
    ("spoil", "messages"),
    [
        (cut, ["steps.npy holds 105 of 300 rows"]),
        (zeroed, ["steps.npy: 40 of 300 rows were not written so"]),
        (without_meta, ["meta.json is missing, so the settings of the run are unknown"]),
        (half_meta, ["meta.json is damaged"]),
        (deep, ["meta.json is damaged: maximum recursion depth"]),
        (no_segment, ["meta.json does not say which settings were used: 1 of 2 can be read"]),
        (without_names, ["scopes.0.json is damaged"]),
        (other_names, ["its header is not ours"]),
        (before_the_first, ["scopes.0.json is damaged"]),
        (twice, ["scopes.1.json is about row 0, which a part before it is about too: left out"]),
        (part_gone, ["1 of 2 parts of scopes are missing"]),
        (piped, ["scopes.0.json is a pipe or a device"]),
    ],
)
def test_damage_is_said_where_something_sound_is_left(
    command: str, spoil: Callable[[Path], None], messages: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = record(tmp_path / "run", NORMS, scopes={"layer": NORMS})
    spoil(path)
    out = ["--out", str(tmp_path / "page.html")] if command == "report" else []
    assert main([command, str(path), *out]) == 0
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == len(messages)
    for line, message in zip(lines, messages, strict=True):
        assert line.startswith("lightning-gradclip: damaged: ")
        assert message in line


def test_one_run_of_several_may_be_beyond_repair(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("one", "other"):
        record(tmp_path / name, NORMS)
    truncated(tmp_path / "one")
    assert main(["advise", str(tmp_path)]) == 0
    printed = capsys.readouterr()
    assert "one/steps.npy is cut off" in printed.err
    assert "300 steps" in printed.out


def test_rows_of_a_table_that_are_none_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [f"{step},{1 + step % 7},{1 + step % 7},0.5" for step in range(150)]
    rows[7], rows[9], rows[11] = "7,often,1,1", "1" * 23 + ",1,1,1", "11,1e400,1e400,0.5"
    text = "\n".join(["step,gradclip/norm,gradclip/norm_max,gradclip/clip_rate", *rows])
    (tmp_path / "metrics.csv").write_text(text)
    assert main(["advise", str(tmp_path)]) == 0
    assert "metrics.csv: 2 of 150 rows are no numbers by step" in capsys.readouterr().err


@pytest.mark.parametrize("force", [False, True])
def test_an_output_never_eats_an_input(force: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = record(tmp_path / "run", NORMS)
    (tmp_path / "metrics.csv").write_text("step,loss\n1,0.5\n")
    (tmp_path / "notes.txt").write_text("mine")
    os.mkfifo(tmp_path / "pipe")
    more = ["--force"] if force else []
    for out in (run / "steps.npy", run / "meta.json", tmp_path / "metrics.csv", tmp_path / "pipe", ""):
        before = Path(out).read_bytes() if out and Path(out).is_file() else b""
        refused(capsys, "report", run, "--out", out, *more)
        assert not out or not Path(out).is_file() or Path(out).read_bytes() == before
    if force:
        assert main(["report", str(run), "--out", str(tmp_path / "notes.txt"), "--force"]) == 0
    else:
        line = refused(capsys, "report", run, "--out", tmp_path / "notes.txt")
        assert "exists and is no page of this program; name another with --out, or overwrite: --force" in line
        assert (tmp_path / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("name", ["pipe", "metrics.csv", "events.out.tfevents.1", "", "metrics.csv.bak"])
def test_what_is_no_file_costs_one_line_and_no_wait(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if name == "metrics.csv.bak":
        (tmp_path / name).write_text("step\n1\n")
        name = "."
    elif name:
        os.mkfifo(tmp_path / name)
        refused(capsys, "advise", tmp_path)
    refused(capsys, "advise", tmp_path / name if name else "")


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


@needs_report
@pytest.mark.parametrize("line", commands("lightning-gradclip "))
def test_the_commands_of_the_guides_work(
    line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for folder in ("outputs/observed/gradclip", "outputs/clipped/gradclip", "lightning_logs/version_0/gradclip"):
        record(tmp_path / folder, np.tile(NORMS, 5), 1.0)
    monkeypatch.chdir(tmp_path)
    assert main(shlex.split(line)[1:]) == 0
    assert capsys.readouterr().err == ""
