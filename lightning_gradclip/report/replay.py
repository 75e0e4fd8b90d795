"""What other limits would have done to recorded norms, without torch: fixed ones, QuantileClip's and SigmaClip's.

Both methods remember sizes as they were before clipping, so that what they allow at a step depends on the record alone,
and steps can be looked at one by one. The tests hold these limits against those of the methods themselves.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from lightning_gradclip.report.run import Numbers

Places: TypeAlias = npt.NDArray[np.int64]
# What NormClip adds to a norm before dividing by it.
_EPSILON = 1e-6
# So many numbers are looked at together.
_BLOCK = 2**21


@dataclass(frozen=True)
class Curve:
    """Shares and factors by limit, `(m,)` each.

    Attributes:
        limit: Rising.
        share: Of the norms that are over it, in [0, 1].
        mean: Mean factor of the steps that would be clipped; NaN where there are none.
        strongest: The smallest factor; NaN where there are none.
    """

    limit: Numbers
    share: Numbers
    mean: Numbers
    strongest: Numbers


def what_if(sizes: Numbers, limits: Numbers | None = None, points: int = 200) -> Curve:
    """Clip recorded norms by each of many limits.

    Args:
        sizes: Finite norms > 0, `(n,)`, n >= 1.
        limits: Which limits to try, rising; None: evenly on a log scale over all norms.
        points: How many of these.
    """
    ordered = np.sort(sizes)
    if limits is None:
        limits = np.geomspace(ordered[0] * 0.8, min(ordered[-1] * 1.25, 1e300), points, dtype=np.float64)
    within = np.searchsorted(ordered, limits, side="right")
    over = len(ordered) - within
    # Sum of 1 / (x + epsilon) over the norms from each place on.
    reciprocals = np.append(np.cumsum(1 / (ordered[::-1] + _EPSILON))[::-1], 0.0)
    some = over > 0
    mean = np.where(some, limits * reciprocals[within] / np.maximum(over, 1), np.nan)
    strongest = np.where(some, limits / (ordered[-1] + _EPSILON), np.nan)
    return Curve(limits, over / len(ordered), mean, strongest)


def quantile_limits(sizes: Numbers, places: Places, *, q: float, window: int) -> Numbers:
    """The q-quantile of the up to `window` sizes before each place, `(len(places),)`; +inf where there are none.

    Args:
        sizes: Finite norms > 0, `(n,)`.
        places: Which of them to look at, rising.
        q: The quantile, in [0, 1].
        window: How many sizes are remembered.
    """
    return _over_memories(sizes, places, window, 1, lambda memories: _quantile(memories, q))[0]


def moments(sizes: Numbers, places: Places, *, window: int, warmup: int) -> tuple[Numbers, Numbers]:
    """Mean and sample standard deviation of the up to `window` sizes before each place, `(len(places),)` each.

    NaN where fewer than `warmup` sizes were seen.
    """
    limits = _over_memories(
        sizes, places, window, warmup, lambda memories: np.stack([memories.mean(1), memories.std(1, ddof=1)])
    )
    seen = places >= warmup
    return np.where(seen, limits[0], np.nan), np.where(seen, limits[-1], np.nan)


def _over_memories(
    sizes: Numbers, places: Places, window: int, least: int, rule: Callable[[Numbers], Numbers]
) -> Numbers:
    """Apply a rule to the memories of these places, rows of equal length; +inf before `least` sizes were seen."""
    results: list[Numbers] = []
    for place in places[places < window]:
        early = np.atleast_2d(rule(sizes[None, :place])) if place >= least else np.full((1, 1), math.inf)
        results.append(early)
    full = places[places >= window]
    if len(full):
        memories = np.lib.stride_tricks.sliding_window_view(sizes, window)
        for block in np.array_split(full, -(-len(full) * window // _BLOCK)):
            results.append(np.atleast_2d(rule(memories[block - window])))
    rows = max(len(one) for one in results)
    return np.concatenate([np.broadcast_to(one, (rows, one.shape[1])) for one in results], axis=1)


def _quantile(memories: Numbers, q: float) -> Numbers:
    """By linear interpolation between the two neighbours in order, one for each row."""
    position = q * (memories.shape[1] - 1)
    below, above = math.floor(position), math.ceil(position)
    ordered = np.partition(memories, (below, above), axis=1)
    low = ordered[:, below]
    return low + (ordered[:, above] - low) * (position - below)
