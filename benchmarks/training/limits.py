"""Prints the limits of each task, from runs that were not clipped; conf/task/ holds them.

python benchmarks/training/study.py -m study=limits
python benchmarks/training/limits.py
"""

import statistics
from collections import defaultdict
from pathlib import Path

from recorder import read_rows

DIGITS = 2


def main() -> None:
    tasks = defaultdict(list)
    for row in read_rows(Path("outputs/study-limits")):
        tasks[row["task"]].append(row)
    for task, rows in tasks.items():
        norm, entry = (statistics.median(row[key] for row in rows) for key in ("norm_median", "entry_median"))
        limits = {"low": 0.3 * norm, "mid": norm, "high": 3 * norm, "entry": entry}
        print(f"{task}  limits: {{{', '.join(f'{name}: {value:.{DIGITS}g}' for name, value in limits.items())}}}")


if __name__ == "__main__":
    main()
