"""A folder of records belongs to one writer, whoever else wants it, and however its owner ends."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from kit.histories import COLUMNS, rows_of
from kit.root import ROOT
from lightning_gradclip import History, HistoryWriter
from lightning_gradclip.record.owner import HistoryOwnedError

# Appends two windows, says so, and waits until it is killed.
HOLDING = """
import sys
import numpy as np
from lightning_gradclip.record.history_writer import HistoryWriter
from kit.histories import COLUMNS, rows_of

writer = HistoryWriter(sys.argv[1], columns=COLUMNS)
for start in (0, 5):
    writer.append(np.arange(start, start + 5), rows_of(np.arange(start, start + 5)))
print("holding", flush=True)
sys.stdin.read()
"""


def append(writer: HistoryWriter, start: int, end: int) -> None:
    writer.append(np.arange(start, end), rows_of(np.arange(start, end)))


def holding(folder: Path) -> "subprocess.Popen[str]":
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    command = [sys.executable, "-c", HOLDING, str(folder)]
    process = subprocess.Popen(command, cwd=ROOT / "tests", text=True, **pipes)
    assert process.stdout is not None
    assert process.stdout.readline() == "holding\n"
    return process


@pytest.mark.processes
def test_a_living_owner_keeps_the_folder_and_a_killed_one_does_not(tmp_path: Path) -> None:
    folder = tmp_path / "it"
    with holding(folder) as process:
        with pytest.raises(HistoryOwnedError, match=rf"belongs to another process, .*: process {process.pid} of .* on"):
            HistoryWriter(folder, columns=COLUMNS)
        (tmp_path / "link").symlink_to(folder)
        for spelling in (tmp_path / "link", tmp_path / "x" / ".." / "it"):
            (tmp_path / "x").mkdir(exist_ok=True)
            with pytest.raises(HistoryOwnedError):
                HistoryWriter(spelling, columns=COLUMNS)
        assert len(History(folder).steps) == 10
        process.send_signal(signal.SIGKILL)
    with HistoryWriter(folder, columns=COLUMNS, start_step=10) as writer:
        append(writer, 10, 12)
    assert History(folder).steps["step"].tolist() == [*range(12)]


@pytest.mark.processes
def test_a_child_of_the_owner_that_outlives_it_holds_nothing(tmp_path: Path) -> None:
    code = HOLDING.replace(
        'print("holding"', "import os\nif os.fork() == 0: sys.stdin.read(); os._exit(0)\nprint('holding'"
    )
    with subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", code, str(tmp_path / "it")],
        cwd=ROOT / "tests",
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.kill()
        process.wait()
        HistoryWriter(tmp_path / "it", columns=COLUMNS, start_step=10).close()


@pytest.mark.processes
def test_one_process_has_one_writer_too(tmp_path: Path) -> None:
    with HistoryWriter(tmp_path, columns=COLUMNS) as first:
        append(first, 0, 3)
        for _ in range(2):
            with pytest.raises(HistoryOwnedError, match="belongs to this process"):
                HistoryWriter(tmp_path, columns=COLUMNS)
        append(first, 3, 5)
        # Nobody else got in by that.
        done = subprocess.run(
            [sys.executable, "-c", HOLDING, str(tmp_path)], cwd=ROOT / "tests", capture_output=True, input=b""
        )
        assert b"HistoryOwnedError" in done.stderr
    assert History(tmp_path).steps["step"].tolist() == [*range(5)]
    HistoryWriter(tmp_path, columns=COLUMNS, start_step=5).close()


@pytest.mark.parametrize(("age", "refused"), [(5, True), (500, False)])
def test_an_owner_on_another_machine_lives_while_it_touches_its_mark(tmp_path: Path, age: int, refused: bool) -> None:
    with HistoryWriter(tmp_path, columns=COLUMNS) as writer:
        append(writer, 0, 3)
    mark = tmp_path / "owner.json"
    about = json.loads(mark.read_text())
    assert about["closed"]
    mark.write_text(json.dumps(about | {"closed": False, "machine": "elsewhere", "host": "far"}))
    now = mark.stat().st_mtime
    os.utime(mark, (now - age, now - age))
    if refused:
        with pytest.raises(HistoryOwnedError, match=r"belongs to another machine, .* on far since"):
            HistoryWriter(tmp_path, columns=COLUMNS, start_step=3)
    else:
        HistoryWriter(tmp_path, columns=COLUMNS, start_step=3).close()
    assert len(History(tmp_path).steps) == 3


def test_a_folder_that_is_deleted_is_made_again_with_one_warning(tmp_path: Path) -> None:
    folder = tmp_path / "it"
    with HistoryWriter(folder, columns=COLUMNS) as writer:
        append(writer, 0, 5)
        for path in folder.iterdir():
            path.unlink()
        folder.rmdir()
        with pytest.warns(UserWarning, match=r"was deleted .* so the steps before 5 are lost; it is made again"):
            append(writer, 5, 9)
        append(writer, 9, 12)
        with pytest.raises(HistoryOwnedError):
            HistoryWriter(folder, columns=COLUMNS)
    history = History(folder)
    assert history.steps["step"].tolist() == [*range(5, 12)]
    assert history.damage == ("the folder was deleted in mid-run: the steps before 5 are lost",)


def test_a_folder_that_is_renamed_is_followed(tmp_path: Path) -> None:
    with HistoryWriter(tmp_path / "it", columns=COLUMNS) as writer:
        append(writer, 0, 5)
        (tmp_path / "it").rename(tmp_path / "other")
        append(writer, 5, 9)
        # A part begins in the folder as it is called by now.
        writer.append(np.arange(9, 11), rows_of(np.arange(9, 11)), ["a"], np.ones((2, 1)))
    assert [path.name for path in tmp_path.iterdir()] == ["other"]
    assert History(tmp_path / "other").steps["step"].tolist() == [*range(11)]
    assert History(tmp_path / "other").parts[0].first_row == 9
    assert json.loads((tmp_path / "other" / "owner.json").read_text())["closed"]


def test_a_folder_of_something_else_gets_no_lock(tmp_path: Path) -> None:
    (tmp_path / "meta.json").write_text('{"mine": true}')
    with pytest.raises(ValueError, match="was not written by lightning-gradclip"):
        HistoryWriter(tmp_path, columns=COLUMNS)
    assert [path.name for path in tmp_path.iterdir()] == ["meta.json"]
