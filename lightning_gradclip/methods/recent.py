"""The last sizes of one scope as floats: what `ring` is on tensors, at a fraction of the cost.

Sizes are kept twice, in the order of arrival and sorted, so that a step inserts one and takes one out.
"""

import math
from bisect import bisect_left, insort
from collections import deque
from collections.abc import Iterable, Sequence


class Recent:
    """At most `window` floats.

    Args:
        sizes: The sizes so far, oldest first.
        window: How many are kept.
    """

    def __init__(self, sizes: Iterable[float], window: int) -> None:
        self.window = window
        self.sizes = deque(sizes, maxlen=window)
        self._sorted = sorted(self.sizes)

    def push(self, size: float) -> None:
        """Remember one more; the oldest makes room."""
        if len(self.sizes) == self.window:
            del self._sorted[bisect_left(self._sorted, self.sizes[0])]
        self.sizes.append(size)
        insort(self._sorted, size)

    def quantile(self, q: float, current: float | None = None) -> float:
        """The q-quantile by linear interpolation, after remembering `current` if given; +inf of nothing."""
        if current is None:
            return quantile_of_sorted(self._sorted, q)
        values = self._sorted.copy()
        if len(self.sizes) == self.window:
            del values[bisect_left(values, self.sizes[0])]
        insort(values, current)
        return quantile_of_sorted(values, q)

    def mean_and_std(self) -> tuple[float, float]:
        """Mean and sample standard deviation (over n - 1); 0 for what needs more sizes."""
        count = len(self.sizes)
        try:
            mean = math.fsum(self.sizes) / max(1, count)
        except OverflowError:  # as a sum of float64 tensors is then
            mean = math.inf
        # The root of the sum of squared deviations, in C and without overflow.
        return mean, math.dist(self.sizes, [mean] * count) / math.sqrt(max(1, count - 1))


def quantile_of_sorted(values: Sequence[float], q: float) -> float:
    """The q-quantile of ascending values by linear interpolation; +inf of none."""
    if not values:
        return math.inf
    position = q * (len(values) - 1)
    below = math.floor(position)
    low, high = values[below], values[math.ceil(position)]
    return low + (high - low) * (position - below)
