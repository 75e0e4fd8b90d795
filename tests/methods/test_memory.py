"""Remembered sizes against lists and NumPy, and the float twin of each memory against its tensors."""

import math
import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from kit.drawn import given, settings, st
from kit.streams import noisy
from lightning_gradclip.methods import memory
from lightning_gradclip.methods.memory import AllSizes, LastSizes, Memory, State

Array = np.ndarray
Kind = type[Memory]

QUANTILES = [0.0, 0.1, 0.5, 0.9, 1.0]
BOTH = pytest.mark.parametrize("kind", [LastSizes, AllSizes])


def tensor(values: object, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.tensor(values, dtype=dtype)


def fresh(kind: Kind, scopes: int = 1, length: int = 9) -> State:
    size = torch.zeros(scopes, dtype=torch.float64)
    return LastSizes.fresh(size, length) if kind is LastSizes else AllSizes.fresh(size)


def pushed(kind: Kind, state: State, row: object, *active: bool) -> State:
    """The state after a row of sizes, of which all are active unless said otherwise."""
    sizes = tensor(row)
    return kind.pushed(state, sizes, torch.tensor(active) if active else torch.ones(len(sizes), dtype=torch.bool))


def in_floats(kind: Kind, sizes: list[float], length: int = 9) -> State:
    """The state of one scope in floats after these sizes."""
    state = kind.in_floats(fresh(kind, 1, length))
    for size in sizes:
        state = kind.pushed(state, size, True)
    return state


def kept(kind: Kind, sizes: list[float], length: int = 9) -> list[float]:
    """What is remembered of these sizes."""
    return sizes[-length:] if kind is LastSizes else sizes


def stream(count: int, *, ties: bool = False) -> list[float]:
    drawn = np.random.default_rng(0).lognormal(size=count)
    return (np.ceil(drawn * 2) if ties else drawn).tolist()


class Lists:
    """A memory of several scopes beside lists that are given the same sizes."""

    def __init__(self, kind: Kind, scopes: int, length: int = 9) -> None:
        self.kind, self.length = kind, length
        self.state = fresh(kind, scopes, length)
        self.lists: list[list[float]] = [[] for _ in range(scopes)]

    def push(self, sizes: Array, active: Array) -> None:
        self.state = pushed(self.kind, self.state, sizes, *active.tolist())
        for one, size, is_active in zip(self.lists, sizes, active, strict=True):
            one.extend([size] if is_active else [])

    @property
    def kept(self) -> list[list[float]]:
        return [kept(self.kind, one, self.length) for one in self.lists]

    def check_quantiles(self, note: str) -> None:
        got = [self.kind.quantile(self.state, q).tolist() for q in QUANTILES]
        expected = [np.quantile(kept, QUANTILES) if kept else [math.inf] * len(QUANTILES) for kept in self.kept]
        np.testing.assert_allclose(got, np.transpose(expected), rtol=1e-13, atol=0, err_msg=note)


def presence(steps: int, *, unequal: bool) -> Array:
    """Which of four scopes are active at each step: all of them, or each at a rate of its own and the last never."""
    rates = [1.0, 0.6, 0.05, 0.0] if unequal else [1.0] * 4
    return np.random.default_rng(1).random((steps, 4)) < rates


class TestBoth:
    @BOTH
    def test_what_was_there_is_left_as_it_is(self, kind: Kind) -> None:
        before = pushed(kind, fresh(kind, 2, 3), [2.0, 4.0])
        copies = {name: value.clone() for name, value in before.items()}
        pushed(kind, before, [1.0, 2.0])
        kind.quantile(before, 0.5, tensor([1.0, 2.0]))
        assert all(torch.equal(before[name], copy) for name, copy in copies.items())

    @BOTH
    def test_of_nothing_there_is_no_limit(self, kind: Kind) -> None:
        for q in QUANTILES:
            assert kind.quantile(fresh(kind, 3), q).tolist() == [math.inf] * 3
            assert kind.quantile(in_floats(kind, []), q) == math.inf

    @pytest.mark.parametrize(("kind", "length"), [*((LastSizes, n) for n in (1, 2, 7, 100)), (AllSizes, 9)])
    @pytest.mark.parametrize("ties", [False, True])
    def test_quantiles_of_floats_are_numpys(self, kind: Kind, length: int, ties: bool) -> None:
        sizes = stream(350 if kind is LastSizes else 2 * memory.RECENT + 40, ties=ties)
        state = in_floats(kind, [], length)
        for i, size in enumerate(sizes):
            if kind is LastSizes or i < 40 or i % 97 == 0 or i % memory.RECENT in (0, 1, memory.RECENT - 1):
                past, with_it = (kept(kind, sizes[:count], length) for count in (i, i + 1))
                for q in QUANTILES:
                    expected = np.quantile(past, q) if past else math.inf
                    assert kind.quantile(state, q) == pytest.approx(expected, rel=1e-14)
                    assert kind.quantile(state, q, size) == pytest.approx(np.quantile(with_it, q), rel=1e-14)
            state = kind.pushed(state, size, True)
        assert kind.count(state) == len(sizes)

    @BOTH
    def test_floats_and_tensors_turn_into_each_other_at_any_time(self, kind: Kind) -> None:
        state, floats, turning = fresh(kind), False, random.Random(0)
        sizes = stream(memory.RECENT + 60)
        for i, size in enumerate(sizes):
            if turning.random() < (0.3 if i < 100 else 0.01):
                state = kind.as_tensors(state) if floats else kind.in_floats(state)
                floats = not floats
            if i % 7 == 0 or i > memory.RECENT - 5:
                past = kept(kind, sizes[:i])
                expected = np.quantile(past, 0.7) if past else math.inf
                assert float(kind.quantile(state, 0.7)) == pytest.approx(expected, rel=1e-14)
            state = kind.pushed(state, size, True) if floats else pushed(kind, state, [size])
        rows = kind.as_tensors(state)
        assert rows["count"].tolist() == [len(sizes)]
        assert rows.keys() == fresh(kind).keys()
        assert all(isinstance(value, Tensor) and len(value) == 1 for value in rows.values())


SIZES = st.floats(min_value=0, exclude_min=True, allow_infinity=False) | st.integers(1, 9).map(float)
ABSENT = st.sampled_from([0.0, math.nan, math.inf])


class TestTwins:
    """What a scope is on tensors it is in floats: pushed, asked, saved and loaded at the same steps."""

    @BOTH
    @settings(derandomize=True, deadline=None, max_examples=300)
    @given(
        sizes=st.lists(SIZES | ABSENT, max_size=20),
        length=st.integers(1, 8),
        recent=st.integers(1, 8),
        q=st.floats(0, 1),
        data=st.data(),
    )
    def test_a_twin_does_as_the_tensors_do(
        self, kind: Kind, sizes: list[float], length: int, recent: int, q: float, data: st.DataObject
    ) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(memory, "RECENT", recent)
            tensors = fresh(kind, 1, length)
            floats = kind.in_floats(tensors)
            for size in sizes:
                self.check(kind, tensors, floats, q, size)
                active = math.isfinite(size) and size > 0
                tensors = pushed(kind, tensors, [size], active)
                floats = kind.pushed(floats, size, active)
                if data.draw(st.booleans(), label="saved and loaded"):
                    assert self.contents(kind.as_tensors(floats)) == self.contents(tensors)
                    tensors, floats = kind.as_tensors(floats), kind.in_floats(tensors)
            self.check(kind, tensors, floats, q, 1.0)

    def check(self, kind: Kind, tensors: State, floats: State, q: float, size: float) -> None:
        """The same quantiles to the bit, and moments that differ by how they are summed."""
        assert [kind.count(floats)] == kind.count(tensors).tolist()
        assert [kind.quantile(floats, q)] == kind.quantile(tensors, q).tolist()
        assert [kind.quantile(floats, q, size)] == kind.quantile(tensors, q, tensor([size])).tolist()
        if kind is LastSizes:
            (mean, std), (of_rows, std_of_rows) = LastSizes.mean_and_std(floats), LastSizes.mean_and_std(tensors)
            assert mean == pytest.approx(of_rows.item(), rel=1e-12)
            # Deviations are of the rounded mean; those whose squares leave the range of float64 are not compared.
            if 1e-150 < mean < 1e150 and std > 1e-150:
                assert std == pytest.approx(std_of_rows.item(), rel=1e-12, abs=1e-15 * mean)

    def contents(self, rows: State) -> dict[str, Any]:
        """What a state holds. Which of all sizes were merged does not matter, and infinities stand for no size."""
        assert all(value.dtype == (torch.long if name == "count" else torch.float64) for name, value in rows.items())
        (count,) = rows["count"].tolist()
        if "ring" in rows:
            return {"ring": rows["ring"][0].tolist(), "count": count}
        both = torch.cat((rows["sorted"], rows["recent"]), dim=1)
        return {"all": both[torch.isfinite(both)].sort().values.tolist(), "count": count}


class TestLastSizes:
    @pytest.mark.parametrize("length", [1, 2, 7, 1000])
    @pytest.mark.parametrize("unequal", [False, True])
    def test_it_holds_the_last_sizes_of_active_scopes(self, length: int, unequal: bool) -> None:
        steps = 2100 if length == 1000 else 60
        held = Lists(LastSizes, 4, length)
        for row, active in zip(noisy(steps, 4), presence(steps, unequal=unequal), strict=True):
            held.push(row, active)
            if length < 1000:
                self.check(held)
        self.check(held)
        assert (min(map(len, held.lists)) > length) == (not unequal)

    def check(self, held: Lists) -> None:
        assert held.state["count"].tolist() == [len(one) for one in held.lists]
        assert held.state["ring"].shape == (4, held.length)
        for row, kept in zip(held.state["ring"].tolist(), held.kept, strict=True):
            assert sorted(row) == sorted(kept) + [math.inf] * (held.length - len(kept))

    @pytest.mark.parametrize("bad", [math.nan, math.inf, 0.0])
    def test_an_inactive_scope_keeps_every_bit(self, bad: float) -> None:
        state = fresh(LastSizes, 2, 2)
        for size in (3.0, 4.0, 5.0):
            state = pushed(LastSizes, state, [size, 2 * size])
        after = pushed(LastSizes, state, [bad, 7.0], False, True)
        assert after["ring"].tolist() == [[5.0, 4.0], [10.0, 7.0]]
        assert after["count"].tolist() == [3, 4]

    @pytest.mark.parametrize("length", [1, 2, 7, 1000])
    @pytest.mark.parametrize("unequal", [False, True])
    def test_the_quantile_is_that_of_numpy(self, length: int, unequal: bool) -> None:
        steps = 1500 if length == 1000 else 40
        held = Lists(LastSizes, 4, length)
        looked = set(range(12)) | set(range(998, 1003)) | set(range(0, steps, 1 if length < 1000 else 97))
        for i, (row, active) in enumerate(zip(noisy(steps, 4), presence(steps, unequal=unequal), strict=True)):
            if i in looked:
                held.check_quantiles(f"after {i} sizes")
            held.push(row, active)

    @pytest.mark.parametrize("count", [1, 2, 5, 6, 20, 21, 500])
    def test_other_scopes_do_not_change_a_bit(self, count: int) -> None:
        # With equal counts it comes from the nearer end of unsorted rows, otherwise from sorted ones.
        alone, among = fresh(LastSizes, 3, 21), fresh(LastSizes, 5, 21)
        for row in noisy(count, 3).tolist():
            alone = pushed(LastSizes, alone, row)
            among = pushed(LastSizes, among, [*row, *row[:2]], True, True, True, False, bool(among["count"][4] < 4))
        for q in (*QUANTILES, 0.25, 1 / 3, 0.999):
            assert torch.equal(LastSizes.quantile(alone, q), LastSizes.quantile(among, q)[:3])

    def test_equal_sizes_give_exactly_that_size(self) -> None:
        state = fresh(LastSizes, 1, 50)
        for _ in range(37):
            state = pushed(LastSizes, state, [0.1])
        for q in (0.0, 0.123, 0.5, 0.77, 1.0):
            assert LastSizes.quantile(state, q).tolist() == [0.1]

    def test_float32_sizes_stay_float32(self) -> None:
        # For devices that know no float64.
        state = LastSizes.fresh(torch.zeros(1), 4)
        for size in (0.1, 0.3):
            state = LastSizes.pushed(state, torch.tensor([size]), torch.tensor([True]))
        median = LastSizes.quantile(state, 0.5)
        assert state["ring"].dtype == median.dtype == torch.float32
        assert median.item() == pytest.approx(0.2, rel=1e-6)


class TestMeanAndStd:
    @pytest.mark.parametrize("length", [2, 7, 300])
    @pytest.mark.parametrize("unequal", [False, True])
    def test_they_are_those_of_numpy_over_n_less_one(self, length: int, unequal: bool) -> None:
        held = Lists(LastSizes, 4, length)
        for i, (row, present) in enumerate(zip(noisy(400, 4), presence(400, unequal=unequal), strict=True)):
            if length < 300 or i % 29 == 0 or i > 395:
                got = torch.stack(LastSizes.mean_and_std(held.state), dim=1).tolist()
                for (mean, std), kept in zip(got, held.kept, strict=True):
                    if len(kept) > 1:
                        assert mean == pytest.approx(np.mean(kept), rel=1e-13)
                        assert std == pytest.approx(np.std(kept, ddof=1), rel=1e-10)
            held.push(row, present)

    @pytest.mark.parametrize("length", [2, 9, 100])
    def test_those_of_floats_are_numpys(self, length: int) -> None:
        state = in_floats(LastSizes, [], length)
        for i, size in enumerate(sizes := stream(150), start=1):
            state = LastSizes.pushed(state, size, True)
            past = kept(LastSizes, sizes[:i], length)
            std = np.std(past, ddof=1) if i > 1 else 0.0
            assert LastSizes.mean_and_std(state) == pytest.approx((np.mean(past), std), rel=1e-13)

    def test_less_than_two_sizes_give_numbers_all_the_same(self) -> None:
        # Whatever they are: nobody uses them, but NaN would be an error under anomaly detection.
        mean, std = LastSizes.mean_and_std(pushed(LastSizes, fresh(LastSizes, 2), [1.0, 2.0], True, False))
        assert mean.tolist() == [1.0, 0.0]
        assert std.tolist() == [0.0, 0.0]
        assert LastSizes.mean_and_std(in_floats(LastSizes, [])) == (0.0, 0.0)

    def test_a_large_mean_takes_nothing_from_a_small_deviation(self) -> None:
        state = fresh(LastSizes)
        for size in (1e8, 1e8 + 1, 1e8 + 2):
            state = pushed(LastSizes, state, [size])
        assert LastSizes.mean_and_std(state)[1].item() == pytest.approx(1.0, rel=1e-12)

    def test_a_sum_beyond_the_largest_float_is_infinite(self) -> None:
        state = in_floats(LastSizes, [1.7e308, 1.7e308, 1.0], 3)
        assert LastSizes.mean_and_std(state) == (math.inf, math.inf)


class TestAllSizes:
    @pytest.mark.parametrize("recent", [1, 2, 5, 64])
    @pytest.mark.parametrize("rates", [[1.0] * 4, [1.0, 0.6, 0.05, 0.0], [0.3, 0.2, 0.0, 0.1]], ids=str)
    @pytest.mark.parametrize("ties", [False, True])
    def test_the_quantile_is_that_of_numpy_at_every_step(
        self, monkeypatch: pytest.MonkeyPatch, recent: int, rates: list[float], ties: bool
    ) -> None:
        # Merges as often as that reach all cases in few steps.
        monkeypatch.setattr(memory, "RECENT", recent)
        rows = np.round(noisy(70, 4)) if ties else noisy(70, 4)
        held = Lists(AllSizes, 4)
        for i, (row, active) in enumerate(zip(rows, np.random.default_rng(2).random(rows.shape) < rates, strict=True)):
            held.check_quantiles(f"after {i} sizes")
            held.push(row, active)
            assert held.state["count"].tolist() == list(map(len, held.lists))
            both = torch.cat((held.state["sorted"], held.state["recent"]), dim=1).tolist()
            assert [sorted(filter(math.isfinite, one)) for one in both] == list(map(sorted, held.lists))

    def test_it_is_that_of_numpy_where_1024_are_merged(self) -> None:
        assert memory.RECENT == 1024
        held = Lists(AllSizes, 2)
        looked = {1024 * times + off for times in (1, 2, 3) for off in (-2, -1, 0, 1, 2)} | {3, 1500}
        for i, row in enumerate(noisy(3 * 1024 + 2, 2), start=1):
            # The second scope sits out every third step.
            held.push(row, np.array([True, i % 3 != 0]))
            if i in looked:
                held.check_quantiles(f"after {i} sizes")
        # Nothing is kept twice, and no more than is needed.
        assert (held.state["sorted"].shape, held.state["recent"].shape) == ((2, 3 * 1024), (2, 2))

    def test_rows_are_as_long_as_the_longest_needs(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(memory, "RECENT", 10)
        state = fresh(AllSizes, 2)
        for i in range(40):
            state = pushed(AllSizes, state, [1.0 + i, 2.0], i % 2 == 0, i % 4 == 0)
        assert state["sorted"].shape == (2, 20)
        assert state["count"].tolist() == [20, 10]

    def test_floats_lie_sorted_where_1024_are_merged(self) -> None:
        rows = AllSizes.as_tensors(in_floats(AllSizes, sizes := stream(2 * 1024 + 40)))
        assert rows["sorted"].tolist() == [sorted(sizes[:2048])]
        assert rows["recent"].tolist() == [sorted(sizes[2048:])]

    def test_fresh_rows_are_as_long_as_those_beside_them(self) -> None:
        like = {"sorted": torch.zeros(1, 7), "recent": torch.zeros(1, 3), "count": torch.tensor([10])}
        state = AllSizes.fresh(torch.zeros(2), like=like)
        shapes = {name: tuple(value.shape) for name, value in state.items()}
        assert shapes == {"sorted": (2, 7), "recent": (2, 3), "count": (2,)}
        assert AllSizes.quantile(state, 0.5).tolist() == [math.inf] * 2

    @settings(derandomize=True, deadline=None, max_examples=200)
    @given(
        long=st.lists(st.integers(1, 9), max_size=12),
        recent=st.lists(st.integers(1, 9), max_size=12),
        q=st.floats(0, 1),
        current=st.none() | st.integers(1, 9).map(float),
    )
    def test_quantiles_of_both_rows_are_numpys(
        self, long: list[int], recent: list[int], q: float, current: float | None
    ) -> None:
        count = torch.tensor([len(long) + len(recent)])
        state = {"sorted": tensor([sorted(long)]), "recent": tensor([recent]), "count": count}
        everything = [*long, *recent, *([] if current is None else [current])]
        expected = np.quantile(everything, q) if everything else math.inf
        assert AllSizes.quantile(AllSizes.in_floats(state), q, current) == pytest.approx(expected, rel=1e-13)


class Written(TorchDispatchMode):
    """Counts the entries of all results."""

    def __init__(self) -> None:
        super().__init__()
        self.entries = 0

    def __torch_dispatch__(
        self, function: object, types: object, args: tuple = (), kwargs: dict | None = None
    ) -> object:
        result = function(*args, **(kwargs or {}))
        self.entries += sum(
            one.numel() for one in (result if isinstance(result, tuple) else (result,)) if isinstance(one, Tensor)
        )
        return result


def test_between_merges_a_step_costs_the_same_however_many_sizes_there_are() -> None:
    state, costs = fresh(AllSizes), {}
    for i, row in enumerate(noisy(5 * 1024 + 513), start=1):
        if i % 1024 != 512:
            state = pushed(AllSizes, state, row)
            continue
        with Written() as written:
            AllSizes.quantile(state, 0.9)
            state = pushed(AllSizes, state, row)
        costs[i] = written.entries
    assert len(costs) == 6
    # Before the first merge there is no long row to look at.
    first, *later = costs.values()
    assert first < later[0]
    assert set(later) == {later[0]}
    assert state["sorted"].shape[1] == 5 * 1024
