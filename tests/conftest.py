"""What holds for all tests, and what `--fast` leaves out."""

import gc
import inspect
import sys
from collections.abc import Generator
from typing import Any

import pytest

# They assert in the name of several test files; a failure shows the values there too.
pytest.register_assert_rewrite("kit.application", "kit.command_lines")

# Folders of tests that start processes; elsewhere it is those that are marked.
_IN_PROCESSES = {"apps", "ranks"}
_STARTED = {"subprocess.Popen", "os.fork", "os.posix_spawn"}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--fast", action="store_true", help="one configuration of each method, and no processes")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """A sum in place of the product: of each test the cases that show something which none before has shown."""
    if config.getoption("fast"):
        shown: set[Any] = set()
        left_out = [item for item in items if _starts_processes(item) or not _shows_more(item, shown)]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in {*left_out}]


def pytest_collection_finish() -> None:
    """Take what was imported and collected out of each later collection of garbage: half a gigabyte of objects."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, Any, Any]:
    """Fail a test that starts processes where it says that it starts none."""
    global _forbidden
    _forbidden = item.config.getoption("fast")
    try:
        return (yield)
    finally:
        _forbidden = False


_forbidden = False


def _watch(event: str, arguments: Any) -> None:
    if _forbidden and event in _STARTED:
        raise AssertionError("this test starts a process: mark it with `pytest.mark.processes`")


sys.addaudithook(_watch)


def _starts_processes(item: pytest.Item) -> bool:
    marked = any(item.get_closest_marker(name) for name in ("distributed", "processes"))
    return marked or not _IN_PROCESSES.isdisjoint(item.path.parts)


def _shows_more(item: pytest.Item, shown: set[Any]) -> bool:
    test = item.nodeid.partition("[")[0]
    given = item.callspec.params if hasattr(item, "callspec") else {}
    fresh = {(test, name, _kind(value)) for name, value in given.items()} or {test}
    fresh -= shown
    shown |= fresh
    return bool(fresh)


def _kind(value: Any) -> Any:
    """What makes a value of an argument another one; of a method one configuration is enough."""
    from lightning_gradclip import ClipMethod

    cls = value if inspect.isclass(value) else type(value)
    if issubclass(cls, ClipMethod):
        return cls
    return (cls, value) if isinstance(value, (str, int, float)) else id(value)
