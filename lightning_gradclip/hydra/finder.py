"""Serves the checkout's `conf` folder as `lightning_gradclip.conf`.

The build moves `conf` into the package; an editable install does not, and Hydra reads the pack from
a package that it can import.
"""

import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_file_location
from pathlib import Path
from types import ModuleType

_CONF = Path(__file__).parents[2] / "conf"


class _CheckoutConf:
    """A meta-path finder for one package."""

    @staticmethod
    def find_spec(
        fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        init = _CONF / "__init__.py"
        if fullname != "lightning_gradclip.conf" or not init.is_file():
            return None
        # Hydra 1.4 takes regular packages only: the location must be a file, not just the folder.
        return spec_from_file_location(fullname, init, submodule_search_locations=[str(_CONF)])


def serve_checkout_conf() -> None:
    """Ask the checkout last, after every installed place."""
    sys.meta_path.append(_CheckoutConf)
