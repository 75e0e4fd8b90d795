"""Runs side by side: what differs in their settings, how a metric ended, and what clipping did in each.

A folder with a `.hydra` is one run, with all that lies below it, also if nothing clipped there; a run in MLflow's
store is one; and where neither is found, each run that `report` would show.
"""

import os
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from lightning_gradclip.record.files import HistoryFormatError
from lightning_gradclip.report import RunError
from lightning_gradclip.report.find import find_runs
from lightning_gradclip.report.logs import (
    DATABASE,
    EVENTS,
    STATE,
    Points,
    csv_points,
    database_runs,
    mlflow_params,
    mlflow_points,
    state_points,
    tensorboard_points,
)
from lightning_gradclip.report.run import Run

# Words in the name of a metric of which more is better.
_HIGHER = {"acc", "accuracy", "auc", "auroc", "bleu", "f1", "iou", "map", "precision", "r2", "recall", "return"}.union(
    {"reward", "rouge", "score"}
)


@dataclass(frozen=True)
class Compared:
    """One run; NaN or None where nobody knows."""

    run: str
    settings: Mapping[str, str]
    """What is not the same in all runs that are compared."""
    last: float
    """The metric at the end."""
    best: float
    best_step: int | None
    steps: int | None
    clip_rate: float
    median: float
    largest: float
    dropped: int | None


@dataclass(frozen=True)
class _Job:
    """What was found of one run."""

    name: str
    settings: Mapping[str, str]
    points: Points
    run: Run | None


def compare(
    runs: str | Path | Sequence[str | Path],
    metric: str | None = None,
    mode: str | None = None,
    tell: Callable[[str], None] = warnings.warn,
) -> list[Compared]:
    """Runs side by side, in the order of their names.

    Args:
        runs: A folder that holds them, such as that of a Hydra multirun or of MLflow, or several.
        metric: Name of the metric that a logger kept, such as "val/loss"; None: none is looked for.
        mode: Which value is the best, "min" or "max"; None: the highest of what is called accuracy, return, score or
            the like, else the lowest.
        tell: Called with a line about each thing that is damaged or missing.

    Raises:
        RunError: If no run is found, or none with that metric.
    """
    paths = [runs] if isinstance(runs, (str, Path)) else list(runs)
    jobs = [job for path in paths for job in _jobs(Path(path), tell)]
    if metric is not None:
        _require_metric(metric, jobs)
    differing = _differing([job.settings for job in jobs])
    highest = mode == "max" if mode else is_higher_better(metric or "")
    return [_compared(job, differing, metric, highest=highest) for job in jobs]


def is_higher_better(metric: str) -> bool:
    """Whether more is better of a metric of this name."""
    words = "".join(letter if letter.isalnum() else " " for letter in metric.lower()).split()
    return any(word in _HIGHER for word in words)


def as_row(one: Compared) -> dict[str, Any]:
    """A run in types that JSON and CSV know, a setting each in a column of its own."""
    numbers = {name: value for name, value in vars(one).items() if name not in {"run", "settings"}}
    known = {
        name: None if isinstance(value, float) and not np.isfinite(value) else value for name, value in numbers.items()
    }
    return {"run": one.run, **one.settings, **known}


def _require_metric(metric: str, jobs: Sequence[_Job]) -> None:
    names = sorted({name for job in jobs for name, values in job.points.items() if values})
    if metric not in names:
        near = get_close_matches(metric, names, 3) or [name for name in names if not name.startswith("gradclip")][:8]
        known = f"did you mean {' or '.join(near)}?" if near else "no logger kept any"
        raise RunError(f"no run holds the metric {metric!r}: {known}")


def _differing(settings: Sequence[Mapping[str, str]]) -> list[str]:
    names = dict.fromkeys(name for one in settings for name in one)
    return [name for name in names if len({one.get(name) for one in settings}) > 1]


def _compared(job: _Job, differing: Iterable[str], metric: str | None, *, highest: bool) -> Compared:
    values = {step: value for step, value in sorted(job.points.get(metric or "", {}).items()) if np.isfinite(value)}
    best = None
    if values:
        best = max(values, key=values.__getitem__) if highest else min(values, key=values.__getitem__)
    run = job.run
    sizes = np.empty(0) if run is None else run.norm_max[np.isfinite(run.norm_max)]
    norms = np.empty(0) if run is None else run.norm[np.isfinite(run.norm)]
    rated = run is not None and np.isfinite(run.changed).any()
    return Compared(
        run=job.name,
        settings={name: job.settings.get(name, "-") for name in differing},
        last=[*job.points.get(metric or "", {0: np.nan}).items()][-1][1] if values else np.nan,
        best=np.nan if best is None else values[best],
        best_step=best,
        steps=None if run is None or not run.each_step else len(run),
        clip_rate=float(np.nanmean(run.changed)) if run is not None and rated else np.nan,
        median=float(np.median(norms)) if len(norms) else np.nan,
        largest=float(sizes.max()) if len(sizes) else np.nan,
        dropped=None if run is None else int(run.skipped.sum()),
    )


def _jobs(path: Path, tell: Callable[[str], None]) -> list[_Job]:
    """The runs at or below a path."""
    if not os.path.lexists(path):
        raise RunError(f"{path} does not exist")
    folders = _holding(path, ".hydra") if path.is_dir() else []
    jobs = [job for folder in folders for job in _job(folder, path, _overrides(folder, tell), tell)]
    if jobs:
        return jobs
    stored = [folder for folder in _holding(path, "metrics") if (folder / "meta.yaml").is_file()]
    jobs = [job for folder in stored for job in _job(folder, path, mlflow_params(folder), tell)]
    for database in [path] if path.name.endswith(".db") else _files(path, DATABASE):
        found = {run.name: run for run in _runs(database, tell)}
        for run, (points, params) in database_runs(database).items():
            own = next((one for name, one in found.items() if run in name), None)
            jobs.append(_Job(run, params, points, own if own or len(found) != 1 else next(iter(found.values()))))
    return jobs or _loose(path, tell)


def _loose(path: Path, tell: Callable[[str], None]) -> list[_Job]:
    """Runs that lie about without a `.hydra`: each folder in which a logger kept something, or a history lies."""
    base = path if path.is_dir() else path.parent
    marks = ("metrics.csv", "hparams.yaml", STATE)
    folders = {one.parent for mark in marks for one in _files(path, mark)}
    folders |= {one.parent for one in _files(path, EVENTS, whole=False)}
    folders |= {one.parent for one in _files(path, "steps.npy") if not any(up in folders for up in one.parents)}
    jobs = [job for folder in sorted(folders) for job in _job(folder, base, _hparams(folder, tell), tell)]
    if not jobs:
        raise RunError(f"{path} holds no run: neither a history nor what a logger kept")
    return jobs


def _job(folder: Path, base: Path, settings: Mapping[str, str], tell: Callable[[str], None]) -> list[_Job]:
    """The runs of one folder: one, but for several optimizers or callbacks."""
    name = folder.relative_to(base).as_posix() if folder != base else folder.resolve().name
    points = _points(folder, tell)
    runs = _runs(folder, tell)
    if not runs:
        return [_Job(name, settings, points, None)] if points else []
    if len(runs) == 1:
        return [_Job(name, {**settings, **_method(runs[0], settings)}, points, runs[0])]
    return [_Job(f"{name} {run.name}", {**settings, **_method(run, settings)}, points, run) for run in runs]


def _runs(folder: Path, tell: Callable[[str], None]) -> list[Run]:
    try:
        return find_runs([folder], tell)
    except RunError:
        # A run that did not clip is compared by its metric.
        return []


def _method(run: Run, settings: Mapping[str, str]) -> dict[str, str]:
    """How it was clipped, where no other setting says it."""
    if settings or not run.settings:
        return {}
    method = run.settings["method"]
    if method is None:
        return {"method": "none"}
    return {"method": f"{method['class']}({', '.join(f'{key}={value}' for key, value in method['settings'].items())})"}


def _points(folder: Path, tell: Callable[[str], None]) -> Points:
    """All that the loggers kept below a folder, under the first logger's word where two say the same."""
    sources: list[Callable[[], tuple[Points, tuple[str, ...]]]] = []
    sources += [lambda one=one: csv_points(one, list) for one in _files(folder, "metrics.csv")]
    events = {one.parent for one in _files(folder, EVENTS, whole=False)}
    sources += [lambda one=one: (tensorboard_points(one, list), ()) for one in sorted(events)]
    stored = [one for one in _holding(folder, "metrics") if (one / "meta.yaml").is_file()]
    sources += [lambda one=one: mlflow_points(one, list) for one in stored]
    sources += [lambda one=one: state_points(one) for one in _files(folder, STATE)[-1:]]
    found: dict[str, Mapping[int, float]] = {}
    for source in sources:
        try:
            points, damage = source()
        except (RunError, HistoryFormatError, OSError) as error:
            points, damage = {}, (str(error),)
        for line in damage:
            tell(f"{folder}: {line}")
        found = {**{name: values for name, values in points.items() if values}, **found}
    return found


def _overrides(folder: Path, tell: Callable[[str], None]) -> dict[str, str]:
    """What the command line of a Hydra application set."""
    content = _yaml(folder / ".hydra" / "overrides.yaml", tell)
    words = [one for one in content if isinstance(one, str)] if isinstance(content, list) else []
    return {name.lstrip("+~"): value for name, _, value in (word.partition("=") for word in words)}


def _hparams(folder: Path, tell: Callable[[str], None]) -> dict[str, str]:
    """What Lightning's loggers kept of the hyperparameters, nested ones with dots."""
    content = _yaml(folder / "hparams.yaml", tell)
    return dict(_flat(content)) if isinstance(content, dict) else {}


def _flat(content: Mapping[Any, Any], start: str = "") -> Iterable[tuple[str, str]]:
    for name, value in content.items():
        if isinstance(value, dict) and start.count(".") < 8:
            yield from _flat(value, f"{start}{name}.")
        else:
            yield f"{start}{name}", str(value)


def _yaml(path: Path, tell: Callable[[str], None]) -> Any:
    if not path.is_file() or path.stat().st_size > 2**20:
        return None
    try:
        return yaml.safe_load(path.read_bytes())
    except (yaml.YAMLError, RecursionError, ValueError, OSError) as error:
        tell(f"{path} cannot be read: {str(error).splitlines()[0]}")
        return None


def _holding(path: Path, name: str) -> list[Path]:
    """Folders at or below a path that hold a folder of this name, in the order of their names."""
    found = [Path(folder) for folder, inner, _ in os.walk(path) if name in inner]
    return sorted(found, key=_natural)


def _files(path: Path, name: str, *, whole: bool = True) -> list[Path]:
    if path.is_file():
        return [path] if path.name == name or (not whole and path.name.startswith(name)) else []
    found = [
        Path(folder, file)
        for folder, _, files in os.walk(path)
        for file in files
        if (file == name if whole else file.startswith(name)) and os.path.isfile(os.path.join(folder, file))
    ]
    return sorted(found, key=_natural)


def _natural(path: Path) -> list[tuple[int, int, str]]:
    """Ten after nine."""
    return [(0, int(part), "") if part.isdecimal() and part.isascii() else (1, 0, part) for part in path.parts]
