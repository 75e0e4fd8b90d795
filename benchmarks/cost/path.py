"""The way of one clipped step through the package: how many functions it calls, and how often it changes the file.

    python benchmarks/cost/path.py                        # prints a table, and the sizes of files and functions
    python benchmarks/cost/path.py AGC --list             # the functions in the order in which they are called
    PYTHONPATH=OLD python benchmarks/cost/path.py         # of another checkout

Counted are the calls of Python functions in files of the package, in a step on CPU of a model with two small layers
under SGD; the steps before have planned what is planned once. Two calls in a row in different files are a change of
file.
"""

import argparse
import ast
import itertools
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from timing import table
from torch import nn

import lightning_gradclip
from lightning_gradclip import AGC, Clipper, EmaClip, Normalize, NormClip, QuantileClip, SigmaClip, ValueClip, ZClip

PACKAGE = Path(lightning_gradclip.__file__).parent
# More than any method watches before it clips.
WARM = 200
METHODS = {
    "NormClip": NormClip(max_norm=1.0),
    "AGC": AGC(),
    "ValueClip": ValueClip(max_value=1.0),
    "Normalize": Normalize(),
    "QuantileClip": QuantileClip(),
    "SigmaClip": SigmaClip(),
    "ZClip": ZClip(),
    "EmaClip": EmaClip(),
    "None": None,
}
Call = tuple[str, str]


def walk(method: Any) -> list[Call]:
    """File and name of each function of the package that is called in a step that clips."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 8))
    clipper = Clipper(model.named_parameters(), method, optimizer=torch.optim.SGD(model.parameters(), lr=0.1))
    for step in range(WARM):
        # Some are clipped, so that what the first such step plans and keeps is there.
        give(model, 1e-3 if step % 20 else 1.0)
        clipper.step()
    give(model, 100.0)
    calls: list[Call] = []

    def see(frame: FrameType, event: str, _: Any) -> None:
        code = frame.f_code
        if event == "call" and (path := Path(code.co_filename)).is_relative_to(PACKAGE):
            calls.append((path.relative_to(PACKAGE).as_posix(), getattr(code, "co_qualname", code.co_name)))

    sys.setprofile(see)
    stats = clipper.step()
    sys.setprofile(None)
    if method is not None and not stats.clipped:
        sys.exit(f"{method} did not clip; its way says nothing")
    return calls


def give(model: nn.Module, size: float) -> None:
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter) * size


def changes(calls: list[Call]) -> int:
    return sum(one != other for (one, _), (other, _) in itertools.pairwise(calls))


def way(calls: list[Call]) -> str:
    """The calls in their order, those in one file on one line."""
    runs = itertools.groupby(calls, key=lambda call: call[0])
    return "\n".join(f"{file}: {', '.join(name for _, name in several)}" for file, several in runs)


def sizes() -> str:
    trees = {path.relative_to(PACKAGE).as_posix(): path.read_text(encoding="utf-8") for path in PACKAGE.rglob("*.py")}
    lines = {path: len(text.splitlines()) for path, text in trees.items()}
    parsed = {path: ast.parse(text) for path, text in trees.items()}
    functions = {
        f"{path}:{node.lineno} {node.name}": length(node) for path in parsed for node in functions_of(parsed[path])
    }
    file, function = max(lines, key=lines.__getitem__), max(functions, key=functions.__getitem__)
    return (
        f"{sum(map(has_code, parsed.values()))} files with code, {sum(lines.values()):,} lines of Python\n"
        f"longest file: {file}, {lines[file]} lines\n"
        f"longest function: {function}, {functions[function]} lines; the median has "
        f"{statistics.median(functions.values()):g} (without signature and docstring)"
    )


def functions_of(tree: ast.Module) -> Iterator[ast.FunctionDef]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))


def length(function: ast.FunctionDef) -> int:
    body = function.body[1:] if ast.get_docstring(function) else function.body
    return body[-1].end_lineno - body[0].lineno + 1 if body else 0


def has_code(tree: ast.Module) -> bool:
    """Whether there is more than a docstring and imports."""
    body = tree.body[1:] if ast.get_docstring(tree) else tree.body
    return any(not isinstance(one, (ast.Import, ast.ImportFrom)) for one in body)


def main() -> None:
    parser = argparse.ArgumentParser(description="The way of one clipped step through the package.")
    parser.add_argument("methods", nargs="*", metavar="METHOD", help=f"default: all of {', '.join(METHODS)}")
    parser.add_argument("--list", action="store_true", help="print the functions in the order in which they are called")
    given = parser.parse_args()
    if unknown := set(given.methods) - METHODS.keys():
        parser.error(f"unknown: {', '.join(unknown)}; choose from {', '.join(METHODS)}")
    ways = {name: walk(METHODS[name]) for name in given.methods or METHODS}
    if given.list:
        print("\n\n".join(f"{name}\n{way(calls)}" for name, calls in ways.items()), end="\n\n")
    rows = [
        [name, str(len(calls)), str(changes(calls)), str(len({file for file, _ in calls}))]
        for name, calls in ways.items()
    ]
    print(f"{PACKAGE}\n\n{table(['method', 'calls', 'changes of file', 'files'], rows)}\n{sizes()}")


if __name__ == "__main__":
    main()
