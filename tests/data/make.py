"""Writes checkpoints and histories for tests to load after the code has changed: `python tests/data/make.py FOLDER`.

Run it with the release whose files are to be kept; what lies in tests/data was written by the release that its folder
is named after. Gradients are given, so that what is learned from them depends on nothing but clipping.
"""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader

from lightning_gradclip import (
    AGC,
    ClipMethod,
    EmaClip,
    GradientClipping,
    Normalize,
    NormClip,
    QuantileClip,
    SigmaClip,
    ValueClip,
    ZClip,
)
from lightning_gradclip.history import History

STEPS, SAVED_AT, LOGGED = 24, 14, 5

CASES: dict[str, tuple[Callable[[], ClipMethod], dict[str, Any]]] = {
    "norm": (lambda: NormClip(max_norm={0: 8.0, 20: 2.0}), {"histograms": True}),
    "norm_layer": (lambda: NormClip(max_norm=2.0, min_norm=0.5, per="layer"), {"measure_per": "layer"}),
    "value": (lambda: ValueClip(max_value=0.5), {}),
    "normalize": (lambda: Normalize(target=1.0), {}),
    "agc": (lambda: AGC(clip_factor=0.5), {"measure_per": "parameter"}),
    "quantile": (lambda: QuantileClip(q=0.8, window=8), {}),
    "quantile_all_layer": (lambda: QuantileClip(q=0.6, window=None, per="layer"), {}),
    "quantile_all": (lambda: QuantileClip(q=0.6, window=None, include_current=True), {}),
    "sigma": (lambda: SigmaClip(k=1.0, window=10, warmup=4), {}),
    "skip_sigma": (lambda: SigmaClip(k=2.0, window=10, warmup=4), {"action": "skip"}),
    "zclip": (lambda: ZClip(warmup=6, z_threshold=1.0), {}),
    "zclip_layer": (lambda: ZClip(warmup=6, z_threshold=1.0, per="layer"), {"measure_per": "layer"}),
    "ema": (lambda: EmaClip(warmup=5), {}),
    "ema_parameter": (lambda: EmaClip(warmup=5, per="parameter"), {}),
    "two_optimizers": (lambda: ZClip(warmup=6, z_threshold=1.0), {"measure_per": "layer"}),
}


class Given(LightningModule):
    """A module whose gradients are given: numbers that float32 holds exactly, with a spike in every seventh step."""

    def __init__(self, optimizers: int = 1) -> None:
        super().__init__()
        self.first, self.second = torch.nn.Linear(3, 2), torch.nn.Linear(2, 1)
        self.count = optimizers
        self.automatic_optimization = optimizers == 1
        with torch.no_grad():
            for place, parameter in enumerate(self.parameters()):
                parameter.copy_(torch.arange(parameter.numel()).view_as(parameter) * 0.25 + place)

    def given(self, step: int) -> torch.Tensor:
        loss = torch.zeros(())
        for place, parameter in enumerate(self.parameters()):
            entries = (torch.arange(parameter.numel()) * 7 + step * 5 + place * 3) % 11 - 5
            size = 2.0 if step % 7 == 6 else 0.25
            loss = loss + (parameter * (entries.view_as(parameter) * size)).sum()
        return loss

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor | None:
        if self.automatic_optimization:
            return self.given(batch_idx)
        for optimizer in self.optimizers():
            optimizer.zero_grad()
            self.manual_backward(self.given(batch_idx))
            optimizer.step()
        return None

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        parts = [self.parameters()] if self.count == 1 else [self.first.parameters(), self.second.parameters()]
        # So small a rate that a weight of 1 stays as it is: AGC sees the same weights at every step.
        return [torch.optim.SGD(part, lr=1e-12) for part in parts]


class Saving(Callback):
    """Saves in the middle of an epoch and of a window, with the history as it is then."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_batch_end(self, trainer: Trainer, *_: object) -> None:
        if trainer.fit_loop.epoch_loop.total_batch_idx + 1 == SAVED_AT:
            trainer.save_checkpoint(self.folder / "checkpoint.ckpt")
            shutil.copytree(self.folder / "straight", self.folder / "history")


def trained(
    name: str, folder: Path, history: Path, *callbacks: Callback, ckpt_path: Path | None = None
) -> GradientClipping:
    """Fit one case, from a checkpoint if given."""
    method, options = CASES[name]
    callback = GradientClipping(method(), history=str(history), nonfinite="ignore", **options)
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=1,
        logger=CSVLogger(folder, name="logs", version=""),
        log_every_n_steps=LOGGED,
        callbacks=[callback, *callbacks],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    data = DataLoader(torch.arange(STEPS), batch_size=None)
    trainer.fit(Given(2 if name == "two_optimizers" else 1), data, ckpt_path=ckpt_path)
    return callback


def recorded(history: Path) -> dict[str, Any]:
    """Every row of a history, by optimizer where there are several, in types that JSON knows."""
    folders = {"": history} if (history / "meta.json").exists() else {str(i): history / str(i) for i in range(2)}
    found: dict[str, Any] = {}
    for key, folder in folders.items():
        read = History(folder)
        names, norms = read.scope_norms()
        rows = {field: read.steps[field].astype(float).tolist() for field in read.steps.dtype.names or ()}
        found[key] = {"rows": rows, "scopes": list(names), "norms": norms.astype(float).tolist()}
    return found


def shape(state: object) -> object:
    """What a state consists of: keys, types and shapes."""
    if isinstance(state, dict):
        return {str(key): shape(value) for key, value in state.items()}
    if isinstance(state, torch.Tensor):
        return f"{state.dtype} {list(state.shape)}"
    return type(state).__name__


def main(folder: Path) -> None:
    """Write all cases."""
    for name in CASES:
        place = folder / name
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True)
        callback = trained(name, place, place / "straight", Saving(place))
        metrics = np.genfromtxt(
            place / "logs/metrics.csv", delimiter=",", names=True, deletechars="", replace_space=" "
        )
        logged = {key: metrics[key].tolist() for key in metrics.dtype.names or ()}
        expected = {"recorded": recorded(place / "straight"), "logged": logged, "state": shape(callback.state_dict())}
        (place / "expected.json").write_text(json.dumps(expected) + "\n", encoding="utf-8")
        shutil.rmtree(place / "straight")
        shutil.rmtree(place / "logs")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
