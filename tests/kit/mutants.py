"""Breaks the package in one place after the other, and asks the tests of that room who notices.

    python -m kit.mutants ROOM [--file NAME] [--every N] [--all] [--tests TEST ...]

A mutant is one change of the syntax tree: a comparison, an operation or a word turned round, a number one more, a
condition always or never true, a call for its effect left out. Each is written into a copy of the repository and runs
in a process of its own, forked from one that has imported torch, Lightning and pytest. What is printed is the kill
table: a row for each mutant, with its line and the test that failed first, or with `--all` all that fail: only those
tell whether a test can be deleted. Exit code 1: some mutant lives.
"""

import argparse
import ast
import copy
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kit.root import ROOT

PACKAGE = "lightning_gradclip"
COPIED = (PACKAGE, "conf", "tests", "examples", "docs", "pyproject.toml", "README.md", "CONTRIBUTING.md", "Makefile")
# Seconds for the tests of a room, of which a mutant may make an endless loop.
PATIENCE = 300.0

TURNED: dict[type[ast.AST], type[ast.AST]] = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
    ast.And: ast.Or,
    ast.Or: ast.And,
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
}


def mutants(source: str) -> Iterator[tuple[int, str, str]]:
    """Line, what is changed, and the whole text of each mutant."""
    tree = ast.parse(source)
    for place, node in enumerate(ast.walk(tree)):
        for number in range(len(changes(node))):
            other = copy.deepcopy(tree)
            found = next(one for at, one in enumerate(ast.walk(other)) if at == place)
            before = ast.unparse(found)
            changes(found)[number]()
            yield node.lineno, f"{before} -> {ast.unparse(found)}", ast.unparse(ast.fix_missing_locations(other))


def changes(node: ast.AST) -> list[Any]:
    """What may be done to a node, as calls that do it."""
    if isinstance(node, ast.Compare):
        return [lambda i=i, op=op: node.ops.__setitem__(i, TURNED[type(op)]()) for i, op in enumerate(node.ops)]
    if isinstance(node, (ast.BoolOp, ast.BinOp)) and type(node.op) in TURNED:
        return [lambda: setattr(node, "op", TURNED[type(node.op)]())]
    if isinstance(node, ast.Constant) and isinstance(node.value, (bool, int, float)):
        other = not node.value if isinstance(node.value, bool) else node.value + 1
        return [lambda: setattr(node, "value", other)]
    if isinstance(node, (ast.If, ast.IfExp)):
        return [lambda word=word: setattr(node, "test", ast.Constant(word)) for word in (True, False)]
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.Not, ast.USub)):
        return [lambda: setattr(node, "op", ast.UAdd() if isinstance(node.op, ast.USub) else ast.Not())][
            : isinstance(node.op, ast.USub)
        ]
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
        return [lambda: setattr(node, "value", ast.Constant(None))]
    return []


class _Noting:
    """Which tests fail."""

    def __init__(self) -> None:
        self.failed: list[str] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.failed.append(report.nodeid)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.failed.append(report.nodeid or "collection")


def killers(copied: Path, tests: list[str], *, every: bool) -> list[str]:
    """The tests that fail in the copy, the first of them or every one; asked in a forked process."""
    reading, writing = os.pipe()
    process = os.fork()
    if process == 0:
        os.setpgid(0, 0)
        silence = os.open(os.devnull, os.O_WRONLY)
        for stream in (1, 2):
            os.dup2(silence, stream)
        os.chdir(copied)
        sys.path[:0] = [str(copied), str(copied / "tests")]
        os.environ["PYTHONPATH"] = str(copied)
        for name in [name for name in sys.modules if name.partition(".")[0] in (PACKAGE, "kit")]:
            del sys.modules[name]
        noting = _Noting()
        options = ["-q", "-p", "no:cacheprovider", "-m", "not packaging and not processes", *["-x"] * (not every)]
        code = pytest.main([*options, *tests], plugins=[noting])
        if code not in (0, 1) and not noting.failed:
            noting.failed.append(f"exit code {code}")
        os.write(writing, "\n".join(one.replace(" ", "_") for one in noting.failed)[:60_000].encode())
        os._exit(0)
    os.close(writing)
    deadline = time.monotonic() + PATIENCE
    while os.waitpid(process, os.WNOHANG) == (0, 0):
        if time.monotonic() > deadline:
            os.killpg(process, signal.SIGKILL)
            os.waitpid(process, 0)
            os.close(reading)
            return ["no end"]
        time.sleep(0.05)
    with open(reading, encoding="utf-8") as answer:
        return answer.read().split()


def asked(room: str, file: Path) -> list[str]:
    """The tests of a room, those that are named after the file first."""
    folder = ROOT / "tests" / room
    own = sorted(folder.glob(f"test_{file.stem}*.py"))
    others = sorted(path for path in folder.glob("test_*.py") if path not in own)
    return [path.relative_to(ROOT).as_posix() for path in [*own, *others]]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("room")
    parser.add_argument("--file", help="only this file of the room, without .py")
    parser.add_argument("--every", type=int, default=1, help="only each Nth mutant")
    parser.add_argument("--all", action="store_true", help="name all tests that fail, not the first")
    parser.add_argument("--tests", nargs="*", help="the tests to ask, in place of those of the room")
    options = parser.parse_args()
    package = ROOT / PACKAGE
    files = [one for one in (package / f"{options.room}.py",) if one.is_file()] or sorted(
        (package / options.room).glob("*.py")
    )
    files = [one for one in files if options.file in (None, one.stem)]
    import torch.distributed.fsdp  # noqa: F401 - forked processes need not import it again

    lives = total = 0
    with tempfile.TemporaryDirectory() as folder:
        copied = Path(folder)
        for name in COPIED:
            if (ROOT / name).is_dir():
                shutil.copytree(ROOT / name, copied / name, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(ROOT / name, copied)
        sys.dont_write_bytecode = True
        os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
        for file in files:
            target = copied / file.relative_to(ROOT)
            source = file.read_text(encoding="utf-8")
            tests = options.tests or asked(options.room, file)
            if failed := killers(copied, tests, every=options.all):
                sys.exit(f"these fail without a mutant: {', '.join(failed)}")
            for number, (line, what, text) in enumerate(mutants(source)):
                if number % options.every:
                    continue
                target.write_text(text, encoding="utf-8")
                failed = killers(copied, tests, every=options.all)
                total, lives = total + 1, lives + (not failed)
                print(f"| {file.name}:{line} | {shown(what)} | {', '.join(failed) or 'LIVES'} |", flush=True)
            target.write_text(source, encoding="utf-8")
    print(f"{total - lives} of {total} mutants of {options.room} were noticed")
    return int(lives > 0)


def shown(what: str) -> str:
    line = " ".join(what.split()).replace("|", "\\|")
    return f"`{line if len(line) < 120 else line[:117] + '...'}`"


if __name__ == "__main__":
    sys.exit(main())
