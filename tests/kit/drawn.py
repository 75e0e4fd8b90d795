"""Hypothesis, for tests whose values are drawn; where it is not installed they are skipped, each by its name."""

from collections.abc import Callable
from typing import Any

import pytest

__all__ = ["given", "settings", "st"]

try:
    from hypothesis import given, settings
    from hypothesis import strategies as st
except ModuleNotFoundError:

    class _Missing:
        """Stands where a strategy would."""

        def __getattr__(self, name: str) -> "_Missing":
            return self

        def __call__(self, *_: Any, **__: Any) -> "_Missing":
            return self

        __or__ = __call__

    def given(*_: Any, **__: Any) -> Callable[[Any], Any]:
        return pytest.mark.skip(reason="hypothesis is not installed: pip install '.[test]'")

    def settings(**_: Any) -> Callable[[Any], Any]:
        return lambda test: test

    st = _Missing()
