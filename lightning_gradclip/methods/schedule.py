"""Limits that change with the step: a mapping from optimizer step to value.

Values are interpolated linearly between the points and constant before the first and after the last. An infinite
value, which stands for no limit, holds until the next point is reached.
"""

import math
from bisect import bisect_right
from collections.abc import Iterator, Mapping
from numbers import Real
from typing import TYPE_CHECKING, Any, cast

from lightning_gradclip import checks

if TYPE_CHECKING:
    Scheduled = float | dict[int, float]
else:
    # To LightningCLI `{0:10,1000:1}` is a mapping without values, and `inf` a text.
    Scheduled = float | dict[int | float | str, float | str | None] | str
MEASURE = "to measure without clipping use method=None"  # the remedy where a limit is refused


def scheduled(name: str, value: object, **bounds: Any) -> Scheduled:
    """Check a constant or a schedule by `checks.number`, and return a plain float or a plain dict sorted by step."""
    if isinstance(value, str):
        value = _read(name, value)
    if not isinstance(value, bool) and isinstance(value, Real):
        return checks.number(name, value, **bounds)
    if not isinstance(value, Mapping):
        kinds = "a number or a schedule such as {0: 10.0, 1000: 1.0}"
        raise TypeError(f"{name} must be {kinds}, got {value!r} ({type(value).__name__})")
    if not value:
        raise ValueError(f"{name} is an empty schedule; give at least one point, {name}={{0: 1.0}}")
    remedy = f"write {name}={{0: 10.0, 1000: 1.0}}"
    given = _points(cast("Mapping[object, object]", value))
    points = {checks.integer(f"{name}'s step", step, at_least=0, remedy=remedy): one for step, one in given}
    return {step: checks.number(f"{name}[{step}]", points[step], **bounds) for step in sorted(points)}


def _read(name: str, text: str) -> object:
    """The number or the mapping that a text stands for, or else the text."""
    if not (text.startswith("{") and text.endswith("}")):
        return checks.from_text(name, text)
    points = (point.partition(":") for point in text[1:-1].split(",") if point.strip())
    return {step.strip(" \"'"): checks.from_text(name, one.strip(" \"'"), quiet=True) for step, _, one in points}


def _points(given: Mapping[object, object]) -> Iterator[tuple[object, object]]:
    """The points of a schedule, also as YAML 1.1 reads `{0:10,1000:1}`: a text and 1000 minutes and a second."""
    run_together = all(value in (None, "None") for value in given.values()) and any(":" in str(step) for step in given)
    for step, value in given.items():
        if run_together:
            step, value = _parted(step)
        # Keys of JSON are text.
        yield int(step) if isinstance(step, str) and step.isdecimal() else step, value


def _parted(point: object) -> tuple[object, object]:
    if isinstance(point, (int, float)):
        minutes, seconds = divmod(point, 60)
        return int(minutes), round(seconds, 15 - len(str(int(point))))
    step, _, value = str(point).partition(":")
    return step, checks.from_text("value", value, quiet=True)


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
