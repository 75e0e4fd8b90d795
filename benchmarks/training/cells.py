"""The results as cells, the runs that differ in nothing but the seed, and how sure a few runs make us."""

import csv
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

CONF = Path(__file__).parent / "conf"
RATES = ("comfortable", "aggressive", "too_high")
# In the order in which they are shown; files of conf/clipping that are not named here come last.
ORDER = ("none", "norm_low", "norm_mid", "norm_high", "value", "normalize", "agc", "autoclip", "quantile", "sigma")
NUMBERS = ("lr", "value", "spikes_per_1000", "clip_rate", "skipped", "nonfinite", "ms_per_step", "norm_median")
CONFIDENCE = 0.93  # five runs reach 0.9375, and not 0.95

Row = Mapping[str, Any]
Key = tuple[str, str, str]


@dataclass(frozen=True)
class Task:
    """What the results have to know of a task: its file in conf/task says the rest."""

    name: str
    metric: str
    maximized: bool
    useless: float
    about: str

    def better(self, one: float, other: float) -> bool:
        return self.loss(one) < self.loss(other)

    def loss(self, value: float) -> float:
        """The lower, the better; what is not finite is worst."""
        if not math.isfinite(value):
            return math.inf
        return -value if self.maximized else value


@dataclass(frozen=True)
class Cell:
    """The runs of one task, way to clip and learning rate."""

    task: Task
    rows: tuple[Row, ...]

    @cached_property
    def interval(self) -> tuple[float, float, float]:
        """Of the metric's median: low, median, high; a run without a finite metric counts as worst."""
        sign = -1 if self.task.maximized else 1
        return tuple(
            sorted(sign * loss for loss in median_interval([self.task.loss(row["value"]) for row in self.rows]))
        )

    @property
    def diverged(self) -> int:
        return sum(row["diverged"] for row in self.rows)

    def mean(self, name: str) -> float:
        values = [row[name] for row in self.rows if math.isfinite(row[name])]
        return statistics.fmean(values) if values else math.nan


def read_results(path: Path) -> list[Row]:
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        row.update({name: float(row[name]) for name in NUMBERS})
        row.update(seed=int(row["seed"]), steps=int(row["steps"]), diverged=row["diverged"] == "True")
    return rows


def read_tasks() -> dict[str, Task]:
    tasks = {}
    for path in sorted((CONF / "task").glob("*.yaml")):
        text = path.read_text(encoding="utf-8")
        node = yaml.safe_load(text)
        # The comment that opens the file, without Hydra's own line.
        comment = [line.lstrip("# ") for line in text.splitlines()[1:] if line.startswith("#")]
        tasks[path.stem] = Task(path.stem, node["metric"], node["mode"] == "max", node["useless"], " ".join(comment))
    return tasks


def cells_of(rows: Iterable[Row], tasks: Mapping[str, Task]) -> dict[Key, Cell]:
    """By task, way to clip and learning rate."""
    groups: dict[Key, list[Row]] = {}
    for row in rows:
        groups.setdefault((row["task"], row["clipping"], row["rate"]), []).append(row)
    return {key: Cell(tasks[key[0]], tuple(group)) for key, group in groups.items()}


def clippings(rows: Iterable[Row]) -> list[str]:
    """The ways to clip that occur, in the order in which they are shown; not those that advice led to."""
    names = {row["clipping"] for row in rows if not row["clipping"].startswith("advised")}
    return sorted(names, key=lambda name: (ORDER.index(name) if name in ORDER else len(ORDER), name))


def median_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """The median, between two of the values that hold the true one with a confidence of at least 0.93.

    From order statistics: each value is above the true median with probability 1/2, whatever the distribution, so that
    the k-th smallest and k-th largest of n miss it with probability 2 P(Binomial(n, 1/2) < k). Up to four runs do not
    reach that confidence; their interval is the range. Values may be infinite.
    """
    ordered, n = sorted(values), len(values)
    half = n // 2
    # Of two middle values one may be infinite.
    middle = ordered[half] if n % 2 or ordered[half] == ordered[half - 1] else (ordered[half - 1] + ordered[half]) / 2
    k = 1
    while k < half and missed(n, k + 1) <= 1 - CONFIDENCE:
        k += 1
    return ordered[k - 1], middle, ordered[n - k]


def missed(n: int, k: int) -> float:
    """Probability that the median lies outside the k-th smallest and the k-th largest of n values."""
    return 2 * sum(math.comb(n, i) for i in range(k)) / 2**n


def wilson(count: int, n: int) -> tuple[float, float]:
    """95 % interval of a share seen `count` times in `n`: Wilson 1927, doi.org/10.1080/01621459.1927.10502953."""
    z = 1.959964
    center = (count + z * z / 2) / (n + z * z)
    width = z / (n + z * z) * math.sqrt(count * (n - count) / n + z * z / 4)
    return max(0.0, center - width), min(1.0, center + width)
