"""The numbers that a page tells about a run; every sentence and table takes its own from here."""

from dataclasses import dataclass

import numpy as np

from lightning_gradclip.report.run import Flags, Numbers, Run
from lightning_gradclip.report.spikes import spike_places


@dataclass(frozen=True)
class Summary:
    """A run in numbers; NaN where there is nothing to count."""

    points: int  # steps, or log events where steps were not recorded
    first: int  # step
    last: int
    percentiles: dict[float, float]  # of the finite norms, by share in percent
    smallest: float
    largest: float
    largest_step: int  # where the largest norm was
    rate: float  # share of the finite steps that clipping changed, or would have changed
    cut: float  # mean factor of the steps that were scaled down
    strongest: float  # the smallest of these factors
    cut_spread: float  # their 90th over their 10th percentile: 1 is a constant rescale
    limit: float  # the last one
    limit_low: float
    limit_moves: bool  # whether it was not the same at all steps
    skipped: int  # dropped steps
    nonfinite: int  # steps with NaN or infinite gradients
    overflows: int  # steps that the GradScaler dropped while it calibrated itself; in neither of the two above
    streak: int  # the most dropped steps in a row
    early: float  # median norm of the first tenth
    late: float  # of the last
    spikes: int

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
        percentiles={share: _percentile(norms, share) for share in (1, 10, 50, 90, 99, 99.9)},
        smallest=_percentile(norms, 0),
        largest=_percentile(peak, 100),
        largest_step=int(run.step[np.nanargmax(run.norm_max) if len(peak) else 0]),
        rate=float(np.nanmean(run.changed)) if np.isfinite(run.changed).any() else np.nan,
        cut=float(cuts.mean()) if len(cuts) else np.nan,
        strongest=_percentile(cuts, 0),
        cut_spread=_percentile(cuts, 90) / _percentile(cuts, 10),
        limit=float(limits[-1]) if len(limits) else np.nan,
        limit_low=_percentile(limits, 0),
        limit_moves=len(limits) > 0 and bool(limits.min() != limits.max()),
        skipped=int(run.skipped.sum()),
        nonfinite=int(run.nonfinite.sum()),
        overflows=int(run.overflows.sum()),
        streak=_longest(run.skipped > 0),
        early=_percentile(norms[:tenth], 50),
        late=_percentile(norms[-tenth:], 50),
        spikes=len(spike_places(norms)[0]) if run.each_step else 0,
    )


def _percentile(values: Numbers, share: float) -> float:
    return float(np.percentile(values, share)) if len(values) else np.nan


def _longest(flags: Flags) -> int:
    """The length of the longest run of true."""
    edges = np.flatnonzero(np.diff(flags.astype(np.int8), prepend=0, append=0))
    return int((edges[1::2] - edges[::2]).max(initial=0))
