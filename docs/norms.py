"""Draws the pictures of docs/methods.md: what each method does to the same norms.

    python docs/norms.py FOLDER

Takes seconds; needs the `bench` extra. The build of the site runs it.
"""

import sys
from pathlib import Path

import matplotlib
import numpy as np
import torch

import lightning_gradclip
from lightning_gradclip import ClipMethod, Clipper

matplotlib.use("Agg")
from matplotlib import pyplot

STEPS = 400


def stream() -> np.ndarray:
    """Norms with noise, a spike in 40 steps and a level that doubles in the middle."""
    random = np.random.default_rng(1)
    norms = 0.6 * np.exp(0.15 * random.standard_normal(STEPS))
    norms[STEPS // 2 :] *= 2
    norms[20::40] *= 6
    return norms


def shown(method: ClipMethod) -> np.ndarray:
    """Norm before, norm after and limit of each step, (STEPS, 3), of sixteen entries beside weights of norm 40."""
    weight = torch.nn.Parameter(torch.full((16,), 10.0))
    optimizer = torch.optim.Adam([weight], lr=0.0)  # some methods ask what it remembers; the weights stay
    clipper = Clipper([("weight", weight)], method, optimizer=optimizer)
    rows = []
    for norm in stream():
        weight.grad = torch.full((16,), float(norm) / 4)
        row = clipper.step()
        optimizer.step()
        rows.append((float(norm), float(weight.grad.norm()), float(row.limit)))
    return np.array(rows)


def draw(method: ClipMethod, path: Path) -> None:
    before, after, limit = shown(method).T
    figure, axes = pyplot.subplots(figsize=(7, 2), layout="constrained")
    axes.plot(before, color="0.7", linewidth=1)
    axes.plot(np.where(np.isfinite(limit) & (limit > 0), limit, np.nan), color="tab:orange", linewidth=1)
    axes.plot(after, color="tab:blue", linewidth=1)
    axes.set(yscale="log", xlabel="step", ylabel="norm", xlim=(0, STEPS))
    figure.savefig(path, dpi=100, metadata={"Software": ""})
    pyplot.close(figure)


def main() -> None:
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    for public in lightning_gradclip.__all__:
        cls = getattr(lightning_gradclip, public)
        if isinstance(cls, type) and issubclass(cls, ClipMethod) and cls is not ClipMethod:
            draw(cls(), folder / f"methods-{cls.__module__.rpartition('.')[2]}.png")


if __name__ == "__main__":
    main()
