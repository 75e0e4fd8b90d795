"""Interleaved timing on a machine that other people use too, and tables of it.

All cases of a comparison run in turn, round after round, and a ratio is taken within each round: what slows the machine
for a while slows both. The quoted ratios are of CPU time of the process with one thread.
"""

import datetime
import importlib.metadata
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"
DEFAULT_THREADS = torch.get_num_threads()
LOAD = os.getloadavg()[0]
# Threads that wait for one which is not running make wall time meaningless.
BUSY = (os.cpu_count() or 1) < 2 * LOAD
Case = Callable[[], Any]


@dataclass
class Times:
    """Microseconds per call of one case, one entry per round."""

    cpu: list[float] = field(default_factory=list)
    wall: list[float] = field(default_factory=list)

    def add(self, cpu: float, wall: float) -> None:
        self.cpu.append(cpu)
        self.wall.append(wall)


def timed(case: Case, calls: int) -> tuple[float, float]:
    """Microseconds per call: CPU time of the process, and wall time."""
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(calls):
        case()
    return (time.process_time() - cpu) / calls * 1e6, (time.perf_counter() - wall) / calls * 1e6


def interleave(cases: Mapping[str, Case], *, rounds: int, seconds: float = 0.01, threads: int = 1) -> dict[str, Times]:
    """Time the cases in turn, each for at least `seconds` of a round."""
    torch.set_num_threads(threads)
    calls = {name: calls_within(case, seconds) for name, case in cases.items()}
    times = {name: Times() for name in cases}
    for _ in range(rounds):
        for name, case in cases.items():
            times[name].add(*timed(case, calls[name]))
    torch.set_num_threads(1)
    return times


def best_wall(cases: Mapping[str, Case], rounds: int) -> dict[str, float]:
    """Wall time of each case's best round with torch's default number of threads; empty where the machine is busy."""
    if BUSY:
        return {}
    times = interleave(cases, rounds=rounds, threads=DEFAULT_THREADS)
    return {name: min(one.wall) for name, one in times.items()}


def calls_within(case: Case, seconds: float) -> int:
    """How many calls take so much CPU time; the first ones, which plan and allocate, do not count."""
    case()
    case()
    start = time.process_time()
    case()
    return max(1, int(seconds / max(time.process_time() - start, 1e-7)))


def ratio(mine: Sequence[float], other: Sequence[float]) -> list[float]:
    """Median and quartiles of the ratio within each round."""
    ratios = [one / two for one, two in zip(mine, other, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    return [middle, low, high]


def shown(found: Sequence[float]) -> str:
    middle, low, high = found
    return f"{middle:.2f} ({low:.2f}-{high:.2f})"


def micros(values: Sequence[float]) -> str:
    middle = statistics.median(values)
    return f"{middle:,.1f}" if middle < 1000 else f"{middle:,.0f}"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def machine() -> dict[str, Any]:
    """Where and with what this ran."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    packages = ("torch", "lightning", "numpy", "timm", "zclip", "autoclip")
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "cpu": model,
        "cores": os.cpu_count(),
        "default threads of torch": DEFAULT_THREADS,
        "load at the start": round(LOAD, 1),
        "python": platform.python_version(),
        **{name: version(name) for name in packages},
    }


def write(
    name: str, title: str, text: str, data: Mapping[str, Any], where: Mapping[str, Any], *, quick: bool = False
) -> None:
    """Write `results/<name>.md` and `.json`, and print the former; quick ones lie beside those that count."""
    name = f"{name}-quick" if quick else name
    RESULTS.mkdir(exist_ok=True)
    place = ", ".join(f"{key} {value}" for key, value in where.items() if value is not None)
    whole = f"## {title}\n\n{place}\n\n{text}"
    (RESULTS / f"{name}.md").write_text(whole)
    (RESULTS / f"{name}.json").write_text(json.dumps({"machine": where, **data}, indent=1) + "\n")
    print(whole)
