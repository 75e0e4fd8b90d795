"""The one rule for a fixed limit, where nobody has chosen a share: the norm that one step in ten is over.

In the study in `benchmarks/training` it was as good at the learning rate that it was taken at as the best of 0.3, 1 and
3 times the median, chosen with hindsight, on all five tasks; three times the median touched 0.7 % of the steps of one
task and 30 % of those of another. A share is the same everywhere, a multiple of the median is not.
"""

import numpy as np
import numpy.typing as npt

SHARE = 0.1
# Fewer steps say nothing.
LEAST = 100


def limit_for(norms: npt.NDArray[np.float64], share: float = SHARE) -> float:
    """The fixed limit that this share of finite norms > 0, `(n,)`, n >= 1, is over; of three digits."""
    return float(f"{np.quantile(norms, 1 - share):.3g}")
