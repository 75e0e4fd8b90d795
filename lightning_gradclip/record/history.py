"""The record of a run, step by step, in a folder beside its logs; written and read with NumPy alone.

    meta.json            what was recorded: format and version, and the settings of each part of the run
    steps.npy            one row a step: `pandas.DataFrame(numpy.load("steps.npy"))`
    scopes.0.npy         with measure_per: the norms of each scope at each step, float32 `(rows, scopes)`, NaN if absent
    scopes.0.json        the names of these scopes, and the row of steps.npy that the first row belongs to
    scopes.1.npy         the same from where the scopes changed, for example when layers were unfrozen
    thresholds.0.npy     where a method has several scopes: the norm from which on each is clipped, as for scopes
    shares.npy           at steps that stand out: the three layers with the largest share of the squared norm
    owner.json           who writes or wrote here; see `owner`

A row of steps.npy takes 88 bytes: 88 MB for a million steps. Norms are float64, as clipping computes them, so that a
decision can be repeated from the record, and so that an exploding norm has a number beyond the 3e38 of float32. Norms
of scopes are there to be looked at, and there are many of them: float32.

Version 1 ended its rows with `overflow`. It reads as if nobody had known the rest, and a run that goes on in such a
folder writes the kept rows anew.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from lightning_gradclip.record.files import (
    HistoryError,
    HistoryFormatError,
    holds_rows_of,
    read_header,
    read_json,
    read_rows,
)

__all__ = ["FORMAT", "SHARES", "STEP", "VERSION", "History", "HistoryError", "HistoryFormatError", "ScopePart"]

FORMAT, VERSION = "lightning-gradclip history", 2
_SETTINGS = {"from_step", "method", "action", "norm_type", "measure_per"}
_ACTIONS = ("clip", "skip", "observe")
STEP = np.dtype(
    [
        ("step", "<i8"),  # on Lightning's own axis, as in the loggers; several optimizer steps of a batch share it
        ("norm", "<f8"),
        ("norm_clipped", "<f8"),
        ("limit", "<f8"),
        ("coef", "<f8"),
        ("clipped", "<f8"),
        ("finite", "?"),
        ("skipped", "?"),
        ("changed", "?"),
        ("overflow", "?"),
        ("threshold", "<f8"),  # the norm from which on a step is clipped; NaN where there are several scopes
        ("loss", "<f8"),  # mean over the accumulated batches of this rank; NaN where nobody told
        ("lr", "<f8"),  # of the first group of the optimizer's; NaN where nobody told
        ("epoch", "<i4"),  # -1 where nobody told
        ("batch", "<i8"),  # index in its epoch of the first of the accumulated batches; -1 where nobody told
    ]
)
# What came with version 2, in the order in which it is handed over.
CONTEXT = ("threshold", "loss", "lr", "epoch", "batch")
STEP_1 = np.dtype([(name, STEP[name]) for name in STEP.names or () if name not in CONTEXT])
NORM = np.dtype("<f4")
SHARES = np.dtype([("row", "<i8"), ("scope", "S200", (3,)), ("share", "<f4", (3,))])

Steps: TypeAlias = npt.NDArray[np.void]
Norms: TypeAlias = npt.NDArray[np.float32]
_PART = re.compile(r"[a-z]+\.(\d{1,9})\.(json|npy)", re.ASCII)


@dataclass(frozen=True)
class ScopePart:
    """Numbers of some scopes over some consecutive steps.

    Attributes:
        first_row: The row of `History.steps` that the first row of `norms` belongs to.
        names: The scopes, `S` of them.
        norms: Norms before clipping, or thresholds, float32 `(rows, S)`, NaN where a scope had no gradient; mapped from
            the file.
    """

    first_row: int
    names: tuple[str, ...]
    norms: Norms


class History:
    """Reads what a `HistoryWriter` wrote, also while it goes on writing. What is damaged is left out, and said.

    Args:
        folder: The folder of one optimizer's history.

    Raises:
        OSError: If a file cannot be read.
        HistoryFormatError: If this is not a history, or one of another version, or nothing in it is sound.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        damage: list[str] = []
        self.meta = _described(self.folder, damage)
        """Format, version, name and optimizer of the callback; `segments`: the settings, each `from_step` on."""
        if _is_count(lost := self.meta.get("lost_before")):
            damage.append(f"the folder was deleted in mid-run: the steps before {lost:,} are lost")
        # Parts are written before the rows they belong to, so they are read after them.
        steps, counted = read_steps(self.folder)
        if len(steps) < counted:
            damage.append(f"steps.npy holds {len(steps):,} of {counted:,} rows")
        sound = _sound(steps)
        if sound is not None:
            damage.append(f"steps.npy: {len(steps) - int(sound.sum()):,} of {len(steps):,} rows were not written so")
        self.steps = steps if sound is None else steps[sound]
        """One row a step, `(rows,)`, with the fields of `STEP`."""
        self.parts = tuple(_read_parts(self.folder, "scopes", len(steps), sound, damage))
        """The norms of the measured scopes; none without `measure_per`."""
        self.thresholds = tuple(_read_parts(self.folder, "thresholds", len(steps), sound, damage))
        """From which norm on each scope is clipped, where a method has several; else it is in `steps`."""
        self.shares = _read_shares(self.folder, len(steps), sound, damage)
        """At some steps, with the fields of `SHARES`: the scopes with the largest share of the squared norm."""
        self.damage = tuple(damage)
        """What is damaged or missing, a line each."""

    def scope_norms(self) -> tuple[tuple[str, ...], Norms]:
        """All parts joined: names in order of appearance, `S`, and norms, `(len(steps), S)`, NaN where absent."""
        return self._joined(self.parts)

    def scope_thresholds(self) -> tuple[tuple[str, ...], Norms]:
        """The same for the thresholds."""
        return self._joined(self.thresholds)

    def _joined(self, parts: Sequence[ScopePart]) -> tuple[tuple[str, ...], Norms]:
        names = tuple(dict.fromkeys(name for part in parts for name in part.names))
        place = {name: column for column, name in enumerate(names)}
        joined = np.full((len(self.steps), len(names)), np.nan, NORM)
        for part in parts:
            rows = slice(part.first_row, part.first_row + len(part.norms))
            joined[rows, [place[name] for name in part.names]] = part.norms
        return names, joined


def read_meta(folder: Path) -> dict[str, Any]:
    """What `meta.json` says, once it is sure that this version understands it; else a HistoryFormatError."""
    damage: list[str] = []
    meta = _described(folder, damage, missing_ok=False)
    if damage:
        raise HistoryFormatError(f"{folder / 'meta.json'} is damaged: {damage[0]}")
    return meta


def _described(folder: Path, damage: list[str], *, missing_ok: bool = True) -> dict[str, Any]:
    path = folder / "meta.json"
    unknown: dict[str, Any] = {"format": FORMAT, "version": VERSION, "name": "", "optimizer": None, "segments": []}
    try:
        meta = read_json(path)
    except (FileNotFoundError, NotADirectoryError) as error:
        # Nobody else has files of such rows.
        if not (missing_ok and is_ours(folder)):
            raise HistoryFormatError(f"{folder} is not a history: it has no meta.json") from error
        damage.append("meta.json is missing, so the settings of the run are unknown")
        return unknown
    except HistoryFormatError as error:
        if not (missing_ok and is_ours(folder)):
            raise
        damage.append(f"{error}, so the settings of the run are unknown")
        return unknown
    if not isinstance(meta, dict) or meta.get("format") != FORMAT:
        raise HistoryFormatError(f"{path} was not written by lightning-gradclip; name the folder of a history")
    if meta.get("version") not in (1, VERSION) or isinstance(meta["version"], bool):
        raise HistoryFormatError(
            f"{folder} is a history of version {meta.get('version')!r}, written by lightning-gradclip "
            f"{meta.get('package')!r}, and this version reads 1 and {VERSION}; use that release, or another folder"
        )
    return unknown | meta | _checked(meta, damage)


def _checked(meta: Mapping[str, Any], damage: list[str]) -> dict[str, Any]:
    """Of what a page or a writer relies on, what is as they expect it."""
    segments, optimizer = meta.get("segments"), meta.get("optimizer")
    listed: list[Any] = segments if isinstance(segments, list) else []
    sound = [one for one in listed if _is_segment(one)]
    if not sound or len(sound) < len(listed):
        damage.append(f"meta.json does not say which settings were used: {len(sound)} of {len(listed)} can be read")
    known = optimizer is None or (_is_count(optimizer) and optimizer < 10**6)
    if not known:
        damage.append("meta.json does not say which optimizer it is about")
    return {"segments": sound, "optimizer": optimizer if known else None}


def _is_segment(one: Any) -> bool:
    if not isinstance(one, dict) or not one.keys() >= _SETTINGS or one["action"] not in _ACTIONS:
        return False
    method, norm_type = one["method"], one["norm_type"]
    described = method is None or (
        isinstance(method, dict) and isinstance(method.get("class"), str) and isinstance(method.get("settings"), dict)
    )
    number = norm_type == "inf" or (isinstance(norm_type, (int, float)) and norm_type > 0)
    return described and number and _is_count(one["from_step"])


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def is_ours(folder: Path) -> bool:
    """Whether the folder holds rows of ours, whatever else is missing."""
    try:
        return _row_of(read_header(folder / "steps.npy")[0]) is not None
    except (OSError, HistoryFormatError):
        return False


def _row_of(header: bytes) -> np.dtype | None:
    return next((row for row in (STEP, STEP_1) if holds_rows_of(header, row) is not None), None)


def read_steps(folder: Path) -> tuple[Steps, int]:
    """The complete rows of `steps.npy`, `(rows,)`, mapped from the file, and how many it counts.

    Rows of version 1 are copied into those of this version.
    """
    path = folder / "steps.npy"
    try:
        row = _row_of(read_header(path)[0])
    except FileNotFoundError as error:
        raise HistoryFormatError(f"{folder} holds no steps: {path} is missing") from error
    rows, counted = read_rows(path, row or STEP)
    return (widened(rows) if row == STEP_1 else rows), counted


def widened(rows: Steps) -> Steps:
    """Rows of version 1 as those of this one, in which nobody told the rest."""
    wide = blank(len(rows))
    for name in STEP_1.names or ():
        wide[name] = rows[name]
    wide["threshold"] = wide["limit"]
    return wide


def blank(count: int) -> Steps:
    """Rows of which nothing is known."""
    rows = np.zeros(count, STEP)
    rows["loss"] = rows["lr"] = rows["threshold"] = np.nan
    rows["epoch"] = rows["batch"] = -1
    return rows


def _sound(steps: Steps) -> npt.NDArray[np.bool_] | None:
    """Which rows a writer can have written: steps never fall; None if that holds for all, which it nearly always does.

    Of rows that contradict each other those stay that are more.
    """
    step = np.asarray(steps["step"])
    possible = (step >= 0) & ~(np.asarray(steps["norm"]) < 0)
    # A disk that lost power may give zeros for what it was given: no step has neither a norm nor a factor.
    flags = steps["finite"] | steps["changed"] | steps["skipped"]
    possible &= flags | (steps["norm"] != 0) | (steps["coef"] != 0) | (steps["limit"] != 0)
    if possible.all() and (step[1:] >= step[:-1]).all():
        return None
    least, most = np.where(possible, step, -1), np.where(possible, step, np.iinfo(np.int64).max)
    above = possible & (step >= np.maximum.accumulate(least))
    below = possible & (step <= np.minimum.accumulate(most[::-1])[::-1])
    return above if above.sum() >= below.sum() else below


def norms_of(scopes: Sequence[str]) -> np.dtype:
    """The type of the rows of a part: of each scope its norm."""
    return np.dtype((NORM, (len(scopes),)))


def numbered(folder: Path, kind: str) -> list[int]:
    """The numbers of the parts of this kind, rising."""
    found = (_PART.fullmatch(path.name) for path in folder.glob(f"{kind}.*"))
    return sorted({int(one[1]) for one in found if one is not None})


def described_part(path: Path) -> tuple[int, tuple[str, ...]]:
    """First row and names of a part, from its `.json`; a HistoryFormatError if it does not say them."""
    about = read_json(path)
    first, names = (about.get("first_row"), about.get("names")) if isinstance(about, dict) else (None, None)
    if not (_is_count(first) and isinstance(names, list) and names and all(isinstance(one, str) for one in names)):
        raise HistoryFormatError(f"{path} is damaged: it does not name the scopes of a part")
    return int(first or 0), tuple(names)


def _read_parts(
    folder: Path, kind: str, total: int, sound: npt.NDArray[np.bool_] | None, damage: list[str]
) -> Iterator[ScopePart]:
    numbers, end = numbered(folder, kind), 0
    if numbers and len(numbers) <= numbers[-1]:
        damage.append(f"{numbers[-1] + 1 - len(numbers)} of {numbers[-1] + 1} parts of {kind} are missing")
    for number in numbers:
        path = folder / f"{kind}.{number}.json"
        try:
            first, names = described_part(path)
            # A kill may have come between the two files, or before the rows that they belong to.
            if first >= total:
                continue
            norms, counted = read_rows(path.with_suffix(".npy"), norms_of(names))
        except (OSError, HistoryFormatError) as error:
            damage.append(_reason(error))
            continue
        if first < end:
            damage.append(f"{path.name} is about row {first:,}, which a part before it is about too: left out")
            continue
        if len(norms) < counted:
            damage.append(f"{path.stem}.npy holds {len(norms):,} of {counted:,} rows")
        norms = norms[: total - first]
        end = first + len(norms)
        if sound is not None:
            norms, first = norms[sound[first:end]], int(sound[:first].sum())
        if len(norms):
            yield ScopePart(first, names, norms)


def _read_shares(folder: Path, total: int, sound: npt.NDArray[np.bool_] | None, damage: list[str]) -> Steps:
    path = folder / "shares.npy"
    try:
        shares = read_rows(path, SHARES)[0]
    except FileNotFoundError:
        return np.zeros(0, SHARES)
    except (OSError, HistoryFormatError) as error:
        damage.append(_reason(error))
        return np.zeros(0, SHARES)
    row = np.asarray(shares["row"])
    impossible = int(((row < 0) | (np.diff(row, prepend=-1) <= 0)).sum())
    if impossible:
        damage.append(f"shares.npy: {impossible:,} of {len(row):,} rows were not written so; all are left out")
        return np.zeros(0, SHARES)
    shares = np.array(shares[row < total])
    if sound is not None:
        shares = shares[sound[shares["row"]]]
        shares["row"] = (np.cumsum(sound) - 1)[shares["row"]]
    return shares


def _reason(error: Exception) -> str:
    return f"{error.filename}: {error.strerror}" if isinstance(error, OSError) else str(error)
