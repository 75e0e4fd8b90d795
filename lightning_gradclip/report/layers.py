"""Norms of the scopes over time, in few columns, and which scopes stand out."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lightning_gradclip.report.run import Numbers, Run

_COLUMNS = 240
# So many steps of each column are looked at for its median; its largest norm is that of all steps.
_SAMPLED = 32
# A spike is held against the median of its column and so many on both sides.
_REACH = 3
# What makes a scope stand out. Layers of one network often differ tenfold, seldom a thousandfold.
VANISHING, EXPLODING, FALLEN, RISEN, DOMINANT, SPIKING = 1e-3, 1e3, 1e-2, 1e2, 0.8, 1e2


@dataclass(frozen=True)
class Heat:
    """Norms of `s` scopes in `t` columns of consecutive steps."""

    names: tuple[str, ...]
    step: npt.NDArray[np.int64]  # the first of each column, `(t,)`
    median: Numbers  # `(s, t)`; NaN where the scope had no gradient
    largest: Numbers  # `(s, t)`

    @property
    def levels(self) -> tuple[Numbers, Numbers]:
        """The norm of each scope in the first and in the last fifth of the run, `(s,)` each; NaN where absent."""
        fifth = max(1, len(self.step) // 5)
        return median(self.median[:, :fifth].T), median(self.median[:, -fifth:].T)


@dataclass(frozen=True)
class Finding:
    """Something about one scope."""

    scope: str
    kind: str  # "vanished", "vanishing", "exploding", "fallen", "risen", "dominant" or "spiking"
    number: float  # how much, as a factor or share
    norm: float  # the one that shows it


def heat(run: Run) -> Heat | None:
    """The norms of the run's scopes; None where none were recorded."""
    names = dict.fromkeys(name for part in run.parts for name in part.names)
    if not names:
        return None
    starts = np.unique(np.linspace(0, len(run), min(_COLUMNS, len(run)), endpoint=False).astype(np.int64))
    edges = np.append(starts, len(run))
    place = {name: row for row, name in enumerate(names)}
    medians, largest = np.full((2, len(names), len(starts)), np.nan)
    for part in run.parts:
        rows = [place[name] for name in part.names]
        bounds = (edges - part.first_row).clip(0, len(part.norms))
        for column in np.flatnonzero(np.diff(bounds)):
            # Where two parts meet in a column the later one counts.
            block = part.norms[bounds[column] : bounds[column + 1]]
            sample = block[:: max(1, len(block) // _SAMPLED)]
            medians[rows, column] = median(np.where(np.isfinite(sample), sample, np.nan))
            largest[rows, column] = np.fmax.reduce(block, axis=0)
    return Heat(tuple(names), run.step[starts], medians, largest)


def findings(heat: Heat, norm_type: float = 2.0, most: int = 6) -> list[Finding]:
    """The scopes that stand out, at most `most`, the most telling first and each once; `norm_type` joins them."""
    names, (early, late) = heat.names, heat.levels
    told = [*_against_others(names, late), *_over_time(names, early, late)]
    told += [*_dominant(names, late, norm_type), *_spiking(heat)]
    found: dict[str, Finding] = {}
    for one in told:
        found.setdefault(one.scope, one)
    return list(found.values())[:most]


def _against_others(names: tuple[str, ...], late: Numbers) -> Iterator[Finding]:
    alive = late[late > 0]
    if len(names) < 2 or not len(alive):
        return
    typical = float(np.median(alive))
    for row in np.argsort(late):
        if late[row] == 0:
            yield Finding(names[row], "vanished", 0.0, 0.0)
        elif late[row] < VANISHING * typical:
            yield Finding(names[row], "vanishing", float(typical / late[row]), float(late[row]))
    for row in np.argsort(-late):
        if late[row] > EXPLODING * typical:
            yield Finding(names[row], "exploding", float(late[row] / typical), float(late[row]))


def _over_time(names: tuple[str, ...], early: Numbers, late: Numbers) -> Iterator[Finding]:
    change = np.divide(late, early, out=np.full(len(late), np.nan), where=(early > 0) & (late > 0))
    if np.isnan(change).all():
        return
    # A run whose norms all fall is converging; only one that falls by itself is telling.
    usual = float(np.nanmedian(change))
    for row, name in enumerate(names):
        if change[row] < FALLEN * min(1.0, usual):
            yield Finding(name, "fallen", float(1 / change[row]), float(late[row]))
        elif change[row] > RISEN * max(1.0, usual):
            yield Finding(name, "risen", float(change[row]), float(late[row]))


def _dominant(names: tuple[str, ...], late: Numbers, norm_type: float) -> Iterator[Finding]:
    alive = late[late > 0]
    if len(alive) < 4 or not np.isfinite(norm_type):
        return
    # Its share of the sum of powers; relative to the largest, so that no power overflows.
    shares = np.nan_to_num(late / alive.max()) ** norm_type
    row = int(shares.argmax())
    if shares[row] > DOMINANT * shares.sum():
        yield Finding(names[row], "dominant", float((shares[row] / shares.sum()) ** (1 / norm_type)), float(late[row]))


def _spiking(heat: Heat) -> Iterator[Finding]:
    padded = np.pad(heat.median, ((0, 0), (_REACH, _REACH)), constant_values=np.nan)
    usual = median(np.moveaxis(np.lib.stride_tricks.sliding_window_view(padded, 2 * _REACH + 1, axis=1), 2, 0))
    times = np.divide(heat.largest, usual, out=np.zeros_like(usual), where=(usual > 0) & np.isfinite(heat.largest))
    most, place = times.max(axis=1), times.argmax(axis=1)
    # A step that is a spike in every scope says nothing about one of them.
    least = SPIKING * max(1.0, float(np.median(most)) / 10)
    for row in np.argsort(-most):
        if most[row] > least:
            yield Finding(heat.names[row], "spiking", float(most[row]), float(heat.largest[row, place[row]]))


def median(rows: npt.NDArray[np.floating]) -> Numbers:
    """The median over axis 0 of what is not NaN; NaN where all is, without a warning."""
    present = ~np.isnan(rows)
    filled = np.where(present, rows, np.inf)
    filled.sort(axis=0)
    count = present.sum(axis=0)
    low = np.take_along_axis(filled, np.maximum(count - 1, 0)[None] // 2, axis=0)[0]
    high = np.take_along_axis(filled, (count // 2)[None].clip(max=len(rows) - 1), axis=0)[0]
    with np.errstate(invalid="ignore"):
        # Halves, since the sum of two of the largest numbers is none.
        return np.where(count > 0, low.astype(float) / 2 + high.astype(float) / 2, np.nan)
