"""Limits that change with the step."""

import math

import numpy as np
import pytest
from omegaconf import OmegaConf

from kit.drawn import given, settings, st
from lightning_gradclip.methods.schedule import greatest, least, scheduled, value_at

SCHEDULES = st.dictionaries(st.integers(0, 10**9), st.floats(1e-30, 1e30, allow_nan=False), min_size=1, max_size=6).map(
    lambda points: scheduled("x", points)
)


def test_a_constant_is_the_same_at_every_step() -> None:
    constant = scheduled("x", 2)
    assert type(constant) is float
    assert [value_at(constant, step) for step in (0, 1, 10**9)] == [2.0, 2.0, 2.0]
    assert (least(constant), greatest(constant)) == (2.0, 2.0)


def test_a_schedule_is_sorted_copied_and_plain() -> None:
    given_points = {1000: 1, 0: 10}
    result = scheduled("x", given_points)
    assert type(result) is dict
    assert list(result.items()) == [(0, 10.0), (1000, 1.0)]
    assert {type(value) for value in result.values()} == {float}
    given_points[0] = 99
    assert result[0] == 10.0
    assert list(given_points) == [1000, 0]


def test_a_configuration_node_becomes_a_plain_dict() -> None:
    result = scheduled("x", OmegaConf.create({0: 10, 1000: 1.5}))
    assert type(result) is dict
    assert result == {0: 10.0, 1000: 1.5}
    assert {type(step) for step in result} == {int}


@pytest.mark.parametrize(
    ("step", "value"),
    [(0, 10.0), (9, 10.0), (10, 10.0), (11, 8.0), (14, 2.0), (15, 4.0), (16, 6.0), (17, 6.0), (10**9, 6.0)],
)
def test_values_are_interpolated_between_the_points_and_constant_outside(step: int, value: float) -> None:
    assert value_at({10: 10.0, 14: 2.0, 16: 6.0}, step) == pytest.approx(value, rel=1e-15)


@settings(derandomize=True, deadline=None)
@given(schedule=SCHEDULES, step=st.integers(0, 2 * 10**9))
def test_interpolation_is_that_of_numpy(schedule: dict[int, float], step: int) -> None:
    expected = np.interp(step, list(schedule), list(schedule.values()))
    # Where two terms cancel the error is one of the larger.
    assert value_at(schedule, step) == pytest.approx(expected, rel=1e-12, abs=1e-15 * greatest(schedule))


@settings(derandomize=True, deadline=None)
@given(schedule=SCHEDULES)
def test_every_point_is_met_exactly_and_bounds_the_rest(schedule: dict[int, float]) -> None:
    assert [value_at(schedule, step) for step in schedule] == list(schedule.values())
    assert least(schedule) == min(schedule.values())
    assert greatest(schedule) == max(schedule.values())


@pytest.mark.parametrize(("step", "value"), [(0, math.inf), (5, math.inf), (10, 1.0), (11, 1.0)])
def test_an_infinite_point_means_no_limit_until_the_next(step: int, value: float) -> None:
    assert value_at(scheduled("max_norm", {0: math.inf, 10: 1.0}, above=0.0), step) == value


@pytest.mark.parametrize(("step", "value"), [(0, 1.0), (5, math.inf), (10, math.inf), (11, math.inf)])
def test_a_limit_may_end_at_infinity(step: int, value: float) -> None:
    assert value_at(scheduled("max_norm", {0: 1.0, 10: math.inf}, above=0.0), step) == value


@pytest.mark.parametrize(
    ("value", "error", "said"),
    [
        ({}, ValueError, "max_norm is an empty schedule; give at least one point, max_norm={0: 1.0}"),
        ({-1: 1.0}, ValueError, "max_norm's step must be >= 0, got -1; write max_norm={0: 10.0, 1000: 1.0}"),
        (
            {"a": 1.0},
            TypeError,
            "max_norm's step must be a whole number, got 'a' (str); write max_norm={0: 10.0, 1000: 1.0}",
        ),
        ("{0}", TypeError, "max_norm[0] must be a number, got '' (str); use None"),
        ({100: None}, TypeError, "max_norm[100] must be a number, got None (NoneType); use None"),
        (
            {0.5: 1.0},
            TypeError,
            "max_norm's step must be a whole number, got 0.5 (float); write max_norm={0: 10.0, 1000: 1.0}",
        ),
        ({0: 1.0, 1000: 0.0}, ValueError, "max_norm[1000] must be > 0, got 0.0; use None"),
        ({0: "one"}, TypeError, "max_norm[0] must be a number, got 'one' (str); use None"),
        (
            [(0, 1.0)],
            TypeError,
            "max_norm must be a number or a schedule such as {0: 10.0, 1000: 1.0}, got [(0, 1.0)] (list)",
        ),
        (0, ValueError, "max_norm must be > 0, got 0; use None"),
    ],
)
def test_what_is_wrong_with_a_schedule_is_said(value: object, error: type[Exception], said: str) -> None:
    with pytest.raises(error) as failure:
        scheduled("max_norm", value, above=0.0, remedy="use None")
    assert str(failure.value) == said


# Keys of JSON, the spelling of both command lines as text, and what YAML 1.1 makes of it without spaces.
@pytest.mark.parametrize(
    "value",
    [
        {"0": 10, "1000": 0.1},
        "{0:10,1000:0.1}",
        "{0: 10, 1000: 0.1}",
        {"0:10": None, 60000.1: None},
        OmegaConf.create("{0:10, 1000:0.1}"),
    ],
)
def test_a_schedule_is_read_in_every_spelling(value: object) -> None:
    assert scheduled("max_norm", value) == {0: 10.0, 1000: 0.1}


def test_an_infinite_point_is_read_in_every_spelling() -> None:
    for value in ("{0:inf,5:1}", "{0: .inf, 5: 1}", {0: "inf", 5: 1}, {"0:inf": None, 301: None}):
        assert scheduled("max_norm", value) == {0: math.inf, 5: 1.0}


def test_at_least_holds_at_every_point() -> None:
    assert scheduled("x", {0: 0.0}, at_least=0.0) == {0: 0.0}
    with pytest.raises(ValueError, match=r"^x\[3\] must be >= 0, got -1"):
        scheduled("x", {0: 0.0, 3: -1.0}, at_least=0.0)
