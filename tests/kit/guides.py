"""What README.md and the pages of docs/ show: their blocks of code, and the commands in them."""

import re

from kit.root import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
_PAGES = {path.stem: path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs").glob("*.md"))}
GUIDES = "\n\n".join([README, *_PAGES.values()])


def page(name: str) -> str:
    """The text of docs/<name>.md."""
    return _PAGES[name]


def blocks(language: str, text: str = GUIDES) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def commands(program: str) -> list[str]:
    lines = (line.split("  #")[0].strip() for block in blocks("bash") for line in block.splitlines())
    return list(dict.fromkeys(line for line in lines if line.startswith(program)))
