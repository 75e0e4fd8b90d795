"""What is set for the method of a chosen option, in files and on the command line.

A method is taken whole: settings that a file made for another option are left out, a schedule takes the place of the
one before, as does a method with a `_target_` of its own. Hydra by itself would merge them key by key.
"""

import warnings
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any, TypeGuard, cast

from hydra.core.override_parser.types import Override, OverrideType
from hydra.errors import ConfigCompositionException
from omegaconf import OmegaConf

from lightning_gradclip.hydra.places import GROUP, Choice, Files

# The argument of the callback that holds what the method is and its arguments.
METHOD = "method"


@dataclass(frozen=True)
class Settled:
    """What the files come to for the method of an option: what belongs to it, and what Hydra merges."""

    method: object
    merged: object


def settle(files: Files, choice: Choice) -> Settled:
    """What belongs to the method of the chosen option, of all that the files have at its place."""
    method: object = None
    merged: object = None
    for path, content in files.contents(choice.place):
        if METHOD not in content:
            continue
        held = content[METHOD]
        merged = _merged(merged, held)
        meant = None if path in choice.files else files.taken_for_chosen(path, choice.place)
        if meant and meant != choice.path:
            _say_what_is_left_out(held, path, meant, choice)
            continue
        if path == choice.path:
            _say_what_is_overwritten(method, held, choice)
        method = _joined(method, _by_step(held))
    return Settled(method, merged)


def settled_overrides(overrides: list[Override], choice: Choice, settled: Settled) -> Iterator[Override]:
    """The overrides, with points of schedules by their step, and whole schedules in place of those before."""
    place = f"{choice.place}.{METHOD}"
    method = settled.method
    targets = [one for one in overrides if one.key_or_group == f"{place}._target_" and not one.is_delete()]
    another = isinstance(method, dict) and any(one.value() != method.get("_target_") for one in targets)
    if another:
        method = {"_target_": targets[-1].value()}
    if another or settled.method != settled.merged:
        yield from _whole(place, method)
    for override in overrides:
        key, value = override.key_or_group, override.value()
        if not is_below(key, place) or (override.is_delete() and not _is_point(key, place, method)):
            yield override
        elif key == place:
            method = value
            yield from _whole(place, value) if isinstance(value, dict) and "_target_" in value else (override,)
        elif method is None and key != f"{place}._target_":
            raise _nothing_to_set(override, choice)
        else:
            method = method if isinstance(method, dict) else {}
            # The constructor of a method that no file describes knows its arguments.
            known = (
                replace(override, type=OverrideType.FORCE_ADD)
                if another and override.type == OverrideType.CHANGE
                else override
            )
            yield from _argument(known, place, method)


def is_below(key: str, place: str) -> bool:
    """Whether a dotted key is this place or lies in it."""
    return f"{key}.".startswith(f"{place}.")


def _is_point(key: str, place: str, method: object) -> bool:
    """Whether this is the key of a point in a schedule of the method."""
    name, _, point = key.removeprefix(f"{place}.").partition(".")
    return point.isdigit() and isinstance(method, dict) and _is_schedule(method.get(name))


def _argument(override: Override, place: str, method: dict[str, Any]) -> Iterator[Override]:
    """Set one argument of the method, which is brought up to date, or one point of it."""
    name, _, point = override.key_or_group.removeprefix(f"{place}.").partition(".")
    key, value, before = f"{place}.{name}", override.value(), method.get(name)
    if point.isdigit():
        if not _is_schedule(before):
            raise _no_schedule(override, key, point, before)
        yield from _point(override, key, int(point), before)
        method[name] = {**before, int(point): value}
        if override.is_delete():
            del method[name][int(point)]
    elif _is_schedule(value) and not override.is_add():
        method[name] = _counted(value)
        if isinstance(before, dict):
            yield _setting(override, key, None)
        yield _setting(override, key, method[name])
    else:
        method[name] = method.get(name) if point else value
        yield override


def _point(override: Override, key: str, step: int, before: dict[Any, Any]) -> Iterator[Override]:
    if not override.is_delete():
        yield _setting(override, key, {step: override.value()})
    elif step in before:
        yield from _whole(key, {other: value for other, value in before.items() if other != step})
    else:
        yield override


def _setting(override: Override, key: str, value: object) -> Override:
    return replace(override, key_or_group=key, _value=value)


def _whole(key: str, value: object) -> Iterator[Override]:
    """Put a value in the place of what is there, of which Hydra would keep the other keys."""
    for one in (None, deepcopy(value)):
        yield Override(OverrideType.FORCE_ADD, key, value_type=None, _value=cast("Any", one))


def _merged(before: object, after: object) -> object:
    """As Hydra merges the files."""
    one, other = (OmegaConf.create({METHOD: value}, flags={"allow_objects": True}) for value in (before, after))
    return OmegaConf.to_container(OmegaConf.merge(one, other), resolve=False)[METHOD]  # type: ignore[index]


def _is_schedule(value: object) -> TypeGuard[dict[Any, Any]]:
    """Whether these are values by step, as a whole number or its digits."""
    return isinstance(value, dict) and bool(value) and all(str(step).isdigit() for step in cast("Any", value))


def _counted(schedule: dict[Any, Any]) -> dict[int, Any]:
    return {int(step): value for step, value in schedule.items()}


def _by_step(method: object) -> object:
    """With the steps of schedules as whole numbers, whatever the file has, so that a point has one key."""
    if not isinstance(method, dict):
        return method
    return {name: _counted(value) if _is_schedule(value) else value for name, value in method.items()}


def _joined(before: object, method: object) -> object:
    """Merge as Hydra does, but for methods and schedules, each of which is replaced as a whole."""
    if not isinstance(method, dict) or not isinstance(before, dict):
        return method
    if "_target_" in method and method["_target_"] != before.get("_target_", method["_target_"]):
        return method
    return _merged({name: None if _is_schedule(method.get(name)) else value for name, value in before.items()}, method)


def _say_what_is_left_out(method: object, path: str, meant: str, choice: Choice) -> None:
    lines = " ".join(_lines(f"{choice.place}.{METHOD}", method))
    warnings.warn(
        f"{lines} in '{path}' is meant for {GROUP}={meant.removeprefix(f'{GROUP}/')} and left out, since {choice.name} "
        f"is chosen; what the command line sets is meant for {choice.name}",
        stacklevel=2,
    )


def _say_what_is_overwritten(before: object, method: object, choice: Choice) -> None:
    """Settings that lie before the option in a defaults list, which in Hydra means that the option wins."""
    if isinstance(before, dict) and isinstance(method, dict) and "_target_" not in before:
        lost = {name: value for name, value in before.items() if name in method and method[name] != value}
        if lost:
            warnings.warn(
                f"{' '.join(_lines(f'{choice.place}.{METHOD}', lost))} comes before {GROUP}: {choice.name} in a "
                "defaults list, and the option overwrites it; write _self_ after the option",
                stacklevel=3,
            )


def _lines(key: str, value: object) -> Iterator[str]:
    if isinstance(value, dict) and value and not _is_schedule(value):
        for name, one in value.items():
            yield from _lines(f"{key}.{name}", one)
    else:
        yield f"{key}={written(value)}"


def written(value: object) -> str:
    """A value as the command line takes it."""
    if isinstance(value, dict):
        return "{" + ",".join(f"{name}:{written(one)}" for name, one in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(written, value)) + "]"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _nothing_to_set(override: Override, choice: Choice) -> ConfigCompositionException:
    return ConfigCompositionException(
        f"{override.input_line} has nothing to set, since {GROUP}={choice.name} has no method; "
        f"choose one that has, such as {GROUP}=norm"
    )


def _no_schedule(override: Override, key: str, point: str, before: object) -> ConfigCompositionException:
    value = written(override.value())
    return ConfigCompositionException(
        f"{override.input_line} sets a point of a schedule, and {key} is {written(before)}; "
        f"write the whole schedule, '{key}={{0: {written(before)}, {point}: {value}}}'"
    )
