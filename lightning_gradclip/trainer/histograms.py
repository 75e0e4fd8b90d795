"""Histograms of the norms of a window, for the loggers that have them: TensorBoard and Weights & Biases."""

from typing import Any, cast

import numpy as np
import numpy.typing as npt

from lightning_gradclip.trainer.lightning import Logger, TensorBoardLogger, WandbLogger

Norms = npt.NDArray[np.float64]


def log_histogram(logger: Logger, key: str, norms: Norms, step: int) -> None:
    """Log how the finite norms are distributed; a logger without histograms receives nothing.

    Args:
        logger: Any logger.
        key: Under which name.
        norms: Of single steps, `(n,)`.
        step: On Lightning's own axis.
    """
    finite = norms[np.isfinite(norms)]
    if not len(finite):
        return
    if isinstance(logger, TensorBoardLogger):
        logger.experiment.add_histogram(key, finite, step)
    elif isinstance(logger, WandbLogger):
        import wandb  # pyright: ignore[reportMissingImports]

        # Through the logger, which puts Lightning's step beside it.
        logger.log_metrics({key: cast("Any", wandb.Histogram(cast("Any", finite)))}, step)
