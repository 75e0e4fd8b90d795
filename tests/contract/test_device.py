"""Runs the tests on a fake accelerator in a process of their own.

torch knows an accelerator for as long as its process lives, and autograd then starts threads for it: tests that fork
could not come after.
"""

import subprocess
import sys
from pathlib import Path

import pytest

from kit.fake_device import AVAILABLE
from kit.root import ROOT

FILE = Path(__file__).with_name("on_device.py")


@pytest.mark.processes
@pytest.mark.product
@pytest.mark.skipif(not AVAILABLE, reason="this torch cannot register a device that is written in Python")
def test_on_a_fake_accelerator(request: pytest.FixtureRequest) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider", str(FILE)]
    if request.config.getoption("products"):
        command.append("--products")
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stdout[-20_000:] + result.stderr[-2_000:]
