"""Makes the pictures of docs/report.md: runs the commands of its section "Look first" and looks at their pages.

    python docs/screenshot.py

Takes a minute; needs the `dev` extra and a Chromium.
"""

import io
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from PIL import Image
from playwright.sync_api import Page, sync_playwright

DOCS = Path(__file__).parent
ROOT = DOCS.parent
PROGRAMS = {"python": sys.executable, "lightning-gradclip": str(Path(sys.executable).with_name("lightning-gradclip"))}


def commands() -> list[list[str]]:
    """Those of the first block of commands below the heading."""
    section = (DOCS / "report.md").read_text(encoding="utf-8").partition("\n## Look first\n")[2]
    block = re.search(r"^```bash\n(.*?)^```", section, re.MULTILINE | re.DOTALL)
    assert block is not None
    lines = [shlex.split(line, comments=True) for line in block[1].splitlines()]
    return [[PROGRAMS[program], *arguments] for program, *arguments in lines]


def picture(page: Page, name: str, clip: dict[str, Any]) -> None:
    taken = page.screenshot(full_page=True, clip=clip)
    # A palette takes a third of the space.
    whole = Image.open(io.BytesIO(taken)).convert("RGB")
    whole.quantize(256, method=Image.Quantize.MAXCOVERAGE).save(DOCS / name, optimize=True)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        os.symlink(ROOT / "examples", Path(folder) / "examples")
        for command in commands():
            subprocess.run(command, cwd=folder, check=True)
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])

        def opened(name: str, width: int) -> Page:
            page = browser.new_page(viewport={"width": width, "height": 1000}, color_scheme="light")
            page.goto((Path(folder) / name).as_uri())
            page.wait_for_selector("html[data-drawn=yes]")
            return page

        page = opened("observed.html", 860)
        picture(page, "report.png", {"x": 0, "y": 0, "width": 860, "height": 1010})
        # From the what-if curve to the map of the layers.
        top = page.locator("#what-if").bounding_box()
        end = page.locator("[data-chart=heat]").bounding_box()
        assert top is not None
        assert end is not None
        height = end["y"] + end["height"] - top["y"] + 30
        picture(page, "layers.png", {"x": 0, "y": top["y"] - 10, "width": 860, "height": height})
        page = opened("compared.html", 1100)
        end = page.locator("[data-chart=norms]").first.bounding_box()
        assert end is not None
        picture(page, "compared.png", {"x": 0, "y": 0, "width": 1100, "height": end["y"] + end["height"] + 10})
        browser.close()


if __name__ == "__main__":
    main()
