"""Every file of the package keeps to its room, and whoever breaks a rule is told which one, and where."""

import ast
import importlib
import inspect
import pkgutil
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from kit.rooms import NEED_TORCH, PACKAGE, TABLE, House, Room, changes_in_place, covers
from kit.root import ROOT
from lightning_gradclip import limit
from lightning_gradclip.limit import limiter

HOUSE = House(ROOT)


@pytest.mark.parametrize("path", HOUSE.files)
def test_a_file_keeps_to_its_room(path: str) -> None:
    faults = HOUSE.faults(path)
    assert not faults, "\n".join(faults)


def test_the_table_names_what_is_there_and_imports_what_stands_above() -> None:
    above: list[str] = []
    for room in HOUSE.rooms:
        for name in room.names:
            assert any(covers(name, path) for path in HOUSE.files), f"{TABLE} has a row for {name}, which is not there"
        for name in room.imports + room.lazily:
            assert any(covers(one, name) or covers(name, one) for one in above), f"{room.names}: {name} is not above"
        above += room.names


@pytest.mark.processes
@pytest.mark.parametrize("room", [room for room in HOUSE.rooms if not room.torch], ids=lambda room: room.names[0])
def test_a_room_that_does_without_torch_is_imported_without(room: Room) -> None:
    code = f"import sys\nsys.modules.update(dict.fromkeys({NEED_TORCH}))\nfor name in sys.argv[1:]: __import__(name)"
    paths = [path for path in HOUSE.files if HOUSE.room_of(path) is room]
    names = [".".join([PACKAGE, *path[:-3].split("/")]) for path in paths]
    done = subprocess.run([sys.executable, "-c", code, *names], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


# A file, what somebody adds at its end, and what they are told.
ADDED = {
    "a rule reads gradients": (
        "methods/agc.py",
        "from lightning_gradclip.gradients import read",
        "imports gradients/read.py; by the table of rooms in CONTRIBUTING.md methods/ imports checks.py",
    ),
    "by a relative path": ("methods/agc.py", "from ..select import layout", "imports select/layout.py; by the table"),
    "by a name in text": (
        "methods/agc.py",
        "import importlib\nimportlib.import_module('lightning_gradclip.select.layout')",
        "imports select/layout.py; by the table",
    ),
    "by a public name": ("limit/units.py", "from lightning_gradclip import Clipper", "imports __init__.py; by the"),
    "a page needs a clipper": ("report/run.py", "import lightning_gradclip.clipper", "report/ imports record/history"),
    "not through a door": (
        "limit/units.py",
        "from lightning_gradclip.gradients.foreach import multiply_",
        "imports gradients/foreach.py, which is no door: gradients/__init__.py does not name it",
    ),
    "Hydra waits for Lightning": (
        "hydra/finder.py",
        "from lightning_gradclip.trainer import lightning",
        "hydra/ imports nothing of ours; inside functions trainer/lightning.py",
    ),
    "a history needs torch": ("record/history.py", "import torch", "record/history.py does without torch"),
    "a neighbour needs torch": (
        "record/history.py",
        "from lightning_gradclip.record.step import Row",
        "imports record/step.py; by the table of rooms",
    ),
    "later still needs torch": ("report/run.py", "def f():\n    import torch", "report/ does without torch"),
    "for types alone": (
        "checks.py",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from torch import Tensor",
        "checks.py does without torch",
    ),
    "Lightning in a stage": (
        "act/decide.py",
        "def f():\n    from lightning_utilities.core.rank_zero import rank_zero_warn",
        "imports lightning_utilities; only trainer/ and callback.py know Lightning",
    ),
    "ranks when selecting": ("select/scopes.py", "import torch.distributed as dist", "only gradients/ranks.py does"),
    "ranks by an attribute": ("act/skips.py", "def f():\n    torch.distributed.barrier()", "imports torch.distributed"),
    "ranks at once": ("select/layout.py", "from torch import distributed", "and select/layout.py inside functions"),
    "a gradient is replaced": ("act/fold.py", "def f(p):\n    p.grad = None", "replaces p.grad; only gradients/write"),
    "a gradient is removed": ("act/fold.py", "def f(p):\n    del p.grad", "replaces p.grad; only gradients/write.py"),
    "a gradient is multiplied": ("gradients/read.py", "def f(g):\n    g.mul_(2)", "changes g in place, which it has"),
    "by an operator": ("limit/limiter.py", "def f(p):\n    g = p.grad\n    g *= 2", "changes g in place"),
    "if not made": (
        "limit/units.py",
        "def f(g):\n    if g is None:\n        g = torch.zeros(1)\n    g.zero_()",
        "changes g in place",
    ),
    "many at once": ("limit/units.py", "def f(some):\n    torch._foreach_mul_(some, 2)", "changes torch in place"),
    "a view of it": ("limit/units.py", "def f(g):\n    one = g.view(-1)\n    one.zero_()", "changes one in place"),
    "a new room": ("rooftop/view.py", "import torch", "rooftop/ is in no room; give it a row in the table of rooms"),
    "a room without doors": ("trainer/new/__init__.py", '"""Something."""', "does not say which doors the room has"),
    "a door that is not there": (
        "trainer/new/__init__.py",
        '"""Door: `left.Out`."""',
        "names the door `left.Out`",
    ),
}


@pytest.mark.parametrize(("file", "added", "told"), ADDED.values(), ids=ADDED)
def test_whoever_breaks_a_rule_is_told(file: str, added: str, told: str, tmp_path: Path) -> None:
    shutil.copytree(ROOT / PACKAGE, tmp_path / PACKAGE, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "CONTRIBUTING.md", tmp_path)
    path = tmp_path / PACKAGE / file
    path.parent.mkdir(exist_ok=True)
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    path.write_text(f"{text}{added}\n", encoding="utf-8")
    before = HOUSE.faults(file) if file in HOUSE.files else []
    (fault,) = [one for one in House(tmp_path).faults(file) if one not in before]
    assert fault.startswith(f"{PACKAGE}/{file}:{len(path.read_text(encoding='utf-8').splitlines())}: ")
    assert told in fault


@pytest.mark.parametrize(
    "kept",
    [
        "made = torch.zeros(3)\n    made.add_(1).mul_(2)",
        "made = torch.empty_like(given)\n    made *= 2",
        "count = 1\n    count *= 2",
        "given.clone().zero_()",
        "ours.scale_(given)",
        "given.__len__()",
    ],
)
def test_what_a_function_has_made_it_may_change(kept: str) -> None:
    (function,) = ast.parse(f"def f(given):\n    {kept}").body
    assert [*changes_in_place(function, {"ours"})] == []


def subclasses(cls: type) -> list[type]:
    return [one for direct in cls.__subclasses__() for one in (direct, *subclasses(direct))]


def test_limiters_are_abstract_or_final() -> None:
    for module in pkgutil.iter_modules(limit.__path__):
        importlib.import_module(f"{limit.__name__}.{module.name}")
    found = subclasses(limiter.Limiter)
    assert len(found) >= 3
    for cls in found:
        assert getattr(cls, "__final__", False) or inspect.isabstract(cls), cls
        for name in vars(cls):
            inherited = getattr(cls.__base__, name, None)
            concrete = inspect.isfunction(inherited) and not getattr(inherited, "__isabstractmethod__", False)
            assert not concrete or name == "__init__", f"{cls.__name__}.{name} overrides what is done already"


def test_no_row_is_made_of_numbers_in_a_row() -> None:
    for path in (ROOT / PACKAGE).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "Row":
                given = [one for one in node.args if not isinstance(one, ast.Starred)]
                assert len(given) <= 2, f"{path}:{node.lineno} tells nine numbers apart by their order"
