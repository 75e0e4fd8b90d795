"""The rooms of the package as CONTRIBUTING.md's table has them, and what keeps to them in the source.

Imports are read and not made, so that those in functions, under TYPE_CHECKING and of what is not installed count too.
"""

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

PACKAGE = "lightning_gradclip"
TABLE = "the table of rooms in CONTRIBUTING.md"

LIGHTNING = {"lightning", "pytorch_lightning", "lightning_fabric", "lightning_utilities"}
KNOW_LIGHTNING = ("trainer/", "callback.py")
NEED_TORCH = {"torch", "torchmetrics", *LIGHTNING}
# Ranks exchange numbers in the first; the second asks, in functions, what a tensor is that is spread over them.
RANKS, LAYOUT = "gradients/ranks.py", "select/layout.py"
# The only file that replaces gradients, and those that change tensors that they were handed.
WRITE = "gradients/write.py"
IN_PLACE = (WRITE, "gradients/foreach.py", "gradients/cuda.py", "act/scaler.py")  # the last: flags of a GradScaler
FRESH = re.compile(r"^torch\.(empty|zeros|ones|full|tensor|arange|stack|cat)(_like)?$|\.(clone|new_\w+)$")


def section(guide: str, title: str) -> str:
    return guide.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def covers(name: str, path: str) -> bool:
    return path == name or (name.endswith("/") and path.startswith(name))


@dataclass
class Room:
    """A row of the table."""

    names: list[str]
    imports: list[str] = field(default_factory=list)
    lazily: list[str] = field(default_factory=list)
    torch: bool = True

    @classmethod
    def read(cls, names: str, imports: str, above: list[str]) -> "Room":
        room = cls(re.findall(r"`([^`]+)`", names))
        for part in imports.split("; "):
            if part == "no torch":
                room.torch = False
            named = above if "all above" in part else re.findall(r"`([^`]+)`", part)
            (room.lazily if part.startswith("lazily") else room.imports).extend(named)
        return room

    @property
    def words(self) -> str:
        lazily = [f"inside functions {', '.join(self.lazily)}"] * bool(self.lazily)
        return "; ".join([", ".join(self.imports) or "nothing of ours", *lazily])


@dataclass(frozen=True)
class Import:
    line: int
    name: str
    lazy: bool


def imports(node: ast.AST, inside: list[str], *, lazy: bool = False) -> Iterator[Import]:
    """All imports below a node of a file in this package; lazy: not when the file is imported."""
    for child in ast.iter_child_nodes(node):
        later = lazy or isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            later = later or child in node.body
        names: list[str] = []
        if isinstance(child, ast.Import):
            names = [one.name for one in child.names]
        elif isinstance(child, ast.ImportFrom):
            base = inside[: len(inside) + 1 - child.level] if child.level else []
            names = [".".join([*base, *filter(None, [child.module]), one.name]) for one in child.names]
        elif isinstance(child, ast.Call) and ast.unparse(child.func).endswith(("import_module", "__import__")):
            names = [one.value for one in child.args[:1] if isinstance(one, ast.Constant)]
        elif isinstance(child, ast.Attribute) and ast.unparse(child) == "torch.distributed":
            names = ["torch.distributed"]
        yield from (Import(child.lineno, name, later) for name in names)
        yield from imports(child, inside, lazy=later)


class House:
    """The package in a folder, beside its CONTRIBUTING.md."""

    def __init__(self, root: Path) -> None:
        package = root / PACKAGE
        self.files = {path.relative_to(package).as_posix(): path for path in sorted(package.rglob("*.py"))}
        self._trees: dict[str, ast.Module] = {}
        guide = (root / "CONTRIBUTING.md").read_text(encoding="utf-8")
        self.rooms: list[Room] = []
        for names, called in re.findall(r"^\| (`.*`) \| .* \| (.*) \|$", section(guide, "The rooms"), re.MULTILINE):
            above = [name for room in self.rooms for name in room.names]
            self.rooms.append(Room.read(names, called, above))

    def tree(self, path: str) -> ast.Module:
        if path not in self._trees:
            self._trees[path] = ast.parse(self.files[path].read_text(encoding="utf-8"))
        return self._trees[path]

    def room_of(self, path: str) -> Room | None:
        """The room whose name fits best."""
        found = [(len(name), room) for room in self.rooms for name in room.names if covers(name, path)]
        return max(found, key=lambda one: one[0])[1] if found else None

    def file_of(self, name: str) -> str:
        """The file that an import of this name runs last."""
        words = name.split(".")[1:]
        for end in range(len(words), 0, -1):
            for path in ("/".join(words[:end]) + ".py", "/".join([*words[:end], "__init__.py"])):
                if path in self.files:
                    return path
        return "__init__.py"

    def imports_of(self, path: str) -> list[Import]:
        return [*imports(self.tree(path), [PACKAGE, *path.split("/")[:-1]])]

    def doors(self, folder: str) -> list[str]:
        """What the docstring of a folder names in the sentence that begins with its door."""
        text = ast.get_docstring(self.tree(f"{folder}/__init__.py")) or ""
        sentence = re.search(r"\bDoors?\b(.*?)\.(?!\S)", text, re.DOTALL)
        return re.findall(r"`([\w.]+)`", sentence[1]) if sentence else []

    def is_door(self, path: str) -> bool:
        """Whether others may import this file: it is named as a door, or a public name comes from it."""
        folder, _, file = path.rpartition("/")
        named = {name.split(".")[0] for name in self.doors(folder)} if folder else set()
        return not folder or file == "__init__.py" or file[:-3] in named or path in self.public

    @cached_property
    def public(self) -> set[str]:
        """The files that the public names come from."""
        return {self.file_of(one.name) for one in self.imports_of("__init__.py")}

    def faults(self, path: str) -> list[str]:
        """What is wrong with a file: where, what, and by which rule."""
        rules = (self.foreign_room, self.other_package, self.written_gradient, self.silent_room)
        room = self.room_of(path)
        if room is None:
            top = path.partition("/")[0] + "/" * ("/" in path)
            return [f"{PACKAGE}/{path}:1: {top} is in no room; give it a row in {TABLE}, with what it imports"]
        found = sorted({fault for rule in rules for fault in rule(path, room)})
        return [f"{PACKAGE}/{path}:{line}: {what}" for line, what in found]

    def foreign_room(self, path: str, room: Room) -> Iterator[tuple[int, str]]:
        folder = path.rpartition("/")[0]
        for one in self.imports_of(path):
            if one.name.split(".")[0] != PACKAGE:
                continue
            target = self.file_of(one.name)
            allowed = room.imports + room.lazily * one.lazy
            if self.room_of(target) is not room and not any(covers(name, target) for name in allowed):
                yield one.line, f"imports {target}; by {TABLE} {room.names[0]} imports {room.words}"
            theirs = target.rpartition("/")[0]
            if theirs != folder and not self.is_door(target):
                yield one.line, f"imports {target}, which is no door: {theirs}/__init__.py does not name it"

    def other_package(self, path: str, room: Room) -> Iterator[tuple[int, str]]:
        for one in self.imports_of(path):
            package = one.name.split(".")[0]
            if package in NEED_TORCH and not room.torch:
                yield one.line, f"imports {package}; by {TABLE} {room.names[0]} does without torch"
            if package in LIGHTNING and not any(covers(name, path) for name in KNOW_LIGHTNING):
                yield one.line, f"imports {package}; only {' and '.join(KNOW_LIGHTNING)} know Lightning"
            ours = path == RANKS or (path == LAYOUT and one.lazy)
            if f"{one.name}.".startswith("torch.distributed.") and not ours:
                yield one.line, f"imports torch.distributed; only {RANKS} does, and {LAYOUT} inside functions"

    def written_gradient(self, path: str, room: Room) -> Iterator[tuple[int, str]]:
        for node in ast.walk(self.tree(path)):
            if isinstance(node, ast.Attribute) and node.attr == "grad" and not isinstance(node.ctx, ast.Load):
                if path != WRITE:
                    yield node.lineno, f"replaces {ast.unparse(node)}; only {WRITE} does"
            elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and path not in IN_PLACE:
                for line, what in changes_in_place(node, self.bound_to_ours(path)):
                    yield line, f"changes {what} in place, which it has not made; only {', '.join(IN_PLACE)} may"

    def bound_to_ours(self, path: str) -> set[str]:
        """Names for modules of this package, whose functions are looked at where they are."""
        nodes = [node for node in ast.walk(self.tree(path)) if isinstance(node, ast.ImportFrom)]
        return {one.asname or one.name for node in nodes if PACKAGE in (node.module or "") for one in node.names}

    def silent_room(self, path: str, room: Room) -> Iterator[tuple[int, str]]:
        folder, _, file = path.rpartition("/")
        if not folder or file != "__init__.py":
            return
        doors = self.doors(folder)
        if not doors:
            yield 1, "does not say which doors the room has; write 'Door: `module.Name` ...' in the docstring"
        known = self.defined(folder)
        yield from ((1, f"names the door `{name}`, which is not in {folder}/") for name in doors if name not in known)

    def defined(self, folder: str) -> set[str]:
        """Files, classes and functions of a folder, the last two with and without the name of their file."""
        files = {Path(path).stem: self.tree(path) for path in self.files if path.startswith(f"{folder}/")}
        found = [
            (stem, node.name)
            for stem, tree in files.items()
            for node in ast.walk(tree)
            if isinstance(node, (ast.ClassDef, ast.FunctionDef))
        ]
        return {*files, *(name for _, name in found), *(f"{stem}.{name}" for stem, name in found)}


def changes_in_place(function: ast.AST, modules: set[str]) -> Iterator[tuple[int, str]]:
    """Calls of methods such as `mul_`, and `*=` or `/=`, on what the function has not made itself."""

    def made_here(node: ast.AST) -> bool:
        if isinstance(node, ast.Call):
            called = node.func
            again = isinstance(called, ast.Attribute) and called.attr.endswith("_") and made_here(called.value)
            return again or FRESH.search(ast.unparse(called)) is not None
        if not isinstance(node, ast.Name):
            return isinstance(node, ast.Constant)
        stored = [one for one in ast.walk(function) if isinstance(one, ast.Name) and one.id == node.id]
        stored = [one for one in stored if isinstance(one.ctx, ast.Store) and one not in augmented]
        values = [one.value for one in assigned if any(target in stored for target in one.targets)]
        return node.id not in given and 0 < len(stored) == len(values) and all(map(made_here, values))

    given = {one.arg for one in ast.walk(function) if isinstance(one, ast.arg)}
    assigned = [one for one in ast.walk(function) if isinstance(one, ast.Assign)]
    augmented = [one.target for one in ast.walk(function) if isinstance(one, ast.AugAssign)]
    for node in ast.walk(function):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            word, receiver = node.func.attr, node.func.value
            if not word.endswith("_") or word.endswith("__") or ast.unparse(receiver) in modules:
                continue
        elif isinstance(node, ast.AugAssign) and isinstance(node.op, (ast.Mult, ast.Div)):
            receiver = node.target
        else:
            continue
        if not made_here(receiver):
            yield node.lineno, ast.unparse(receiver)
