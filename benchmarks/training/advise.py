"""Closes the loop of measuring, taking advice and training with it.

Each task is trained once without clipping, at its comfortable learning rate and with a seed that the study does not
use; what `lightning-gradclip advise` says about that run is then used at all rates and seeds of the study.

python benchmarks/training/advise.py             # after study.py -m study=full; writes its rows beside those
python benchmarks/training/advise.py wgan
"""

import subprocess
import sys
from argparse import ArgumentParser
from collections.abc import Sequence
from pathlib import Path

from cells import read_tasks

from lightning_gradclip.report.advice import Proposal, hydra, proposals, usable_sizes
from lightning_gradclip.report.find import find_runs
from lightning_gradclip.report.run import Run

STUDY = Path(__file__).with_name("study.py")
MONITORED = Path("outputs/study-advice")
# Of the steps; a smaller share cannot be told from runs of a hundred steps.
SHARE = 0.1
SEED = 101


def main() -> None:
    parser = ArgumentParser(description="Trains with the limits that advice proposes.")
    parser.add_argument("tasks", nargs="*", default=list(read_tasks()), help="default: all")
    for task in parser.parse_args().tasks:
        runs = monitor(task)
        advised = [proposals(usable_sizes(run), SHARE) for run in runs]
        # One kind of limit after the other, for every optimizer of the task.
        for several in zip(*advised, strict=True):
            overrides = [one for pair in zip(several, runs, strict=True) for one in settings(*pair)]
            study("-m", "study=advised", f"task={task}", f"clipping_name=advised_{several[0].option}", *overrides)


def monitor(task: str) -> list[Run]:
    """Train without clipping, and read what the logger kept: a run for each optimizer."""
    folder = MONITORED / task
    log = ["callbacks/gradclip=monitor", "logger=csv", "trainer.log_every_n_steps=1"]
    study(f"task={task}", f"seed={SEED}", "clipping_name=monitor", *log, f"hydra.run.dir={folder}")
    return find_runs([folder])


def settings(proposal: Proposal, run: Run) -> Sequence[str]:
    """The overrides of a proposal; every optimizer after the first gets a callback of its own."""
    chosen = [one.lstrip("+") for one in hydra(proposal, run)]
    if not run.optimizer:
        return chosen
    place = f"optimizer{run.optimizer}"
    group, *values = chosen
    moved = [one.replace("callbacks.gradclip.", f"callbacks.{place}.") for one in values]
    return ["+" + group.replace("=", f"@callbacks.{place}="), *moved, f"callbacks.{place}.name={place}"]


def study(*overrides: str) -> None:
    print("study.py", *overrides, flush=True)
    subprocess.run([sys.executable, str(STUDY), *overrides], check=True)


if __name__ == "__main__":
    main()
