"""What holds for all tests."""

import gc

import pytest

# They assert in the name of several test files; a failure shows the values there too.
pytest.register_assert_rewrite("kit.application", "kit.command_lines")


def pytest_collection_finish() -> None:
    """Take what was imported and collected out of each later collection of garbage: half a gigabyte of objects."""
    gc.collect()
    gc.freeze()
