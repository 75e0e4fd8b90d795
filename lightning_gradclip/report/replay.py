"""What other limits would have done to recorded norms, without torch: fixed ones, QuantileClip's and SigmaClip's.

Both methods remember sizes as they were before clipping, so that what they allow at a step depends on the record alone,
and steps can be looked at one by one. The tests hold these limits against those of the methods themselves.
"""

import math
from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from lightning_gradclip.report.run import Numbers

Places: TypeAlias = npt.NDArray[np.int64]
# What NormClip adds to a norm before dividing by it.
_EPSILON = 1e-6
# So many numbers are looked at together.
_BLOCK = 2**21


class Curve(NamedTuple):
    """Shares and factors by limit, `(m,)` each; NaN where a limit clips no step."""

    limit: Numbers  # rising
    share: Numbers  # of the norms that are over it, in [0, 1]
    mean: Numbers  # mean factor of the steps that would be clipped
    strongest: Numbers  # the smallest factor


def what_if(sizes: Numbers, limits: Numbers | None = None, points: int = 200) -> Curve:
    """Clip finite norms > 0, `(n,)` with n >= 1, by rising limits; None: `points` evenly on a log scale over all."""
    ordered = np.sort(sizes)
    if limits is None:
        limits = np.geomspace(ordered[0] * 0.8, min(ordered[-1] * 1.25, 1e300), points, dtype=np.float64)
    within = np.searchsorted(ordered, limits, side="right")
    over = len(ordered) - within
    some = over > 0
    # Sum of 1 / (x + epsilon) over the norms from each place on.
    reciprocals = np.append(np.cumsum(1 / (ordered[::-1] + _EPSILON))[::-1], 0.0)
    mean = np.where(some, limits * reciprocals[within] / np.maximum(over, 1), np.nan)
    strongest = np.where(some, limits / (ordered[-1] + _EPSILON), np.nan)
    return Curve(limits, over / len(ordered), mean, strongest)


def quantile_limits(sizes: Numbers, places: Places, *, q: float, window: int) -> Numbers:
    """The q-quantile of the up to `window` sizes before each place, `(len(places),)`; +inf where there are none."""

    def rule(memories: Numbers) -> Numbers:
        # By linear interpolation between the two neighbours in order.
        position = q * (memories.shape[1] - 1)
        below, above = math.floor(position), math.ceil(position)
        ordered = np.partition(memories, (below, above), axis=1)
        low = ordered[:, below]
        return low + (ordered[:, above] - low) * (position - below)

    return np.where(places > 0, _over_memories(sizes, places, window, 1, rule)[0], np.inf)


def moments(sizes: Numbers, places: Places, *, window: int, warmup: int) -> tuple[Numbers, Numbers]:
    """Mean and sample deviation of the up to `window` sizes before each place; NaN before `warmup` sizes were seen."""

    def rule(memories: Numbers) -> Numbers:
        return np.stack([memories.mean(1), memories.std(1, ddof=1)])

    mean, deviation = _over_memories(sizes, places, window, warmup, rule, rows=2)
    return mean, deviation


def _over_memories(
    sizes: Numbers, places: Places, window: int, least: int, rule: Callable[[Numbers], Numbers], rows: int = 1
) -> Numbers:
    """The `rows` numbers that a rule makes of the memory of each place; NaN before `least` sizes were seen."""
    results = np.full((rows, len(places)), np.nan)
    for at in np.flatnonzero((places >= least) & (places < window)):
        results[:, at : at + 1] = rule(sizes[None, : places[at]])
    full = np.flatnonzero(places >= max(least, window))
    if len(full):
        memories = np.lib.stride_tricks.sliding_window_view(sizes, window)
        for block in np.array_split(full, -(-len(full) * window // _BLOCK)):
            results[:, block] = rule(memories[places[block] - window])
    return results
