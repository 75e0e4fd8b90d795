"""What clippers recorded, to the loggers, `trainer.callback_metrics` and the progress bar."""

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor

from lightning_gradclip.trainer.clippers import Clippers
from lightning_gradclip.trainer.lightning import Logger, TensorBoardLogger, Trainer, WandbLogger

_IN_BAR = ("norm", "clip_rate")


class Publisher:
    """Aggregates the windows of clippers and publishes them under one name, with `several` by optimizer."""

    def __init__(self, name: str, *, every: int | None, prog_bar: bool, several: bool) -> None:
        self._name, self._every, self._prog_bar, self._several = name, every, prog_bar, several

    def preview(self, trainer: Trainer, clippers: Clippers) -> None:
        """Show the open windows to whoever monitors a metric, without ending them."""
        self._show(trainer, self._metrics(clippers, clear=False))

    def publish(self, trainer: Trainer, clippers: Clippers, step: int, norms: Mapping[int, Tensor]) -> None:
        """End the windows and write them on Lightning's own step axis, and by optimizer a histogram of these norms."""
        metrics = self._metrics(clippers, clear=True)
        if not metrics:
            return
        self._show(trainer, metrics)
        every = trainer.log_every_n_steps if self._every is None else self._every  # type: ignore[attr-defined]
        if every and trainer.is_global_zero:
            for logger in trainer.loggers:
                logger.log_metrics(metrics, step=step)
                for index, values in norms.items():
                    _log_histogram(logger, self._prefix(index) + "norms", values, step)

    def publish_rest(self, trainer: Trainer, clippers: Clippers, step: int, norms: Mapping[int, Tensor]) -> None:
        """The same after the last log event, where Lightning does not save the loggers any more."""
        if any(clipper.has_news for clipper in clippers.values()):
            self.publish(trainer, clippers, step, norms)
            if trainer.is_global_zero:
                for logger in trainer.loggers:
                    logger.save()

    def _metrics(self, clippers: Clippers, *, clear: bool) -> dict[str, float]:
        return {
            self._prefix(index) + key: value
            for index, clipper in sorted(clippers.items())
            if clipper.serves_any and (clear or clipper.has_news)
            for key, value in (clipper.metrics() if clear else clipper.peek()).items()
        }

    def _prefix(self, index: int) -> str:
        return f"{self._name}/{index}/" if self._several else f"{self._name}/"

    def _show(self, trainer: Trainer, metrics: Mapping[str, float]) -> None:
        tensors = {key: torch.tensor(value, dtype=torch.float32, device="cpu") for key, value in metrics.items()}
        trainer.callback_metrics.update(tensors)
        if self._prog_bar:
            shown = {key: value for key, value in metrics.items() if key.rpartition("/")[2] in _IN_BAR}
            trainer.progress_bar_metrics.update(shown)  # type: ignore[attr-defined]


def _log_histogram(logger: Logger, key: str, norms: Tensor, step: int) -> None:
    """Log how the finite norms are distributed to TensorBoard or Weights & Biases; other loggers receive nothing."""
    finite = norms[norms.isfinite()].numpy()
    if not len(finite):
        return
    if isinstance(logger, TensorBoardLogger):
        logger.experiment.add_histogram(key, finite, step)
    elif isinstance(logger, WandbLogger):
        import wandb  # pyright: ignore[reportMissingImports]

        # Through the logger, which puts Lightning's step beside it.
        logger.log_metrics({key: cast("Any", wandb.Histogram(cast("Any", finite)))}, step)
