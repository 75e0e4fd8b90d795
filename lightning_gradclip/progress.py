"""Where a trainer stands: the few things that Lightning has no public name for are asked here."""

from lightning.pytorch import Trainer
from torch.optim import Optimizer


def position(trainer: Trainer, optimizer: Optimizer) -> int | None:
    """Index of the optimizer among the trainer's; None if it is none of them."""
    return next((index for index, one in enumerate(trainer.optimizers) if one is optimizer), None)


def batches(trainer: Trainer) -> int:
    """Batches that stepped so far: the step axis on which Lightning logs."""
    return trainer.fit_loop.epoch_loop._batches_that_stepped  # pyright: ignore[reportPrivateUsage]


def accumulates(trainer: Trainer) -> bool:
    """Whether this batch only accumulates gradients."""
    return trainer.fit_loop._should_accumulate()  # pyright: ignore[reportPrivateUsage]


def ends_now(trainer: Trainer) -> bool:
    """Whether training ends with this batch, unless something stops it earlier."""
    steps, epochs = trainer.max_steps, trainer.max_epochs
    last_epoch = epochs is not None and epochs != -1 and trainer.current_epoch + 1 >= epochs
    return (steps != -1 and trainer.global_step >= steps) or (last_epoch and trainer.is_last_batch)
