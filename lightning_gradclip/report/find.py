"""Finds the runs below a path: histories, or else what a CSV or TensorBoard logger kept."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from lightning_gradclip.record.history import FORMAT, History, HistoryFormatError
from lightning_gradclip.report import RunError, logged
from lightning_gradclip.report.run import Run, from_history


def find_runs(paths: Sequence[str | Path]) -> list[Run]:
    """All runs in or below each path, named so that they can be told apart.

    Args:
        paths: History folders, log files, or folders that hold such.

    Raises:
        RunError: If a path holds no run, or a damaged one.
    """
    found = {(folder, run.name): run for path in paths for folder, run in _runs_of(Path(path))}
    names = _names([folder for folder, _ in found])
    return [
        replace(run, name=f"{name} {metric}".strip())
        for name, (_, metric), run in zip(names, found, found.values(), strict=True)
    ]


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
    if (path / "steps.npy").exists():
        # The user named it: if it is not ours, that has to be said.
        yield path, from_history(History(path))
        return
    for folder in _below(path, "meta.json"):
        if FORMAT.encode() in (folder / "meta.json").read_bytes():
            yield folder, from_history(History(folder))


def _logged(path: Path) -> Iterator[tuple[Path, Run]]:
    if path.is_file():
        reading = logged.from_tensorboard if logged.is_events(path) else logged.from_csv
        yield from ((path.parent, run) for run in reading(path))
        return
    tables = _below(path, "metrics.csv")
    for folder in tables:
        yield from ((folder, run) for run in logged.from_csv(folder / "metrics.csv"))
    for folder in _below(path, logged.EVENTS):
        # A trainer with both loggers has written the same points twice.
        if folder not in tables:
            yield from ((folder, run) for run in logged.from_tensorboard(folder))


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
