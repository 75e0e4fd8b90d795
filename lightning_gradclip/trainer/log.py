"""What clippers recorded, to the loggers, to who monitors `trainer.callback_metrics`, and to the progress bar."""

import math
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor

from lightning_gradclip.record.window import Recorded, WindowNumbers
from lightning_gradclip.trainer import asked
from lightning_gradclip.trainer.clippers import Clippers
from lightning_gradclip.trainer.lightning import Logger, TensorBoardLogger, Trainer, WandbLogger

_IN_BAR = ("norm", "clip_rate")
# What monitors read as NaN where the gradients of no step were finite.
_ALWAYS = ("norm", "norm_clipped", "norm_max", "clip_rate")


class Publisher:
    """Aggregates the windows of clippers and publishes them under one name, with `several` by optimizer.

    Without `logs` they are shown in the progress bar only. With `old_names` norms of scopes begin with `name/norm/`.
    """

    def __init__(
        self, name: str, *, every: int | None, logs: bool, prog_bar: bool, several: bool, old_names: bool
    ) -> None:
        self._name, self._every, self._several = name, every, several
        self._logs, self._prog_bar = logs, prog_bar
        self._old_names = old_names
        # By optimizer what monitors are told of its latest window; what they were told last, and of which steps.
        self._told: dict[int, dict[str, float]] = {}
        self._shown: set[str] = set()
        self._seen: object = None

    def attend(self, trainer: Trainer, clippers: Clippers) -> None:
        """Have whoever asks `trainer.callback_metrics` for a metric read the steps since the last log event.

        Just after a log event, the steps before it.
        """
        if self._logs:
            asked.attend(trainer, self._prefixes, partial(self._refresh, clippers))

    def leave(self, trainer: Trainer, *, device_answers: bool = True) -> None:
        """Leave the metrics as they are now, or as they were when somebody asked last if the device is lost."""
        asked.leave(trainer, self._prefixes, refreshing=device_answers)

    def publish(self, trainer: Trainer, clippers: Clippers, step: int, norms: Mapping[int, Tensor]) -> None:
        """End the windows and write them on Lightning's own step axis, and by optimizer a histogram of these norms."""
        if not (self._logs or self._prog_bar):
            return
        metrics: dict[str, float] = {}
        for index, clipper in _served(clippers):
            had_steps, numbers = clipper.has_news, clipper.take()
            metrics |= self._keyed(index, numbers)
            self._told[index] = self._telling(index, numbers, had_steps=had_steps)
        if not metrics:
            return
        if self._prog_bar:
            self._show_in_bar(trainer)
        every = trainer.log_every_n_steps if self._every is None else self._every  # type: ignore[attr-defined]
        if every and self._logs and trainer.is_global_zero:
            for logger in trainer.loggers:
                logger.log_metrics(metrics, step=step)
                for index, values in norms.items():
                    _log_histogram(logger, self._prefix(index) + "norms", values, step)

    def publish_rest(self, trainer: Trainer, clippers: Clippers, step: int, norms: Mapping[int, Tensor]) -> None:
        """The same after the last log event, where Lightning does not save the loggers any more."""
        if self._logs and any(clipper.has_news for clipper in clippers.values()):
            self.publish(trainer, clippers, step, norms)
            if trainer.is_global_zero:
                for logger in trainer.loggers:
                    logger.save()

    @property
    def _prefixes(self) -> tuple[str, ...]:
        return f"{self._name}/", f"{self._name}_norm/"

    def _refresh(self, clippers: Clippers, metrics: dict[str, Tensor]) -> None:
        """Replace what is ours among these metrics by what it is now, unless nothing has happened since."""
        served = list(_served(clippers))
        seen = [(index, clipper.steps, clipper.has_news) for index, clipper in served]
        if seen == self._seen:
            return
        self._seen = seen
        for index, clipper in served:
            if clipper.has_news:
                self._told[index] = self._telling(index, clipper.peeked(), had_steps=True)
        told = {key: value for one in self._told.values() for key, value in one.items()}
        for key in self._shown - told.keys():
            metrics.pop(key, None)
        self._shown = {*told}
        metrics.update({key: torch.tensor(value, dtype=torch.float32, device="cpu") for key, value in told.items()})

    def _telling(self, index: int, numbers: WindowNumbers, *, had_steps: bool) -> dict[str, float]:
        """What monitors are told of a window: where no step was finite, NaN for what they may have read before."""
        found = self._keyed(index, numbers)
        if not had_steps or "norm" in numbers.metrics:
            return found
        lost = {*self._told.get(index, {}), *(self._prefix(index) + name for name in _ALWAYS)}
        return dict.fromkeys(sorted(lost), math.nan) | found

    def _keyed(self, index: int, numbers: WindowNumbers) -> dict[str, float]:
        if self._old_names:
            return {self._prefix(index) + key: value for key, value in numbers.flat().items()}
        return numbers.keyed(self._name, index if self._several else None)

    def _prefix(self, index: int) -> str:
        return f"{self._name}/{index}/" if self._several else f"{self._name}/"

    def _show_in_bar(self, trainer: Trainer) -> None:
        told = {key: value for one in self._told.values() for key, value in one.items()}
        shown = {self._prefix(index) + name for index in self._told for name in _IN_BAR}
        trainer.progress_bar_metrics.update({key: told[key] for key in told if key in shown})  # type: ignore[attr-defined]


def _served(clippers: Clippers) -> Iterator[tuple[int, Recorded]]:
    return ((index, clipper) for index, clipper in sorted(clippers.items()) if clipper.serves_any)


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
