"""Trains a model, by default a character-level language model; every part of it is configured by Hydra.

Try:
    python examples/train.py
    python examples/train.py callbacks.gradclip.method.max_norm=0.5
    python examples/train.py experiment=exploding
    python examples/train.py experiment=nfnet_digits
"""

import logging
import math
import os
import warnings
from pathlib import Path

import hydra
import torch
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from omegaconf import DictConfig
from outcome import refuse
from summary import announce, conclude


@hydra.main(version_base="1.3", config_path="conf", config_name="train")
def main(config: DictConfig) -> float:
    quieten()
    torch.set_num_threads(config.threads)
    seed_everything(config.seed, verbose=False)
    try:
        data = instantiate(config.data)
        optimizer = instantiate(config.optimizer)
        model = instantiate(config.model, optimizer=optimizer, **data.facts())
        callbacks = [instantiate(node) for node in config.callbacks.values() if node]
        loggers = [instantiate(node) for node in config.logger.values() if node]
        trainer: Trainer = instantiate(config.trainer, callbacks=callbacks, logger=loggers)
    except InstantiationException as error:
        refuse(error)

    if trainer.is_global_zero:
        announce(config, data, model, trainer)
    stopped = None
    try:
        trainer.fit(model, data, ckpt_path=config.ckpt_path)
    except FloatingPointError as error:  # clipping gives up on gradients that stay NaN or infinite
        stopped = str(error)
    except (MisconfigurationException, FileNotFoundError, ValueError) as error:
        # Mistakes that show only once the model is known, such as a pattern that matches no parameter.
        refuse(error)
    if trainer.is_global_zero:
        conclude(config, data, trainer, stopped)

    metrics = trainer.callback_metrics
    if config.optimized_metric not in metrics and not stopped:
        refuse(ValueError(f"optimized_metric={config.optimized_metric} is not logged; use one of {list(metrics)}"))
    # A sweeper ranks a run that diverged last.
    result = math.nan if stopped else float(metrics[config.optimized_metric])
    worst = -math.inf if config.optimized_mode == "max" else math.inf
    return result if math.isfinite(result) else worst


def quieten() -> None:
    # Which devices there are and aren't, and tips: the table at the start says what is used.
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    # Batches are slices of a tensor in memory: worker processes would only copy them.
    warnings.filterwarnings("ignore", ".*does not have many workers")
    warnings.filterwarnings("ignore", "Your `IterableDataset` has `__len__` defined")
    # They start at the trainer's step.
    warnings.filterwarnings("ignore", ".*your dataloader is not resumable")
    # A resumed run writes its checkpoints to its own folder.
    warnings.filterwarnings("ignore", "The dirpath has changed from")
    # Lightning 2.6 asks torch 2.13 for a class it deprecates.
    warnings.filterwarnings("ignore", r"`isinstance\(treespec, LeafSpec\)` is deprecated")


if __name__ == "__main__":
    # A launcher may run jobs in processes of their own, which must find the modules beside this file.
    folders = [str(Path(__file__).resolve().parent), os.environ.get("PYTHONPATH")]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, folders))
    main()
