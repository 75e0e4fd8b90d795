"""What is set for the method of a chosen option, in files and on the command line.

A method is taken whole: settings that a file made for another option are left out, a schedule takes the place of the
one before, as does a method with a `_target_` of its own. Hydra by itself would merge them key by key.
"""

import warnings
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, TypeGuard, cast

from hydra.core.override_parser.types import Override
from hydra.errors import ConfigCompositionException
from omegaconf import DictConfig, OmegaConf, flag_override

from lightning_gradclip.hydra.places import GROUP, Choice, Files

# The argument of the callback that holds what the method is and its arguments.
METHOD = "method"


def settle(files: Files, choice: Choice) -> object:
    """Leave in the files only what belongs to the chosen option.

    Returns:
        What its method comes to: a dictionary, or None where the option has no method.
    """
    result: object = None
    before: list[DictConfig] = []
    for path, node in files.contents(choice.place):
        if METHOD not in _plain(node):
            continue
        meant = None if path in choice.files else files.taken_for_chosen(path, choice.place)
        if meant and meant != choice.path:
            _leave_out(node, f"'{path}'", meant, choice)
            continue
        _count_steps(node)
        method = _plain(node)[METHOD]
        if path == choice.path:
            _say_what_is_overwritten(result, method, choice)
        result = _joined(result, method, before)
        before.append(node)
    return result


def settled_overrides(overrides: list[Override], choice: Choice, method: object) -> Iterator[Override]:
    """The overrides, with points of schedules by their step, and whole schedules in place of those before."""
    place = f"{choice.place}.{METHOD}"
    for override in overrides:
        key, value = override.key_or_group, override.value()
        if override.is_delete() or not is_below(key, place):
            yield override
        elif key == place:
            if isinstance(value, dict) and "_target_" in value:
                yield _setting(override, place, None)
            method = value
            yield override
        elif method is None and key != f"{place}._target_":
            raise _nothing_to_set(override, choice)
        else:
            method = method if isinstance(method, dict) else {}
            yield from _argument(override, place, method)


def is_below(key: str, place: str) -> bool:
    """Whether a dotted key is this place or lies in it."""
    return f"{key}.".startswith(f"{place}.")


def _argument(override: Override, place: str, method: dict[str, Any]) -> Iterator[Override]:
    """Set one argument of the method, which is brought up to date, or one point of it."""
    name, _, point = override.key_or_group.removeprefix(f"{place}.").partition(".")
    key, value, before = f"{place}.{name}", override.value(), method.get(name)
    if point.isdigit():
        if not _is_schedule(before):
            raise _no_schedule(override, key, point, before)
        method[name] = {**before, int(point): value}
        yield _setting(override, key, {int(point): value})
    elif _is_schedule(value) and not override.is_add():
        method[name] = _counted(value)
        if isinstance(before, dict):
            yield _setting(override, key, None)
        yield _setting(override, key, method[name])
    else:
        method[name] = method.get(name) if point else value
        yield override


def _setting(override: Override, key: str, value: object) -> Override:
    return replace(override, key_or_group=key, _value=value)


def _plain(node: DictConfig) -> dict[str, Any]:
    return cast("dict[str, Any]", OmegaConf.to_container(node, resolve=False) or {})


def _is_schedule(value: object) -> TypeGuard[dict[Any, Any]]:
    """Whether these are values by step, as a whole number or its digits."""
    return isinstance(value, dict) and bool(value) and all(str(step).isdigit() for step in cast("Any", value))


def _counted(schedule: dict[Any, Any]) -> dict[int, Any]:
    return {int(step): value for step, value in schedule.items()}


def _count_steps(node: DictConfig) -> None:
    """Let all files give steps as whole numbers, so that a point has one key."""
    method = _plain(node)[METHOD]
    for name, value in method.items() if isinstance(method, dict) else ():
        if _is_schedule(value) and not all(isinstance(step, int) for step in value):
            node[METHOD][name] = _counted(value)


def _joined(result: object, method: object, before: list[DictConfig]) -> object:
    """Merge as Hydra will, after taking out of the files before what is replaced as a whole."""
    if not isinstance(method, dict) or not isinstance(result, dict):
        return method
    if "_target_" in method and method["_target_"] != result.get("_target_", method["_target_"]):
        for node in before:
            _drop(node, METHOD)
        return method
    for name in method.keys() & result.keys():
        if _is_schedule(method[name]) and isinstance(result[name], dict):
            for node in before:
                _drop(node[METHOD], name)
    return {**result, **method}


def _drop(node: object, key: str) -> None:
    if isinstance(node, DictConfig) and key in _plain(node):
        with flag_override(node, ["struct", "readonly"], False):
            del node[key]


def _leave_out(node: DictConfig, where: str, meant: str, choice: Choice) -> None:
    lines = " ".join(_lines(f"{choice.place}.{METHOD}", _plain(node)[METHOD]))
    _drop(node, METHOD)
    warnings.warn(
        f"{lines} in {where} is meant for {GROUP}={meant.removeprefix(f'{GROUP}/')} and left out, since {choice.name} "
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
