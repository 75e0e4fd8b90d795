"""Prints the runs of a sweep as a Markdown table, best first.

Try:
    python examples/results.py                                # the newest sweep below multirun/
    python examples/results.py multirun/2026-01-31/12-00-00
    python examples/results.py --pool seed                    # runs that differ in nothing but the seed share a row
"""

import math
import re
import sys
from argparse import ArgumentParser
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import yaml

NOTHING = "-"


@dataclass(frozen=True)
class Run:
    name: str
    overrides: tuple[str, ...]
    outcome: dict

    @property
    def verdict(self) -> str:
        """How it ended; a run that was killed, or still goes on, has left no outcome."""
        return self.outcome.get("verdict", "no outcome")

    @property
    def metric(self) -> str | None:
        return self.outcome.get("metric")

    @property
    def value(self) -> float:
        return self.outcome.get("value", math.nan)

    @property
    def rank(self) -> float:
        """The lower, the better; what has no finite value comes last."""
        if not math.isfinite(self.value):
            return math.inf
        return -self.value if self.outcome["mode"] == "max" else self.value


class Row:
    """Runs that share a row: one, or those that differ in nothing but the pooled key."""

    def __init__(self, runs: Iterable[Run]):
        self.runs = sorted(runs, key=lambda run: run.rank)

    @property
    def order(self) -> tuple[str, float]:
        middle = self.runs[len(self.runs) // 2]
        return middle.metric or "~", middle.rank  # failed runs, which have no metric, behind the others

    def value(self, metric: str) -> str:
        """The middle value, of two the worse, and the range."""
        values = [run.value for run in self.runs if run.metric == metric]
        if not values:
            return NOTHING
        middle, ordered = number(values[len(values) // 2]), sorted(values, key=nan_last)
        return middle if len(values) == 1 else f"{middle} ({number(ordered[0])} to {number(ordered[-1])})"

    def clip_rate(self) -> str:
        rates = self.facts("clip_rate")
        return f"{sum(rates) / len(rates):.1%}" if rates else NOTHING

    def largest_norm(self) -> str:
        return number(max(self.facts("largest_norm"), key=nan_last)) if self.facts("largest_norm") else NOTHING

    def facts(self, name: str) -> list[float]:
        return [run.outcome[name] for run in self.runs if run.outcome.get(name) is not None]

    def verdict(self) -> str:
        counts = Counter(run.verdict for run in self.runs)
        return ", ".join(f"{count} {verdict}" if len(self.runs) > 1 else verdict for verdict, count in counts.items())


def main() -> None:
    parser = ArgumentParser(description="Prints the runs of a sweep as a Markdown table, best first.")
    parser.add_argument("folder", nargs="?", type=Path, help="of the sweep; default: the newest one below multirun/")
    parser.add_argument("--pool", metavar="KEY", help="runs that differ in nothing but this key share a row")
    arguments = parser.parse_args()
    folder = arguments.folder or newest(Path("multirun"))
    runs = list(read(folder))
    if not runs:
        sys.exit(f"{folder} holds no run of Hydra; name the folder of a sweep, such as multirun/2026-01-31/12-00-00")
    report(folder, runs, arguments.pool)


def newest(root: Path) -> Path:
    """The folder of the sweep whose job started last."""
    jobs = {file.parents[1]: file.stat().st_mtime for file in root.rglob(".hydra/overrides.yaml")}
    if not jobs:
        sys.exit(f"there is no sweep below {root}/; start one with -m, or name its folder")
    return max(jobs, key=jobs.__getitem__).parent


def read(folder: Path) -> Iterator[Run]:
    """Every job that Hydra has started, whatever became of it."""
    for file in sorted(folder.rglob(".hydra/overrides.yaml"), key=job_number):
        job = file.parents[1]
        outcome = job / "outcome.yaml"
        loaded = yaml.safe_load(outcome.read_text(encoding="utf-8")) if outcome.is_file() else {}
        overrides = yaml.safe_load(file.read_text(encoding="utf-8"))
        yield Run(str(job.relative_to(folder)), tuple(overrides), loaded)


def job_number(file: Path) -> list[tuple[int, str]]:
    """Sorts job 10 behind job 9."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in file.parts]


def report(folder: Path, runs: list[Run], pool: str | None) -> None:
    shared = [one for one in runs[0].overrides if len(runs) > 1 and all(one in run.overrides for run in runs)]
    rows: dict[tuple[str, ...], list[Run]] = {}
    for run in runs:
        own = tuple(one for one in run.overrides if one not in shared and key_of(one) != pool)
        rows.setdefault(own, []).append(run)
    names = short_names({key_of(one) for own in rows for one in own})
    metrics = sorted({run.metric for run in runs if run.metric})
    head = ["overrides", *metrics, "steps clipped", "largest norm", "outcome"]
    ranked = sorted(((Row(group), own) for own, group in rows.items()), key=lambda pair: pair[0].order)
    body = []
    for row, own in ranked:
        told = ", ".join(shortened(one, names) for one in own) or NOTHING
        values = [row.value(metric) for metric in metrics]
        body.append([told, *values, row.clip_rate(), row.largest_norm(), row.verdict()])

    count = f"{len(runs)} runs" if len(runs) > 1 else "1 run"
    print(f"{count} in {folder}{', each with ' if shared else ''}{' '.join(shared)}; best first\n")
    print_table(head, body)
    best, own = ranked[0]
    if len(metrics) == 1 and math.isfinite(best.order[1]):
        print(f"\nbest: {' '.join([*shared, *own])}")
    if reasons := [run for run in runs if run.outcome.get("reason")]:
        print()
    for run in reasons:
        print(f"- {folder / run.name} {run.verdict}: {' '.join(run.outcome['reason'].split())}")


def print_table(head: list[str], body: list[list[str]]) -> None:
    cells = [[cell.replace("|", r"\|") for cell in row] for row in [head, *body]]
    widths = [max(len(row[column]) for row in cells) for column in range(len(head))]
    # Words to the left, numbers to the right.
    right = [0 < column < len(head) - 1 for column in range(len(head))]
    rule = ["-" * (width - 1) + ":" if to_right else "-" * width for width, to_right in zip(widths, right, strict=True)]
    for row in [cells[0], rule, *cells[1:]]:
        padded = [
            cell.rjust(width) if to_right else cell.ljust(width)
            for cell, width, to_right in zip(row, widths, right, strict=True)
        ]
        print("|", " | ".join(padded), "|")


def key_of(override: str) -> str:
    return override.lstrip("+~").partition("=")[0]


def short_names(keys: set[str]) -> dict[str, str]:
    """The end of each key, as long as it takes to tell it from the others."""
    ends = {key: [key[mark.end() :] for mark in re.finditer(r"[./]|^", key)] for key in keys}
    taken = Counter(end for several in ends.values() for end in several)
    return {key: next((end for end in reversed(several) if taken[end] == 1), key) for key, several in ends.items()}


def shortened(override: str, names: dict[str, str]) -> str:
    _, sign, value = override.partition("=")
    if re.fullmatch(r"-?\d+\.\d{5,}(e-?\d+)?", value):
        value = number(float(value))
    removed = "~" if override.startswith("~") else ""
    return f"{removed}{names[key_of(override)]}{sign}{value}"


def number(value: float) -> str:
    return f"{value:,.4g}"


def nan_last(value: float) -> tuple[bool, float]:
    return math.isnan(value), value


if __name__ == "__main__":
    main()
