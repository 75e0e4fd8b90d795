"""Somebody's Hydra application, `tests/foreign`, started as its user starts it."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

from kit.root import ROOT

FOREIGN = ROOT / "tests" / "foreign"

# What takes seconds to import and composing has no use for.
HEAVY = {"torch", "lightning", "pytorch_lightning", "lightning_fabric", "torchmetrics", "numpy"}


@dataclass
class Started:
    """How one run ended."""

    code: int
    stdout: str
    stderr: str
    modules: set[str]

    @property
    def heavy(self) -> set[str]:
        return HEAVY & {name.split(".")[0] for name in self.modules}

    @property
    def printed(self) -> list[dict[str, Any]]:
        """What the application printed, one configuration for each job."""
        return [json.loads(line) for line in self.stdout.splitlines() if line.startswith("{")]


@dataclass
class Application:
    """A copy of the application, away from the checkout, and the Python that runs it."""

    folder: Path
    python: Path = Path(sys.executable)

    @classmethod
    def copied(cls, parent: Path, python: Path = Path(sys.executable)) -> "Application":
        return cls(Path(shutil.copytree(FOREIGN, parent / "application")), python)

    def tries(self, lines: Iterable[Callable[["Application"], None]]) -> None:
        """Run several command lines, two at a time."""
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(lambda line: line(self), lines))

    def start(self, *arguments: str, quiet: bool = True, **variables: str) -> Started:
        """Run `train.py` with these arguments, writing no folders if quiet."""
        unwritten = ["hydra.output_subdir=null", "hydra.run.dir=.", "hydra.sweep.dir=.", "hydra/job_logging=disabled"]
        modules = self.folder / f"{uuid4()}.txt"
        inherited = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "HYDRA"))}
        process = subprocess.run(
            [self.python, "train.py", *(unwritten if quiet else []), *arguments],
            cwd=self.folder,
            env={**inherited, "MODULES": str(modules), **variables},
            capture_output=True,
            text=True,
            timeout=120,
        )
        return Started(process.returncode, process.stdout, process.stderr, set(modules.read_text().splitlines()))

    def shown(self, *arguments: str, **variables: str) -> Started:
        """Run without an error and without importing anything heavy."""
        started = self.start(*arguments, **variables)
        assert started.code == 0, started.stderr
        assert not started.heavy
        # Hydra's plugin scanner would warn every user about a plugin that it cannot load.
        assert "plugin" not in started.stderr.lower()
        return started

    def composed(self, *arguments: str) -> dict[str, Any]:
        """The configuration of a run that composes and ends."""
        (config,) = self.shown(*arguments).printed
        return config

    def refused(self, *arguments: str) -> str:
        """What a run says that ends while it composes."""
        started = self.start(*arguments)
        assert started.code == 1, started.stdout + started.stderr
        assert not started.heavy
        return started.stderr

    def trained(self, *arguments: str) -> list[dict[str, Any]]:
        """The metrics after one optimizer step."""
        started = self.start("trainer=once", *arguments)
        assert started.code == 0, started.stderr
        return started.printed

    def failed(self, *arguments: str) -> str:
        """What a run says that ends while it makes its objects, or before the first step."""
        started = self.start("trainer=once", *arguments)
        assert started.code == 1, started.stdout + started.stderr
        assert not started.printed
        return started.stderr
