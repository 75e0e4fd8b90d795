"""Where tests lie: in the room of what they test, or in one of the folders that belong to no room."""

import ast
from pathlib import Path

import pytest

from kit.root import ROOT

TESTS = ROOT / "tests"
# Walks over the package, several processes, applications; what tests share, and files that they read.
OTHERS = {"contract", "ranks", "apps", "kit", "data", "foreign"}
FILES = sorted(path for path in TESTS.rglob("*.py") if not {"data", "foreign"} & {*path.relative_to(TESTS).parts})


def test_every_folder_is_a_room_of_the_package() -> None:
    folders = {path.relative_to(TESTS).parts[0] for path in FILES if path.parent != TESTS} - OTHERS
    package = ROOT / "lightning_gradclip"
    astray = sorted(name for name in folders if not ((package / name).is_dir() or (package / f"{name}.py").is_file()))
    assert not astray, f"tests/{astray[0]} is no room of the package: name it after one, or move its files to one"


def test_nothing_at_the_top_can_be_imported_by_accident() -> None:
    assert [path.name for path in FILES if path.parent == TESTS] == ["conftest.py"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(TESTS).as_posix())
def test_what_tests_share_lies_in_the_kit(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    modules = {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    modules |= {one.name for node in ast.walk(tree) if isinstance(node, ast.Import) for one in node.names}
    tests = sorted(name for name in modules if name.rpartition(".")[2].startswith("test_") or name.startswith("tests"))
    assert not tests, f"{path.name} imports {tests}; put what it needs into tests/kit"
    defined = [node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    assert path.parent.name != "kit" or not [name for name in defined if name.startswith("test_")]
