"""What the repository shows of itself: one address everywhere, forms that ask for commands that exist."""

import importlib
import re
import subprocess
import sys

import pytest

import lightning_gradclip
from kit.guides import README, page
from kit.root import ROOT
from lightning_gradclip import ClipMethod
from lightning_gradclip.report import cli

sys.path.append(str(ROOT / "docs"))
pages = importlib.import_module("pages")

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli", reason="Python 3.10 reads no TOML")

URLS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["urls"]
FILES = ("README.md", "CITATION.cff", "mkdocs.yml", "conda/meta.yaml", ".github/ISSUE_TEMPLATE/config.yml")


@pytest.mark.parametrize("file", FILES)
def test_there_is_one_address(file: str) -> None:
    text = (ROOT / file).read_text(encoding="utf-8")
    named = set(re.findall(r"https://(?:raw\.)?github(?:usercontent)?\.com/([\w.-]+/lightning-gradclip)", text))
    assert named <= {URLS["Repository"].removeprefix("https://github.com/")}


def test_the_readme_is_one_screen() -> None:
    assert len(README.encode()) <= 10_000
    assert len(README.splitlines()) <= 160


def test_every_link_of_the_readme_leads_somewhere() -> None:
    """On the package index too: no link is relative, and those to this repository name what is there."""
    links = re.findall(r"\]\(([^)\s]+)\)", README)
    assert links
    for link in links:
        assert link.startswith("https://"), link
        path = re.search(r"/lightning-gradclip/(?:blob/)?main/([^#]+)", link)
        assert path is None or (ROOT / path[1]).is_file(), link


def test_the_issue_form_asks_for_commands_that_exist(capsys: pytest.CaptureFixture[str]) -> None:
    form = (ROOT / ".github" / "ISSUE_TEMPLATE" / "bug.yml").read_text(encoding="utf-8")
    asked = re.findall(r"`lightning-gradclip ([^`]+)`", form)
    assert asked
    for words in asked:
        with pytest.raises(SystemExit) as ended:
            cli.main([*words.split(), "--help"])
        assert ended.value.code == 0
    capsys.readouterr()


def test_the_table_of_versions_is_made_of_the_results() -> None:
    command = [sys.executable, "docs/versions.py", "table", "docs/versions"]
    made = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "not yet run" in made
    assert made.strip() in page("versions")


def test_the_reference_has_every_public_name() -> None:
    shown = set(re.findall(r"^::: [\w.]+\.(\w+)$", pages.names(), re.MULTILINE))
    assert shown > set(lightning_gradclip.__all__)


def test_every_method_has_a_card_with_its_rule_its_picture_and_its_option() -> None:
    cards = pages.methods().split("\n## ")
    methods = {name for name in lightning_gradclip.__all__ if is_a_method(getattr(lightning_gradclip, name))}
    assert {re.search(r"`(\w+)`", card)[1] for card in cards} == methods
    for card in cards:
        assert "**Rule:**" in card
        assert "_target_: lightning_gradclip." in card
        assert re.search(r"\(methods-\w+\.png\)", card)


def is_a_method(public: object) -> bool:
    return isinstance(public, type) and issubclass(public, ClipMethod) and public is not ClipMethod


def test_conda_asks_for_what_pip_asks_for() -> None:
    asked = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["dependencies"]
    recipe = (ROOT / "conda" / "meta.yaml").read_text(encoding="utf-8")
    run = re.findall(
        r"^    - ([\w-]+ >=[\d.]+)$", recipe.partition("  run:\n")[2].partition("\ntest:")[0], re.MULTILINE
    )
    assert {one.replace(" ", "").replace("pytorch>", "torch>") for one in run} == set(asked)
