"""Where options of the pack are chosen: by which file, for which place, and what another file takes for chosen."""

from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, cast

from hydra._internal.config_repository import IConfigRepository
from hydra.core.default_element import ConfigDefault, GroupDefault, ResultDefault
from omegaconf import Container, DictConfig, ListConfig, OmegaConf, flag_override

PARENT = "callbacks"
GROUP = f"{PARENT}/gradclip"
# By which Hydra knows the source of the pack.
SCHEME = "gradclip"


@dataclass(frozen=True)
class Choice:
    """An option at a place, a dotted key such as `callbacks.gradclip`, and the files that make it up."""

    place: str
    path: str
    parent: str
    files: frozenset[str]

    @property
    def name(self) -> str:
        """The option as users write it."""
        return self.path.removeprefix(f"{GROUP}/")


class Files:
    """The files of one composition, in the order in which Hydra merges them."""

    def __init__(self, defaults: list[ResultDefault], repo: IConfigRepository) -> None:
        self.repo = repo
        self.packages: dict[str, str] = {}
        self.parents: dict[str, str] = {}
        self._placed: dict[tuple[str, str], str] = {}
        for default in defaults:
            path, package, parent = default.config_path or "", default.package or "", default.parent or ""
            self.packages.setdefault(path, package)
            self.parents.setdefault(path, parent)
            self._placed[path, package] = parent

    def config(self, path: str) -> Container | None:
        """What the file holds."""
        loaded = self.repo.load_config(path)
        return loaded and loaded.config

    def choices(self) -> Iterator[Choice]:
        """Every option that was chosen; two for one place are two."""
        for (path, place), parent in self._placed.items():
            if path.startswith(f"{GROUP}/") and not self._is_part(parent, place):
                files = frozenset(self._below(path, place))
                # Files with settings and no `_target_`, listed beside an option, choose nothing.
                if any(_has_target(self.config(file)) for file in files):
                    yield Choice(place, path, parent, files)

    def contents(self, place: str) -> Iterator[tuple[str, dict[str, Any]]]:
        """What each file has for this place, in the order of merging."""
        keys = place.split(".")
        for path, package in self._placed:
            outer = package.split(".") if package else []
            if all(key == other for key, other in zip(keys, outer, strict=False)):
                found = _inside(self.config(path), keys[len(outer) :])
                if isinstance(found, DictConfig):
                    if keys[0] != "hydra":
                        _count_steps(found)
                    held: Any = OmegaConf.to_container(found, resolve=False)
                    # A file may lie deeper: its package is the method, or an argument of it.
                    for key in reversed(outer[len(keys) :]):
                        held = {key: held}
                    yield path, held or {}

    def without_room(self, place: str) -> tuple[str, str, str, str] | None:
        """What leaves no room for a place: the file, the key in it, the type that lies there, the field it would need.

        A list has no fields at all.
        """
        keys = place.split(".")
        for path, package in self._placed:
            inside = package.split(".") if package else []
            for end in range(len(inside), len(keys)) if keys[: len(inside)] == inside else ():
                found = _inside(self.config(path), keys[len(inside) : end])
                kind = OmegaConf.get_type(found) if isinstance(found, (DictConfig, ListConfig)) else None
                if kind is list or (kind not in (None, dict) and keys[end] not in set(cast("DictConfig", found))):
                    return path, ".".join(keys[:end]) or "everything", kind.__name__, keys[end]
        return None

    def taken_for_chosen(self, path: str, place: str) -> str | None:
        """The option that this file is written for: its own choice, or that of the files which it is a part of."""
        found = self._chosen_below(path, place, overrides=True)
        while not found and path in self.parents:
            path = self.parents[path]
            beside = (self._chosen_below(child, place, overrides=False) for child in reversed(self._children(path)))
            found = self._chosen_in(path, place, overrides=True) or next(filter(None, beside), None)
        return found

    def _is_part(self, parent: str, place: str) -> bool:
        return parent.startswith(f"{GROUP}/") and (parent, place) in self._placed

    def _below(self, path: str, place: str) -> Iterator[str]:
        yield path
        for (child, package), parent in self._placed.items():
            if parent == path and package == place and child != path:
                yield from self._below(child, place)

    def _children(self, path: str) -> list[str]:
        return [child for child, parent in self.parents.items() if parent == path]

    def _chosen_below(self, path: str, place: str, *, overrides: bool) -> str | None:
        deeper = (self._chosen_below(child, place, overrides=overrides) for child in reversed(self._children(path)))
        return self._chosen_in(path, place, overrides=overrides) or next(filter(None, deeper), None)

    def _chosen_in(self, path: str, place: str, *, overrides: bool) -> str | None:
        """What the file's own defaults list says, whoever else has overridden it."""
        loaded = path in self.packages and self.repo.load_config(path)
        found = None
        for default in (loaded and loaded.defaults_list) or ():
            if overrides or not default.is_override():
                for one in _configs(deepcopy(default)):
                    one.update_parent(path.rpartition("/")[0], self.packages[path])
                    if one.get_config_path().startswith(f"{GROUP}/") and one.get_final_package() == place:
                        found = one.get_config_path()
        return found


def _count_steps(node: DictConfig) -> None:
    """Let all files give steps as whole numbers, which OmegaConf does not merge with their digits."""
    for name, value in OmegaConf.to_container(node, resolve=False).items():  # type: ignore[union-attr]
        if isinstance(value, dict) and value and all(isinstance(key, str) and key.isdigit() for key in value):
            with flag_override(node, ["struct", "readonly"], False):
                node[name] = {int(key): one for key, one in value.items()}
        elif isinstance(value, dict):
            _count_steps(cast("DictConfig", node[name]))


def _configs(default: object) -> Iterator[ConfigDefault]:
    """The files that an entry of a defaults list stands for."""
    if isinstance(default, ConfigDefault) and not default.is_self():
        yield default
    elif isinstance(default, GroupDefault):
        values = default.value if isinstance(default.value, list) else [default.value]
        for value in values:
            if value is not None and "${" not in value:
                yield ConfigDefault(path=f"{default.group}/{value}", package=default.package)


def _has_target(config: Container | None) -> bool:
    return isinstance(config, DictConfig) and "_target_" in config


def _inside(config: object, keys: list[str]) -> object:
    for key in keys:
        if not isinstance(config, DictConfig) or key not in config or OmegaConf.is_interpolation(config, key):
            return None
        config = config[key]
    return config
