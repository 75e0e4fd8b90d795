"""What a run leaves: one row, in a file of its own until all are gathered.

Norms, spikes and time are watched from outside of what is studied, whatever clips.
"""

import hashlib
import json
import math
import statistics
import subprocess
import time
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from omegaconf import DictConfig, OmegaConf

from lightning_gradclip import GradientClipping

SPIKE, BEFORE, AT_LEAST = 5.0, 50, 10
PATIENCE = 20
NAME = "row.json"
# Of a callback that clips, what has a say in the numbers; the rest decides what is told of them.
_DECIDES = ("_target_", "method", "action", "nonfinite", "max_consecutive_skips", "include", "exclude", "optimizer")
# What says for a second time what the references to it have been resolved to, and where a run is logged.
_ASIDE = ("rates", "limits", "last_layer", "logger")


class Recorder(Callback):
    """Measures every gradient before anything clips it, so it comes before what clips.

    A run ends after 20 losses in a row that are not finite.

    Attributes:
        norms: For each optimizer the norm of every step's gradient before clipping.
        largest: The same for the gradient's largest absolute entry, with `entries`.
        seconds: CPU time from the start of each batch to the start of the next.
    """

    def __init__(self, entries: bool = False):
        self.entries = entries
        self.norms: dict[int, list[float]] = {}
        self.largest: dict[int, list[float]] = {}
        self.seconds: list[float] = []
        self._began: float | None = None
        self._bad_losses = 0

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        now = time.process_time()
        if self._began is not None:
            self.seconds.append(now - self._began)
        self._began = now

    def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
        index = next(index for index, one in enumerate(trainer.optimizers) if one is optimizer)
        gradients = [weight.grad for group in optimizer.param_groups for weight in group["params"]]
        gradients = [gradient for gradient in gradients if gradient is not None]
        self.norms.setdefault(index, []).append(float(torch.nn.utils.get_total_norm(gradients)))
        if self.entries:
            self.largest.setdefault(index, []).append(float(torch.nn.utils.get_total_norm(gradients, math.inf)))

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        loss = float(trainer.callback_metrics["train/loss"])
        self._bad_losses = 0 if math.isfinite(loss) else self._bad_losses + 1
        if self._bad_losses >= PATIENCE:
            trainer.should_stop = True

    @property
    def steps(self) -> int:
        """Of all optimizers."""
        return sum(map(len, self.norms.values()))

    @property
    def nonfinite(self) -> int:
        """Steps whose gradient was NaN or infinite."""
        return sum(not math.isfinite(norm) for norms in self.norms.values() for norm in norms)

    @property
    def spikes_per_1000(self) -> float:
        """Of 1,000 optimizer steps, those whose gradient was a spike."""
        return 1000 * sum(count_spikes(norms) for norms in self.norms.values()) / self.steps

    @property
    def ms_per_step(self) -> float:
        """CPU milliseconds of a batch, by the median; NaN after a single one."""
        return 1000 * statistics.median(self.seconds) if self.seconds else math.nan


def count_spikes(norms: Sequence[float]) -> int:
    """Norms that are not finite, or over 5 times the median of the finite ones among the 50 before.

    The first 10 are no spikes: there is nothing to compare them with.
    """
    count = 0
    for place in range(AT_LEAST, len(norms)):
        before = [norm for norm in norms[max(0, place - BEFORE) : place] if math.isfinite(norm)]
        ordinary = statistics.median(before) if before else math.inf
        count += not math.isfinite(norms[place]) or norms[place] > SPIKE * ordinary
    return count


def write_row(folder: Path, row: Mapping[str, Any]) -> None:
    # In one piece: a run that is killed here is run again.
    part = folder / f"{NAME}.part"
    part.write_text(json.dumps(row, indent=1) + "\n", encoding="utf-8")
    part.replace(folder / NAME)


def read_row(folder: Path) -> dict[str, Any] | None:
    """The row in this folder, if its run has ended."""
    path = folder / NAME
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def fingerprint(config: DictConfig) -> str:
    """Of all settings that have a say in the numbers: a run whose settings have changed is run again."""
    settings = OmegaConf.create(OmegaConf.to_container(config))
    settings.trainer.default_root_dir = None
    resolved = OmegaConf.to_container(settings, resolve=True)
    told = {key: value for key, value in resolved.items() if key not in _ASIDE}
    clipping = {name: node for name, node in told["callbacks"].items() if name != "recorder"}
    told["callbacks"] = {name: {key: node[key] for key in _DECIDES if key in node} for name, node in clipping.items()}
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:16]


def clipping_counts(trainer: Trainer, recorder: Recorder) -> dict[str, float]:
    """What the callbacks report of the whole run: the share of clipped steps, and how many were not taken."""
    steps, clipped, skipped = 0, 0.0, 0.0
    metrics = trainer.callback_metrics
    for callback in trainer.callbacks:
        if not isinstance(callback, GradientClipping):
            continue
        for index, norms in recorder.norms.items():
            if callback.optimizer not in (None, index):
                continue
            several = len(trainer.optimizers) > 1 and callback.optimizer is None
            prefix = f"{callback.name}/{index}/" if several else f"{callback.name}/"
            # Without a single finite step there is no rate.
            if f"{prefix}clip_rate" in metrics:
                clipped += len(norms) * float(metrics[f"{prefix}clip_rate"])
                steps += len(norms)
            skipped += float(metrics.get(f"{prefix}skipped", 0))
    return {"clip_rate": round(clipped / steps, 6) if steps else math.nan, "skipped": skipped}


def where() -> dict[str, str]:
    """With what a run was made."""
    return {name: version(name) for name in ("torch", "lightning")} | {"commit": commit()}


@cache
def commit() -> str:
    """Of this repository, with `-dirty` where the package differs from it."""
    here = Path(__file__).parent
    command = ["git", "-C", str(here), "describe", "--always", "--dirty", "--exclude=*"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else "unknown"


def read_rows(folder: Path) -> list[dict[str, Any]]:
    """Of all runs below a folder that have ended, in the order of their names."""
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.rglob(NAME))]
