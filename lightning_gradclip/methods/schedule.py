"""Limits that change with the step: a mapping from optimizer step to value.

Values are interpolated linearly between the points and constant before the first and after the last. An infinite
value, which stands for no limit, holds until the next point is reached.
"""

import math
from bisect import bisect_right
from collections.abc import Mapping
from numbers import Real
from typing import Any, cast

from lightning_gradclip import checks

Scheduled = float | dict[int, float]
MEASURE = "to measure without clipping use method=None"  # the remedy where a limit is refused


def scheduled(name: str, value: object, **bounds: Any) -> Scheduled:
    """Check a constant or a schedule by `checks.number`, and return a plain float or a plain dict sorted by step."""
    if not isinstance(value, bool) and isinstance(value, Real):
        return checks.number(name, value, **bounds)
    if not isinstance(value, Mapping):
        kinds = "a number or a schedule such as {0: 10.0, 1000: 1.0}"
        raise TypeError(f"{name} must be {kinds}, got {value!r} ({type(value).__name__})")
    if not value:
        raise ValueError(f"{name} is an empty schedule; give at least one point, {name}={{0: 1.0}}")
    remedy = f"write {name}={{0: 10.0, 1000: 1.0}}"
    given = cast("Mapping[object, object]", value).items()
    points = {checks.integer(f"{name}'s step", step, at_least=0, remedy=remedy): one for step, one in given}
    return {step: checks.number(f"{name}[{step}]", points[step], **bounds) for step in sorted(points)}


def value_at(value: Scheduled, step: int) -> float:
    """The value of a constant or a schedule at one optimizer step, counted from 0."""
    if not isinstance(value, dict):
        return value
    steps = list(value)
    after = bisect_right(steps, step)
    left = steps[(after or 1) - 1]
    if step <= left or after == len(steps):
        return value[left]
    low, high = value[left], value[steps[after]]
    if math.isinf(low) or math.isinf(high):
        return low if math.isinf(low) else high
    return low + (step - left) / (steps[after] - left) * (high - low)


def least(value: Scheduled) -> float:
    """The smallest value that a constant or a schedule ever takes."""
    return min(value.values()) if isinstance(value, dict) else value


def greatest(value: Scheduled) -> float:
    """The largest value that a constant or a schedule ever takes."""
    return max(value.values()) if isinstance(value, dict) else value
