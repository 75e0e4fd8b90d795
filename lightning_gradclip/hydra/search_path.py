"""The plugin that puts the configuration pack on Hydra's search path."""

from hydra.core.config_search_path import ConfigSearchPath
from hydra.plugins.search_path_plugin import SearchPathPlugin


class GradclipSearchPath(SearchPathPlugin):
    """Appends the pack, so that the application's own files win over files of the same name."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        search_path.append(provider="lightning_gradclip", path="pkg://lightning_gradclip.conf")
