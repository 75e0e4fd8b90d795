"""Steps whose norm stands out from those around it: where each came from, what was done about it, and what followed.

A spike is held against the median of the norms around it, as many on either side, up to 50: a norm that only falls or
only rises has none, however steeply, and neither has a step from one level to another. It is at least three times that
median, and five robust standard deviations above it on a log scale, so that what is usual in a noisy run is none. The
first five steps of a run have too few neighbours to be one; the last five are held against those before them.
"""

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from lightning_gradclip.report import RunError
from lightning_gradclip.report.run import Numbers, Run

SPIKE, _DEVIATIONS = 3.0, 5.0
_REACH, _LEAST = 50, 5
# The losses before a spike say what is usual; in so many after it they may come back.
_BEFORE, _AFTER = 20, 1000
# What makes the deviation of a normal distribution of the median of its absolute deviations.
_ROBUST = 1.4826

Places: TypeAlias = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Spike:
    """One step that stands out; NaN, None or an empty tuple where the record does not say."""

    step: int
    epoch: int | None
    batch: int | None
    """Index in its epoch of the first of the accumulated batches."""
    norm: float
    usual: float
    """The median of the norms around it."""
    layers: tuple[tuple[str, float], ...]
    """The scopes with the largest shares of the squared norm, up to three, and these."""
    done: str
    """"clipped", "dropped" or "passed"; of a run that was only observed, what would have happened."""
    threshold: float
    """The norm from which on a step was clipped."""
    loss_before: float
    """The median of the losses of up to 20 steps before it."""
    loss: float
    loss_after: float
    """The loss of the next step."""
    back_after: int | None
    """Steps until the loss was within what was usual before; None if it was not within 1,000."""
    lr: float

    @property
    def times(self) -> float:
        """How many times the usual norm it is."""
        return self.norm / self.usual if self.usual else math.inf


def spikes(run: str | Path, tell: Callable[[str], None] = warnings.warn) -> list[Spike]:
    """The spikes of a recorded run, in the order of their steps.

    Args:
        run: A history folder, or what else `lightning-gradclip spikes` takes, that holds one run.
        tell: Called with a line about each thing in it that is damaged.

    Raises:
        RunError: If there is no run of single steps, or more than one.
    """
    from lightning_gradclip.report.find import find_runs

    runs = find_runs([run], tell)
    if len(runs) > 1:
        raise RunError(f"{run} holds {len(runs)} runs ({', '.join(one.name for one in runs)}); name one of them")
    return spikes_of(runs[0])


def spikes_of(run: Run) -> list[Spike]:
    """The spikes of a run that is read already."""
    if not run.each_step:
        raise RunError(
            f"{run.name} holds means over several steps, from which single steps cannot be told; "
            "log with log_every_n_steps=1, or record a history"
        )
    places, usual = spike_places(run.norm)
    return [_spike(run, place, level) for place, level in zip(places.tolist(), usual.tolist(), strict=True)]


def spike_places(norms: Numbers) -> tuple[Places, Numbers]:
    """Where norms, `(n,)`, stand out, and the median around each; those that are not finite are as if not there."""
    known = np.flatnonzero(np.isfinite(norms) & (norms > 0))
    logs = np.log(norms[known])
    some = [(place, level) for place in _candidates(logs).tolist() if (level := _level(logs, place)) is not None]
    places = np.array([known[place] for place, _ in some], np.int64)
    return places, np.exp(np.array([level for _, level in some], np.float64))


def _candidates(logs: Numbers) -> Places:
    """Places that may be spikes: all that are, and few others, at a glance."""
    count = len(logs)
    if count <= 2 * _LEAST:
        return np.arange(0)
    padded = np.concatenate([logs, np.full(-count % _REACH, np.nan)]).reshape(-1, _REACH)
    lowest = np.nanmin(padded, axis=1) if count <= 4 * _REACH else np.nanpercentile(padded, 20, axis=1)
    around = np.pad(lowest, 1, mode="edge")
    low = np.minimum(np.minimum(around[:-2], around[1:-1]), around[2:])
    return np.flatnonzero(logs > np.repeat(low, _REACH)[:count] + math.log(SPIKE))


def _level(logs: Numbers, place: int) -> float | None:
    """The median around a place that stands out; None for one that does not."""
    after = len(logs) - 1 - place
    reach = min(_REACH, place, after)
    if reach < _LEAST:
        # At the end: far above what came just before, too, so that a norm that grows steadily is none.
        if after >= _LEAST or place < 2 * _LEAST or logs[place] - logs[place - _LEAST : place].max() < math.log(SPIKE):
            return None
        around = logs[max(0, place - 2 * _REACH) : place]
    else:
        around = logs[place - reach : place + reach + 1]
    level = float(np.median(around))
    deviation = _ROBUST * float(np.median(np.abs(around - level)))
    return level if logs[place] - level >= max(math.log(SPIKE), _DEVIATIONS * deviation) else None


def _spike(run: Run, place: int, usual: float) -> Spike:
    told = None if run.history is None else run.history.steps[place]
    epoch, batch = (None if told is None or told[name] < 0 else int(told[name]) for name in ("epoch", "batch"))
    losses = np.full(1, np.nan) if run.loss is None else run.loss[: place + _AFTER]
    before, at, after, back = _around(losses, place)
    return Spike(
        step=int(run.step[place]),
        epoch=epoch,
        batch=batch,
        norm=float(run.norm[place]),
        usual=usual,
        layers=_layers(run, place),
        done="dropped" if run.skipped[place] else "clipped" if run.changed[place] > 0 else "passed",
        threshold=float(run.limit[place]) if told is None else float(told["threshold"]),
        loss_before=before,
        loss=at,
        loss_after=after,
        back_after=back,
        lr=math.nan if run.lr is None else float(run.lr[place]),
    )


def _around(losses: Numbers, place: int) -> tuple[float, float, float, int | None]:
    """The loss before, at and after a step, and how many steps it took to come back."""
    at, after = (float(losses[i]) if i < len(losses) else math.nan for i in (place, place + 1))
    earlier = losses[max(0, place - _BEFORE) : place]
    earlier = earlier[np.isfinite(earlier)]
    if not len(earlier):
        return math.nan, at, after, None
    before = float(np.median(earlier))
    usual = before + 3 * _ROBUST * float(np.median(np.abs(earlier - before)))
    back = np.flatnonzero(losses[place + 1 :] <= usual)
    return before, at, after, int(back[0]) + 1 if len(back) else None


def _layers(run: Run, place: int) -> tuple[tuple[str, float], ...]:
    """The scopes with the largest shares at a step: noted then, or from the norms of the measured ones."""
    shares = None if run.history is None else run.history.shares
    if shares is not None and len(found := shares[shares["row"] == place]):
        pairs = zip(found["scope"][0].tolist(), found["share"][0].tolist(), strict=True)
        return tuple((name.decode("utf-8", "replace"), share) for name, share in pairs if name)
    for part in run.parts:
        if 0 <= place - part.first_row < len(part.norms):
            return _largest(part.names, np.nan_to_num(part.norms[place - part.first_row].astype(float)))
    return ()


def _largest(names: tuple[str, ...], norms: Numbers) -> tuple[tuple[str, float], ...]:
    if not norms.max() > 0:
        return ()
    squares = (norms / norms.max()) ** 2
    order = np.argsort(-squares, kind="stable")[:3]
    return tuple((names[i], float(squares[i] / squares.sum())) for i in order.tolist())


def as_row(spike: Spike) -> dict[str, Any]:
    """The spike in types that JSON and CSV know: None where a number is unknown or infinite."""
    row = {name: _known(value) for name, value in vars(spike).items() if name != "layers"}
    row["times"] = _known(spike.times)
    row["layers"] = [{"layer": name, "share": _known(share)} for name, share in spike.layers]
    return row


def _known(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
