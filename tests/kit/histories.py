"""Rows of a history from which the step can be told, and histories of given norms. Torch is not needed."""

from pathlib import Path

import numpy as np

from lightning_gradclip.record.history import CONTEXT, STEP, blank
from lightning_gradclip.record.history_writer import HistoryWriter

Array = np.ndarray

COLUMNS = tuple(name for name in STEP.names or () if name not in {"step", *CONTEXT})


def rows_of(steps: Array) -> Array:
    """A row for each step, from which the step can be told."""
    steps = np.asarray(steps, dtype=float)
    columns = {
        "norm": steps + 0.25,
        "norm_clipped": steps + 0.125,
        "limit": np.full(len(steps), 3.0),
        "coef": 1 / (1 + steps),
    }
    columns |= {"clipped": steps % 2, "finite": steps % 3 > 0, "skipped": steps % 5 > 0, "changed": steps % 7 > 0}
    columns |= {"overflow": steps % 11 > 0}
    return np.stack([columns[name] for name in COLUMNS], axis=1)


def names_at(step: int) -> tuple[str, ...]:
    """The scopes of a step: from 100 on there is one more."""
    return ("head",) if step < 100 else ("body", "head")


def norms_of(steps: Array) -> tuple[tuple[str, ...], Array]:
    names = names_at(int(steps[0]))
    return names, np.stack([steps + {"head": 0.5, "body": 0.75}[name] for name in names], axis=1)


def expected(steps: Array) -> Array:
    packed = blank(len(steps))
    packed["step"] = steps
    for name, column in zip(COLUMNS, rows_of(steps).T, strict=True):
        packed[name] = column
    packed["threshold"] = packed["limit"]
    return packed


def record(
    folder: Path,
    norms: Array,
    limit: float = np.inf,
    *,
    scopes: dict[str, Array] | None = None,
    action: str = "clip",
    method: object | None = None,
    optimizer: int | None = None,
) -> Path:
    """The history of a run with these norms, clipped to a fixed limit; a step that is not finite is dropped.

    Returns:
        The folder.
    """
    finite = np.isfinite(norms)
    over = finite & (norms > limit)
    coef = np.divide(limit, norms + 1e-6, out=np.ones(len(norms)), where=over)
    dropped = ~finite | (over if action == "skip" else False)
    columns = {
        "norm": norms,
        "norm_clipped": np.where(dropped, 0.0, np.where(finite, norms, 0.0) * coef),
        "limit": np.full(len(norms), limit),
        "coef": np.where(dropped, 0.0, coef),
        "clipped": over,
        "finite": finite,
        "skipped": dropped,
        "changed": over | dropped,
        "overflow": np.zeros(len(norms)),
    }
    rows = np.stack([columns[name] for name in COLUMNS], axis=1)
    measured = {} if scopes is None else scopes
    options = {"action": action, "method": method, "optimizer": optimizer}
    with HistoryWriter(folder, columns=COLUMNS, measure_per="layer" if scopes else None, **options) as writer:
        of_scopes = np.stack(list(measured.values()), axis=1) if measured else None
        writer.append(np.arange(len(norms)), rows, tuple(measured), of_scopes)
    return folder
