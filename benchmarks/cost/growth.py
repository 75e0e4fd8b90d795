"""How the cost of a step grows with the number of tensors and of elements, ours and torch's.

pip install -e '.[bench]'
python benchmarks/cost/growth.py [--quick]    # writes results/growth.md, growth.json and docs/growth.png
"""

import argparse
import gc
import statistics
from pathlib import Path
from typing import Any

import sets
import timing
import torch
from matplotlib import pyplot
from timing import interleave, micros, ratio, shown, table
from torch.nn.utils import clip_grad_norm_

from lightning_gradclip import Clipper, NormClip

PICTURE = Path(__file__).parents[2] / "docs" / "growth.png"
COUNTS = [3, 10, 30, 100, 300, 1000, 3000, 10_000, 20_000]
ELEMENTS = [10**3, 10**4, 10**5, 10**6, 10**7, 10**8, 2 * 10**8]


def measured(shapes: sets.Shapes, rounds: int) -> dict[str, Any]:
    """Microseconds of CPU time of an unclipped step."""
    params = sets.parameters(shapes)
    clipper = Clipper(sets.named(params), NormClip(max_norm=1e9))
    times = interleave({"torch": lambda: clip_grad_norm_(params, 1e9), "ours": clipper.step}, rounds=rounds)
    gc.collect()
    found = {name: statistics.median(one.cpu) for name, one in times.items()}
    return found | {"ratio": ratio(times["ours"].cpu, times["torch"].cpu)}


def draw(panels: dict[str, dict[int, dict[str, Any]]]) -> None:
    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.6), sharey=True, layout="constrained")
    for axis, (label, panel) in zip(axes, panels.items(), strict=True):
        styles = {"torch": ("clip_grad_norm_", "tab:gray", "s"), "ours": ("Clipper.step()", "tab:blue", "o")}
        for name, (title, color, marker) in styles.items():
            axis.loglog(list(panel), [one[name] for one in panel.values()], label=title, color=color, marker=marker)
        axis.set_xlabel(label)
        axis.grid(visible=True, which="major", alpha=0.3)
    axes[0].set_ylabel("microseconds of CPU time\nper unclipped step, one thread")
    axes[0].legend(frameon=False)
    PICTURE.parent.mkdir(exist_ok=True)
    figure.savefig(PICTURE, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="few rounds, at most 1e7 elements; under a minute")
    quick = parser.parse_args().quick
    torch.manual_seed(0)
    torch.set_num_threads(1)
    where, rounds = timing.machine(), 3 if quick else 9
    elements = [one for one in ELEMENTS if one <= 10**7] if quick else ELEMENTS
    panels = {
        "tensors of 100 elements": {count: measured([(100,)] * count, rounds) for count in COUNTS},
        "elements in 10 tensors": {size: measured([(size // 10,)] * 10, rounds) for size in elements},
    }
    text = "An unclipped step, microseconds of CPU time, one thread.\n\n![Growth](../../../docs/growth.png)\n"
    for label, panel in panels.items():
        rows = [
            [f"{n:,}", *(micros([one[k]]) for k in ("ours", "torch")), shown(one["ratio"])] for n, one in panel.items()
        ]
        text += "\n" + table([label, "`Clipper.step()`", "`clip_grad_norm_`", "ratio (quartiles)"], rows)
    timing.write("growth", "Growth", text, panels, where, quick=quick)
    if not quick:
        draw(panels)


if __name__ == "__main__":
    main()
