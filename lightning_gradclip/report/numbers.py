"""The numbers that a page tells about a run; every sentence and table takes its own from here."""

from dataclasses import dataclass

import numpy as np

from lightning_gradclip.report.run import Flags, Numbers, Run

PERCENTILES = (1, 10, 50, 90, 99, 99.9)
# A step is called a spike when its norm is this many times the median of its neighbours, a block of this many steps.
SPIKE, BLOCK = 5.0, 101


@dataclass(frozen=True)
class Summary:
    """A run in numbers; NaN where there is nothing to count.

    Attributes:
        points: Steps, or log events where steps were not recorded.
        first: The first step; `last` the last.
        median: Of the finite norms; `percentiles` has more of them, `smallest` and `largest` the ends.
        largest_step: Where the largest norm was.
        rate: Share of the finite steps that clipping changed, or would have changed.
        cut: Mean factor of the steps that were scaled down; `strongest` the smallest.
        cut_spread: 90th over 10th percentile of these factors: 1 is a constant rescale.
        limit: The last limit; `limit_low` and `limit_high` bound all of them.
        skipped: Dropped steps; `nonfinite` those with NaN or infinite gradients.
        overflows: Steps that the GradScaler dropped while it calibrated itself; counted apart from both.
        streak: The most dropped steps in a row.
        early: Median norm of the first tenth; `late` of the last.
        spikes: Steps with a norm SPIKE times that of their neighbours.
        zeros: Steps with a norm of exactly zero.
    """

    points: int
    first: int
    last: int
    percentiles: dict[float, float]
    smallest: float
    largest: float
    largest_step: int
    rate: float
    cut: float
    strongest: float
    cut_spread: float
    limit: float
    limit_low: float
    limit_high: float
    skipped: int
    nonfinite: int
    overflows: int
    streak: int
    early: float
    late: float
    spikes: int
    zeros: int

    @property
    def median(self) -> float:
        return self.percentiles[50]


def summarize(run: Run) -> Summary:
    """Count everything once."""
    norms = run.norm[np.isfinite(run.norm)]
    tenth = max(1, len(norms) // 10)
    cuts = run.coef[(run.coef < 1) & (run.coef > 0)]
    limits = run.limit[np.isfinite(run.limit)]
    peak = run.norm_max[np.isfinite(run.norm_max)]
    return Summary(
        points=len(run),
        first=int(run.step[0]),
        last=int(run.step[-1]),
        percentiles={share: _percentile(norms, share) for share in PERCENTILES},
        smallest=_percentile(norms, 0),
        largest=_percentile(peak, 100),
        largest_step=int(run.step[np.nanargmax(run.norm_max)]) if len(peak) else int(run.step[0]),
        rate=float(np.nanmean(run.changed)) if np.isfinite(run.changed).any() else np.nan,
        cut=float(cuts.mean()) if len(cuts) else np.nan,
        strongest=_percentile(cuts, 0),
        cut_spread=_percentile(cuts, 90) / _percentile(cuts, 10),
        limit=float(limits[-1]) if len(limits) else np.nan,
        limit_low=_percentile(limits, 0),
        limit_high=_percentile(limits, 100),
        skipped=int(run.skipped.sum()),
        nonfinite=int(run.nonfinite.sum()),
        overflows=int(run.overflows.sum()),
        streak=_longest(run.skipped > 0),
        early=_percentile(norms[:tenth], 50),
        late=_percentile(norms[-tenth:], 50),
        spikes=int(is_spike(norms).sum()),
        zeros=int((norms == 0).sum()),
    )


def is_spike(norms: Numbers) -> Flags:
    """Which norms, `(n,)`, stand out from the median of their block of neighbours."""
    blocks = max(1, len(norms) // BLOCK)
    medians = [np.median(block) for block in np.array_split(norms, blocks) if len(block)]
    lengths = [len(block) for block in np.array_split(norms, blocks) if len(block)]
    return norms > SPIKE * np.repeat(medians, lengths) if len(norms) else norms > 0


def _percentile(values: Numbers, share: float) -> float:
    return float(np.percentile(values, share)) if len(values) else np.nan


def _longest(flags: Flags) -> int:
    """The length of the longest run of true."""
    edges = np.flatnonzero(np.diff(np.concatenate(([0], flags.astype(np.int8), [0]))))
    return int((edges[1::2] - edges[::2]).max(initial=0))
