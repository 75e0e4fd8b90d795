"""What mkdocs asks while it builds the site: pages that are made of the package, and links out of this folder.

Named as a hook in mkdocs.yml. Nothing here is listed by hand: methods, options and names are found in the package.
"""

import ast
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "lightning_gradclip"
OPTIONS = ROOT / "conf" / "callbacks" / "gradclip"
MADE = ROOT / "outputs" / "docs"  # what programs make for the site
DOORS = ("accelerate", "fabric", "transformers")


def on_page_markdown(markdown: str, *, page: Any, config: Any, files: Any) -> str:
    """mkdocs calls this with the text of each page."""
    if page.file.src_uri == "api.md":
        markdown = markdown.replace("<!-- names -->", names())
    if page.file.src_uri == "methods.md":
        markdown = markdown.replace("<!-- methods -->", methods())
    return outward(markdown, config.extra["repository"])


def outward(markdown: str, address: str) -> str:
    """Links to files beside docs/ lead to the repository."""
    markdown = re.sub(r"\]\(\.\./([^)]*)\)", rf"]({address}/blob/main/\1)", markdown)
    # Those of pages that stand in the root of the repository, and are included here.
    return re.sub(r"\]\((LICENSE|README\.md)\)", rf"]({address}/blob/main/\1)", markdown)


def public() -> dict[str, str]:
    """Each public name and where it stands, from the only list that there is."""
    tree = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    found = (node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module)
    return {
        alias.asname: f"{node.module}.{alias.name}"
        for node in found
        if node.module.startswith(PACKAGE.name)
        for alias in node.names
        if alias.asname
    }


def names() -> str:
    """Every public name, then what the doors for single libraries open."""
    doors = [
        f"## `lightning_gradclip.{door}`\n\n" + "\n".join(shown(place, 3) for place in opened(door)) for door in DOORS
    ]
    return "\n".join([*(shown(place, 2) for _, place in sorted(public().items())), *doors])


def shown(place: str, level: int) -> str:
    return f"::: {place}\n    options:\n      heading_level: {level}\n"


def opened(door: str) -> list[str]:
    """What a door gives: the names that it imports from the rooms."""
    tree = ast.parse((PACKAGE / f"{door}.py").read_text(encoding="utf-8"))
    found = (node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module)
    return [f"{node.module}.{alias.name}" for node in found for alias in node.names]


def methods() -> str:
    places = {
        place.rpartition(".")[0].rpartition(".")[2]: name for name, place in public().items() if ".methods." in place
    }
    return "\n".join(card(module, name) for module, name in places.items() if (OPTIONS / f"{module}.yaml").is_file())


def card(module: str, name: str) -> str:
    """Formula and source from the docstring of the module, the picture, the option."""
    text = ast.get_docstring(ast.parse((PACKAGE / "methods" / f"{module}.py").read_text(encoding="utf-8"))) or ""
    first, _, rest = text.partition("\n")
    option = (OPTIONS / f"{module}.yaml").read_text(encoding="utf-8").rstrip()
    return "\n".join(
        [
            f"## `{name}`",
            f"\n**{first}**\n",
            labelled(rest),
            f"\n![Norms before and after {name} at its defaults](methods-{module}.png)\n",
            f"`+callbacks/gradclip={module}`:\n\n```yaml\n{option}\n```\n",
            f"Arguments in Python: [`{name}`][lightning_gradclip.methods.{module}.{name}].\n",
        ]
    )


def labelled(text: str) -> str:
    """The docstring as Markdown: its first words in bold, its lists as lists, `a * b` as it is."""
    text = re.sub(r"\n(?=- )(?<!\n\n)", "\n\n", text.replace("*", r"\*"))
    # What follows a list begins at the margin, with a capital.
    text = re.sub(r"(\n- [^\n]*(?:\n  [^\n]*)*)\n(?=[A-Z])", r"\1\n\n", text)
    return re.sub(r"^([A-Z][a-z ]+):", r"**\1:**", text, flags=re.MULTILINE)


def runs() -> dict[str, list[str]]:
    """The pages of the gallery and the commands that make them, from the table in gallery.md."""
    table = (ROOT / "docs" / "gallery.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| \[.*\]\(gallery/(\w+)\.html\) \| `python ([^`]+)`", table, re.MULTILINE)
    return {name: shlex.split(command) for name, command in rows}


def on_files(files: Any, *, config: Any) -> Any:
    """mkdocs calls this with the files of the site: what is made by programs is added."""
    from mkdocs.structure.files import File  # here, so that the rest needs nothing but Python

    for path in (*pictures(), *gallery()):
        place = path.relative_to(MADE).as_posix()
        files.append(File.generated(config, place, abs_src_path=str(path)))
    return files


def pictures() -> list[Path]:
    """What each method does to the same norms, drawn anew."""
    execute("docs/norms.py", str(MADE))
    return sorted(MADE.glob("methods-*.png"))


def gallery() -> list[Path]:
    """The pages of the gallery, made where they are not yet."""
    made = {MADE / "gallery" / f"{name}.html": command for name, command in runs().items()}
    for page, command in made.items():
        if not page.is_file():
            execute(*command, f"hydra.run.dir={page.with_suffix('')}")
            execute("-m", "lightning_gradclip", "report", str(page.with_suffix("")), "--out", str(page))
    return list(made)


def execute(*arguments: str) -> None:
    subprocess.run([sys.executable, *arguments], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
