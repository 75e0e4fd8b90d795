"""All sizes of one scope as floats: what `archive` is on tensors, at a fraction of the cost.

Inserting into one sorted list would move megabytes in a long run. The sizes lie in a long sorted array and a short
sorted list that is merged into it when it is full; an order statistic of both is found by bisection.
"""

import math
from bisect import bisect_left, insort
from collections.abc import Iterable

import numpy as np

RECENT = 1024


class Everything:
    """Any number of floats, eight bytes each.

    Args:
        long: Ascending sizes.
        recent: Further sizes, fewer than 1024, in any order.
    """

    def __init__(self, long: Iterable[float], recent: Iterable[float]) -> None:
        self.long = np.fromiter(long, dtype=np.float64)
        self.recent = sorted(recent)

    def push(self, size: float) -> None:
        """Remember one more."""
        insort(self.recent, size)
        if len(self.recent) == RECENT:
            self.long = np.insert(self.long, np.searchsorted(self.long, self.recent), self.recent)
            self.recent = []

    def quantile(self, q: float, current: float | None = None) -> float:
        """The q-quantile by linear interpolation, after remembering `current` if given; +inf of nothing."""
        recent = self.recent
        if current is not None:
            recent = recent.copy()
            insort(recent, current)
        count = len(self.long) + len(recent)
        if not count:
            return math.inf
        position = q * (count - 1)
        below = math.floor(position)
        low, high = self._from(below, recent)
        return low + (high - low) * (position - below)

    def _from(self, rank: int, recent: list[float]) -> tuple[float, float]:
        """The sizes of this rank, from 0, and the next in both rows together; of the last one twice the same."""
        long = self.long
        least, most = max(0, rank - len(long)), min(rank, len(recent))

        def is_enough(taken: int) -> bool:
            """Whether no more than `taken` of the recent sizes come before the rank."""
            return bool(long[rank - taken - 1] <= recent[taken])

        taken = least + bisect_left(range(least, most), True, key=is_enough)
        follow = sorted((*long[rank - taken : rank - taken + 2].tolist(), *recent[taken : taken + 2]))
        return follow[0], follow[min(1, len(follow) - 1)]
