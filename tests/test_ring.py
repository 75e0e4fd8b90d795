"""The last sizes of each scope against lists and NumPy."""

import math

import numpy as np
import pytest
import torch
from streams import noisy
from torch import Tensor

from lightning_gradclip.methods import ring

QUANTILES = [0.0, 0.1, 0.5, 0.9, 1.0]


def tensor(values: object, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.tensor(values, dtype=dtype)


class Pushed:
    """Rings beside lists that are given the same sizes."""

    def __init__(self, scopes: int, window: int) -> None:
        self.window = window
        self.state = ring.fresh(torch.zeros(scopes, dtype=torch.float64), window)
        self.lists: list[list[float]] = [[] for _ in range(scopes)]

    def push(self, sizes: np.ndarray, active: np.ndarray) -> None:
        self.state = ring.pushed(self.state, tensor(sizes), torch.from_numpy(active))
        for one, size, is_active in zip(self.lists, sizes, active, strict=True):
            one.extend([size] if is_active else [])

    @property
    def kept(self) -> list[list[float]]:
        return [one[-self.window :] for one in self.lists]


def presence(steps: int, *, unequal: bool) -> np.ndarray:
    """Which of four scopes are active at each step: all of them, or each at a rate of its own and the last never."""
    rates = [1.0, 0.6, 0.05, 0.0] if unequal else [1.0] * 4
    return np.random.default_rng(1).random((steps, 4)) < rates


class TestPushed:
    @pytest.mark.parametrize("window", [1, 2, 7, 1000])
    @pytest.mark.parametrize("unequal", [False, True])
    def test_it_holds_the_last_sizes_of_active_scopes(self, window: int, unequal: bool) -> None:
        steps = 2100 if window == 1000 else 60
        pushed, rows = Pushed(4, window), noisy(steps, 4)
        for row, active in zip(rows, presence(steps, unequal=unequal), strict=True):
            pushed.push(row, active)
            if window < 1000:
                self.check(pushed)
        self.check(pushed)
        assert (min(map(len, pushed.lists)) > window) == (not unequal)

    def check(self, pushed: Pushed) -> None:
        assert pushed.state["count"].tolist() == [len(one) for one in pushed.lists]
        assert pushed.state["ring"].shape == (4, pushed.window)
        for row, kept in zip(pushed.state["ring"].tolist(), pushed.kept, strict=True):
            assert sorted(row) == sorted(kept) + [math.inf] * (pushed.window - len(kept))

    def test_what_was_there_is_left_as_it_is(self) -> None:
        before = ring.fresh(torch.zeros(2, dtype=torch.float64), 3)
        ring.pushed(before, tensor([1.0, 2.0]), torch.tensor([True, True]))
        assert (before["ring"] == math.inf).all()
        assert before["count"].tolist() == [0, 0]

    @pytest.mark.parametrize("bad", [math.nan, math.inf, 0.0])
    def test_an_inactive_scope_keeps_every_bit(self, bad: float) -> None:
        state = ring.fresh(torch.zeros(2, dtype=torch.float64), 2)
        for size in (3.0, 4.0, 5.0):
            state = ring.pushed(state, tensor([size, 2 * size]), torch.tensor([True, True]))
        after = ring.pushed(state, tensor([bad, 7.0]), torch.tensor([False, True]))
        assert after["ring"].tolist() == [[5.0, 4.0], [10.0, 7.0]]
        assert after["count"].tolist() == [3, 4]


class TestQuantile:
    @pytest.mark.parametrize("window", [1, 2, 7, 1000])
    @pytest.mark.parametrize("unequal", [False, True])
    def test_it_is_that_of_numpy(self, window: int, unequal: bool) -> None:
        steps = 1500 if window == 1000 else 40
        pushed, rows = Pushed(4, window), noisy(steps, 4)
        looked = set(range(12)) | set(range(998, 1003)) | set(range(0, steps, 1 if window < 1000 else 97))
        for i, (row, active) in enumerate(zip(rows, presence(steps, unequal=unequal), strict=True)):
            if i in looked:
                got = [ring.quantile(pushed.state, q).tolist() for q in QUANTILES]
                expected = [np.quantile(kept, QUANTILES) if kept else [math.inf] * 5 for kept in pushed.kept]
                np.testing.assert_allclose(got, np.transpose(expected), rtol=1e-13, atol=0, err_msg=f"after {i} sizes")
            pushed.push(row, active)

    @pytest.mark.parametrize("count", [1, 2, 5, 6, 20, 21, 500])
    def test_other_scopes_do_not_change_a_bit(self, count: int) -> None:
        # With equal counts it comes from the nearer end of unsorted rows, otherwise from sorted ones.
        sizes = tensor(noisy(count, 3))
        alone, among = (ring.fresh(torch.zeros(n, dtype=torch.float64), 21) for n in (3, 5))
        for row in sizes:
            alone = ring.pushed(alone, row, torch.ones(3, dtype=torch.bool))
            more = torch.cat((row, row[:1], row[:1]))
            among = ring.pushed(among, more, torch.tensor([True, True, True, False, bool(among["count"][4] < 4)]))
        rows, stored = alone["ring"].sort(dim=1).values, alone["count"].clamp_max(21)
        for q in (*QUANTILES, 0.25, 1 / 3, 0.999):
            assert torch.equal(ring.quantile(alone, q), ring.quantile(among, q)[:3])
            assert torch.equal(ring.quantile(alone, q), ring.quantile_of_sorted(rows, stored, q))

    def test_every_scope_may_be_empty(self) -> None:
        state = ring.fresh(torch.zeros(2, dtype=torch.float64), 5)
        for q in QUANTILES:
            assert ring.quantile(state, q).tolist() == [math.inf] * 2

    def test_equal_sizes_give_exactly_that_size(self) -> None:
        state = ring.fresh(torch.zeros(1, dtype=torch.float64), 50)
        for _ in range(37):
            state = ring.pushed(state, tensor([0.1]), torch.tensor([True]))
        for q in (0.0, 0.123, 0.5, 0.77, 1.0):
            assert ring.quantile(state, q).tolist() == [0.1]

    def test_float32_sizes_stay_float32(self) -> None:
        # For devices that know no float64.
        state = ring.fresh(torch.zeros(1), 4)
        state = ring.pushed(state, torch.tensor([0.1]), torch.tensor([True]))
        state = ring.pushed(state, torch.tensor([0.3]), torch.tensor([True]))
        assert state["ring"].dtype == torch.float32
        median = ring.quantile(state, 0.5)
        assert median.dtype == torch.float32
        assert median.item() == pytest.approx(0.2, rel=1e-6)


class TestMeanAndStd:
    @pytest.mark.parametrize("window", [2, 7, 300])
    @pytest.mark.parametrize("unequal", [False, True])
    def test_they_are_those_of_numpy_over_n_less_one(self, window: int, unequal: bool) -> None:
        pushed = Pushed(4, window)
        rows, active = noisy(400, 4), presence(400, unequal=unequal)
        for i, (row, present) in enumerate(zip(rows, active, strict=True)):
            if window < 300 or i % 29 == 0 or i > 395:
                got = torch.stack(ring.mean_and_std(pushed.state), dim=1).tolist()
                for (mean, std), kept in zip(got, pushed.kept, strict=True):
                    if len(kept) > 1:
                        assert mean == pytest.approx(np.mean(kept), rel=1e-13)
                        assert std == pytest.approx(np.std(kept, ddof=1), rel=1e-10)
            pushed.push(row, present)

    def test_less_than_two_sizes_give_numbers_all_the_same(self) -> None:
        # Whatever they are: nobody uses them, but NaN would be an error under anomaly detection.
        state = ring.fresh(torch.zeros(2, dtype=torch.float64), 3)
        state = ring.pushed(state, tensor([1.0, 2.0]), torch.tensor([True, False]))
        mean, std = ring.mean_and_std(state)
        assert mean.tolist() == [1.0, 0.0]
        assert std.tolist() == [0.0, 0.0]

    def test_a_large_mean_takes_nothing_from_a_small_deviation(self) -> None:
        state = ring.fresh(torch.zeros(1, dtype=torch.float64), 10)
        for size in (1e8, 1e8 + 1, 1e8 + 2):
            state = ring.pushed(state, tensor([size]), torch.tensor([True]))
        assert ring.mean_and_std(state)[1].item() == pytest.approx(1.0, rel=1e-12)
