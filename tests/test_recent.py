"""Sizes of one scope in floats, against NumPy and against the same on tensors."""

import math
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_gradclip.methods import archive, ring
from lightning_gradclip.methods.everything import RECENT, Everything
from lightning_gradclip.methods.recent import Recent

QUANTILES = [0.0, 0.1, 0.5, 0.9, 1.0]


def stream(count: int, *, ties: bool, seed: int = 0) -> list[float]:
    drawn = np.random.default_rng(seed).lognormal(size=count)
    return (np.ceil(drawn * 2) if ties else drawn).tolist()


class TestRecent:
    @pytest.mark.parametrize("window", [1, 2, 7, 100])
    @pytest.mark.parametrize("ties", [False, True])
    def test_quantiles_are_numpys(self, window: int, ties: bool) -> None:
        sizes = stream(350, ties=ties)
        held = Recent([], window)
        for i, size in enumerate(sizes):
            for q in QUANTILES:
                past, with_it = sizes[max(0, i - window) : i], sizes[max(0, i + 1 - window) : i + 1]
                expected = np.quantile(past, q) if past else math.inf
                assert held.quantile(q) == pytest.approx(expected, rel=1e-14)
                assert held.quantile(q, size) == pytest.approx(np.quantile(with_it, q), rel=1e-14)
            held.push(size)
        assert list(held.sizes) == sizes[-window:]

    @pytest.mark.parametrize("window", [2, 9, 100])
    def test_mean_and_std_are_numpys(self, window: int) -> None:
        held = Recent([], window)
        for i, size in enumerate(sizes := stream(150, ties=False), start=1):
            held.push(size)
            past = sizes[max(0, i - window) : i]
            std = np.std(past, ddof=1) if i > 1 else 0.0
            assert held.mean_and_std() == pytest.approx((np.mean(past), std), rel=1e-13)

    def test_a_sum_beyond_the_largest_float_is_infinite(self) -> None:
        assert Recent([1.7e308, 1.7e308, 1.0], 3).mean_and_std() == (math.inf, math.inf)

    def test_of_nothing_there_is_no_limit(self) -> None:
        assert Recent([], 3).quantile(0.5) == math.inf
        assert Recent([], 3).mean_and_std() == (0.0, 0.0)


class TestEverything:
    @pytest.mark.parametrize("ties", [False, True])
    def test_quantiles_are_numpys_across_merges(self, ties: bool) -> None:
        sizes = stream(2 * RECENT + 40, ties=ties)
        held = Everything([], [])
        for i, size in enumerate(sizes):
            if i < 40 or i % 97 == 0 or i % RECENT in (0, 1, RECENT - 1):
                for q in QUANTILES:
                    assert held.quantile(q) == pytest.approx(np.quantile(sizes[:i], q) if i else math.inf, rel=1e-14)
                    expected = np.quantile(sizes[: i + 1], q)
                    assert held.quantile(q, size) == pytest.approx(expected, rel=1e-14)
            held.push(size)
        assert len(held.long) == 2 * RECENT
        assert (np.diff(held.long) >= 0).all()

    @settings(derandomize=True, deadline=None, max_examples=200)
    @given(
        long=st.lists(st.integers(1, 9), max_size=12),
        recent=st.lists(st.integers(1, 9), max_size=12),
        q=st.floats(0, 1),
        current=st.none() | st.integers(1, 9),
    )
    def test_quantiles_of_both_rows_are_numpys(
        self, long: list[int], recent: list[int], q: float, current: int | None
    ) -> None:
        held = Everything(map(float, sorted(long)), map(float, recent))
        everything = [*long, *recent, *([] if current is None else [current])]
        expected = np.quantile(everything, q) if everything else math.inf
        assert held.quantile(q, None if current is None else float(current)) == pytest.approx(expected, rel=1e-13)


@pytest.mark.parametrize("memory", ["ring", "archive"])
def test_floats_and_tensors_turn_into_each_other_at_any_time(memory: str) -> None:
    module, size = (
        (ring, torch.zeros(1, dtype=torch.float64)) if memory == "ring" else (archive, torch.zeros(1).double())
    )
    state = ring.fresh(size, 9) if memory == "ring" else archive.fresh(size)
    turning = random.Random(0)
    floats = False
    sizes = stream(RECENT + 60, ties=False)
    for i, value in enumerate(sizes):
        if turning.random() < (0.3 if i < 100 else 0.01):
            state = module.rows(state) if floats else module.in_floats(state)
            floats = not floats
        given = value if floats else torch.tensor([value], dtype=torch.float64)
        past = sizes[max(0, i - 9) if memory == "ring" else 0 : i]
        if i % 7 == 0 or i > RECENT - 5:
            expected = np.quantile(past, 0.7) if past else math.inf
            assert float(module.quantile(state, 0.7)) == pytest.approx(expected, rel=1e-14)
        state = module.pushed(state, given, True if floats else torch.tensor([True]))
    rows = module.rows(state)
    assert rows["count"].tolist() == [len(sizes)]
    assert all(isinstance(value, torch.Tensor) and len(value) == 1 for value in rows.values())
