"""Limits that change with the step: a mapping from optimizer step to value.

Values are interpolated linearly between the points and constant before the first and after the last. An infinite
value, which stands for no limit, holds until the next point is reached.
"""

import math
from bisect import bisect_right
from collections.abc import Mapping
from functools import partial
from numbers import Real
from typing import cast

from lightning_gradclip import checks

Scheduled = float | dict[int, float]


def scheduled(
    name: str,
    value: object,
    *,
    above: float = float("-inf"),
    at_least: float = float("-inf"),
    at_most: float = float("inf"),
    finite: bool = False,
    remedy: str = "",
) -> Scheduled:
    """Check a constant or a schedule and return it as a plain float or a plain dict sorted by step."""
    check = partial(checks.number, above=above, at_least=at_least, at_most=at_most, finite=finite, remedy=remedy)
    if isinstance(value, Real) and value is not True and value is not False:
        return check(name, value)
    if not isinstance(value, Mapping):
        kinds = "a number or a schedule such as {0: 10.0, 1000: 1.0}"
        raise TypeError(f"{name} must be {kinds}, got {value!r} ({type(value).__name__})")
    points = cast("Mapping[object, object]", value)
    if not points:
        raise ValueError(f"{name} is an empty schedule; give at least one point, {name}={{0: 1.0}}")
    steps = {
        checks.integer(f"{name}'s step", step, at_least=0, remedy=f"write {name}={{0: 10.0, 1000: 1.0}}"): step
        for step in points
    }
    return {step: check(f"{name}[{step}]", points[steps[step]]) for step in sorted(steps)}


def value_at(value: Scheduled, step: int) -> float:
    """The value of a constant or a schedule at one optimizer step, counted from 0."""
    if not isinstance(value, dict):
        return value
    steps = list(value)
    after = bisect_right(steps, step)
    if after == 0:
        return value[steps[0]]
    left = steps[after - 1]
    if after == len(steps) or step == left:
        return value[left]
    right = steps[after]
    for end in (value[left], value[right]):
        if math.isinf(end):
            return end
    share = (step - left) / (right - left)
    return value[left] + share * (value[right] - value[left])


def least(value: Scheduled) -> float:
    """The smallest value that a constant or a schedule ever takes."""
    return min(value.values()) if isinstance(value, dict) else value


def greatest(value: Scheduled) -> float:
    """The largest value that a constant or a schedule ever takes."""
    return max(value.values()) if isinstance(value, dict) else value
