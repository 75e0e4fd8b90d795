"""Published implementations from tests/peers.txt."""

import importlib
import importlib.util
import sys
from importlib.metadata import PackageNotFoundError, distribution
from types import ModuleType

import pytest

_REMEDY = "is not installed: pip install --no-deps -r tests/peers.txt"


def module(name: str) -> ModuleType:
    """A module of a peer; the test is skipped where it is not installed."""
    if importlib.util.find_spec(name.partition(".")[0]) is None:
        pytest.skip(f"{name} {_REMEDY}")
    return importlib.import_module(name)


def file(package: str, path: str) -> ModuleType:
    """One file of a peer without the package around it, whose import wants more than is installed."""
    try:
        location = distribution(package).locate_file(path)
    except PackageNotFoundError:
        pytest.skip(f"{package} {_REMEDY}")
    spec = importlib.util.spec_from_file_location(f"peer_{package}", str(location))
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def inside(package: str, path: str, name: str) -> ModuleType:
    """One file of a folder of a peer, with the others that it imports, without the rest of the package."""
    try:
        location = distribution(package).locate_file(path)
    except PackageNotFoundError:
        pytest.skip(f"{package} {_REMEDY}")
    folder = ModuleType(f"peer_{package}_folder")
    folder.__path__ = [str(location)]
    sys.modules.setdefault(folder.__name__, folder)
    return importlib.import_module(f"{folder.__name__}.{name}")
