"""What loggers kept: of each metric its values by step, from CSVLogger, TensorBoard, MLflow and Transformers."""

import csv
import io
import math
import sqlite3
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, TypeAlias, cast

from lightning_gradclip.record.files import HistoryFormatError, open_file, read_json
from lightning_gradclip.report import RunError

EVENTS = "events.out.tfevents"
STATE = "trainer_state.json"
DATABASE = "mlflow.db"

# Of each metric the values by step.
Points: TypeAlias = Mapping[str, Mapping[int, float]]
# Of the names of all metrics those that are wanted.
Wanted: TypeAlias = Callable[[Sequence[str]], Iterable[str]]


def csv_points(path: Path, wanted: Wanted) -> tuple[Points, tuple[str, ...]]:
    """The wanted metrics of a metrics.csv, and a line about each thing in it that is damaged."""
    points: dict[str, dict[int, float]] = {}
    rows = bad = 0
    damage: list[str] = []
    try:
        with io.TextIOWrapper(open_file(path), encoding="utf-8", newline="") as file:
            table = csv.DictReader(file, strict=True)
            names = [*wanted([name for name in table.fieldnames or () if name != "step"])]
            points = {name: {} for name in names}
            for rows, row in enumerate(table if names else (), start=1):  # noqa: B007
                try:
                    values = {name: float(row[name]) for name in names if row[name]}
                    step = _step(row["step"]) if values else 0
                except (ValueError, KeyError, TypeError):
                    bad += 1
                    continue
                for name, value in values.items():
                    points[name][step] = value
    except (csv.Error, UnicodeDecodeError) as error:
        if not any(points.values()):
            raise RunError(f"{path} is damaged or no table: {error}") from error
        damage.append(f"{path.name} is damaged after row {rows:,}: {error}")
    if bad and not any(points.values()):
        raise RunError(
            f"{path} is no table of numbers by step as CSVLogger writes it: {bad:,} of {rows:,} rows are not"
        )
    if bad:
        damage.append(f"{path.name}: {bad:,} of {rows:,} rows are no numbers by step")
    return points, tuple(damage)


def tensorboard_points(path: Path, wanted: Wanted) -> Points:
    """The wanted metrics in a folder of event files, or in one file."""
    if not path.is_dir():
        open_file(path).close()
    try:
        from tensorboard.backend.event_processing import event_accumulator  # pyright: ignore[reportMissingTypeStubs]
    except ImportError as error:
        raise RunError(
            f"{path} was written for TensorBoard, which is not installed; pip install 'lightning-gradclip[tensorboard]'"
        ) from error
    # 0: every point, instead of a sample.
    events = event_accumulator.EventAccumulator(str(path), size_guidance={event_accumulator.SCALARS: 0})
    events.Reload()
    names = wanted(cast("list[str]", events.Tags()["scalars"]))
    return {tag: {one.step: one.value for one in events.Scalars(tag)} for tag in names}


def mlflow_points(folder: Path, wanted: Wanted) -> tuple[Points, tuple[str, ...]]:
    """The wanted metrics in the folder of a run in MLflow's file store, and what of it is damaged."""
    metrics = folder / "metrics"
    paths = {path.relative_to(metrics).as_posix(): path for path in sorted(metrics.rglob("*")) if path.is_file()}
    points: dict[str, dict[int, float]] = {}
    bad = 0
    for name in wanted([*paths]):
        points[name] = {}
        with open_file(paths[name]) as file:
            # Time, value and step.
            for line in file:
                try:
                    _, value, step = line.split()
                    points[name][_step(step.decode())] = float(value)
                except (ValueError, UnicodeDecodeError):
                    bad += 1
    return points, ((f"{bad:,} values of MLflow's cannot be read",) if bad else ())


def mlflow_params(folder: Path) -> dict[str, str]:
    """The parameters of a run in MLflow's file store."""
    params = folder / "params"
    paths = (path for path in sorted(params.rglob("*")) if path.is_file())
    return {path.relative_to(params).as_posix(): path.read_text("utf-8", "replace") for path in paths}


def database_runs(path: Path) -> dict[str, tuple[Points, dict[str, str]]]:
    """By run the metrics and parameters in MLflow's SQLite database."""
    open_file(path).close()
    found: dict[str, tuple[dict[str, dict[int, float]], dict[str, str]]] = {}
    try:
        with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)) as database:
            for (run,) in database.execute("select run_uuid from runs order by start_time"):
                found[run] = defaultdict(dict), {}
            metrics = "select run_uuid, key, step, value, is_nan from metrics order by timestamp"
            for run, key, step, value, is_nan in database.execute(metrics):
                found[run][0][key][int(step)] = math.nan if is_nan else float(value)
            for run, key, value in database.execute("select run_uuid, key, value from params"):
                found[run][1][key] = str(value)
    except (sqlite3.Error, KeyError, ValueError, TypeError) as error:
        raise RunError(f"{path} is no database of MLflow's, or a damaged one: {error}") from error
    return dict(found)


def state_points(path: Path) -> tuple[Points, tuple[str, ...]]:
    """All numbers by step in the `trainer_state.json` of Transformers, and what of it is damaged."""
    try:
        state = read_json(path)
    except HistoryFormatError as error:
        raise RunError(str(error)) from error
    log: Any = state.get("log_history") if isinstance(state, dict) else None
    if not isinstance(log, list):
        raise RunError(f"{path} was not written by Transformers: it has no log_history")
    points: dict[str, dict[int, float]] = defaultdict(dict)
    bad = 0
    for event in log:
        step: Any = event.get("step") if isinstance(event, dict) else None
        if not isinstance(step, int) or not 0 <= step < 2**53:
            bad += 1
            continue
        for name, value in event.items():
            if name != "step" and isinstance(value, (int, float)) and not isinstance(value, bool):
                points[name][step] = _float(value)
    return points, ((f"{path.name}: {bad:,} of {len(log):,} log events have no step",) if bad else ())


def _float(value: float) -> float:
    try:
        return float(value)
    except OverflowError:
        return math.inf


def _step(word: str) -> int:
    step = int(word)
    if not 0 <= step < 2**53:
        raise ValueError(f"{step} is no step")
    return step
