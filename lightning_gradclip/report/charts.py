"""What the page's charts are drawn from: plain types, and arrays as base64 of little-endian numbers.

Long runs become buckets of consecutive steps that keep their smallest and largest norm, so that no spike is lost.
"""

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from lightning_gradclip.report.layers import Finding, Heat, median
from lightning_gradclip.report.numbers import Summary
from lightning_gradclip.report.replay import what_if
from lightning_gradclip.report.run import Numbers, Run

# So many points of a run can be zoomed into, over all runs; the file stays within a few megabytes.
_POINTS = 32_768
_BINS = 60
_ROWS = 200


@dataclass(frozen=True)
class Buckets:
    """`b` buckets of `width` points each, the last one perhaps shorter; arrays of shape `(b,)`."""

    width: int  # 1: every step by itself
    step: npt.NDArray[np.int64]  # the first
    low: Numbers  # the smallest norm before clipping, NaN if none was finite
    high: Numbers
    high_step: npt.NDArray[np.int64]  # where the largest was
    median: Numbers  # before clipping
    low_clipped: Numbers  # the smallest norm after clipping
    high_clipped: Numbers
    limit: Numbers  # at the first step
    changed: Numbers  # share of the steps that clipping changed; one that was not finite counts as not changed
    skipped: Numbers  # dropped steps
    nonfinite: Numbers  # steps with NaN or infinite gradients


def payload(run: Run, summary: Summary, heat: Heat | None, found: Sequence[Finding], *, share: float) -> dict[str, Any]:
    """One run for the charts; `share` is the part of all points that it may take."""
    sizes = run.sizes
    return {
        "name": run.name,
        "eachStep": run.each_step,
        "observed": run.observed,
        "percentiles": {f"{at:g}": _finite(value) for at, value in summary.percentiles.items()},
        "limit": None if summary.limit_moves else _finite(summary.limit),
        "norms": _norms(run, max(1024, int(_POINTS * share))),
        "spread": _spread(sizes) if len(sizes) else None,
        "whatIf": _what_if(sizes, run.each_step) if len(sizes) else None,
        "heat": None if heat is None else _heat(heat, found),
    }


def _norms(run: Run, most: int) -> dict[str, Any]:
    b = bucketed(run, most)
    columns = {"low": b.low, "high": b.high}
    columns |= {"lowClipped": b.low_clipped, "highClipped": b.high_clipped, "limit": b.limit}
    columns |= {"changed": b.changed, "skipped": b.skipped, "nonfinite": b.nonfinite}
    steps = {"step": _encoded(b.step, "<f8"), "highStep": _encoded(b.high_step, "<f8")}
    # A median of medians is none: one for each number of buckets that the browser draws as one.
    medians = [b.median, *(_medians(run.norm, b.width << power) for power in range(1, len(b.step).bit_length()))]
    medians = [_encoded(one) for one in medians]
    return {"width": b.width, "medians": medians, **steps, **{name: _encoded(one) for name, one in columns.items()}}


def bucketed(run: Run, most: int) -> Buckets:
    """At most `most` buckets of equal width."""
    width = -(-len(run) // most)
    starts = np.arange(0, len(run), width)
    lengths = np.diff(np.append(starts, len(run)))
    # A place in the run, of the first of the largest norms; where none is finite, the bucket's first.
    filled = np.where(np.isfinite(run.norm_max), run.norm_max, -1.0)
    peaks = filled == np.repeat(np.maximum.reduceat(filled, starts), lengths)
    places = np.minimum.reduceat(np.where(peaks, np.arange(len(run)), len(run)), starts)
    return Buckets(
        width=width,
        step=run.step[starts],
        low=np.fmin.reduceat(np.fmin(run.norm, run.norm_max), starts),
        high=np.fmax.reduceat(run.norm_max, starts),
        high_step=run.step[places],
        median=_medians(run.norm, width),
        low_clipped=np.fmin.reduceat(run.norm_clipped, starts),
        high_clipped=np.fmax.reduceat(run.norm_clipped, starts),
        limit=run.limit[starts],
        changed=np.add.reduceat(np.nan_to_num(run.changed), starts) / lengths,
        skipped=np.add.reduceat(run.skipped, starts),
        nonfinite=np.add.reduceat(run.nonfinite, starts),
    )


def _medians(norms: Numbers, width: int) -> Numbers:
    if width == 1:
        return norms
    whole = np.concatenate([norms, np.full(-len(norms) % width, np.nan)]).reshape(-1, width)
    return median(whole.T)


def _spread(sizes: Numbers) -> dict[str, Any]:
    """Share of the norms in bins that are equally wide on a log scale."""
    logs = np.log10(sizes)
    low, high = float(logs.min()), float(logs.max())
    if high - low < 1e-3:
        low, high = low - 0.5, high + 0.5
    counts, edges = np.histogram(logs, _BINS, (low, high))
    return {"edges": (10**edges).tolist(), "share": (counts / len(sizes)).tolist()}


def _what_if(sizes: Numbers, each_step: bool) -> dict[str, Any]:
    curve = what_if(sizes)
    # A mean over the largest steps of log events would not be one over steps.
    mean = curve.mean if each_step else np.full_like(curve.mean, np.nan)
    columns = {"limit": curve.limit, "share": curve.share, "mean": mean, "strongest": curve.strongest}
    return {name: _encoded(column, "<f8") for name, column in columns.items()}


def _heat(heat: Heat, found: Sequence[Finding]) -> dict[str, Any]:
    named = {one.scope for one in found}
    rows = np.arange(len(heat.names))
    if len(rows) > _ROWS:
        notable = [row for row in rows if heat.names[row] in named]
        rows = np.unique([*notable, *np.linspace(0, len(rows) - 1, _ROWS - len(notable)).astype(int)])
    return {
        "names": [heat.names[row] for row in rows],
        "total": len(heat.names),
        "marked": [heat.names[row] in named for row in rows],
        "step": heat.step.tolist(),
        "median": _encoded(heat.median[rows]),
        "largest": _encoded(heat.largest[rows]),
    }


def _encoded(values: npt.NDArray[np.generic], dtype: str = "<f4") -> str:
    ends = np.finfo(dtype)
    # An infinite norm has no place on an axis; one beyond float32 has its place at the end.
    return base64.b64encode(np.clip(values, ends.min, ends.max).astype(dtype).tobytes()).decode("ascii")


def _finite(value: float) -> float | None:
    return value if np.isfinite(value) else None
