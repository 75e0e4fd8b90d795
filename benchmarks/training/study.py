"""What each method does to training: one run of the study, or with -m many of them. Hydra configures every part.

pip install -e '.[test]'
export OMP_NUM_THREADS=1
python benchmarks/training/study.py task=wgan clipping=norm rate=aggressive seed=11    # one row, always the same
python benchmarks/training/study.py -m study=short                                     # what has a row is not run again
"""

import math
import os
import sys
from pathlib import Path
from typing import Any

import hydra
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from lightning.pytorch import LightningDataModule, LightningModule, Trainer, seed_everything
from omegaconf import DictConfig

# The demo's models, data and configuration are used as they are.
sys.path.append(str(Path(__file__).resolve().parents[2] / "examples"))
sys.path.append(str(Path(__file__).resolve().parent))
os.environ["GRADCLIP_EXAMPLES"] = str(Path(__file__).resolve().parents[2] / "examples")

from outcome import in_sweep
from recorder import Recorder, clipping_counts, fingerprint, read_row, where, write_row
from train import quieten


@hydra.main(version_base="1.3", config_path=str(Path(__file__).resolve().parent / "conf"), config_name="study")
def main(config: DictConfig) -> float:
    folder, settings = Path(HydraConfig.get().runtime.output_dir), fingerprint(config)
    done = read_row(folder)
    if in_sweep() and done is not None and done["settings"] == settings:
        return done["value"]
    overrides = " ".join(HydraConfig.get().overrides.task)
    row = {**train(config), "overrides": overrides, "settings": settings}
    write_row(folder, row)
    name = " ".join(str(config[key]) for key in ("task_name", "clipping_name", "rate", "seed"))
    print(f"{name}: {row['metric']} {row['value']!r}{', diverged' if row['diverged'] else ''}", flush=True)
    if not in_sweep():
        print("\n".join(f"{key:16} {value}" for key, value in row.items()))
    return row["value"]


def train(config: DictConfig) -> dict[str, Any]:
    """Train one model, and say in a row how that went."""
    quieten()
    torch.set_num_threads(config.threads)
    seed_everything(config.seed, verbose=False)
    data: LightningDataModule = instantiate(config.data)
    model: LightningModule = instantiate(config.model, optimizer=instantiate(config.optimizer), **data.facts())
    callbacks = [one for node in config.callbacks.values() if node and (one := instantiate(node)) is not None]
    recorder = next(one for one in callbacks if isinstance(one, Recorder))
    loggers = [instantiate(node) for node in config.logger.values() if node]
    trainer: Trainer = instantiate(config.trainer, callbacks=callbacks, logger=loggers)
    reason = ""
    try:
        trainer.fit(model, data)
    except FloatingPointError as error:  # clipping gives up on gradients that stay NaN or infinite
        reason = str(error).partition(";")[0]
    counts = clipping_counts(trainer, recorder)
    value = result(trainer, model, data, config.metric)
    return {
        "task": config.task_name,
        "clipping": config.clipping_name,
        "rate": config.rate,
        "lr": config.optimizer.lr,
        "seed": config.seed,
        "metric": config.metric,
        "value": value,
        "diverged": bool(reason) or is_diverged(value, config),
        "steps": recorder.steps,
        "spikes_per_1000": recorder.spikes_per_1000,
        **counts,
        "nonfinite": recorder.nonfinite,
        "ms_per_step": recorder.ms_per_step,
        "norm_median": median_norm(recorder.norms),
        **({"entry_median": median_norm(recorder.largest)} if recorder.entries else {}),
        "threads": config.threads,
        **where(),
        "reason": reason,
    }


def result(trainer: Trainer, model: LightningModule, data: LightningDataModule, metric: str) -> float:
    """The metric after the last step."""
    [values] = trainer.validate(model, data, verbose=False)
    return values[metric]


def is_diverged(value: float, config: DictConfig) -> bool:
    """Whether nothing was learned, or it was lost again: the metric is no better than the task's bound."""
    better = value > config.useless if config.mode == "max" else value < config.useless
    return not (math.isfinite(value) and better)


def median_norm(norms: dict[int, list[float]]) -> float:
    """Over the steps of all optimizers."""
    return float(torch.tensor([norm for several in norms.values() for norm in several]).nanmedian())


if __name__ == "__main__":
    # A launcher's processes must find the modules of both folders.
    folders = [str(Path(__file__).resolve().parent), os.environ["GRADCLIP_EXAMPLES"], os.environ.get("PYTHONPATH")]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, folders))
    main()
