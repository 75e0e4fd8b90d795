"""How sure a few runs make us."""

import math
from collections.abc import Sequence

CONFIDENCE = 0.93  # five runs reach 0.9375, and not 0.95


def median_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """The median, between two of the values that hold the true one with a confidence of at least 0.93.

    From order statistics: each value is above the true median with probability 1/2, whatever the distribution, so that
    the k-th smallest and k-th largest of n miss it with probability 2 P(Binomial(n, 1/2) < k). Up to four runs do not
    reach that confidence; their interval is the range. Values may be infinite.
    """
    ordered, n = sorted(values), len(values)
    half = n // 2
    # Of two middle values one may be infinite.
    middle = ordered[half] if n % 2 or ordered[half] == ordered[half - 1] else (ordered[half - 1] + ordered[half]) / 2
    k = 1
    while k < half and missed(n, k + 1) <= 1 - CONFIDENCE:
        k += 1
    return ordered[k - 1], middle, ordered[n - k]


def missed(n: int, k: int) -> float:
    """Probability that the median lies outside the k-th smallest and the k-th largest of n values."""
    return 2 * sum(math.comb(n, i) for i in range(k)) / 2**n


def wilson(count: int, n: int) -> tuple[float, float]:
    """95 % interval of a share seen `count` times in `n`: Wilson 1927, doi.org/10.1080/01621459.1927.10502953."""
    z = 1.959964
    center = (count + z * z / 2) / (n + z * z)
    width = z / (n + z * z) * math.sqrt(count * (n - count) / n + z * z / 4)
    return max(0.0, center - width), min(1.0, center + width)
