"""The plugins by which Hydra finds the configuration pack: where it is, and what is in it."""

from importlib.resources import files
from typing import TYPE_CHECKING, cast

from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.object_type import ObjectType
from hydra.core.plugins import Plugins
from hydra.plugins.config_source import ConfigLoadError, ConfigResult, ConfigSource
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import DictConfig, OmegaConf

from lightning_gradclip.hydra import composition
from lightning_gradclip.hydra.places import GROUP, PARENT, SCHEME

if TYPE_CHECKING:
    import builtins
    from importlib.abc import Traversable


class GradclipSearchPath(SearchPathPlugin):
    """Appends the pack, so that the application's own files win over files of the same name."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        Plugins.instance().register(GradclipSource)
        search_path.append(provider="lightning_gradclip", path=f"{SCHEME}://lightning_gradclip.conf")


class GradclipSource(ConfigSource):
    """The options of the pack, each whole: what it is built on is merged here, where no other file can take its place.

    A second name, with an underscore in front, is for files that build on an option and have its name themselves.
    """

    # Hydra asks whether `callbacks` is a group to list it and, while it composes, to tell options from values.
    composes = False

    @staticmethod
    def scheme() -> str:
        return SCHEME

    def available(self) -> bool:
        return True

    def is_group(self, config_path: str) -> bool:
        return config_path == GROUP or (config_path in ("", PARENT) and not self.composes)

    def is_config(self, config_path: str) -> bool:
        return _file(config_path) is not None

    def list(self, config_path: str, results_filter: ObjectType | None) -> "builtins.list[str]":
        if config_path != GROUP:
            below = {"": PARENT, PARENT: GROUP.removeprefix(f"{PARENT}/")}
            return [] if results_filter == ObjectType.CONFIG else [below[config_path]]
        return [] if results_filter == ObjectType.GROUP else options()

    def load_config(self, config_path: str) -> ConfigResult:
        file = _file(config_path)
        if file is None:
            raise ConfigLoadError(f"{config_path} is no option of lightning_gradclip")
        return ConfigResult(self.provider, self.full_path(), _whole(file), {"package": None})


def options() -> list[str]:
    """The names of the pack's options; what starts with an underscore is a part of them."""
    names = (file.name for file in _folder().iterdir())
    return sorted(name.removesuffix(".yaml") for name in names if name.endswith(".yaml") and name[0] != "_")


def _folder() -> "Traversable":
    return files("lightning_gradclip.conf").joinpath(*GROUP.split("/"))


def _file(config_path: str) -> "Traversable | None":
    group, _, name = config_path.removesuffix(".yaml").rpartition("/")
    if group != GROUP:
        return None
    found = (_folder() / f"{stem}.yaml" for stem in (name, name.removeprefix("_")))
    return next((file for file in found if file.is_file()), None)


def _whole(file: "Traversable") -> DictConfig:
    """An option with all it is built on, in the order that its own defaults list gives."""
    with file.open(encoding="utf-8") as text:
        written = cast("DictConfig", OmegaConf.load(text))
    bases = written.pop("defaults", ["_self_"])
    parts = [written if base == "_self_" else _whole(_folder() / f"{base}.yaml") for base in bases]
    return cast("DictConfig", OmegaConf.merge(*parts))


composition.watch()
