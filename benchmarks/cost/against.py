"""What a step costs in two checkouts of this package, side by side in one run.

    python benchmarks/cost/against.py OLD                          # another checkout beside this one; prints a table
    python benchmarks/cost/against.py OLD NEW --only 'AGC|ViT' --rounds 100 --threads 2
    python benchmarks/cost/against.py . .                          # what the same code differs from itself

Two processes, one for each checkout, time the same cases in turn, many short rounds: steps of each method, fits of a
Trainer and FSDP2. The cases are those that lie beside this file, and use public names only. A ratio is taken within
each round, so that what slows the machine for a while slows both; a word marks it where 1 lies outside the quartiles.
Where memory lies makes a difference too: there are several pairs of processes, and each case is made several times.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from itertools import chain, cycle, islice
from pathlib import Path
from typing import Any, TextIO

import cases
import sharded
import torch
from timing import Case, Times, calls_within, micros, ratio, shown, table, timed

import lightning_gradclip

HEAD = ["row", "old, us", "new, us", "CPU time, new / old", "least / least", "wall time, new / old"]
# Pairs of processes, and how often the case of a row is made among them.
PAIRS, MADE = 4, 8
# Of fits and of processes that start, which take a second, one round in so many.
SELDOM = 2
# Given a number of calls, microseconds per call: CPU time and wall time.
Sample = Callable[[int], tuple[float, float]]


def rows() -> dict[str, Callable[[], tuple[Sample, int]]]:
    """By name what makes a sample, and says how many calls it should have."""
    made = {name: partial(stepping, make) for name, make in cases.ours().items()}
    for layers in (2, 21):
        made[f"Trainer, {2 * layers} tensors"] = partial(fitting, layers)
        made[f"Trainer, {2 * layers} tensors, history=True"] = partial(fitting, layers, history=True)
    return made | {f"FSDP2, {label}": partial(exchanging, label) for label in sharded.ROWS}


def is_seldom(row: str) -> bool:
    return row.startswith(("Trainer", "FSDP2"))


def stepping(make: Callable[[], Case]) -> tuple[Sample, int]:
    case = make()
    return partial(timed, case), calls_within(case, seconds=0.01)


def fitting(layers: int, **options: Any) -> tuple[Sample, int]:
    """A step in a Trainer: the median of the stretches of a fit."""
    # Lightning takes a second to import, which other rows need not wait.
    import trainer

    from lightning_gradclip import GradientClipping, NormClip

    trainer.quieten()

    def sample(calls: int) -> tuple[float, float]:
        with tempfile.TemporaryDirectory() as folder:
            callback = GradientClipping(NormClip(), **options)
            return medians(trainer.fit(layers, folder, [callback]))

    return sample, 1


def exchanging(label: str) -> tuple[Sample, int]:
    """A step of two processes that start for it."""
    return lambda calls: medians(sharded.on_two_processes(25, [label])[label]["ours"]), 1


def medians(times: Times) -> tuple[float, float]:
    return statistics.median(times.cpu), statistics.median(times.wall)


class Worker:
    """A process that times what it is asked to in one checkout."""

    def __init__(self, checkout: Path, threads: int) -> None:
        command = [sys.executable, __file__, str(checkout), "--threads", str(threads), "--serve"]
        env = {**os.environ, "PYTHONPATH": str(checkout)}
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(command, env=env, stdin=pipe, stdout=pipe, text=True)

    def ask(self, question: object) -> None:
        self._process.stdin.write(f"{json.dumps(question)}\n")
        self._process.stdin.flush()

    def answer(self) -> Any:
        """None where a row has ended, or failed, which its own standard error tells about."""
        return json.loads(self._process.stdout.readline() or "null")

    def finish(self) -> None:
        self.ask(None)
        self.answer()

    def stop(self) -> None:
        self._process.stdin.close()
        self._process.wait()


def serve(checkout: Path, threads: int) -> None:
    """Say that all is imported; then answer each row with a number of calls, and each such number with a time."""
    answers, sys.stdout = sys.stdout, sys.stderr
    found = Path(lightning_gradclip.__file__)
    if not found.is_relative_to(checkout):
        sys.exit(f"{found} was imported in place of the package in {checkout}")
    print("true", file=answers, flush=True)
    for line in sys.stdin:
        # A child for each row: what it leaves in memory, or a fault, is gone with it.
        if child := os.fork():
            os.waitpid(child, 0)
            print("null", file=answers, flush=True)
        else:
            time_row(json.loads(line), threads, answers)
            return


def time_row(row: str, threads: int, answers: TextIO) -> None:
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    torch.set_num_threads(threads)
    sample, calls = rows()[row]()
    print(calls, file=answers, flush=True)
    while asked := json.loads(sys.stdin.readline() or "null"):
        print(json.dumps(sample(asked)), file=answers, flush=True)


def compare(row: str, pairs: Sequence[Sequence[Worker]], rounds: int) -> list[Times] | None:
    """The times of the old and the new, round by round; None where one of them has no such row."""
    times = [Times(), Times()]
    chunks = min(MADE, rounds)
    for workers in islice(cycle(pairs), chunks):
        for worker in workers:
            worker.ask(row)
        calls = {worker: found for worker in workers if (found := worker.answer())}
        if len(calls) == len(workers):
            alternate(workers, times, max(calls.values()), rounds // chunks)
        for worker in calls:
            worker.finish()
        if len(calls) < len(workers):
            return None
    return times


def alternate(workers: Sequence[Worker], times: Sequence[Times], calls: int, rounds: int) -> None:
    turns = list(zip(workers, times, strict=True))
    for _ in range(rounds):
        for worker, one in turns:
            worker.ask(calls)
            one.add(*worker.answer())
        turns.reverse()


def told(new: Sequence[float], old: Sequence[float]) -> str:
    """The ratio, with a word where 1 lies outside the quartiles."""
    found = ratio(new, old)
    _, low, high = found
    word = " **slower**" if low > 1 else " **faster**" if high < 1 else ""
    return f"{shown(found)}{word}"


def cells(old: Times, new: Times) -> list[str]:
    least = f"{min(new.cpu) / min(old.cpu):.2f}"
    return [micros(old.cpu), micros(new.cpu), told(new.cpu, old.cpu), least, told(new.wall, old.wall)]


def commit(checkout: Path) -> str:
    command = ["git", "-C", str(checkout), "describe", "--always", "--dirty", "--exclude=*"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "no commit"


def main() -> None:
    here = Path(__file__).resolve().parents[2]
    parser = argparse.ArgumentParser(description="What a step costs in two checkouts of this package.")
    parser.add_argument("old", type=Path, help="the root of a checkout")
    parser.add_argument("new", type=Path, nargs="?", default=here, help="the root of another; default: this one")
    parser.add_argument("--only", default="", metavar="PATTERN", help="a regular expression for the names of rows")
    parser.add_argument("--rounds", type=int, default=40, help="how often each row is timed in both; default: 40")
    parser.add_argument("--threads", type=int, default=1, help="of torch in each process; default: 1")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    checkouts = [given.old.resolve(), given.new.resolve()]
    if given.serve:
        return serve(checkouts[0], given.threads)
    for checkout in checkouts:
        if not (checkout / "lightning_gradclip").is_dir():
            parser.error(f"{checkout} is no checkout: it holds no folder lightning_gradclip")
    names = [name for name in rows() if re.search(given.only, name)]
    if not names:
        parser.error(f"no row matches {given.only!r}; there are: {'; '.join(rows())}")
    for name, checkout in zip(("old", "new"), checkouts, strict=True):
        print(f"{name}: {checkout} at {commit(checkout)}")
    print(f"threads {given.threads}, rounds {given.rounds}, load {os.getloadavg()[0]:.1f}; quartiles in brackets\n")
    print(table(HEAD, []), end="", flush=True)
    pairs = [[Worker(checkout, given.threads) for checkout in checkouts] for _ in range(min(PAIRS, given.rounds))]
    for worker in chain(*pairs):
        if not worker.answer():
            sys.exit("a process has not started; above is why")
    for name in names:
        times = compare(name, pairs, max(1, given.rounds // SELDOM) if is_seldom(name) else given.rounds)
        print(f"| {' | '.join([name, *(cells(*times) if times else ['not in both', *[''] * 4])])} |", flush=True)
    for worker in chain(*pairs):
        worker.stop()
    return None


if __name__ == "__main__":
    main()
