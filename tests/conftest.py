"""What holds for all tests, and what `--fast` leaves out."""

import gc
import sys
from collections import defaultdict
from collections.abc import Generator
from typing import Any

import pytest

from kit.tiers import first_of_each_kind, summed

# They assert in the name of several test files; a failure shows the values there too.
pytest.register_assert_rewrite("kit.application", "kit.command_lines")

# Folders of tests that start processes; elsewhere it is those that are marked.
_IN_PROCESSES = {"apps", "ranks"}
_STARTED = {"subprocess.Popen", "os.fork", "os.posix_spawn"}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--fast", action="store_true", help="one configuration of each method, and no processes")
    parser.addoption("--products", action="store_true", help="all cases of tests that multiply what they are given")
    parser.addoption("--lightning", help="a checkout of Lightning, whose own tests `-m foreign` runs")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out cases that others of the same test stand for."""
    tests: dict[str, list[pytest.Item]] = defaultdict(list)
    for item in items:
        if not (config.getoption("fast") and _starts_processes(item)):
            tests[item.nodeid.partition("[")[0]].append(item)
    kept = {one for cases in tests.values() for one in _asked(cases, config)}
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = [item for item in items if item in kept]


def _asked(items: list[pytest.Item], config: pytest.Config) -> list[pytest.Item]:
    cases = [item.callspec.params if hasattr(item, "callspec") else {} for item in items]
    if config.getoption("fast"):
        return [items[place] for place in first_of_each_kind(cases)]
    if items[0].get_closest_marker("product") and not config.getoption("products"):
        return [items[place] for place in summed(cases)]
    return items


def pytest_collection_finish() -> None:
    """Take what was imported and collected out of each later collection of garbage: half a gigabyte of objects."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish() -> None:
    """Leave no process and no folder behind."""
    if workers := sys.modules.get("kit.workers"):
        workers.leave()


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
