"""Turns the table of results into one page with figures.

pip install -e '.[bench]'
python benchmarks/training/page.py benchmarks/training/results.csv docs/study.md
"""

import math
import os
from argparse import ArgumentParser
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from cells import RATES, Cell, Key, Row, Task, cells_of, clippings, missed, read_results, read_tasks, wilson

NOTHING = "-"
WORDS = {"comfortable": "comfortable", "aggressive": "aggressive", "too_high": "too high"}
REFERENCES = ("none", "norm_mid")


def main() -> None:
    parser = ArgumentParser(description="Turns the table of results into one page with figures.")
    parser.add_argument("results", type=Path, help="the CSV file")
    parser.add_argument("page", type=Path, help="the Markdown file to write; its figures lie beside it")
    arguments = parser.parse_args()
    rows = read_results(arguments.results)
    tasks = {name: task for name, task in read_tasks().items() if any(row["task"] == name for row in rows)}
    import figures  # wants matplotlib, of which the tables know nothing

    drawn = figures.draw(rows, tasks, arguments.page)
    benchmarks = os.path.relpath(Path(__file__).parents[1], arguments.page.parent)
    text = "\n\n".join(blocks(rows, tasks, drawn, benchmarks))
    arguments.page.write_text(text + "\n", encoding="utf-8")
    print(f"{arguments.page} and {len(drawn)} figures")


def blocks(rows: Sequence[Row], tasks: Mapping[str, Task], drawn: Mapping[str, str], benchmarks: str) -> Iterator[str]:
    """The parts of the page: `drawn` are the files of the figures, `benchmarks` is the folder, both as links."""
    cells, names = cells_of(rows, tasks), clippings(rows)
    yield "# What clipping does to training"
    yield introduction(rows, tasks, benchmarks)
    yield f"![All results]({drawn['overview']})"
    yield overall(cells, tasks, names)
    for task in tasks.values():
        yield f"## {task.name}"
        yield task.about
        yield f"![{task.name}]({drawn[task.name]})"
        yield task_table(cells, task, names)
    yield "## What a step takes"
    yield overhead_table(rows, tasks, names, benchmarks)
    if advice := advice_table(cells, tasks):
        yield "## Limits by advice"
        yield advice


def introduction(rows: Sequence[Row], tasks: Mapping[str, Task], benchmarks: str) -> str:
    seeds = sorted({row["seed"] for row in rows})
    made = ", ".join(f"{name} {' and '.join(sorted({row[name] for row in rows}))}" for name in ("torch", "lightning"))
    commits = ", ".join(f"`{name}`" for name in sorted({row["commit"] for row in rows}))
    shares = ", ".join(
        f"{count} of {len(seeds)}: {low:.0%} to {high:.0%}"
        for count in range(len(seeds) + 1)
        for low, high in [wilson(count, len(seeds))]
    )
    return (
        f"Written by `page.py` from {len(rows):,} runs: {len(tasks)} tasks, seeds {seeds[0]} to {seeds[-1]}; {made}; "
        f"package at {commits}. [How it was made, and how to repeat it]({benchmarks}/training/README.md).\n\n"
        f"A result is the median of the seeds and, in brackets, an interval that holds the true median with a "
        f"confidence of {1 - missed(len(seeds), 1):.0%}: from the worst to the best of up to eight runs (order "
        "statistics, which assume nothing about the distribution). The best median of a column is bold; that alone "
        "does not make it better than one whose interval overlaps. *Diverged*: the metric ended no better than the "
        "bound under the task, or training had to stop. What is behind such counts, by Wilson's 95 % interval: "
        f"{shares}. "
        "*Spikes*: steps in 1,000 whose gradient, before clipping, is not finite or over 5 times the median of the 50 "
        "before. *Clipped*: steps that clipping changed or dropped, for NaN gradients too. Three numbers "
        "stand for the three learning rates."
    )


def overall(cells: Mapping[Key, Cell], tasks: Mapping[str, Task], names: Iterable[str]) -> str:
    """Seed by seed against a reference, over all tasks."""
    head = ["way to clip", *(f"{WORDS[rate]}, against `{other}`" for other in REFERENCES for rate in RATES)]
    body = []
    for name in names:
        counts = [
            NOTHING if name == other else "{} : {} of {}".format(*duels(cells, tasks, name, other, rate))
            for other in REFERENCES
            for rate in RATES
        ]
        body.append([f"`{name}`", *counts])
    return (
        "Better and worse than no clipping, and than clipping at the median norm, run by run with the same task, "
        "learning rate and seed; the rest is equal, mostly because both diverged. With no difference at all, 18 or "
        "more of 25 in one direction come up once in twenty times.\n\n" + table(head, body)
    )


def duels(
    cells: Mapping[Key, Cell], tasks: Mapping[str, Task], name: str, other: str, rate: str
) -> tuple[int, int, int]:
    """In how many pairs of runs `name` ended better and worse than `other`, and how many pairs there are."""
    better = worse = pairs = 0
    for task in tasks.values():
        mine, others = (by_seed(cells.get((task.name, one, rate))) for one in (name, other))
        for seed in mine.keys() & others.keys():
            pairs += 1
            # Two runs that came to nothing are equal, however they did.
            values = [math.nan if row["diverged"] else row["value"] for row in (mine[seed], others[seed])]
            better += task.better(*values)
            worse += task.better(*reversed(values))
    return better, worse, pairs


def by_seed(cell: Cell | None) -> dict[int, Row]:
    return {row["seed"]: row for row in cell.rows} if cell else {}


def task_table(cells: Mapping[Key, Cell], task: Task, names: Iterable[str]) -> str:
    found = {rate: {name: cells[key] for name in names if (key := (task.name, name, rate)) in cells} for rate in RATES}
    best = {rate: min(map(middle, several.values()), default=math.inf) for rate, several in found.items()}
    rates = {rate: next(iter(several.values())).rows[0]["lr"] for rate, several in found.items() if several}
    head = ["", *(f"{WORDS[rate]}, {lr:g}" for rate, lr in rates.items())]
    head += ["diverged", "spikes in 1,000", "clipped", "skipped"]
    body = []
    for name in names:
        mine = [found[rate].get(name) for rate in rates]
        values = [shown(cell, best[rate]) for cell, rate in zip(mine, rates, strict=True)]
        counts = [joined(mine, lambda cell: f"{cell.diverged}")]
        counts += [joined(mine, lambda cell: short(cell.mean("spikes_per_1000")))]
        counts += [NOTHING if name == "none" else joined(mine, lambda cell: share(cell.mean("clip_rate")))]
        counts += [joined(mine, lambda cell: short(cell.mean("skipped")))]
        body.append([f"`{name}`", *values, *counts])
    words = ("the more", "at most") if task.maximized else ("the less", "at least")
    return f"`{task.metric}`, {words[0]} the better; diverged: {words[1]} {task.useless:g}.\n\n{table(head, body)}"


def overhead_table(rows: Iterable[Row], tasks: Mapping[str, Task], names: Iterable[str], benchmarks: str) -> str:
    """CPU time in units of that of the run with the same task, rate and seed which does not clip."""
    times = {(row["task"], row["clipping"], row["rate"], row["seed"]): row["ms_per_step"] for row in rows}
    # How long the games of a policy take depends on how well it plays.
    timed = [name for name in tasks if name != "cartpole"]
    body = []
    for name in names:
        told = []
        for task in timed:
            ratios = sorted(
                mine / times[task, "none", rate, seed]
                for (one, clipping, rate, seed), mine in times.items()
                if (one, clipping) == (task, name) and (task, "none", rate, seed) in times
            )
            count = len(ratios)
            quarter = count // 4
            told.append(
                f"{ratios[count // 2]:.2f} ({ratios[quarter]:.2f} to {ratios[-1 - quarter]:.2f})" if ratios else NOTHING
            )
        body.append([f"`{name}`", *told])
    return (
        "CPU time of a whole step, as a multiple of that of the run with the same learning rate and seed in which "
        "nothing clips: median and quartiles. These runs shared a machine with others, which moves single times by "
        f"tens of per cent; [measured side by side]({benchmarks}/cost/results/README.md) the callback takes about a "
        "tenth of a millisecond. CartPole is left out: its steps last as long as its games.\n\n"
        + table(["", *timed], body)
    )


def advice_table(cells: Mapping[Key, Cell], tasks: Mapping[str, Task]) -> str:
    advised = sorted({name for _, name, _ in cells if name.startswith("advised")})
    if not advised:
        return ""
    body = []
    for task in tasks.values():
        for rate in RATES:
            grid = {name: cells.get((task.name, name, rate)) for name in ("norm_low", "norm_mid", "norm_high")}
            limits = {name: cell for name, cell in grid.items() if cell}
            if not limits:
                continue
            best = min(limits, key=lambda name: middle(limits[name]))
            values = [f"{shown(limits[best])} `{best}`"]
            values += [shown(cells.get((task.name, name, rate))) for name in ("none", *advised)]
            body.append([f"{task.name}, {WORDS[rate]}", *values])
    return (
        "`advise` saw one run that was not clipped, at the comfortable learning rate and with a seed that is not among "
        "these (`advise.py`), and was asked for a limit that clips a tenth of the steps. The best limit of the grid is "
        "the best of three by the results themselves: chosen with hindsight, which favours it.\n\n"
        + table(["", "best norm limit of the grid", "`none`", *(f"`{name}`" for name in advised)], body)
    )


def middle(cell: Cell) -> float:
    return cell.task.loss(cell.interval[1])


def shown(cell: Cell | None, best: float | None = None) -> str:
    if cell is None:
        return NOTHING
    low, median, high = map(short, cell.interval)
    bold = "**" if middle(cell) == best and math.isfinite(middle(cell)) else ""
    return f"{bold}{median}{bold} ({low} to {high})"


def joined(several: Iterable[Cell | None], told) -> str:
    return " / ".join(NOTHING if cell is None else told(cell) for cell in several)


def short(value: float) -> str:
    return f"{value:,.3g}" if math.isfinite(value) else "∞"


def share(value: float) -> str:
    return f"{value:.0%}" if math.isfinite(value) else NOTHING


def table(head: Sequence[str], body: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    main()
