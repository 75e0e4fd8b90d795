"""Finds and reads the runs below a path: histories, or else what Lightning's CSVLogger and TensorBoard kept.

A log event covers all steps since the one before: the norm is their mean. Where each step was logged a point is a step.
"""

import csv
import os
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import TypeAlias, cast

import numpy as np

from lightning_gradclip.record.history import FORMAT, History, HistoryFormatError, ScopePart
from lightning_gradclip.report import RunError
from lightning_gradclip.report.run import Numbers, Run, comparable, from_history

_EVENTS = "events.out.tfevents"
# Of every log event of ours one of these is there; without a finite step only the second.
_RATE, _MARKS = "clip_rate", ("clip_rate", "nonfinite")

# Of each metric the values by step.
_Points: TypeAlias = Mapping[str, Mapping[int, float]]


def find_runs(paths: Sequence[str | Path]) -> list[Run]:
    """All runs in or below history folders, log files, or folders that hold such, named so that they can be told apart.

    Raises:
        RunError: If a path holds no run, or a damaged one.
    """
    found = {(folder, run.name): run for path in paths for folder, run in _runs_of(Path(path))}
    names = _names([folder for folder, _ in found])
    return [replace(run, name=f"{name} {run.name}".strip()) for name, run in zip(names, found.values(), strict=True)]


def _runs_of(path: Path) -> list[tuple[Path, Run]]:
    """The runs of one path with their folders; the name of a run is what it has besides its folder's."""
    if not path.exists():
        raise RunError(f"{path} does not exist")
    try:
        found = list(_recorded(path)) or list(_logged(path))
    except HistoryFormatError as error:
        raise RunError(str(error)) from error
    except OSError as error:
        raise RunError(f"cannot read {error.filename or path}: {error.strerror or error}") from error
    if not found:
        raise RunError(
            f"{path} holds no gradient clipping: neither a history (meta.json, steps.npy), nor a metrics.csv or "
            "TensorBoard file with gradclip/clip_rate in it"
        )
    return [(folder.resolve(), run) for folder, run in found]


def _recorded(path: Path) -> Iterator[tuple[Path, Run]]:
    if path.name in {"meta.json", "steps.npy"}:
        path = path.parent
    # What the user named is read in any case: if it is not ours, that has to be said.
    folders = [path]
    if not (path / "steps.npy").exists():
        folders = [one for one in _below(path, "meta.json") if FORMAT.encode() in (one / "meta.json").read_bytes()]
    return ((folder, from_history(History(folder))) for folder in folders)


def _logged(path: Path) -> Iterator[tuple[Path, Run]]:
    if path.is_file():
        return _from_tensorboard(path) if path.name.startswith(_EVENTS) else _from_csv(path)
    tables = _below(path, "metrics.csv")
    # A trainer with both loggers has written the same points twice.
    events = [folder for folder in _below(path, _EVENTS) if folder not in tables]
    return chain(*(_from_csv(folder / "metrics.csv") for folder in tables), *map(_from_tensorboard, events))


def _below(path: Path, start: str) -> list[Path]:
    """Folders at or below `path` that hold a file whose name starts so, in the order of their names."""
    return sorted(Path(folder) for folder, _, files in os.walk(path) if any(one.startswith(start) for one in files))


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


def _from_csv(path: Path) -> Iterator[tuple[Path, Run]]:
    points: dict[str, dict[int, float]] = defaultdict(dict)
    try:
        with path.open(newline="", encoding="utf-8") as file:
            table = csv.DictReader(file, strict=True)
            prefixes, wanted = _ours(table.fieldnames or ())
            if not prefixes:
                return
            for row in table:
                for name in wanted:
                    if row[name]:
                        points[name][int(row["step"])] = float(row[name])
    except (csv.Error, UnicodeDecodeError) as error:
        raise RunError(f"{path} is damaged or no table: {error}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise RunError(f"{path} is no table of numbers by step as CSVLogger writes it: {error}") from error
    yield from _runs(points, prefixes, path)


def _from_tensorboard(path: Path) -> Iterator[tuple[Path, Run]]:
    """The runs in a folder of event files, or in one file."""
    try:
        from tensorboard.backend.event_processing import event_accumulator  # pyright: ignore[reportMissingTypeStubs]
    except ImportError as error:
        raise RunError(
            f"{path} was written for TensorBoard, which is not installed; pip install 'lightning-gradclip[tensorboard]'"
        ) from error
    # 0: every point, instead of a sample.
    events = event_accumulator.EventAccumulator(str(path), size_guidance={event_accumulator.SCALARS: 0})
    events.Reload()
    prefixes, wanted = _ours(cast("list[str]", events.Tags()["scalars"]))
    yield from _runs({tag: {one.step: one.value for one in events.Scalars(tag)} for tag in wanted}, prefixes, path)


def _ours(names: Sequence[str]) -> tuple[list[str], list[str]]:
    """What the metrics of each callback and optimizer begin with, such as "gradclip/", and all that begin so."""
    prefixes = list(
        dict.fromkeys(name.removesuffix(mark) for name in names for mark in _MARKS if name.endswith(f"/{mark}"))
    )
    wanted = tuple(start for prefix in prefixes for start in (prefix, *_of_scopes(prefix)))
    return prefixes, [name for name in names if name.startswith(wanted)]


def _of_scopes(prefix: str) -> tuple[str, ...]:
    """What norms of scopes begin with beside "gradclip/": "gradclip_norm/", and in 0.1.0 "gradclip/norm/"."""
    name, _, index = prefix[:-1].rpartition("/")
    by_index = (f"{name}_norm/{index}/",) if name and index.isdecimal() else ()
    return (f"{prefix[:-1]}_norm/", *by_index, f"{prefix}norm/")


def _runs(points: _Points, prefixes: list[str], path: Path) -> Iterator[tuple[Path, Run]]:
    for prefix in prefixes:
        own = {name.removeprefix(prefix): values for name, values in points.items() if name.startswith(prefix)}
        starts = _of_scopes(prefix)
        scopes = {
            name.removeprefix(start): points[name] for start in starts for name in points if name.startswith(start)
        }
        if not any(own.get(mark) for mark in _MARKS):
            raise RunError(f"{path} names {prefix}{_RATE} but holds no value of it")
        run = _run(own, scopes, prefix, name=prefix[:-1] if len(prefixes) > 1 else "")
        yield path if path.is_dir() else path.parent, run


def _run(points: _Points, scopes: _Points, prefix: str, name: str) -> Run:
    steps = sorted({step for mark in _MARKS for step in points.get(mark, ())})

    def column(metric: str, points: _Points = points) -> Numbers:
        values = points.get(metric, {})
        return np.array([values.get(step, np.nan) for step in steps], dtype=float)

    norms = [column(scope, scopes) for scope in scopes]
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
        parts=(ScopePart(0, tuple(scopes), np.stack(norms, axis=1).astype(np.float32)),) if scopes else (),
        optimizer=int(index) if index.isdecimal() else None,
    )


def _increments(counts: Numbers) -> Numbers:
    """What was added at each point to a count since the start; one that falls has started again."""
    known = np.nan_to_num(counts)
    added = np.diff(known, prepend=0.0)
    return np.where(added < 0, known, added)
