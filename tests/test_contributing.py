"""CONTRIBUTING.md's walk-through, followed to the letter in a copy of the project."""

import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

ROOT = Path(__file__).parents[1]
GUIDE = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    found = re.findall(rf"^   ```{language}\n(.*?)^   ```", GUIDE, re.MULTILINE | re.DOTALL)
    return [textwrap.dedent(block) for block in found]


def insert_before(path: Path, mark: str, line: str) -> None:
    before, found, after = path.read_text(encoding="utf-8").partition(mark)
    assert found
    path.write_text(before + line + found + after, encoding="utf-8")


def test_a_method_costs_three_files_a_line_and_a_row(tmp_path: Path) -> None:
    for folder in ("lightning_gradclip", "conf", "tests"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / file, tmp_path)
    (rule, test, line), (option,), (row,) = blocks("python"), blocks("yaml"), blocks("markdown")
    (tmp_path / "lightning_gradclip/methods/peak.py").write_text(rule, encoding="utf-8")
    (tmp_path / "tests/methods/test_peak.py").write_text(test, encoding="utf-8")
    (tmp_path / "conf/callbacks/gradclip/peak.yaml").write_text(option, encoding="utf-8")
    insert_before(
        tmp_path / "lightning_gradclip/__init__.py", "    from lightning_gradclip.record", f"    {line.strip()}\n"
    )
    insert_before(tmp_path / "README.md", "| `None` | `monitor` |", row)
    tests = ["tests/test_contract.py", "tests/methods/test_peak.py", "-k", "Peak or peak or limit_is_half"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests],
        cwd=tmp_path,
        env={"PYTHONPATH": str(tmp_path), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed
    assert int(passed[1]) > 50
