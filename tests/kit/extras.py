"""Packages that come with an extra: whoever installed the package alone has none of them."""

import importlib.util

import pytest


def needs(*packages: str, extra: str = "test") -> pytest.MarkDecorator:
    """Skips a test where one of these packages is not installed, and says which."""
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    return pytest.mark.skipif(bool(missing), reason=_remedy(missing, extra))


def require(*packages: str, extra: str = "test") -> None:
    """The same from inside a test or what it calls."""
    if missing := [name for name in packages if importlib.util.find_spec(name) is None]:
        pytest.skip(_remedy(missing, extra))


def require_loops(*packages: str) -> None:
    """As `require`, of libraries whose loops are tried, which are installed apart."""
    if missing := [name for name in packages if importlib.util.find_spec(name) is None]:
        pytest.skip(f"{' and '.join(missing)} not installed: make test-loops")


def _remedy(missing: list[str], extra: str) -> str:
    return f"{' and '.join(missing)} not installed: pip install '.[{extra}]'"


needs_report = needs("plotly", "jinja2", extra="report")
needs_tensorboard = needs("tensorboard", extra="tensorboard")
