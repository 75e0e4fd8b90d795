"""One bar for the whole run."""

from lightning.pytorch import callbacks
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

SHOWN = {
    "train/loss": "loss",
    "val/loss": "val",
    "val/accuracy": "accuracy",
    "val/return": "return",
    "gradclip/norm": "norm",
}


class ProgressBar(callbacks.ProgressBar):
    """Counts optimizer steps; Lightning's own bars start again at every epoch and validation."""

    def __init__(self):
        super().__init__()
        words = TextColumn("{task.description}")
        self.progress = Progress(BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), words)

    def disable(self) -> None:
        self.progress.disable = True

    def on_train_start(self, trainer, pl_module) -> None:
        total = trainer.max_steps if trainer.max_steps > 0 else trainer.estimated_stepping_batches
        self.task = self.progress.add_task("", total=total, completed=trainer.global_step)
        self.progress.start()

    def on_train_batch_end(self, trainer, *args) -> None:
        self.advance(trainer)

    def on_validation_end(self, trainer, pl_module) -> None:
        self.advance(trainer)

    def advance(self, trainer) -> None:
        values = trainer.callback_metrics
        shown = (f"{word} {values[key]:.3g}" for key, word in SHOWN.items() if key in values)
        self.progress.update(self.task, completed=trainer.global_step, description=", ".join(shown))

    def on_train_end(self, trainer, pl_module) -> None:
        self.progress.stop()

    def on_exception(self, trainer, pl_module, exception) -> None:
        self.progress.stop()
