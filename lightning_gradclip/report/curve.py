"""What-if: for every fixed limit, how many of the recorded steps it would have clipped, and how hard."""

from dataclasses import dataclass

import numpy as np

from lightning_gradclip.report.run import Numbers

# What NormClip adds to a norm before dividing by it.
EPSILON = 1e-6


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
    tried: Numbers = _spread(ordered, points) if limits is None else limits
    within = np.searchsorted(ordered, tried, side="right")
    over = len(ordered) - within
    # Sum of 1 / (x + epsilon) over the norms from each place on.
    reciprocals = np.append(np.cumsum(1 / (ordered[::-1] + EPSILON))[::-1], 0.0)
    some = over > 0
    mean = np.where(some, tried * reciprocals[within] / np.maximum(over, 1), np.nan)
    strongest = np.where(some, tried / (ordered[-1] + EPSILON), np.nan)
    return Curve(tried, over / len(ordered), mean, strongest)


def _spread(ordered: Numbers, points: int) -> Numbers:
    return np.geomspace(ordered[0] * 0.8, min(ordered[-1] * 1.25, 1e300), points, dtype=np.float64)
