"""Draws the pictures of docs/choosing.md, from runs of the study that log every step.

pip install -e '.[bench]'
python benchmarks/training/pictures.py    # a minute
"""

import csv
import subprocess
import sys
from pathlib import Path

import numpy as np
import study  # puts the modules of the examples within reach
from figures import save
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from matplotlib import pyplot

STUDY = Path(study.__file__)
DOCS = Path(__file__).parents[2] / "docs"
LOGGED = Path("outputs/study-pictures")
SEED = 11
COLORS = {
    "none": "tab:red",
    "norm_low": "tab:blue",
    "norm_mid": "tab:blue",
    "zclip": "tab:orange",
    "quantile": "tab:green",
    "sigma": "tab:purple",
}

Curve = tuple[list[int], list[float]]


def main() -> None:
    explosion(DOCS / "choosing-explosion.png")
    limits(DOCS / "choosing-limits.png")


def explosion(path: Path) -> None:
    """What happens to a recurrent network at a learning rate that is too high, with and without clipping."""
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3), layout="constrained")
    labels = {"none": "not clipped", "zclip": "zclip, which watches 25 steps first", "norm_low": "clipped by norm"}
    for clipping, label in labels.items():
        # Without a method the callback measures and changes nothing.
        measured = ["callbacks/gradclip=monitor"] if clipping == "none" else []
        log = train(f"explosion-{clipping}", "task=char_lstm", "rate=too_high", f"clipping={clipping}", *measured)
        left.plot(*curve(log, "gradclip/norm"), color=COLORS[clipping], linewidth=1, label=label)
        right.plot(*curve(log, "train/loss"), color=COLORS[clipping], linewidth=1)
    left.set_title("norm of the gradient before clipping", fontsize=9)
    right.set_title("training loss; guessing has 3.25", fontsize=9)
    right.axhline(3.25, color="lightgray", linewidth=1, zorder=0)
    for axis in (left, right):
        axis.set_yscale("log")
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_formatter("")
    left.legend(frameon=False, fontsize=7)
    finish(figure, path)


def limits(path: Path) -> None:
    """The norms of one run, and where each rule would have drawn the line."""
    figure, axis = pyplot.subplots(figsize=(9, 3.2), layout="constrained")
    labels = {
        "norm_mid": "norm: a number",
        "quantile": "quantile: nine of ten are below",
        "sigma": "sigma",
        "zclip": "zclip",
    }
    for clipping, label in labels.items():
        watched = f"limits-{clipping}", "task=transformer", f"clipping={clipping}", "callbacks.gradclip.action=observe"
        log = train(*watched)
        if clipping == "norm_mid":
            axis.plot(*curve(log, "gradclip/norm"), color="black", linewidth=0.8, label="norm of the gradient")
        # ZClip has a limit for spikes alone: what they are cut to.
        style = "v" if clipping == "zclip" else "-"
        axis.plot(
            *curve(log, "gradclip/limit"), style, color=COLORS[clipping], linewidth=1.4, markersize=5, label=label
        )
    for step in noisy_steps():
        axis.axvspan(step - 1, step + 1, color="gold", alpha=0.5, zorder=0, linewidth=0)
    axis.set_yscale("log")
    axis.yaxis.set_major_formatter("{x:g}")
    axis.set_title("a transformer learns; in the yellow steps its batch is noise", fontsize=9)
    axis.legend(frameon=False, fontsize=7, ncols=5, loc="upper center")
    axis.margins(y=0.15)
    finish(figure, path)


def noisy_steps() -> list[int]:
    """The steps of these runs, from 1, whose batch is noise."""
    with initialize_config_dir(str(STUDY.parent / "conf"), version_base="1.3"):
        config = compose("study", ["task=transformer", f"seed={SEED}"])
    data = instantiate(config.data)
    batches = (data.draw(np.random.default_rng([SEED, number])) for number in range(config.trainer.max_steps))
    return [step for step, starts in enumerate(batches, 1) if starts[0] < 0]


def train(name: str, *overrides: str) -> list[dict[str, str]]:
    """What was logged at each step."""
    folder = LOGGED / name
    log = [f"seed={SEED}", "logger=csv", "trainer.log_every_n_steps=1", f"hydra.run.dir={folder}"]
    subprocess.run([sys.executable, str(STUDY), *overrides, *log], check=True, stdout=subprocess.DEVNULL)
    with (folder / "csv" / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def curve(log: list[dict[str, str]], metric: str) -> Curve:
    points = [(int(row["step"]) + 1, float(row[metric])) for row in log if row.get(metric)]
    return [step for step, _ in points], [value for _, value in points]


def finish(figure, path: Path) -> None:
    for axis in figure.axes:
        axis.set_xlabel("step", fontsize=8)
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    save(figure, path)
    print(path)


if __name__ == "__main__":
    main()
