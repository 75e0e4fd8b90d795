"""The steps between two log events: every one counted once, in bounded memory."""

import io
import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from kit.drawn import given, settings, st
from kit.gradients import same_bits
from lightning_gradclip.record.step import Row
from lightning_gradclip.record.window import Window

GOOD = Row(norm=2.0, norm_clipped=1.0, limit=1.0, coef=0.5, clipped=1.0, finite=1, skipped=0, changed=1, overflow=0)
BAD = GOOD._replace(norm=math.inf, norm_clipped=0.0, coef=0.0, finite=0.0, skipped=1.0)
OVERFLOW = BAD._replace(norm=math.nan, changed=0.0, overflow=1.0)


def rows(count: int, seed: int = 0) -> list[Row]:
    """Steps of all kinds: clipped or not, dropped, not finite, repaired, overflowing."""
    random = np.random.default_rng(seed)
    result = []
    for _ in range(count):
        norm = float(np.exp(random.normal()))
        limit = float(random.uniform(0.5, 2.0))
        coef = min(1.0, limit / norm)
        row = Row(norm, norm * coef, limit, coef, float(coef < 1), 1.0, 0.0, float(coef < 1), 0.0)
        kind = random.choice(["good", "over", "bad", "zeroed", "overflow"], p=[0.75, 0.1, 0.07, 0.05, 0.03])
        if kind == "over":
            row = row._replace(norm_clipped=0.0, coef=0.0, skipped=1.0, changed=1.0)
        elif kind == "zeroed":
            row = row._replace(finite=0.0, changed=1.0)
        elif kind != "good":
            row = row._replace(norm=math.nan, norm_clipped=0.0, coef=0.0, finite=0.0, skipped=1.0, changed=1.0)
        if kind == "overflow":
            row = row._replace(changed=0.0, overflow=1.0)
        result.append(row)
    return result


MANY = rows(5000)


def expected(window: Sequence[Row], since_start: Sequence[Row]) -> dict[str, float]:
    """All numbers over the same steps: those whose norm is finite."""
    result: dict[str, float] = {}
    if covered := [row for row in window if math.isfinite(row.norm)]:
        result |= {
            "norm": np.mean([row.norm for row in covered]),
            "norm_clipped": np.mean([row.norm_clipped for row in covered]),
            "norm_max": max(row.norm for row in covered),
            "limit": np.mean([row.limit for row in covered]),
            "coef_min": min(row.coef for row in covered),
            "clip_rate": np.mean([row.changed for row in covered]),
        }
    result["skipped"] = sum(row.skipped for row in since_start if not row.overflow)
    result["nonfinite"] = sum(1 - row.finite for row in since_start if not row.overflow)
    if any(row.overflow for row in since_start):
        result["overflows"] = sum(row.overflow for row in since_start)
    return result


def assert_equal(result: dict[str, float], reference: dict[str, float]) -> None:
    assert result.keys() == reference.keys()
    for name, value in reference.items():
        # Means to the rounding of a sum; everything else exactly.
        rtol = 1e-13 if name in ("norm", "norm_clipped", "limit", "clip_rate") else 0
        assert type(result[name]) is float
        np.testing.assert_allclose(result[name], value, rtol=rtol, atol=0, err_msg=name)


def filled(steps: Iterable[Row | Tensor]) -> Window:
    window = Window()
    for row in steps:
        window.add(0, row)
    return window


def on_device(row: Row) -> Tensor:
    """The row as a GPU step leaves it."""
    return torch.tensor(row, dtype=torch.float64)


def saved_and_loaded(state: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def leaves(state: object) -> list[object]:
    if isinstance(state, dict):
        return [leaf for key in sorted(state) for leaf in (key, *leaves(state[key]))]
    return [leaf for one in state for leaf in leaves(one)] if isinstance(state, list) else [state]


def assert_same_state(one: dict[str, Any], other: dict[str, Any]) -> None:
    pairs = list(zip(leaves(one), leaves(other), strict=True))
    assert pairs
    for a, b in pairs:
        assert type(a) is type(b)
        assert same_bits(a, b) if isinstance(a, Tensor) else a == b


@pytest.mark.parametrize("count", [1, 2, 1023, 1024, 1025, 2048, 5000])
def test_aggregates_are_those_of_numpy_however_often_the_buffer_folds(count: int) -> None:
    steps = rows(count)
    assert_equal(filled(steps).compute(), expected(steps, steps))


@pytest.mark.parametrize("count", [3, 1500])
def test_rows_on_the_device_and_on_the_host_count_alike(count: int) -> None:
    steps = rows(count)
    half = count // 2
    # A checkpoint leaves host rows before those of the device.
    for mixed in ([on_device(row) for row in steps], [*steps[:half], *map(on_device, steps[half:])]):
        assert_equal(filled(mixed).compute(), expected(steps, steps))


def test_float32_rows_of_a_device_without_float64_count_too() -> None:
    window = filled([torch.tensor(GOOD, dtype=torch.float32), GOOD])
    assert window.compute()["norm"] == 2.0


def test_the_buffer_is_bounded() -> None:
    window = Window()
    for i in range(5000):
        window.add(i, GOOD, ("a", "b"), torch.tensor([1.0, 2.0], dtype=torch.float64))
        if i % 97 == 0 or i > 4900:
            state = window.state_dict()
            assert len(state["rows"]) < 1024
            assert len(state["scope_norms"]) < 1024


def test_clearing_begins_a_new_window_and_keeps_the_counts() -> None:
    steps = rows(3000)
    window = filled(steps[:1700])
    assert_equal(window.compute(), expected(steps[:1700], steps[:1700]))
    window.clear()
    for row in steps[1700:]:
        window.add(0, row)
    assert_equal(window.compute(), expected(steps[1700:], steps))


def test_clearing_counts_what_nobody_asked_for() -> None:
    window = filled([GOOD, BAD])
    window.clear()
    assert window.compute() == {"skipped": 1.0, "nonfinite": 1.0}


def test_an_empty_window_has_counts_only() -> None:
    assert Window().compute() == {"skipped": 0.0, "nonfinite": 0.0}


def test_without_a_finite_step_the_norms_are_left_out_and_the_counts_written() -> None:
    assert filled([BAD, BAD]).compute() == {"skipped": 2.0, "nonfinite": 2.0}


def test_overflows_are_counted_apart_and_change_nothing() -> None:
    result = filled([OVERFLOW, GOOD]).compute()
    assert (result["skipped"], result["nonfinite"], result["overflows"]) == (0.0, 0.0, 1.0)
    assert (result["clip_rate"], result["norm"]) == (1.0, 2.0)


@pytest.mark.parametrize("limit", [math.inf, math.nan])
def test_a_limit_that_is_not_finite_is_left_out(limit: float) -> None:
    result = filled([GOOD._replace(limit=limit)]).compute()
    assert "limit" not in result
    assert result["norm"] == 2.0
    # As in the warm-up of an adaptive limit: a mean over the others would not be about the steps of the norm.
    assert "limit" not in filled([GOOD._replace(limit=limit), GOOD]).compute()


@pytest.mark.parametrize("name", ["norm_clipped", "coef", "limit"])
def test_what_is_not_known_of_every_step_is_left_out(name: str) -> None:
    known = filled([GOOD, GOOD, BAD]).compute()
    unknown = filled([GOOD, GOOD._replace(**{name: math.nan}), BAD]).compute()
    missing = "coef_min" if name == "coef" else name
    assert {key: value for key, value in unknown.items() if key != "clipped"} == {
        key: value for key, value in known.items() if key != missing
    }


def test_a_repaired_step_counts_as_what_was_made_of_it_and_a_dropped_one_as_zero() -> None:
    zeroed = GOOD._replace(norm=4.0, norm_clipped=1.0, coef=0.25, finite=0.0)
    dropped = GOOD._replace(norm=6.0, norm_clipped=0.0, coef=0.0, skipped=1.0)
    result = filled([GOOD, zeroed, dropped, BAD]).compute()
    assert result == {
        "norm": 4.0,
        "norm_clipped": pytest.approx(2 / 3),
        "norm_max": 6.0,
        "limit": 1.0,
        "coef_min": 0.0,
        "clip_rate": 1.0,
        "skipped": 2.0,
        "nonfinite": 2.0,
    }


def test_a_window_is_empty_until_a_step_is_recorded() -> None:
    window = Window()
    assert window.is_empty
    for row in (GOOD, BAD, OVERFLOW):
        window.add(0, row)
        assert not window.is_empty
        window.compute()
        assert not window.is_empty
        window.clear()
        assert window.is_empty


class TestScopes:
    def test_their_norms_are_means_over_the_steps_in_which_they_were_there(self) -> None:
        random = np.random.default_rng(0)
        matrix = random.uniform(1, 2, (3000, 3))
        matrix[random.uniform(size=matrix.shape) < 0.3] = math.nan
        matrix[random.uniform(size=matrix.shape) < 0.01] = math.inf
        matrix[:, 2] = math.nan
        window = Window()
        for row in torch.from_numpy(matrix):
            window.add(0, GOOD, ("a", "b", "c"), row)
        result = window.scope_norms()
        assert result.keys() == {"a", "b"}
        for column, name in enumerate(("a", "b")):
            seen = matrix[np.isfinite(matrix[:, column]), column]
            assert result[name] == pytest.approx(seen.mean(), rel=1e-13)

    def test_scopes_may_join_and_leave_within_a_window(self) -> None:
        window = Window()
        for names, norms in ((("a",), [1.0]), (("a", "b"), [3.0, 5.0]), (("b",), [7.0])):
            window.add(0, GOOD, names, torch.tensor(norms, dtype=torch.float64))
        assert window.scope_norms() == {"a": 2.0, "b": 6.0}

    def test_they_leave_out_the_steps_that_the_joint_norm_leaves_out(self) -> None:
        window = Window()
        for row, norm in ((GOOD, 1.0), (BAD, 100.0), (GOOD, 3.0)):
            window.add(0, row, ("a", "b"), torch.tensor([norm, math.inf if row is BAD else 1.0]))
        assert window.scope_norms() == {"a": 2.0, "b": 1.0}

    def test_they_are_cleared(self) -> None:
        window = Window()
        window.add(0, GOOD, ("a",), torch.tensor([1.0], dtype=torch.float64))
        window.clear()
        assert window.scope_norms() == {}
        window.add(0, GOOD, ("a",), torch.tensor([5.0], dtype=torch.float64))
        assert window.scope_norms() == {"a": 5.0}


def steps_with_scopes(window: Window, steps: Sequence[Row]) -> None:
    for row in steps:
        window.add(0, row, ("a", "b"), torch.tensor([row.coef, math.nan], dtype=torch.float64))


class TestState:
    @pytest.mark.parametrize("count", [0, 1, 700, 1024, 2500])
    @pytest.mark.parametrize("looked_at", [False, True])
    def test_a_window_goes_on_to_the_bit(self, count: int, looked_at: bool) -> None:
        steps = rows(count + 1500)
        straight = Window()
        steps_with_scopes(straight, steps[:count])
        if looked_at:
            straight.compute()
        state = saved_and_loaded(straight.state_dict())
        assert_same_state(state, straight.state_dict())
        resumed = Window()
        resumed.load_state_dict(state)
        assert resumed.is_empty == straight.is_empty
        assert_same_state(resumed.state_dict(), straight.state_dict())
        for window in (straight, resumed):
            steps_with_scopes(window, steps[count:])
        assert resumed.compute() == straight.compute()
        assert resumed.scope_norms() == straight.scope_norms()
        assert_equal(resumed.compute(), expected(steps, steps))

    def test_rows_of_a_device_are_saved_on_the_host_in_their_order(self) -> None:
        steps = rows(5)
        state = filled([*steps[:2], *map(on_device, steps[2:])]).state_dict()
        np.testing.assert_array_equal(state["rows"].numpy(), np.array(steps))
        assert state["rows"].device.type == "cpu"

    def test_saving_changes_nothing(self) -> None:
        steps = rows(1500)
        window = filled(steps)
        first = window.state_dict()
        assert_same_state(window.state_dict(), first)
        assert_equal(window.compute(), expected(steps, steps))

    def test_what_was_saved_does_not_change_with_the_window(self) -> None:
        window = Window()
        steps_with_scopes(window, rows(1500))
        window.compute()
        state = window.state_dict()
        copy = saved_and_loaded(state)
        steps_with_scopes(window, rows(1500))
        window.compute()
        assert_same_state(state, copy)

    def test_what_was_loaded_does_not_change_with_the_window(self) -> None:
        source = Window()
        steps_with_scopes(source, rows(1500))
        source.compute()
        state = source.state_dict()
        copy = saved_and_loaded(state)
        window = Window()
        window.load_state_dict(state)
        steps_with_scopes(window, rows(1500))
        window.compute()
        assert_same_state(state, copy)

    @pytest.mark.parametrize("count", [0, 3])
    def test_loading_replaces_what_was_there(self, count: int) -> None:
        saved = filled(rows(count, seed=1))
        saved.compute()
        window = Window()
        steps_with_scopes(window, rows(1500))
        window.compute()
        window.load_state_dict(saved.state_dict())
        assert_same_state(window.state_dict(), saved.state_dict())
        assert window.is_empty == saved.is_empty
        assert window.compute() == saved.compute()


@settings(derandomize=True, deadline=None, max_examples=40)
@given(
    operations=st.lists(
        st.one_of(st.integers(1, 400), st.sampled_from(["look", "clear", "resume"])), min_size=1, max_size=12
    ),
    seed=st.integers(0, 100),
)
def test_every_step_is_counted_once_whatever_happens_in_between(operations: list[int | str], seed: int) -> None:
    steps = MANY[seed:]
    window, start, end = Window(), 0, 0
    for operation in operations:
        if operation == "look":
            window.compute()
        elif operation == "clear":
            window.clear()
            start = end
        elif operation == "resume":
            state = saved_and_loaded(window.state_dict())
            window = Window()
            window.load_state_dict(state)
        else:
            for row in steps[end : end + operation]:
                window.add(0, row)
            end += operation
    assert window.is_empty == (start == end)
    assert_equal(window.compute(), expected(steps[start:end], steps[:end]))


def test_the_share_of_clipped_scopes_is_averaged_where_there_are_several() -> None:
    several = GOOD._replace(limit=math.nan)
    window = filled([several._replace(clipped=share) for share in (0.25, 0.0, 0.5)] + [BAD._replace(clipped=1.0)])
    assert window.compute()["clipped"] == 0.25
    assert "clipped" not in filled([GOOD, GOOD]).compute()


def test_a_loaded_window_is_as_bounded() -> None:
    names = tuple(map(str, range(3000)))
    norms = torch.ones(3000, dtype=torch.float64)
    before, window = Window(), Window()
    before.add(0, GOOD, names, norms)
    window.load_state_dict(before.state_dict())
    for step in range(1, 400):
        window.add(step, GOOD, names, norms)
        if step % 20 == 0:
            # 2**18 / 3,000 is 87.4.
            assert len(window.state_dict()["scope_norms"]) < 88
