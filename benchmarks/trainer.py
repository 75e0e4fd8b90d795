"""What a step of a real Trainer costs above a bare one: its own clipping, ours with logging, and an empty callback.

    python benchmarks/trainer.py [--quick]         # writes benchmarks/results/trainer.md and trainer.json

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
from typing import Any

import lightning.pytorch as pl
import timing
import torch
from lightning.pytorch.loggers import CSVLogger
from timing import table

from lightning_gradclip import GradientClipping, NormClip

# As many as lie between two log events, so that each stretch has one.
STRETCH, STRETCHES = 50, 8
CASES: dict[str, Any] = {
    "bare": dict,
    "an empty Callback": lambda: {"callbacks": [pl.Callback()]},
    "Trainer(gradient_clip_val=1.0)": lambda: {"gradient_clip_val": 1.0},
    "GradientClipping(NormClip())": lambda: {"callbacks": [GradientClipping(NormClip())]},
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
    """CPU time of each stretch of batches; in every fit alike, so that it adds the same to each."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx % STRETCH == 0:
            self.seen.append(time.process_time())


def fit(layers: int, folder: str, callbacks: Any = (), **options: Any) -> list[float]:
    """Microseconds of CPU time per step, for each stretch but the first."""
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
    return [(end - start) / STRETCH * 1e6 for start, end in itertools.pairwise(clock.seen[1:])]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="few rounds; under a minute")
    rounds = 3 if parser.parse_args().quick else 12
    warnings.filterwarnings("ignore")
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    torch.set_num_threads(1)
    where, rows, data = timing.machine(), [], {}
    for layers in (2, 21):
        times: dict[str, list[float]] = {name: [] for name in CASES}
        with tempfile.TemporaryDirectory() as folder:
            for _ in range(rounds):
                for name, options in CASES.items():
                    times[name].extend(fit(layers, folder, **options()))
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
    timing.write("trainer", "In a Trainer", text + table(head, rows), data, where)


if __name__ == "__main__":
    main()
