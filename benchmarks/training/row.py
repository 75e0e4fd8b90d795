"""What a run leaves: one row, in a file of its own until all are gathered."""

import hashlib
import json
import math
import subprocess
from collections.abc import Mapping
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from omegaconf import DictConfig, OmegaConf
from recorder import Recorder

from lightning_gradclip import GradientClipping

NAME = "row.json"
# Of a callback that clips, what has a say in the numbers; the rest decides what is told of them.
_DECIDES = ("_target_", "method", "action", "nonfinite", "max_consecutive_skips", "include", "exclude", "optimizer")
# What says for a second time what the references to it have been resolved to, and where a run is logged.
_ASIDE = ("rates", "limits", "last_layer", "logger")


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
