"""Serves the checkout's `conf` folder as `lightning_gradclip.conf`.

The build moves `conf` into the package; an editable install does not, and Hydra reads the pack from an importable one.
"""

import sys
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_file_location
from pathlib import Path

# Hydra 1.4 takes regular packages only: the location must be a file, not just the folder.
_INIT = Path(__file__).parents[2] / "conf" / "__init__.py"


class _CheckoutConf:
    @staticmethod
    def find_spec(fullname: str, *_: object) -> ModuleSpec | None:
        if fullname != "lightning_gradclip.conf" or not _INIT.is_file():
            return None
        return spec_from_file_location(fullname, _INIT, submodule_search_locations=[str(_INIT.parent)])


def serve_checkout_conf() -> None:
    """Ask the checkout last, after every installed place."""
    sys.meta_path.append(_CheckoutConf)
