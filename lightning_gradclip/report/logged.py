"""Reads what loggers kept of clipping: Lightning's CSVLogger and TensorBoard.

A log event covers all steps since the one before: the norm is their mean. Where each step was logged a point is a step.
"""

import csv
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import cast

import numpy as np

from lightning_gradclip.record.history import ScopePart
from lightning_gradclip.report import RunError
from lightning_gradclip.report.run import Numbers, Run, comparable

EVENTS = "events.out.tfevents"
_MARK = "/clip_rate"

# Of each metric the values by step.
Points = Mapping[str, Mapping[int, float]]


def is_events(path: Path) -> bool:
    """Whether a file is one of TensorBoard's, by its name."""
    return path.name.startswith(EVENTS)


def from_csv(path: Path) -> Iterator[Run]:
    """The runs in a `metrics.csv`: one for each callback and optimizer.

    Raises:
        OSError: If the file cannot be read.
        RunError: If it is not a table of numbers by step.
    """
    points: dict[str, dict[int, float]] = defaultdict(dict)
    try:
        with path.open(newline="", encoding="utf-8") as file:
            table = csv.DictReader(file, strict=True)
            prefixes = _prefixes(table.fieldnames or ())
            if not prefixes:
                return
            wanted = [name for name in table.fieldnames or () if name.startswith(tuple(f"{one}/" for one in prefixes))]
            for row in table:
                for name in wanted:
                    if row[name]:
                        points[name][int(row["step"])] = float(row[name])
    except (csv.Error, UnicodeDecodeError) as error:
        raise RunError(f"{path} is damaged or no table: {error}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise RunError(f"{path} is no table of numbers by step as CSVLogger writes it: {error}") from error
    yield from _runs(points, prefixes, path)


def from_tensorboard(path: Path) -> Iterator[Run]:
    """The runs in a folder of TensorBoard's event files, or in one file.

    Raises:
        RunError: If tensorboard is not installed.
    """
    try:
        from tensorboard.backend.event_processing import event_accumulator  # pyright: ignore[reportMissingTypeStubs]
    except ImportError as error:
        raise RunError(
            f"{path} was written for TensorBoard, which is not installed; pip install 'lightning-gradclip[tensorboard]'"
        ) from error
    # 0: every point, instead of a sample.
    events = event_accumulator.EventAccumulator(str(path), size_guidance={event_accumulator.SCALARS: 0})
    events.Reload()
    tags = cast("list[str]", events.Tags()["scalars"])
    prefixes = _prefixes(tags)
    wanted = [tag for tag in tags if tag.startswith(tuple(f"{one}/" for one in prefixes))]
    yield from _runs({tag: {one.step: one.value for one in events.Scalars(tag)} for tag in wanted}, prefixes, path)


def _prefixes(names: Iterable[str]) -> list[str]:
    return [name.removesuffix(_MARK) for name in names if name.endswith(_MARK)]


def _runs(points: Points, prefixes: list[str], path: Path) -> Iterator[Run]:
    for prefix in prefixes:
        if not points.get(prefix + _MARK):
            raise RunError(f"{path} names {prefix + _MARK} but holds no value of it")
        yield _run(points, prefix, name=prefix if len(prefixes) > 1 else "")


def _run(points: Points, prefix: str, name: str) -> Run:
    steps = sorted(points[prefix + _MARK])

    def column(metric: str) -> Numbers:
        values = points.get(f"{prefix}/{metric}", {})
        return np.array([values.get(step, np.nan) for step in steps], dtype=float)

    scopes = [metric for metric in points if metric.startswith(f"{prefix}/norm/")]
    names = tuple(metric.removeprefix(f"{prefix}/norm/") for metric in scopes)
    norms = np.stack([column(f"norm/{one}") for one in names], axis=1) if names else np.zeros((len(steps), 0))
    norm, largest = column("norm"), column("norm_max")
    index = prefix.rpartition("/")[2]
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
        changed=column(_MARK[1:]),
        skipped=_increments(column("skipped")),
        nonfinite=_increments(column("nonfinite")),
        overflows=_increments(column("overflows")),
        parts=(ScopePart(0, names, norms.astype(np.float32)),) if names else (),
        optimizer=int(index) if index.isdecimal() else None,
    )


def _increments(counts: Numbers) -> Numbers:
    """What was added at each point to a count since the start; one that falls has started again."""
    known = np.nan_to_num(counts)
    added = np.diff(known, prepend=0.0)
    return np.where(added < 0, known, added)
