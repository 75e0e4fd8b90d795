"""What clippers recorded, to the loggers, `trainer.callback_metrics` and the progress bar."""

from collections.abc import Iterator, Mapping
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch

from lightning_gradclip.trainer.clippers import Clippers
from lightning_gradclip.trainer.lightning import Logger, TensorBoardLogger, Trainer, WandbLogger

Norms = npt.NDArray[np.float64]

_IN_BAR = ("norm", "clip_rate")


class Publisher:
    """Aggregates the windows of some clippers and publishes them under one name.

    Args:
        name: Prefix of the metrics.
        every: Steps between two log events; None: the trainer's setting.
        prog_bar: Whether norm and clip rate go to the progress bar.
        several: Whether the index of an optimizer follows the name.
    """

    def __init__(self, name: str, *, every: int | None, prog_bar: bool, several: bool) -> None:
        self._name, self._every, self._prog_bar, self._several = name, every, prog_bar, several

    def preview(self, trainer: Trainer, clippers: Clippers) -> None:
        """Show the open windows to whoever monitors a metric, without ending them."""
        self._show(trainer, dict(self._metrics(clippers, clear=False)))

    def publish(self, trainer: Trainer, clippers: Clippers, step: int, norms: Mapping[int, Norms]) -> None:
        """End the windows and write them on Lightning's own step axis.

        Args:
            trainer: Whose loggers receive them.
            clippers: What they are the windows of.
            step: Where on that axis.
            norms: By optimizer, the norms of which a histogram is wanted.
        """
        metrics = dict(self._metrics(clippers, clear=True))
        if not metrics:
            return
        self._show(trainer, metrics)
        every = trainer.log_every_n_steps if self._every is None else self._every  # type: ignore[attr-defined]
        if every and trainer.is_global_zero:
            for logger in trainer.loggers:
                logger.log_metrics(metrics, step=step)
                for index, values in norms.items():
                    _log_histogram(logger, self._prefix(index) + "norms", values, step)

    def publish_rest(self, trainer: Trainer, clippers: Clippers, step: int, norms: Mapping[int, Norms]) -> None:
        """The same after the last log event, where Lightning does not save the loggers any more."""
        if any(clipper.has_news for clipper in clippers.values()):
            self.publish(trainer, clippers, step, norms)
            if trainer.is_global_zero:
                for logger in trainer.loggers:
                    logger.save()

    def _metrics(self, clippers: Clippers, *, clear: bool) -> Iterator[tuple[str, float]]:
        for index, clipper in sorted(clippers.items()):
            if not clipper.serves_any or not (clear or clipper.has_news):
                continue
            for key, value in (clipper.metrics() if clear else clipper.peek()).items():
                yield self._prefix(index) + key, value

    def _prefix(self, index: int) -> str:
        return f"{self._name}/{index}/" if self._several else f"{self._name}/"

    def _show(self, trainer: Trainer, metrics: Mapping[str, float]) -> None:
        tensors = {key: torch.tensor(value, dtype=torch.float32, device="cpu") for key, value in metrics.items()}
        trainer.callback_metrics.update(tensors)
        if self._prog_bar:
            shown = {key: value for key, value in metrics.items() if key.rpartition("/")[2] in _IN_BAR}
            trainer.progress_bar_metrics.update(shown)  # type: ignore[attr-defined]


def _log_histogram(logger: Logger, key: str, norms: Norms, step: int) -> None:
    """Log how the finite norms are distributed to TensorBoard or Weights & Biases; other loggers receive nothing."""
    finite = norms[np.isfinite(norms)]
    if not len(finite):
        return
    if isinstance(logger, TensorBoardLogger):
        logger.experiment.add_histogram(key, finite, step)
    elif isinstance(logger, WandbLogger):
        import wandb  # pyright: ignore[reportMissingImports]

        # Through the logger, which puts Lightning's step beside it.
        logger.log_metrics({key: cast("Any", wandb.Histogram(cast("Any", finite)))}, step)
