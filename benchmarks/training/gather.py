"""Gathers the rows of all runs that have ended into one table.

python benchmarks/training/gather.py outputs/study benchmarks/training/results.csv
"""

import csv
from argparse import ArgumentParser
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from recorder import read_rows

COLUMNS = (
    *("task", "clipping", "rate", "lr", "seed", "metric", "value", "diverged", "steps", "spikes_per_1000", "clip_rate"),
    *("skipped", "nonfinite", "ms_per_step", "norm_median", "threads", "torch", "lightning", "commit"),
    *("reason", "overrides"),
)


def main() -> None:
    parser = ArgumentParser(description="Gathers the rows of all runs that have ended into one table.")
    parser.add_argument("runs", type=Path, help="the folder of the sweep")
    parser.add_argument("results", type=Path, help="the CSV file to write")
    arguments = parser.parse_args()
    rows = read_rows(arguments.runs)
    if not rows:
        parser.error(f"{arguments.runs} holds no run that has ended; run study.py -m study=short first")
    write_results(arguments.results, rows)
    print(f"{len(rows)} runs in {arguments.results}")


def write_results(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    ordered = sorted(rows, key=lambda row: (row["task"], row["clipping"], row["lr"], row["seed"]))
    part = path.with_suffix(".part")
    with part.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(ordered)
    part.replace(path)


if __name__ == "__main__":
    main()
