"""Finds and reads the runs below a path: histories, or else what Lightning's CSVLogger and TensorBoard kept.

A log event covers all steps since the one before: the norm is their mean. Where each step was logged a point is a step.
"""

import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TypeAlias

import numpy as np

from lightning_gradclip.record.files import HistoryFormatError, open_file
from lightning_gradclip.record.history import FORMAT, History, ScopePart, is_ours
from lightning_gradclip.report import RunError
from lightning_gradclip.report.logs import (
    DATABASE,
    EVENTS,
    STATE,
    Points,
    csv_points,
    database_runs,
    mlflow_points,
    state_points,
    tensorboard_points,
)
from lightning_gradclip.report.run import Numbers, Run, comparable, from_history

# Of every log event of ours one of these is there; without a finite step only the second.
_RATE, _MARKS = "clip_rate", ("clip_rate", "nonfinite")

# Reads the runs of one folder or file, with their folders.
_Source: TypeAlias = Callable[[], list[tuple[Path, Run]]]


def find_runs(paths: Sequence[str | Path], tell: Callable[[str], None] = warnings.warn) -> list[Run]:
    """All runs in or below history folders, log files, or folders that hold such, named so that they can be told apart.

    Args:
        paths: Where to look.
        tell: Called with a line about each thing that is damaged, where something sound is left.

    Raises:
        RunError: If a path holds no run, or only damaged ones.
    """
    found = {(folder, run.name): run for path in paths for folder, run in _runs_of(path, tell)}
    names = _names([folder for folder, _ in found])
    return [replace(run, name=f"{name} {run.name}".strip()) for name, run in zip(names, found.values(), strict=True)]


def _runs_of(given: str | Path, tell: Callable[[str], None]) -> list[tuple[Path, Run]]:
    """The runs of one path with their folders; the name of a run is what it has besides its folder's."""
    path = Path(given)
    if not str(given) or "\0" in str(given):
        raise RunError(f"{str(given)!r} is no name of a file or folder")
    if not os.path.exists(path):
        raise RunError(f"{path} does not exist")
    errors: list[str] = []
    found = _read(_recorded(path), errors) or _read(_logged(path), errors)
    if not found and errors:
        raise RunError(errors[0])
    if not found:
        raise RunError(
            f"{path} holds no gradient clipping: neither a history (meta.json, steps.npy), nor a metrics.csv, "
            "TensorBoard file or MLflow run with gradclip/clip_rate in it, nor a trainer_state.json of Transformers"
        )
    for line in [*errors, *(f"{folder}: {line}" for folder, run in found for line in run.damage)]:
        tell(line)
    return [(folder.resolve(), run) for folder, run in found]


def _read(sources: Iterable[_Source], errors: list[str]) -> list[tuple[Path, Run]]:
    """The runs of all sources that can be read, and why the others cannot."""
    found: list[tuple[Path, Run]] = []
    for source in sources:
        try:
            found += source()
        except (RunError, HistoryFormatError) as error:
            errors.append(str(error))
        except OSError as error:
            errors.append(f"cannot read {error.filename}: {error.strerror or error}")
    return found


def _recorded(path: Path) -> Iterator[_Source]:
    if path.name in {"meta.json", "steps.npy"}:
        path = path.parent
    # What the user named is read in any case: if it is not ours, that has to be said.
    folders = [path]
    if not (path / "steps.npy").exists():
        described = [one for one in _below(path, "meta.json") if _is_described(one / "meta.json")]
        folders = sorted({*described, *filter(is_ours, _below(path, "steps.npy"))})
    return (partial(_from_history, folder) for folder in folders)


def _is_described(path: Path) -> bool:
    with open_file(path) as file:
        return FORMAT.encode() in file.read(2**20)


def _from_history(folder: Path) -> list[tuple[Path, Run]]:
    return [(folder, from_history(History(folder)))]


def _logged(path: Path) -> Iterator[_Source]:
    if not path.is_dir():
        yield partial(_reader_of(path.name), path)
        return
    tables = _below(path, "metrics.csv")
    # A trainer with both loggers has written the same points twice.
    events = [folder for folder in _below(path, EVENTS, whole=False) if folder not in tables]
    yield from (partial(_from_csv, folder / "metrics.csv") for folder in tables)
    yield from (partial(_from_tensorboard, folder) for folder in events)
    yield from (partial(_from_mlflow, folder) for folder in _below(path, "meta.yaml") if (folder / "metrics").is_dir())
    yield from (partial(_from_database, folder / DATABASE) for folder in _below(path, DATABASE))
    yield from (partial(_from_state, folder / STATE) for folder in _latest(_below(path, STATE)))


def _reader_of(name: str) -> Callable[[Path], list[tuple[Path, Run]]]:
    if name.startswith(EVENTS):
        return _from_tensorboard
    return _from_state if name == STATE else _from_database if name.endswith(".db") else _from_csv


def _latest(folders: Sequence[Path]) -> list[Path]:
    """Of the checkpoints of one run, each of which holds all that was logged before it, the last one."""
    found: dict[Path, Path] = {}
    for folder in folders:
        kind, _, number = folder.name.rpartition("-")
        run = folder.parent if kind == "checkpoint" and number.isdecimal() else folder
        if run not in found or (found[run] != run and (run == folder or _number(folder) > _number(found[run]))):
            found[run] = folder
    return [*found.values()]


def _number(folder: Path) -> int:
    return int(folder.name.rpartition("-")[2])


def _below(path: Path, name: str, *, whole: bool = True) -> list[Path]:
    """Folders at or below `path` that hold a file of this name, or one that begins so, in the order of their names."""
    found = {
        Path(folder)
        for folder, _, files in os.walk(path)
        for file in files
        if (file == name if whole else file.startswith(name)) and os.path.isfile(os.path.join(folder, file))
    }
    return sorted(found)


def _names(folders: Sequence[Path]) -> list[str]:
    """What is different in the folders' paths; of a single one its last parts."""
    parts = [folder.parts for folder in folders]
    if len(set(parts)) < 2:
        return ["/".join(one[-3:]).lstrip("/") for one in parts]
    start, end = _shared(parts), _shared([one[::-1] for one in parts])
    # Where one path holds the other, its last part stays.
    return ["/".join(one[start : len(one) - end]) or one[-1] for one in parts]


def _shared(parts: Sequence[tuple[str, ...]]) -> int:
    """How many leading parts all paths have in common."""
    return next((place for place, ones in enumerate(zip(*parts, strict=False)) if len(set(ones)) > 1), 0)


def _from_csv(path: Path) -> list[tuple[Path, Run]]:
    points, damage = csv_points(path, _wanted)
    return [(folder, replace(run, damage=damage)) for folder, run in _runs(points, path)]


def _from_tensorboard(path: Path) -> list[tuple[Path, Run]]:
    """The runs in a folder of event files, or in one file."""
    return [*_runs(tensorboard_points(path, _wanted), path)]


def _from_mlflow(path: Path) -> list[tuple[Path, Run]]:
    points, damage = mlflow_points(path, _wanted)
    return [(folder, replace(run, damage=damage)) for folder, run in _runs(points, path)]


def _from_database(path: Path) -> list[tuple[Path, Run]]:
    """The runs in MLflow's database, each by its identity as if it had a folder."""
    found = database_runs(path)
    return [pair for run, (points, _) in found.items() for pair in _runs(points, path / run, folder=path / run)]


def _from_state(path: Path) -> list[tuple[Path, Run]]:
    """The run that Transformers logged: the norms of the steps at which it did, before clipping."""
    points, damage = state_points(path)
    if not points.get("grad_norm"):
        raise RunError(f"{path} holds no grad_norm, which Transformers logs from 4.38 on")
    steps = sorted(points["grad_norm"])

    def column(name: str) -> Numbers:
        return np.array([points.get(name, {}).get(step, np.nan) for step in steps], float)

    norm = column("grad_norm")
    bad = ~np.isfinite(norm)
    norm = np.where(bad, np.nan, norm)
    unknown, none = np.full(len(steps), np.nan), np.zeros(len(steps))
    run = Run(
        name="",
        each_step=True,
        step=np.array(steps, np.int64),
        norm=norm,
        norm_max=norm,
        norm_clipped=unknown,
        limit=unknown,
        coef=unknown,
        changed=unknown,
        skipped=none,
        nonfinite=bad.astype(float),
        overflows=none,
        loss=column("loss"),
        lr=column("learning_rate"),
        damage=damage,
    )
    return [(path.parent, run)]


def _prefixes(names: Iterable[str]) -> list[str]:
    """What the metrics of each callback and optimizer begin with, such as "gradclip/"."""
    return list(
        dict.fromkeys(name.removesuffix(mark) for name in names for mark in _MARKS if name.endswith(f"/{mark}"))
    )


def _wanted(names: Sequence[str]) -> list[str]:
    """All metrics of ours."""
    starts = tuple(start for prefix in _prefixes(names) for start in (prefix, *_of_scopes(prefix)))
    return [name for name in names if name.startswith(starts)]


def _of_scopes(prefix: str) -> tuple[str, ...]:
    """What norms of scopes begin with beside "gradclip/": "gradclip_norm/", and in 0.1.0 "gradclip/norm/"."""
    name, _, index = prefix[:-1].rpartition("/")
    by_index = (f"{name}_norm/{index}/",) if name and index.isdecimal() else ()
    return (f"{prefix[:-1]}_norm/", *by_index, f"{prefix}norm/")


def _runs(points: Points, path: Path, folder: Path | None = None) -> Iterator[tuple[Path, Run]]:
    prefixes = _prefixes(points)
    for prefix in prefixes:
        own = {name.removeprefix(prefix): values for name, values in points.items() if name.startswith(prefix)}
        starts = _of_scopes(prefix)
        scopes = {
            name.removeprefix(start): points[name] for start in starts for name in points if name.startswith(start)
        }
        if not any(own.get(mark) for mark in _MARKS):
            raise RunError(f"{path} names {prefix}{_RATE} but holds no value of it")
        run = _run(own, scopes, prefix, name=prefix[:-1] if len(prefixes) > 1 else "")
        yield folder or (path if path.is_dir() else path.parent), run


def _run(points: Points, scopes: Points, prefix: str, name: str) -> Run:
    steps = sorted({step for mark in _MARKS for step in points.get(mark, ())})

    def column(metric: str, points: Points = points) -> Numbers:
        values = points.get(metric, {})
        return np.array([values.get(step, np.nan) for step in steps], dtype=float)

    # What is beyond float32 is infinite, as in a history.
    with np.errstate(over="ignore"):
        norms = [column(scope, scopes).astype(np.float32) for scope in scopes]
    norm, largest = column("norm"), column("norm_max")
    index = prefix.split("/")[-2]
    return Run(
        name=name,
        # The mean of several norms equals the largest only if they are all the same; TensorBoard keeps float32.
        each_step=np.allclose(norm, largest, rtol=1e-5, atol=0, equal_nan=True),
        step=np.array(steps, dtype=np.int64),
        norm=norm,
        norm_max=largest,
        norm_clipped=column("norm_clipped"),
        limit=comparable(column("limit"), column("coef_min")),
        coef=column("coef_min"),
        changed=column(_RATE),
        skipped=_increments(column("skipped")),
        nonfinite=_increments(column("nonfinite")),
        overflows=_increments(column("overflows")),
        parts=(ScopePart(0, tuple(scopes), np.stack(norms, axis=1)),) if scopes else (),
        optimizer=int(index) if index.isdecimal() else None,
    )


def _increments(counts: Numbers) -> Numbers:
    """What was added at each point to a count since the start; one that falls has started again."""
    known = np.nan_to_num(counts)
    added = np.diff(known, prepend=0.0)
    return np.where(added < 0, known, added)
