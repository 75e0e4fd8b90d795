"""Join the tables of `results` into its README.md and draw what docs/costs.md shows.

pip install -e '.[bench]'
python benchmarks/cost/report.py    # after all the others
"""

import json
from pathlib import Path
from typing import Any

import timing
from matplotlib import pyplot

PICTURE = Path(__file__).parents[2] / "docs" / "costs.png"
PARTS = ("clip", "trainer", "sharded", "growth", "memory")
GRAY, LIGHT, BLUE, SKY = "tab:gray", "lightgray", "tab:blue", "lightskyblue"


def norm_bars(axis: Any, norms: dict[str, Any]) -> None:
    """Each set's times as shares of torch's unclipped step."""
    bars = {
        "torch, unclipped": ("torch", GRAY),
        "torch, clipped": ("torch clipped", LIGHT),
        "ours, unclipped": ("step", BLUE),
        "ours, clipped": ("step clipped", SKY),
        "reading once": ("read", "tab:orange"),
    }
    for place, (label, (key, color)) in enumerate(bars.items()):
        heights = []
        for one in norms.values():
            times = one["cpu us"]
            heights.append(times[one["read by"] if key == "read" else key] / times["torch"])
        spots = [index + (place - 2) * 0.17 for index in range(len(norms))]
        axis.bar(spots, heights, 0.16, label=label, color=color)
    short = [name.replace(", ", "\n").replace("tensors of", "tensors\nof").replace("M ", "M\n") for name in norms]
    axis.set_xticks(range(len(norms)), short, fontsize=7)
    axis.set_title("clipping by norm", fontsize=10)
    axis.set_ylim(top=1.5)
    axis.set_ylabel("CPU time, clip_grad_norm_ = 1")
    axis.legend(frameon=False, fontsize=7, ncols=3, loc="upper center", bbox_to_anchor=(0.5, 1.0))


def side_bars(axis: Any, title: str, times: dict[str, float], unit: str) -> None:
    colors = [SKY if "Clip()" in name else GRAY for name in times]
    bars = axis.barh(list(times), list(times.values()), color=colors)
    axis.bar_label(bars, fmt="{:.3g}", fontsize=7, padding=2)
    axis.margins(x=0.2)
    axis.invert_yaxis()
    axis.tick_params(labelsize=7)
    axis.set_title(title, fontsize=10)
    axis.set_xlabel(unit, fontsize=8)


def draw(found: dict[str, Any]) -> None:
    figure, (left, middle, right) = pyplot.subplots(
        1, 3, figsize=(13, 3.9), layout="constrained", width_ratios=(2.4, 1, 1)
    )
    norm_bars(left, found["norm"])
    adaptive = {name: one["us"] for name, one in found["adaptive"].items() if "steps" not in name}
    side_bars(middle, "adaptive limits, 3-tensor MLP", adaptive, "microseconds a step")
    agc = {}
    for name, one in found["other"].items():
        if name.startswith("AGC, 10%"):
            model = name.split(", ", 2)[2].split(" / ")[0]
            agc[f"AGC, {model}"] = one["ratio"][0]
    side_bars(right, "AGC, 10 % of the units over", agc, "CPU time, timm = 1")
    for patch in right.patches:
        patch.set_color(SKY)
    for axis in (left, middle, right):
        axis.spines[["top", "right"]].set_visible(False)
    PICTURE.parent.mkdir(exist_ok=True)
    figure.savefig(PICTURE, dpi=100)


def main() -> None:
    parts = [(timing.RESULTS / f"{name}.md").read_text() for name in PARTS]
    path = timing.RESULTS / "README.md"
    path.write_text("# What it costs\n\nWritten by `make bench`.\n\n" + "\n".join(parts))
    draw(json.loads((timing.RESULTS / "clip.json").read_text()))
    print(f"{path} and {PICTURE}")


if __name__ == "__main__":
    main()
