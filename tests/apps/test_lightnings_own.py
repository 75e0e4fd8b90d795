"""Lightning's own published tests with our callback in every Trainer that they make.

`pytest -m foreign --lightning=../pytorch-lightning` runs those below twice, with the callback and without; the checkout
should be of the release that is installed.
"""

import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from kit.root import ROOT

# Where optimizers, loops, hooks and callbacks are tested.
ASKED = ("trainer/optimization", "loops/optimization", "models/test_hooks.py", "callbacks/test_callbacks.py")


@pytest.mark.foreign
def test_what_passes_without_our_callback_passes_with_it(request: pytest.FixtureRequest, tmp_path: Path) -> None:
    checkout = request.config.getoption("lightning")
    if checkout is None:
        pytest.skip("no checkout of Lightning: pytest -m foreign --lightning=../pytorch-lightning")
    without = failures(Path(checkout), tmp_path / "without.xml")
    ours = failures(Path(checkout), tmp_path / "with.xml", "-p", "kit.in_every_trainer")
    assert without.keys() == ours.keys()
    worse = {name: ours[name] for name in ours if ours[name] and not without[name]}
    print(f"{len(ours)} tests, {sum(map(bool, without.values()))} fail without it, {len(worse)} more with it")
    # Or nothing was asked.
    assert 10 * sum(map(bool, without.values())) < len(ours), without
    assert not worse


def failures(checkout: Path, report: Path, *plugins: str) -> dict[str, str]:
    """What each of their tests says that fails; nothing of one that passes or is skipped."""
    tests = checkout.resolve() / "tests"
    path = os.pathsep.join(map(str, (tests, ROOT / "tests", ROOT)))
    # Their marks of plugins that are not needed are no mistake, as with --strict-markers.
    options = ["-q", "-o", "addopts=", "-p", "no:cacheprovider", f"--junitxml={report}"]
    command = [sys.executable, "-m", "pytest", "-c", "../pyproject.toml", "--rootdir", "..", *options, *plugins]
    asked = [f"tests_pytorch/{name}" for name in ASKED]
    env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HOME": str(report.parent)}
    subprocess.run([*command, *asked], cwd=tests, env=env, capture_output=True, timeout=3600)
    cases = ElementTree.parse(report).getroot().iter("testcase")
    return {f"{case.get('classname')}::{case.get('name')}": said(case) for case in cases}


def said(case: ElementTree.Element) -> str:
    return "".join(one.get("message", "") for one in case if one.tag in ("failure", "error"))
