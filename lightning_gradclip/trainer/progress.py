"""Where a trainer stands: the few things that Lightning has no public name for are asked here."""

from torch.optim import Optimizer

from lightning_gradclip.trainer.lightning import Trainer


def position(trainer: Trainer, optimizer: Optimizer) -> int | None:
    """Index of the optimizer among the trainer's; None if it is none of them."""
    for index, one in enumerate(trainer.optimizers):
        if one is optimizer:
            return index
    return None


def batches(trainer: Trainer) -> int:
    """Batches that stepped so far: the step axis on which Lightning logs."""
    return trainer.fit_loop.epoch_loop._batches_that_stepped  # pyright: ignore[reportPrivateUsage]


def accumulates(trainer: Trainer) -> bool:
    """Whether this batch only accumulates gradients."""
    return trainer.fit_loop._should_accumulate()  # pyright: ignore[reportPrivateUsage]


def logs_now(trainer: Trainer, every: int | None) -> bool:
    """Whether Lightning logs after this batch, or with `every` whether its own turn has come; asked at every batch."""
    turn = trainer.log_every_n_steps if every is None else every  # type: ignore[attr-defined]
    due = turn and ((batches(trainer) + 1) % turn == 0 or trainer.should_stop)
    if not due and not (every is None and trainer.fast_dev_run):  # type: ignore[attr-defined]
        return False
    return not (trainer.lightning_module.automatic_optimization and accumulates(trainer))


def ends_now(trainer: Trainer, *, with_next_step: bool = False) -> bool:
    """Whether training ends with this batch, once a step still to come is taken, unless something stops it earlier."""
    steps, epochs = trainer.max_steps, trainer.max_epochs
    if steps != -1 and trainer.global_step + with_next_step >= steps:
        return True
    return trainer.is_last_batch and epochs is not None and epochs != -1 and trainer.current_epoch + 1 >= epochs
