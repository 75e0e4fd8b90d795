"""Tests pairs of torch and Lightning, and makes the table of docs/versions.md.

    python docs/versions.py run 2.14 2.6          # as `make test-versions TORCH=2.14 LIGHTNING=2.6` does
    python docs/versions.py table outputs/versions

`run` takes an environment of its own, and needs nothing but Python; a version may be "nightly" too.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "outputs" / "versions"
WORKFLOW = ROOT / ".github" / "workflows" / "versions.yml"
NIGHTLY = {
    "torch": ["--pre", "torch", "--index-url", "https://download.pytorch.org/whl/nightly/cpu"],
    "lightning": ["lightning @ git+https://github.com/Lightning-AI/pytorch-lightning"],
}


def wanted(package: str, version: str) -> list[str]:
    """What pip is asked for: the newest patch of a minor version, or the very version."""
    if version == "nightly":
        return NIGHTLY[package]
    return [f"{package}=={version}" + (".*" if version.count(".") == 1 else "")]


def run(torch: str, lightning: str) -> int:
    """Install both and the package, run the quick tests, and write down what came of it."""
    with tempfile.TemporaryDirectory() as folder:
        python = Path(folder) / "bin" / "python"
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        install = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        for words in (wanted("torch", torch), wanted("lightning", lightning), ["--editable", ".[test]"]):
            subprocess.run([*install, *words], cwd=ROOT, check=True)
        subprocess.run([*install, "--no-deps", "--requirement", "tests/peers.txt"], cwd=ROOT, check=True)
        tests = [str(python), "-m", "pytest", "--fast", "--numprocesses", "auto", "-q"]
        done = subprocess.run(tests, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    print(done.stdout)
    RESULTS.mkdir(parents=True, exist_ok=True)
    result = {"torch": torch, "lightning": lightning, "said": said(done.stdout)}
    (RESULTS / f"{torch}-{lightning}.json").write_text(json.dumps(result) + "\n", encoding="utf-8")
    return done.returncode


def said(output: str) -> str:
    """`passed`, or what did not, from the last line of pytest."""
    failed = re.findall(r"(\d+ (?:failed|errors?))", output.strip().rpartition("\n")[2])
    return ", ".join(failed) or ("passed" if " passed" in output else "did not start")


def pairs() -> tuple[list[str], list[str]]:
    """The versions of torch and of Lightning that the workflow names."""
    text = WORKFLOW.read_text(encoding="utf-8")
    torch, lightning = (re.search(rf"^ +{name}: \[(.*)\]$", text, re.MULTILINE) for name in ("torch", "lightning"))
    assert torch is not None
    assert lightning is not None
    return re.findall(r'"([^"]+)"', torch[1]), re.findall(r'"([^"]+)"', lightning[1])


def table(results: Path) -> str:
    """Every pair of the workflow in its cell, those without a result included."""
    found = {}
    for path in sorted(results.glob("**/*.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        found[result["torch"], result["lightning"]] = result["said"]
    torch, lightning = pairs()
    lines = [["torch", *(f"Lightning {version}" for version in lightning)], ["---"] * (len(lightning) + 1)]
    lines += [[version, *(found.get((version, other), "not yet run") for other in lightning)] for version in torch]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> int:
    verb, *words = sys.argv[1:]
    if verb == "run":
        return run(*words)
    print(table(Path(words[0])))
    return 0


if __name__ == "__main__":
    sys.exit(main())
