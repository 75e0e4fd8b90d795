"""The figures of the page: one of all results, and one for each task with every run in it."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from cells import RATES, Cell, Key, Row, Task, cells_of, clippings
from matplotlib import pyplot

COLORS = dict(zip(RATES, ("tab:green", "tab:orange", "tab:red"), strict=True))
# Below this the squares are so red that black is not read.
DARK = 0.12


def draw(rows: Sequence[Row], tasks: Mapping[str, Task], page: Path) -> dict[str, str]:
    """Draw all figures beside the page; their file names by what they show."""
    cells, names = cells_of(rows, tasks), clippings(rows)
    drawn = {"overview": f"{page.stem}-overview.png"}
    overview(cells, tasks, names, page.with_name(drawn["overview"]))
    for task in tasks.values():
        drawn[task.name] = f"{page.stem}-{task.name}.png"
        every_run(cells, task, names, page.with_name(drawn[task.name]))
    return drawn


def overview(cells: Mapping[Key, Cell], tasks: Mapping[str, Task], names: Sequence[str], path: Path) -> None:
    """A square for each cell: from what is useless, red, to the best median of the task, blue."""
    figure, axes = pyplot.subplots(1, len(tasks), figsize=(12, 0.34 * len(names) + 1.4), layout="constrained")
    for axis, task in zip(axes if len(tasks) > 1 else [axes], tasks.values(), strict=True):
        grid = [[cells.get((task.name, name, rate)) for rate in RATES] for name in names]
        medians = [[task.loss(cell.interval[1]) if cell else math.nan for cell in line] for line in grid]
        bound = task.loss(task.useless)
        best = min((loss for line in medians for loss in line if math.isfinite(loss)), default=bound)
        reached = [[goodness(loss, best, bound) for loss in line] for line in medians]
        image = axis.pcolormesh(
            range(len(RATES)), range(len(names)), reached, cmap="RdYlBu", vmin=0, vmax=1, edgecolors="white"
        )
        axis.invert_yaxis()
        for y, line in enumerate(grid):
            for x, cell in enumerate(line):
                if cell and cell.diverged:
                    color = "white" if reached[y][x] < DARK else "black"
                    told = f"{cell.diverged}/{len(cell.rows)}"
                    axis.text(x, y, told, ha="center", va="center", fontsize=7, color=color)
        axis.set_xticks(
            range(len(RATES)), [rate.replace("_", " ") for rate in RATES], rotation=40, ha="right", fontsize=8
        )
        axis.set_yticks(range(len(names)), names if axis is figure.axes[0] else [""] * len(names), fontsize=8)
        axis.set_title(f"{task.name}\n{task.metric}", fontsize=9)
        axis.spines[:].set_visible(False)
        axis.tick_params(length=0)
    bar = figure.colorbar(image, ax=figure.axes, ticks=[0, 1], pad=0.01)
    bar.ax.set_yticklabels(["useless", "best"], fontsize=8)
    figure.suptitle("Median result by way to clip and learning rate; numbers: runs that diverged", fontsize=10)
    save(figure, path)


def goodness(loss: float, best: float, bound: float) -> float:
    """1 for the best, 0 for what is no better than the bound."""
    if math.isnan(loss):
        return math.nan
    return max(0.0, (bound - loss) / (bound - best)) if bound > best and math.isfinite(loss) else 0.0


def every_run(cells: Mapping[Key, Cell], task: Task, names: Sequence[str], path: Path) -> None:
    """A dot for each run; those beyond the bound stand on its line."""
    figure, axis = pyplot.subplots(figsize=(9, 3.2), layout="constrained")
    for place, rate in enumerate(RATES):
        for x, name in enumerate(names):
            if cell := cells.get((task.name, name, rate)):
                spot = x + (place - 1) * 0.24
                reached = [row["value"] for row in cell.rows if not row["diverged"]]
                axis.plot([spot] * len(reached), reached, "o", color=COLORS[rate], markersize=3.5, alpha=0.7, mew=0)
                if cell.diverged:
                    axis.plot([spot], [task.useless], "x", color=COLORS[rate], markersize=5)
                    axis.annotate(
                        str(cell.diverged),
                        (spot, task.useless),
                        (0, 4),
                        textcoords="offset points",
                        fontsize=6,
                        ha="center",
                    )
                if cell.diverged < len(cell.rows) / 2:
                    axis.plot([spot - 0.1, spot + 0.1], [cell.interval[1]] * 2, color=COLORS[rate], linewidth=1.5)
        axis.plot([], [], "o", color=COLORS[rate], markersize=4, label=rate.replace("_", " "))
    axis.plot([], [], "x", color="gray", markersize=5, label="diverged, how many")
    axis.axhline(task.useless, color="lightgray", linewidth=1, zorder=0)
    axis.set_xticks(range(len(names)), names, rotation=30, ha="right", fontsize=8)
    axis.set_ylabel(task.metric, fontsize=8)
    axis.tick_params(labelsize=8)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=7, ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    save(figure, path)


def save(figure, path: Path) -> None:
    # Without the date and version of the program, so that the same results give the same file.
    figure.savefig(path, dpi=90, metadata={"Software": None})
    pyplot.close(figure)
