"""What a step of a real Trainer costs above a bare one: its own clipping, ours with logging, and an empty callback.

    python benchmarks/cost/trainer.py [--quick]    # writes results/trainer.md and trainer.json

Many short fits alternate, so that what slows the machine for a while slows all of them; the clock is the CPU time of
the process, with one thread, for stretches of 50 batches. The least of many stretches is what the machine can do.
"""

import argparse
import itertools
import logging
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import timing
import torch
from lightning.pytorch.loggers import CSVLogger
from timing import Times, table

from lightning_gradclip import Clipper, GradientClipping, NormClip

# As many as lie between two log events, so that each stretch has one.
STRETCH, STRETCHES = 50, 8
CASES: dict[str, Any] = {
    "bare": dict,
    "an empty Callback": lambda: {"callbacks": [pl.Callback()]},
    "Trainer(gradient_clip_val=1.0)": lambda: {"gradient_clip_val": 1.0},
    "GradientClipping(NormClip())": lambda: {"callbacks": [GradientClipping(NormClip())]},
    "the same, history=True": lambda: {"callbacks": [GradientClipping(NormClip(), history=True)]},
}


class Model(pl.LightningModule):
    def __init__(self, layers: int) -> None:
        super().__init__()
        self.layers = torch.nn.Sequential(*[torch.nn.Linear(8, 8) for _ in range(layers)])

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        return self.layers(batch).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-4)


class Clock(pl.Callback):
    """CPU and wall time of each stretch of batches; in every fit alike, so that it adds the same to each."""

    def __init__(self) -> None:
        self.seen = Times()

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx % STRETCH == 0:
            self.seen.add(time.process_time(), time.perf_counter())


def quieten() -> None:
    warnings.filterwarnings("ignore")
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)


def fit(layers: int, folder: str, callbacks: Any = (), **options: Any) -> Times:
    """Microseconds per step, for each stretch but the first."""
    torch.manual_seed(0)
    clock = Clock()
    trainer = pl.Trainer(
        max_epochs=1,
        accelerator="cpu",
        enable_progress_bar=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        logger=CSVLogger(folder),
        log_every_n_steps=50,
        callbacks=[*callbacks, clock],
        **options,
    )
    batches = torch.utils.data.DataLoader(torch.randn(STRETCH * (STRETCHES + 1) + 1, 4, 8), batch_size=None)
    trainer.fit(Model(layers), batches)
    return Times(per_step(clock.seen.cpu[1:]), per_step(clock.seen.wall[1:]))


def per_step(seen: list[float]) -> list[float]:
    return [(end - start) / STRETCH * 1e6 for start, end in itertools.pairwise(seen)]


def steps(layers: int, every: int, per: str | None, folder: str | None) -> Callable[[], None]:
    """So many steps of a clipper as the callback takes them, recorded if there is a folder."""
    model = torch.nn.Sequential(*[torch.nn.Linear(8, 8) for _ in range(layers)])
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    clipper, count = (
        Clipper(model, NormClip(max_norm=1e9), measure_per=per, history=folder or False),
        itertools.count(1),
    )

    def run() -> None:
        for step in itertools.islice(count, STRETCH):
            clipper.step()
            if step % every == 0:
                clipper.metrics()

    return run


def history(rounds: int) -> tuple[str, dict[str, Any]]:
    """What recording adds to a step: without a trainer, whose own time varies by more than that."""
    rows, data = [], {}
    for layers, per, every in itertools.product((2, 21), (None, "layer"), (1, STRETCH)):
        with tempfile.TemporaryDirectory() as folder:
            cases = {"without": steps(layers, every, per, None), "with": steps(layers, every, per, folder)}
            times = timing.interleave(cases, rounds=rounds, seconds=0.05)
        added = [(one - other) / STRETCH for one, other in zip(times["with"].cpu, times["without"].cpu, strict=True)]
        least = (min(times["with"].cpu) - min(times["without"].cpu)) / STRETCH
        name = f"{2 * layers} tensors, measure_per={per}, log_every_n_steps={every}"
        rows.append([str(2 * layers), str(per), str(every), f"{statistics.median(added):+.1f}", f"{least:+.1f}"])
        data[name] = {"added": added, "added, least": least}
        print(rows[-1], flush=True)
    head = ["tensors", "measure_per", "log_every_n_steps", "history=True adds, median", "least to least"]
    return "\nMicroseconds of CPU time per step that `history=True` adds to a clipper.\n\n" + table(head, rows), data


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="few rounds; under a minute")
    quick = parser.parse_args().quick
    rounds = 3 if quick else 12
    quieten()
    torch.set_num_threads(1)
    where, rows, data = timing.machine(), [], {}
    for layers in (2, 21):
        times: dict[str, list[float]] = {name: [] for name in CASES}
        with tempfile.TemporaryDirectory() as folder:
            for _ in range(rounds):
                for name, options in CASES.items():
                    times[name].extend(fit(layers, folder, **options()).cpu)
        bare = times["bare"]
        for name, own in times.items():
            above = statistics.median(own) - statistics.median(bare)
            least = min(own) - min(bare)
            rows.append([str(2 * layers), name, f"{statistics.median(own):.0f}", f"{above:+.0f}", f"{least:+.0f}"])
            data[f"{2 * layers} tensors, {name}"] = {"us": own, "above": above, "above, least": least}
            print(rows[-1], flush=True)
    text = (
        "Microseconds of CPU time per step, one thread. The callback keeps all statistics and logs every 50 steps.\n\n"
    )
    head = ["tensors", "trainer", "step, median", "above bare, median", "above bare, least to least"]
    more, data["history"] = history(11 if quick else 41)
    timing.write("trainer", "In a Trainer", text + table(head, rows) + more, data, where, quick=quick)


if __name__ == "__main__":
    main()
