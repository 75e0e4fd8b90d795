"""Lightning under the name that the application imports it by, and what it has no public name for.

The packages `lightning` and `pytorch_lightning` hold the same code twice, and know nothing of each other's classes. An
application that has imported only the second is given that one, and spared the time and memory for the first.
"""

import sys
from typing import TYPE_CHECKING

from torch.optim import Optimizer

if TYPE_CHECKING or "pytorch_lightning" not in sys.modules or "lightning.pytorch" in sys.modules:
    from lightning.fabric.utilities.exceptions import MisconfigurationException
    from lightning.pytorch import Callback, LightningModule, Trainer
    from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger
else:
    from lightning_fabric.utilities.exceptions import MisconfigurationException
    from pytorch_lightning import Callback, LightningModule, Trainer
    from pytorch_lightning.loggers import Logger, TensorBoardLogger, WandbLogger

__all__ = [
    "Callback",
    "LightningModule",
    "Logger",
    "MisconfigurationException",
    "TensorBoardLogger",
    "Trainer",
    "WandbLogger",
    "batches",
    "ends_now",
    "is_any",
    "is_fsdp1",
    "logs_now",
    "position",
]


def position(trainer: Trainer, optimizer: Optimizer) -> int | None:
    """Index of the optimizer among the trainer's; None if it is none of them."""
    for index, one in enumerate(trainer.optimizers):
        if one is optimizer:
            return index
    return None


def batches(trainer: Trainer) -> int:
    """Batches that stepped so far: the step axis on which Lightning logs."""
    return trainer.fit_loop.epoch_loop._batches_that_stepped  # pyright: ignore[reportPrivateUsage]


def logs_now(trainer: Trainer, every: int | None) -> bool:
    """Whether Lightning logs after this batch, or with `every` whether its own turn has come; asked at every batch."""
    turn = trainer.log_every_n_steps if every is None else every  # type: ignore[attr-defined]
    due = turn and ((batches(trainer) + 1) % turn == 0 or trainer.should_stop)
    if not due and not (every is None and trainer.fast_dev_run):  # type: ignore[attr-defined]
        return False
    return not (trainer.lightning_module.automatic_optimization and _accumulates(trainer))


def ends_now(trainer: Trainer, *, with_next_step: bool = False) -> bool:
    """Whether training ends with this batch, once a step still to come is taken, unless something stops it earlier."""
    steps, epochs = trainer.max_steps, trainer.max_epochs
    if steps != -1 and trainer.global_step + with_next_step >= steps:
        return True
    return trainer.is_last_batch and epochs is not None and epochs != -1 and trainer.current_epoch + 1 >= epochs


def is_any(strategy: object, *names: str) -> bool:
    """Whether the strategy is of one of these classes; by name, so that those of pytorch_lightning are known too."""
    return not {base.__name__ for base in type(strategy).__mro__}.isdisjoint(names)


def is_fsdp1(strategy: object) -> bool:
    """Whether the strategy wraps the module in FullyShardedDataParallel."""
    return is_any(strategy, "FSDPStrategy")


def _accumulates(trainer: Trainer) -> bool:
    """Whether this batch only accumulates gradients."""
    return trainer.fit_loop._should_accumulate()  # pyright: ignore[reportPrivateUsage]
