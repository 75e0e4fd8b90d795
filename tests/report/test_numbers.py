"""The numbers of a run, each against what was put into it."""

from typing import Any

import numpy as np
import pytest

from lightning_gradclip.report.numbers import summarize
from lightning_gradclip.report.run import Run

NAN = float("nan")


def run(norm: Any, **given: Any) -> Run:
    """A run of these norms, step 10 on, with nothing else in it but what is given."""
    norm = np.asarray(norm, float)
    nothing = {"limit": NAN, "coef": 1.0, "changed": 0.0, "skipped": 0.0, "nonfinite": 0.0, "overflows": 0.0}
    arrays = {name: np.full(len(norm), value) for name, value in nothing.items()} | {"norm_max": norm}
    arrays |= {name: np.asarray(values, float) for name, values in given.items()}
    return Run("it", each_step=True, step=10 + np.arange(len(norm)), norm=norm, norm_clipped=norm, **arrays)


def test_percentiles_and_medians_are_of_the_finite_norms() -> None:
    norms = np.random.default_rng(0).lognormal(size=95)
    summary = summarize(run([NAN, *norms, np.inf]))
    assert summary.percentiles == {share: np.percentile(norms, share) for share in (1, 10, 50, 90, 99, 99.9)}
    assert summary.median == np.median(norms)
    assert (summary.smallest, summary.points, summary.first, summary.last) == (norms.min(), 97, 10, 106)
    # A tenth of 95 is nine.
    assert (summary.early, summary.late) == (np.median(norms[:9]), np.median(norms[-9:]))
    short = summarize(run([3, 1, 2]))
    assert (short.early, short.late) == (3, 2)


def test_the_largest_is_of_the_steps_behind_a_point() -> None:
    summary = summarize(run([1, 2, 3, 2], norm_max=[1, 9, NAN, 8]))
    assert (summary.largest, summary.largest_step) == (9, 11)
    # Where none is known the first step stands for it.
    assert summarize(run([NAN, NAN])).largest_step == 10


def test_a_dropped_step_is_no_cut_and_neither_is_an_untouched_one() -> None:
    coefs = [0.0, 0.5, 1.0, 0.25, NAN, 0.9]
    summary = summarize(run([1.0] * 6, coef=coefs, changed=[1, 1, 0, 1, NAN, 1]))
    cuts = [0.5, 0.25, 0.9]
    assert summary.cut == pytest.approx(np.mean(cuts))
    assert summary.strongest == 0.25
    assert summary.cut_spread == pytest.approx(np.percentile(cuts, 90) / np.percentile(cuts, 10))
    assert summary.rate == pytest.approx(4 / 5)
    assert np.isnan(summarize(run([NAN], changed=[NAN])).rate)


def test_the_limit_is_the_last_that_is_known() -> None:
    summary = summarize(run([1.0] * 5, limit=[3.0, 2.0, np.inf, 4.0, NAN]))
    assert (summary.limit, summary.limit_low) == (4.0, 2.0)
    assert np.isnan(summarize(run([1.0])).limit)


def test_counts_and_the_longest_streak_of_dropped_steps() -> None:
    skipped, nonfinite, overflows = [1, 0, 1, 1, 1, 0, 1], [1, 0, 0, 1, 0, 0, 0], [0, 1, 0, 0, 0, 1, 0]
    summary = summarize(run([1.0] * 7, skipped=skipped, nonfinite=nonfinite, overflows=overflows))
    assert (summary.skipped, summary.nonfinite, summary.overflows, summary.streak) == (5, 2, 2, 3)
    # At either end of the run, too.
    assert [summarize(run([1.0] * 3, skipped=one)).streak for one in ([1, 1, 0], [0, 1, 1], [0, 0, 0])] == [2, 2, 0]


def test_a_spike_stands_out_from_the_steps_around_it() -> None:
    assert summarize(run([1.0] * 20 + [2.9] + [1.0] * 20)).spikes == 0
    assert summarize(run([1.0] * 20 + [3.1] + [1.0] * 20)).spikes == 1
    # A level that rises for good is none, and what stands out from the new level is.
    assert summarize(run([1.0] * 100 + [6.0] + [10.0] * 100 + [60.0])).spikes == 1
    assert summarize(run([1.0] * 101 + [6.0] * 100)).spikes == 0
