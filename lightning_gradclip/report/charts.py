"""What the page's charts are drawn from: plain types, and arrays as base64 of little-endian numbers."""

import base64
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from lightning_gradclip.report.buckets import bucketed
from lightning_gradclip.report.curve import what_if
from lightning_gradclip.report.layers import Finding, Heat
from lightning_gradclip.report.numbers import Summary
from lightning_gradclip.report.run import Numbers, Run

# So many points of a run can be zoomed into, over all runs; the file stays within a few megabytes.
_POINTS = 32_768
_BINS = 60
_ROWS = 200


def payload(run: Run, summary: Summary, heat: Heat | None, found: Sequence[Finding], *, share: float) -> dict[str, Any]:
    """One run for the charts; `share` is the part of all points that it may take."""
    sizes = run.sizes
    return {
        "name": run.name,
        "eachStep": run.each_step,
        "observed": run.observed,
        "percentiles": {f"{at:g}": _finite(value) for at, value in summary.percentiles.items()},
        "limit": _finite(summary.limit),
        "norms": _norms(run, max(1024, int(_POINTS * share))),
        "spread": _spread(sizes),
        "whatIf": _what_if(sizes, run.each_step) if len(sizes) else None,
        "heat": None if heat is None else _heat(heat, found),
    }


def _norms(run: Run, most: int) -> dict[str, Any]:
    b = bucketed(run, most)
    norms = {
        "low": b.low,
        "median": b.median,
        "high": b.high,
        "lowClipped": b.low_clipped,
        "highClipped": b.high_clipped,
    }
    others = {"limit": b.limit, "changed": b.changed, "skipped": b.skipped, "nonfinite": b.nonfinite}
    steps = {"step": _encoded(b.step, "<f8"), "highStep": _encoded(b.high_step, "<f8")}
    return {"width": b.width, **steps, **{name: _encoded(column) for name, column in {**norms, **others}.items()}}


def _spread(sizes: Numbers) -> dict[str, Any] | None:
    """Share of the norms in bins that are equally wide on a log scale."""
    if not len(sizes):
        return None
    logs = np.log10(sizes)
    low, high = float(logs.min()), float(logs.max())
    if high - low < 1e-3:
        low, high = low - 0.5, high + 0.5
    counts, edges = np.histogram(logs, _BINS, (low, high))
    return {"edges": (10**edges).tolist(), "share": (counts / len(sizes)).tolist()}


def _what_if(sizes: Numbers, each_step: bool) -> dict[str, Any]:
    curve = what_if(sizes)
    # A mean over the largest steps of log events would not be one over steps.
    mean = curve.mean if each_step else np.full(len(curve.limit), np.nan)
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
    limits = np.finfo(dtype)
    # An infinite norm has no place on an axis; one beyond float32 has its place at the end.
    clipped = np.clip(values, limits.min, limits.max) if dtype == "<f4" else values
    return base64.b64encode(np.ascontiguousarray(clipped, dtype).tobytes()).decode("ascii")


def _finite(value: float) -> float | None:
    return value if np.isfinite(value) else None
