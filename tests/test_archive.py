"""All sizes of each scope against lists and NumPy, across merges."""

import math

import numpy as np
import pytest
import torch
from streams import Fed, noisy
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_gradclip import QuantileClip
from lightning_gradclip.methods import archive

QUANTILES = [0.0, 0.1, 0.5, 0.9, 1.0]


def empty(scopes: int) -> archive.State:
    return archive.fresh(torch.zeros(scopes, dtype=torch.float64))


def pushed(state: archive.State, row: object, *active: bool) -> archive.State:
    sizes = torch.tensor(row, dtype=torch.float64)
    return archive.pushed(state, sizes, torch.tensor(active) if active else torch.ones(len(sizes), dtype=torch.bool))


def check(state: archive.State, lists: list[list[float]], note: str) -> None:
    got = [archive.quantile(state, q).tolist() for q in QUANTILES]
    expected = [np.quantile(one, QUANTILES) if one else [math.inf] * len(QUANTILES) for one in lists]
    np.testing.assert_allclose(got, np.transpose(expected), rtol=1e-13, atol=0, err_msg=note)


class TestQuantile:
    @pytest.mark.parametrize("recent", [1, 2, 5, 64])
    @pytest.mark.parametrize("rates", [[1.0] * 4, [1.0, 0.6, 0.05, 0.0], [0.3, 0.2, 0.0, 0.1]], ids=str)
    @pytest.mark.parametrize("ties", [False, True])
    def test_it_is_that_of_numpy_at_every_step(
        self, monkeypatch: pytest.MonkeyPatch, recent: int, rates: list[float], ties: bool
    ) -> None:
        # Merges as often as that reach all cases in few steps.
        monkeypatch.setattr(archive, "RECENT", recent)
        rows = noisy(70, 4)
        rows = np.round(rows) if ties else rows
        present = np.random.default_rng(2).random(rows.shape) < rates
        state, lists = empty(4), [[] for _ in rates]
        for i, (row, active) in enumerate(zip(rows, present, strict=True)):
            check(state, lists, f"after {i} sizes")
            state = pushed(state, row, *active.tolist())
            for one, size, is_active in zip(lists, row, active, strict=True):
                one.extend([size] if is_active else [])
            assert state["count"].tolist() == list(map(len, lists))
            held = torch.cat((state["sorted"], state["recent"]), dim=1)
            assert [sorted(filter(math.isfinite, one)) for one in held.tolist()] == list(map(sorted, lists))

    def test_it_is_that_of_numpy_where_1024_are_merged(self) -> None:
        count = 3 * archive.RECENT + 2
        assert archive.RECENT == 1024
        rows = noisy(count, 2)
        state = empty(2)
        looked = {1024 * times + off for times in (1, 2, 3) for off in (-2, -1, 0, 1, 2)} | {3, 1500}
        for i, row in enumerate(rows, start=1):
            # The second scope sits out every third step.
            state = pushed(state, row, True, i % 3 != 0)
            if i in looked:
                check(state, [rows[:i, 0].tolist(), rows[:i, 1][np.arange(1, i + 1) % 3 != 0].tolist()], f"after {i}")
        # Nothing is kept twice, and no more than is needed.
        assert (state["sorted"].shape, state["recent"].shape) == ((2, 3 * 1024), (2, 2))

    def test_rows_are_as_long_as_the_longest_needs(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(archive, "RECENT", 10)
        state = empty(2)
        for i in range(40):
            state = pushed(state, [1.0 + i, 2.0], i % 2 == 0, i % 4 == 0)
        assert state["sorted"].shape == (2, 20)
        assert state["count"].tolist() == [20, 10]

    def test_an_empty_archive_has_no_limit(self) -> None:
        for q in QUANTILES:
            assert archive.quantile(empty(3), q).tolist() == [math.inf] * 3

    def test_what_was_there_is_left_as_it_is(self) -> None:
        before = pushed(empty(1), [2.0])
        copies = {name: value.clone() for name, value in before.items()}
        pushed(before, [1.0])
        assert all(torch.equal(before[name], copy) for name, copy in copies.items())


class TestScopesThatJoin:
    @pytest.mark.parametrize("before", [10, 1023, 1024, 1030])
    def test_they_begin_empty_beside_long_rows(self, before: int) -> None:
        rows = noisy(before, 2)
        fed = Fed(QuantileClip(q=0.5, window=None, per="parameter"), ["a", "b"])
        for row in rows:
            fed.step(row)
        grown = Fed(QuantileClip(q=0.5, window=None, per="parameter"), ["new", "b", "a"])
        grown.clipper.load_state_dict(fed.clipper.state_dict())
        later = noisy(20, 3, seed=1)
        limits = grown.limits(later)
        for i in range(20):
            expected = [np.median([*rows[:, 1 - k], *later[:i, 1 + k]]) for k in (0, 1)]
            np.testing.assert_allclose(limits[i, 1:], expected, rtol=1e-13)
            assert limits[i, 0] == (pytest.approx(np.median(later[:i, 0]), rel=1e-13) if i else math.inf)
        assert grown.memory["count"].tolist() == [20, before + 20, before + 20]

    def test_fresh_rows_are_as_long_as_those_beside_them(self) -> None:
        like = {"sorted": torch.zeros(1, 7), "recent": torch.zeros(1, 3), "count": torch.tensor([10])}
        state = archive.fresh(torch.zeros(2), like=like)
        assert {name: tuple(value.shape) for name, value in state.items()} == {
            "sorted": (2, 7),
            "recent": (2, 3),
            "count": (2,),
        }
        assert archive.quantile(state, 0.5).tolist() == [math.inf] * 2


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
    state, costs = empty(1), {}
    for i, row in enumerate(noisy(5 * 1024 + 513), start=1):
        if i % 1024 != 512:
            state = pushed(state, row)
            continue
        with Written() as written:
            archive.quantile(state, 0.9)
            state = pushed(state, row)
        costs[i] = written.entries
    assert len(costs) == 6
    # Before the first merge there is no long row to look at.
    first, *later = costs.values()
    assert first < later[0]
    assert set(later) == {later[0]}
    assert state["sorted"].shape[1] == 5 * 1024
