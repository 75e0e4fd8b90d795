"""Long runs in few points: buckets of consecutive steps that keep their smallest and largest norm.

No spike is lost.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lightning_gradclip.report.layers import median
from lightning_gradclip.report.run import Numbers, Run


@dataclass(frozen=True)
class Buckets:
    """`b` buckets of `width` points each, the last one perhaps shorter; arrays of shape `(b,)`.

    Attributes:
        width: Points in a bucket; 1: nothing was reduced.
        step: The first step of each bucket.
        low: The smallest norm before clipping, NaN if none was finite; `high` the largest.
        high_step: The step of the largest.
        median: The median norm before clipping.
        low_clipped: The smallest norm after clipping; `high_clipped` the largest.
        limit: At the first step.
        changed: Share of the steps that clipping changed; one that was not finite counts as not changed.
        skipped: Dropped steps; `nonfinite` those with NaN or infinite gradients.
    """

    width: int
    step: npt.NDArray[np.int64]
    low: Numbers
    high: Numbers
    high_step: npt.NDArray[np.int64]
    median: Numbers
    low_clipped: Numbers
    high_clipped: Numbers
    limit: Numbers
    changed: Numbers
    skipped: Numbers
    nonfinite: Numbers


def bucketed(run: Run, most: int) -> Buckets:
    """At most `most` buckets of equal width."""
    width = -(-len(run) // most)
    starts = np.arange(0, len(run), width)
    lengths = np.diff(np.append(starts, len(run)))
    low = np.fmin(run.norm, run.norm_max)
    changed = np.nan_to_num(run.changed)
    # A place in the run, of the first of the largest norms; where none is finite, the bucket's first.
    filled = np.where(np.isfinite(run.norm_max), run.norm_max, -1.0)
    peaks = filled == np.repeat(np.maximum.reduceat(filled, starts), lengths)
    places = np.minimum.reduceat(np.where(peaks, np.arange(len(run)), len(run)), starts)
    return Buckets(
        width=width,
        step=run.step[starts],
        low=np.fmin.reduceat(low, starts),
        high=np.fmax.reduceat(run.norm_max, starts),
        high_step=run.step[places],
        median=_medians(run.norm, width),
        low_clipped=np.fmin.reduceat(run.norm_clipped, starts),
        high_clipped=np.fmax.reduceat(run.norm_clipped, starts),
        limit=run.limit[starts],
        changed=np.add.reduceat(changed, starts) / lengths,
        skipped=np.add.reduceat(run.skipped, starts),
        nonfinite=np.add.reduceat(run.nonfinite, starts),
    )


def _medians(norms: Numbers, width: int) -> Numbers:
    if width == 1:
        return norms
    whole = np.concatenate([norms, np.full(-len(norms) % width, np.nan)]).reshape(-1, width)
    return median(whole.T)
