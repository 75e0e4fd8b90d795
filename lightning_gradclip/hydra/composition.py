"""Looks on while Hydra composes, so that what was chosen is what comes out.

Hydra has no hook between choosing files and merging them, so its own function is wrapped: a private name, for which
`make test-packaging` asks every supported version. Where it is missing, importing this fails, and Hydra says that the
plugin does not fit. A composition without an option of the pack is left as it is.
"""

from collections.abc import Iterator

import hydra
from hydra._internal import config_loader_impl
from hydra._internal.config_repository import IConfigRepository
from hydra._internal.defaults_list import DefaultsList
from hydra._internal.defaults_list import create_defaults_list as _create_defaults_list
from hydra.core.default_element import ConfigDefault
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import ConfigCompositionException

from lightning_gradclip.hydra.places import GROUP, PARENT, SCHEME, Choice, Files
from lightning_gradclip.hydra.settings import METHOD, is_below, settle, settled_overrides, written


def watch() -> None:
    """Look on from now on.

    Raises:
        ImportError: If this Hydra composes in another way.
    """
    names = config_loader_impl.__dict__
    if "create_defaults_list" not in names:
        raise ImportError(
            f"lightning_gradclip does not know how Hydra {hydra.__version__} composes; pip install 'hydra-core<1.5'"
        )
    names["create_defaults_list"] = create_defaults_list


def create_defaults_list(
    repo: IConfigRepository,
    config_name: str | None,
    overrides_list: list[Override],
    prepend_hydra: bool,
    skip_missing: bool,
) -> DefaultsList:
    """Do what Hydra's function of this name does, and settle what the options of the pack come to."""
    for source in repo.get_sources():
        if source.scheme() == SCHEME:
            # To an application without a group of this name, `callbacks` is a value like any other.
            vars(source)["composes"] = not any(map(_names_an_option, overrides_list))
    _refuse_two_on_the_line(overrides_list)
    try:
        result = _create_defaults_list(repo, config_name, overrides_list, prepend_hydra, skip_missing)
    except RecursionError:
        _refuse_endless(repo)
        raise
    files = Files(result.defaults, repo)
    searched = [*overrides_list, *_searched(files)] if skip_missing else overrides_list
    for place, sweep in _sweeps(searched):
        _refuse_shared(searched, place, sweep)
        # A job of the sweep has the option that they are for.
        result.config_overrides = [one for one in result.config_overrides if not is_below(one.key_or_group, place)]
    for choice in _one_for_each_place(files, overrides_list):
        _refuse_without_room(files, choice)
        settled = settle(files, choice)
        result.config_overrides = list(settled_overrides(result.config_overrides, choice, settled))
    return result


def _values(override: Override) -> list[object]:
    value = override.value()
    return value if isinstance(value, list) else [value]


def _names_an_option(override: Override) -> bool:
    prefix = GROUP.removeprefix(f"{PARENT}/") + "/"
    return override.key_or_group == PARENT and any(str(value).startswith(prefix) for value in _values(override))


def _refuse_two_on_the_line(overrides: list[Override]) -> None:
    seen: dict[str | None, Override] = {}
    for override in overrides:
        if override.key_or_group == GROUP and not override.is_delete():
            first = seen.setdefault(override.package, override)
            if first.value() != override.value():
                raise ConfigCompositionException(
                    f"{first.input_line} and {override.input_line} choose two options for one place; leave one of them"
                )


def _refuse_endless(repo: IConfigRepository) -> None:
    for name in repo.get_group_options(GROUP):
        loaded = repo.load_config(f"{GROUP}/{name}")
        for default in (loaded and loaded.defaults_list) or ():
            if isinstance(default, ConfigDefault) and default.path == name:
                raise ConfigCompositionException(
                    f"'{GROUP}/{name}' is built on itself, since it has the name of an option of lightning_gradclip; "
                    f"write defaults: [_{name}, _self_] in it"
                ) from None


def _one_for_each_place(files: Files, overrides: list[Override]) -> list[Choice]:
    chosen: dict[str, Choice] = {}
    for choice in files.choices():
        first = chosen.setdefault(choice.place, choice)
        if first.path != choice.path:
            both = [f"{one.name} by {_origin(one, overrides)}" for one in (first, choice)]
            raise ConfigCompositionException(
                f"{choice.place} is chosen twice, {both[0]} and {both[1]}; choose once, such as {GROUP}={choice.name}"
            )
    return list(chosen.values())


def _refuse_without_room(files: Files, choice: Choice) -> None:
    if choice.place == PARENT:
        name = choice.path.removeprefix(f"{PARENT}/")
        raise ConfigCompositionException(
            f"{PARENT}={name} puts the option in the place of all callbacks; write {PARENT}=[{name}], in brackets"
        )
    found = files.without_room(choice.place)
    if found:
        path, key, kind, field = found
        remedy = f"write {field}: Any = None in it"
        if kind == "list":
            remedy = f"choose another place, +{GROUP}@gradclip={choice.name}, and add ${{gradclip}} to the list"
        raise ConfigCompositionException(
            f"{choice.place} has no place, since {key} in '{path}' is a {kind} without {field!r}; {remedy}"
        )


def _origin(choice: Choice, overrides: list[Override]) -> str:
    """Who has chosen it: a part of the command line, or a file."""
    names = {GROUP: choice.name, PARENT: choice.path.removeprefix(f"{PARENT}/")}
    for override in overrides:
        if override.key_or_group in names and names[override.key_or_group] in _values(override):
            return f"{override.input_line}"
    return f"'{choice.parent}'"


def _sweeps(overrides: list[Override]) -> Iterator[tuple[str, Override]]:
    """The places for which a sweep or a search goes through several options."""
    for override in overrides:
        if override.key_or_group == GROUP and override.is_sweep_override():
            yield override.package or GROUP.replace("/", "."), override


def _searched(files: Files) -> Iterator[Override]:
    """What the files tell a sweeper to go through, under whatever key that sweeper has for it."""
    parser = OverridesParser.create()
    for _, node in files.contents("hydra.sweeper"):
        for key, value in _named(node):
            yield parser.parse_override(f"{key}={_choice(value) or written(value)}")


def _named(node: object) -> Iterator[tuple[str, object]]:
    """The keys in it that lie below the place of all callbacks, and what they have."""
    for key, value in node.items() if isinstance(node, dict) else ():
        if is_below(str(key).lstrip("+").replace("/", ".").partition("@")[0], PARENT):
            yield str(key), value
        else:
            yield from _named(value)


def _choice(value: object) -> str | None:
    """As Hydra writes it. Optuna's files have text, Nevergrad's a list, Ax's `values`, and Optuna's had `choices`."""
    values = value.get("values", value.get("choices")) if isinstance(value, dict) else value
    return f"choice({written(values)[1:-1]})" if isinstance(values, list) else None


def _refuse_shared(overrides: list[Override], place: str, sweep: Override) -> None:
    """A setting of a method in a sweep over methods would be that of each; two plus signs say that it is meant so."""
    for override in overrides:
        if is_below(override.key_or_group, f"{place}.{METHOD}") and not override.is_force_add():
            raise ConfigCompositionException(
                f"{override.input_line} would be set for each option of {sweep.input_line}; sweep over options of your "
                f"own, {GROUP}/NAME.yaml with what is set for each, or write ++{override.key_or_group} if all are meant"
            )
