"""History files: what is written is read again, whatever interrupts the writing."""

import contextlib
import json
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

import lightning_gradclip
from kit.histories import COLUMNS, expected, names_at, norms_of, rows_of
from kit.root import ROOT
from lightning_gradclip import EmaClip, NormClip
from lightning_gradclip.record.files import HEADER_BYTES
from lightning_gradclip.record.history import CONTEXT, STEP, History, HistoryError, HistoryFormatError
from lightning_gradclip.record.history_writer import HistoryWriter
from lightning_gradclip.record.step import Row

Array = np.ndarray
Opened = Callable[..., HistoryWriter]

# Appends windows of seven rows whose values follow from the step, until it is killed.
ENDLESS = """
import itertools, sys
import numpy as np
from lightning_gradclip.record.history_writer import HistoryWriter
from kit.histories import COLUMNS, norms_of, rows_of

writer = HistoryWriter(sys.argv[1], columns=COLUMNS, start_step=int(sys.argv[2]), measure_per="layer")
for start in itertools.count(int(sys.argv[2]), 7):
    steps = np.arange(start, start + 7)
    names, norms = norms_of(steps)
    writer.append(steps, rows_of(steps), names, norms)
    print(start, flush=True)
"""

# Appends while files may not grow beyond some bytes, and goes on when they may.
FULL_DISK = """
import resource, sys
import numpy as np
from lightning_gradclip.record.history import History, HistoryError
from lightning_gradclip.record.history_writer import HistoryWriter
from kit.histories import COLUMNS, norms_of, rows_of

folder, limit = sys.argv[1], int(sys.argv[2])
writer = HistoryWriter(folder, columns=COLUMNS, measure_per="layer")
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
failures = 0
for start in range(0, 700, 7):
    steps = np.arange(start, start + 7)
    names, norms = norms_of(steps)
    try:
        writer.append(steps, rows_of(steps), names, norms)
    except HistoryError as error:
        failures += 1
        message = str(error)
        recorded = len(History(folder).steps)
assert failures and recorded == len(np.load(folder + "/steps.npy")), failures
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
steps = np.arange(700, 707)
writer.append(steps, rows_of(steps))
steps = np.arange(707, 714)
names, norms = norms_of(steps)
writer.append(steps, rows_of(steps), names, norms)
writer.close()
print(recorded, message)
"""


def assert_equal(found: Array, wanted: Array) -> None:
    """Field by field, since NaN is not equal to itself."""
    assert found.dtype == wanted.dtype
    for name in wanted.dtype.names or ():
        np.testing.assert_array_equal(found[name], wanted[name], err_msg=name)


def assert_holds(folder: Path, steps: Array) -> None:
    """The history is exactly that of these steps, in the file that users load and to the reader."""
    history = History(folder)
    assert_equal(history.steps, expected(steps))
    assert_equal(np.load(folder / "steps.npy"), history.steps)


def write(folder: Path, steps: Array, **options: object) -> None:
    with HistoryWriter(folder, **{"columns": COLUMNS, "start_step": int(steps[0]), **options}) as writer:
        writer.append(steps, rows_of(steps))


@pytest.fixture
def opened() -> Iterator[Opened]:
    """Opens writers, and closes what a test leaves open."""
    with contextlib.ExitStack() as stack:
        yield lambda folder, **options: stack.enter_context(HistoryWriter(folder, **{"columns": COLUMNS, **options}))


def execute(code: str, *arguments: object, check: bool = True) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, *(str(argument) for argument in arguments)]
    done = subprocess.run(command, cwd=ROOT / "tests", capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 or not check, done.stderr
    return done


def test_the_file_is_a_table_to_pandas(tmp_path: Path) -> None:
    pandas = pytest.importorskip("pandas")
    write(tmp_path, np.arange(20))
    table = pandas.DataFrame(np.load(tmp_path / "steps.npy"))
    assert list(table.columns) == ["step", *COLUMNS, *CONTEXT]
    assert table.norm.tolist() == [step + 0.25 for step in range(20)]
    assert table[table.skipped].step.tolist() == [step for step in range(20) if step % 5]


def test_every_column_of_a_row_is_recorded_under_its_name(tmp_path: Path) -> None:
    assert set(COLUMNS) == set(Row._fields)
    write(tmp_path, np.arange(1000))
    assert_holds(tmp_path, np.arange(1000))


def test_columns_are_found_by_name(tmp_path: Path, opened: Opened) -> None:
    order = ["other", *reversed(COLUMNS)]
    writer = opened(tmp_path, columns=order)
    steps = np.arange(30)
    writer.append(steps, np.column_stack([steps * 0.0, rows_of(steps)[:, ::-1]]))
    assert_holds(tmp_path, steps)
    with pytest.raises(ValueError, match="lack coef; pass the names of all columns"):
        HistoryWriter(tmp_path / "other", columns=[name for name in COLUMNS if name != "coef"])


def test_numbers_beyond_float32_are_kept(tmp_path: Path, opened: Opened) -> None:
    row = Row(1e200, 1.0, float("nan"), 1e-200, 1.0, 1.0, 0.0, 1.0, 0.0)
    writer = opened(tmp_path)
    writer.append([4], [row], ["a"], [[1e200]])
    history = History(tmp_path)
    assert (history.steps["norm"][0], history.steps["coef"][0]) == (1e200, 1e-200)
    assert np.isnan(history.steps["limit"][0])
    assert history.scope_norms()[1].tolist() == [[float("inf")]]


def test_rows_can_be_read_before_the_writer_closes(tmp_path: Path, opened: Opened) -> None:
    writer = opened(tmp_path)
    assert_holds(tmp_path, np.arange(0))
    for end in (1, 9, 10, 99, 100, 1001):
        begin = len(History(tmp_path).steps)
        writer.append(np.arange(begin, end), rows_of(np.arange(begin, end)))
        assert_holds(tmp_path, np.arange(end))


@pytest.mark.parametrize("start", [0, 1, 57, 99, 100, 250])
def test_resuming_drops_what_comes_again(start: int, tmp_path: Path) -> None:
    write(tmp_path, np.arange(100))
    write(tmp_path, np.arange(start, 300))
    assert_holds(tmp_path, np.concatenate([np.arange(min(start, 100)), np.arange(start, 300)]))


def test_steps_that_share_a_number_are_dropped_together(tmp_path: Path) -> None:
    write(tmp_path, np.repeat(np.arange(10), 3))
    write(tmp_path, np.repeat(np.arange(4, 6), 3))
    assert_holds(tmp_path, np.repeat(np.arange(6), 3))


def test_a_step_back_is_refused(tmp_path: Path, opened: Opened) -> None:
    writer = opened(tmp_path, start_step=5)
    for steps in ([4], [6, 5]):
        with pytest.raises(ValueError, match=r"comes after step .*; to go back open the history again"):
            writer.append(steps, rows_of(np.array(steps)))
    writer.append([7], rows_of(np.array([7])))
    with pytest.raises(ValueError, match="step 6 comes after step 7"):
        writer.append([6], rows_of(np.array([6])))
    assert_holds(tmp_path, np.array([7]))


def test_shapes_that_do_not_fit_are_refused(tmp_path: Path, opened: Opened) -> None:
    writer = opened(tmp_path)
    with pytest.raises(ValueError, match=r"steps of shape \(2,\) and rows of shape \(1, 9\)"):
        writer.append([1, 2], rows_of(np.arange(1)))
    with pytest.raises(ValueError, match=r"scope_norms of shape \(1, 2\); it must be \(1, 1\)"):
        writer.append([1], rows_of(np.arange(1)), ["a"], [[1.0, 2.0]])
    assert_holds(tmp_path, np.arange(0))


@pytest.mark.parametrize("start", [0, 60, 100, 130, 200])
def test_scopes_that_change_are_joined_by_name(start: int, tmp_path: Path, opened: Opened) -> None:
    for begin, end in ((0, 200), (start, 300)):
        writer = opened(tmp_path, start_step=begin, measure_per="layer")
        for first in range(begin, end, 10):
            steps = np.arange(first, first + 10)
            writer.append(steps, rows_of(steps), *norms_of(steps))
        writer.close()
    history = History(tmp_path)
    names, norms = history.scope_norms()
    assert names == ("head", "body")
    steps = np.arange(300)
    assert np.array_equal(norms[:, 0], steps + np.float32(0.5))
    assert np.array_equal(norms[100:, 1], steps[100:] + np.float32(0.75))
    assert np.isnan(norms[:100, 1]).all()
    # The writer goes on where it left off, and begins a part only where the scopes change.
    assert len(history.parts) == 2


def test_scopes_may_pause(tmp_path: Path, opened: Opened) -> None:
    writer = opened(tmp_path)
    for first, measured in ((0, False), (5, True), (10, False), (15, True)):
        steps = np.arange(first, first + 5)
        writer.append(steps, rows_of(steps), *(norms_of(steps) if measured else ()))
    _, norms = History(tmp_path).scope_norms()
    nan = [np.nan] * 5
    steps = np.arange(20) + 0.5
    assert np.array_equal(norms[:, 0], np.concatenate([nan, steps[5:10], nan, steps[15:]]), equal_nan=True)


def test_the_release_that_wrote_it_is_named(tmp_path: Path) -> None:
    write(tmp_path, np.arange(1))
    assert History(tmp_path).meta["package"] == lightning_gradclip.__version__


def test_settings_are_kept_with_the_step_they_hold_from(tmp_path: Path) -> None:
    limited = EmaClip(warmup_max_norm=1.0)
    methods = [NormClip(max_norm={0: 10.0, 100: 1.0}), limited, limited, EmaClip(warmup_max_norm=float("inf"))]
    for start, method in zip((0, 10, 20, 30), methods, strict=True):
        write(tmp_path, np.array([start]), method=method)
    meta = History(tmp_path).meta
    assert [one["from_step"] for one in meta["segments"]] == [0, 10, 30]
    first, _, last = (one["method"] for one in meta["segments"])
    assert (first["class"], first["settings"]["max_norm"]) == ("NormClip", {"0": 10.0, "100": 1.0})
    assert last["settings"]["warmup_max_norm"] == "inf"
    # Resuming before a change forgets it.
    write(tmp_path, np.array([20]), method=methods[1], action="observe")
    segments = History(tmp_path).meta["segments"]
    assert [(one["from_step"], one["action"]) for one in segments] == [(0, "clip"), (10, "clip"), (20, "observe")]


def test_norms_of_another_kind_are_not_mixed(tmp_path: Path) -> None:
    write(tmp_path, np.arange(10), method=NormClip())
    with pytest.raises(HistoryFormatError, match=r"norm_type=2.0, and this run measures norm_type=1.0; use another"):
        write(tmp_path, np.arange(5, 10), method=NormClip(norm_type=1.0))
    assert_holds(tmp_path, np.arange(10))
    write(tmp_path, np.arange(5), method=NormClip(norm_type=1.0))
    assert_holds(tmp_path, np.arange(5))


@pytest.mark.processes
def test_a_killed_process_leaves_whole_steps(tmp_path: Path) -> None:
    start = 0
    for windows in (1, 3, 40):
        command = [sys.executable, "-c", ENDLESS, str(tmp_path), str(start)]
        with subprocess.Popen(command, cwd=ROOT / "tests", stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            for _ in range(windows):
                acknowledged = int(process.stdout.readline())
                # It is read while it is written.
                snapshot = History(tmp_path).steps
                assert_equal(snapshot, expected(np.arange(len(snapshot))))
            process.kill()
            assert process.wait() == -signal.SIGKILL
        count = len(History(tmp_path).steps)
        # What append() had returned from is there, and all of it is whole.
        assert count >= acknowledged + 7
        assert count % 7 == 0
        assert_holds(tmp_path, np.arange(count))
        # Go on somewhat earlier, as from a checkpoint, but not in the middle of a window of ours.
        start = max(0, count - 14)
    names, norms = History(tmp_path).scope_norms()
    assert names == ("head", "body")
    assert np.array_equal(norms[:, 0], np.arange(count) + np.float32(0.5))


def test_bytes_behind_the_counted_rows_are_dropped(tmp_path: Path) -> None:
    write(tmp_path, np.arange(10))
    size = (tmp_path / "steps.npy").stat().st_size
    with (tmp_path / "steps.npy").open("ab") as file:
        file.write(b"\xff" * 77)
    assert_holds(tmp_path, np.arange(10))
    HistoryWriter(tmp_path, columns=COLUMNS, start_step=10).close()
    assert (tmp_path / "steps.npy").stat().st_size == size


def test_a_truncated_file_is_a_prefix_that_is_said_or_an_error(tmp_path: Path, opened: Opened) -> None:
    writer = opened(tmp_path, measure_per="layer")
    steps = np.concatenate([np.arange(6), np.arange(100, 104)])
    for window in (steps[:6], steps[6:]):
        writer.append(window, rows_of(window), *norms_of(window))
    writer.close()
    for path in sorted(path for path in tmp_path.iterdir() if "owner" not in path.name):
        whole = path.read_bytes()
        for length in range(len(whole)):
            path.write_bytes(whole[:length])
            if path.name == "steps.npy" and length < HEADER_BYTES:
                with pytest.raises(HistoryFormatError, match="is cut off"):
                    History(tmp_path)
                continue
            history = History(tmp_path)
            assert_equal(history.steps, expected(steps[: len(history.steps)]))
            # A JSON file is whole without its last line end.
            (said,) = history.damage or ["nothing"]
            assert path.name in said or (path.suffix == ".json" and length == len(whole) - 1), (path, length)
            if path.name == "steps.npy":
                assert len(history.steps) == (length - HEADER_BYTES) // STEP.itemsize
            names, norms = history.scope_norms()
            for name, column in zip(names, norms.T, strict=True):
                known = ~np.isnan(column)
                wanted = steps[: len(column)][known] + np.float32({"head": 0.5, "body": 0.75}[name])
                assert np.array_equal(column[known], wanted)
        path.write_bytes(whole)
    assert_holds(tmp_path, steps)


def test_a_writer_goes_on_after_a_truncation(tmp_path: Path) -> None:
    write(tmp_path, np.arange(10))
    with (tmp_path / "steps.npy").open("r+b") as file:
        file.truncate(HEADER_BYTES + 4 * STEP.itemsize + 13)
    write(tmp_path, np.arange(10, 20))
    assert_holds(tmp_path, np.concatenate([np.arange(4), np.arange(10, 20)]))


@pytest.mark.processes
@pytest.mark.parametrize("limit", [HEADER_BYTES + 300, 1200, 5000, 5001])
def test_a_full_disk_costs_only_what_did_not_fit(limit: int, tmp_path: Path) -> None:
    recorded, message = execute(FULL_DISK, tmp_path, limit).stdout.split(maxsplit=1)
    count = int(recorded)
    assert count == (limit - HEADER_BYTES) // STEP.itemsize // 7 * 7
    assert "cannot write the history: File too large" in message
    assert str(tmp_path) in message
    steps = np.concatenate([np.arange(count), np.arange(700, 714)])
    assert_holds(tmp_path, steps)
    names, norms = History(tmp_path).scope_norms()
    for name, column in zip(names, norms.T, strict=True):
        known = ~np.isnan(column)
        # The norms that fitted while their steps did not are forgotten.
        assert np.array_equal(
            known, (steps >= 707) | ((steps < 700) & np.array([name in names_at(one) for one in steps]))
        )
        assert np.array_equal(column[known], steps[known] + np.float32({"head": 0.5, "body": 0.75}[name]))


def test_a_folder_that_cannot_be_made_is_a_history_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(HistoryError, match="cannot write the history: Not a directory") as failure:
        HistoryWriter(tmp_path / "file" / "gradclip", columns=COLUMNS)
    assert isinstance(failure.value, OSError)
    assert failure.value.errno


def test_closing_twice_and_without_steps_is_fine(tmp_path: Path, opened: Opened) -> None:
    writer = opened(tmp_path)
    writer.append([], np.zeros((0, len(COLUMNS))))
    writer.close()
    writer.close()
    assert_holds(tmp_path, np.arange(0))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda meta: meta | {"version": 3}, "history of version 3, written by lightning-gradclip '9.9'"),
        (lambda meta: meta | {"format": "other"}, "was not written by lightning-gradclip"),
        (lambda meta: [], "was not written by lightning-gradclip"),
    ],
)
def test_another_format_is_refused_and_left_alone(change: object, message: str, tmp_path: Path) -> None:
    write(tmp_path, np.arange(10))
    path = tmp_path / "meta.json"
    path.write_text(json.dumps(change(json.loads(path.read_text()) | {"package": "9.9"})))
    before = {one.name: one.read_bytes() for one in tmp_path.iterdir()}
    with pytest.raises(HistoryFormatError, match=message):
        History(tmp_path)
    with pytest.raises(HistoryFormatError, match=message):
        HistoryWriter(tmp_path, columns=COLUMNS)
    assert before == {one.name: one.read_bytes() for one in tmp_path.iterdir()}


def test_a_foreign_array_is_refused_and_left_alone(tmp_path: Path) -> None:
    np.save(tmp_path / "steps.npy", np.arange(1000))
    before = (tmp_path / "steps.npy").read_bytes()
    with pytest.raises(HistoryFormatError, match=r"has no meta\.json"):
        HistoryWriter(tmp_path, columns=COLUMNS)
    assert [path.name for path in tmp_path.iterdir()] == ["steps.npy"]
    write(tmp_path / "ours", np.arange(3))
    (tmp_path / "ours" / "steps.npy").write_bytes(before)
    for opening in (History, lambda folder: HistoryWriter(folder, columns=COLUMNS)):
        with pytest.raises(HistoryFormatError, match="its header is not ours"):
            opening(tmp_path / "ours")
    assert (tmp_path / "ours" / "steps.npy").read_bytes() == before


def test_a_folder_without_history_is_an_error(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "missing"):
        with pytest.raises(HistoryFormatError, match=r"is not a history: it has no meta\.json"):
            History(folder)
    write(tmp_path, np.arange(1))
    (tmp_path / "steps.npy").unlink()
    with pytest.raises(HistoryFormatError, match=r"holds no steps: .*steps\.npy is missing"):
        History(tmp_path)


@pytest.mark.parametrize("seed", range(5))
def test_any_order_of_windows_resumes_and_scopes(seed: int, tmp_path: Path, opened: Opened) -> None:
    """Random appends, restarts and changes of scopes, beside a plain list of what should be there."""
    rng = np.random.default_rng(seed)
    kept: list[tuple[int, dict[str, float]]] = []
    writer, step = opened(tmp_path), 0
    for _ in range(60):
        if rng.random() < 0.3:
            writer.close()
            step = max(0, step - int(rng.integers(0, 15)))
            kept = [one for one in kept if one[0] < step]
            writer = opened(tmp_path, start_step=step)
        count = int(rng.integers(0, 9))
        steps = np.arange(step, step + count)
        names = [("a",), ("b", "a"), ()][int(rng.integers(3))]
        norms = rng.random((count, len(names))).astype(np.float32)
        writer.append(steps, rows_of(steps), names, norms if names else None)
        kept += [(int(one), dict(zip(names, row.tolist(), strict=True))) for one, row in zip(steps, norms, strict=True)]
        step += count
    assert_holds(tmp_path, np.array([one for one, _ in kept]))
    names, norms = History(tmp_path).scope_norms()
    wanted = [[of_step.get(name, np.nan) for name in names] for _, of_step in kept]
    assert set(names) == {name for _, of_step in kept for name in of_step}
    assert np.array_equal(norms, np.array(wanted, dtype=np.float32), equal_nan=True)


def test_memory_does_not_grow_with_the_run(tmp_path: Path, opened: Opened) -> None:
    writer = opened(tmp_path)
    window = rows_of(np.arange(50))
    for start in range(0, 20_000, 50):
        writer.append(np.arange(start, start + 50), window)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for start in range(20_000, 400_000, 50):
        writer.append(np.arange(start, start + 50), window)
    # 20 MB were written.
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2_000


def test_settings_hold_from_their_own_first_step_on(tmp_path: Path) -> None:
    """A run that begins again where another began leaves none of that one's settings."""
    write(tmp_path, np.arange(10), method=NormClip(max_norm=1.0))
    write(tmp_path, np.arange(5, 10), method=NormClip(max_norm=2.0))
    write(tmp_path, np.arange(5, 8), method=NormClip(max_norm=3.0))
    segments = History(tmp_path).meta["segments"]
    assert [(one["from_step"], one["method"]["settings"]["max_norm"]) for one in segments] == [(0, 1.0), (5, 3.0)]
