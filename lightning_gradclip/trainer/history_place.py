"""Where the history of a trainer's run is, and how it is opened there."""

import contextlib
import os
from pathlib import Path
from typing import Any, cast

from lightning_utilities.core.rank_zero import rank_zero_warn

from lightning_gradclip.record.growing import HistoryFormatError
from lightning_gradclip.record.history import read_steps
from lightning_gradclip.record.history_writer import HistoryWriter
from lightning_gradclip.record.step import Row
from lightning_gradclip.trainer.lightning import Callback, MisconfigurationException, Trainer
from lightning_gradclip.trainer.record import Opening


def history_opening(
    trainer: Trainer, history: bool | str, name: str, *, several: bool, only: int | None, **settings: Any
) -> Opening | None:
    """How the histories of a fit are opened; None where none is written: on other ranks, and in a `fast_dev_run`.

    Args:
        trainer: That fits.
        history: True, False or a folder.
        name: The callback's.
        several: Whether each optimizer has a folder of its own.
        only: Index of the only optimizer that is served, if that was chosen.
        settings: What `HistoryWriter` records about the run.

    Raises:
        MisconfigurationException: If the directory of the logger is not on a file system of this machine, or another
            callback writes to the same folder.
    """
    if history is False or trainer.fast_dev_run or not trainer.is_global_zero:  # type: ignore[attr-defined]
        return None
    folder = _in_logs(trainer, name) if history is True else _named(trainer, history)

    def opening(index: int, first_step: int) -> HistoryWriter:
        place, of = (folder / str(index), index) if several else (folder, only)
        return _opened(place, first_step, name=name, optimizer=of, **settings)

    return opening


def _named(trainer: Trainer, history: str) -> Path:
    folders = [getattr(one, "history", None) for one in cast("list[Callback]", trainer.callbacks)]  # type: ignore[attr-defined]
    if sum(isinstance(one, str) and os.path.abspath(one) == os.path.abspath(history) for one in folders) > 1:
        raise MisconfigurationException(
            f"two callbacks would write their histories to {history}; give each a folder of its own, or history=True"
        )
    return Path(history).expanduser()


def _in_logs(trainer: Trainer, name: str) -> Path:
    """The folder of this name in the directory of the logger."""
    directory = _directory(trainer)
    if "://" in directory:
        raise MisconfigurationException(
            f"history=True would write to {directory}, which is not on a file system of this machine; name a folder "
            f"that is, such as history={name!r}"
        )
    return Path(directory, name)


def _directory(trainer: Trainer) -> str:
    """That of the first logger that has one; beside the checkpoints where no logger has one of this run alone."""
    if not trainer.loggers:
        return trainer.default_root_dir
    known = [one for one in trainer.loggers if getattr(one, "log_dir", None) or one.save_dir]
    logger = (known or trainer.loggers)[0]
    if own := getattr(logger, "log_dir", None):
        return os.fspath(own)
    # As ModelCheckpoint does it.
    version = f"version_{logger.version}" if isinstance(logger.version, int) else logger.version
    parts = (str(part) for part in (logger.name, version) if part is not None)
    return os.path.join(logger.save_dir or trainer.default_root_dir, *parts)


def _opened(folder: Path, start_step: int, **settings: Any) -> HistoryWriter:
    held = 0
    if start_step == 0:
        # What is wrong with the folder the writer will say.
        with contextlib.suppress(OSError, HistoryFormatError):
            held = len(read_steps(folder))
    writer = HistoryWriter(folder, columns=Row._fields, start_step=start_step, **settings)
    if held:
        rank_zero_warn(
            f"{folder} held a history of {held:,} steps, which that of this run replaces, as it begins at step 0; "
            "to keep both name another folder with history="
        )
    return writer
