"""Every step of a fit: into the history on the disk, and to whoever wants a histogram of the norms."""

import contextlib
import os
from collections import defaultdict
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor

from lightning_gradclip.record.history import HistoryError, HistoryFormatError, read_steps
from lightning_gradclip.record.history_writer import HistoryWriter
from lightning_gradclip.record.step import Row
from lightning_gradclip.record.window import Packed, Reader, Recorded
from lightning_gradclip.trainer.lightning import Callback, MisconfigurationException, Trainer
from lightning_gradclip.trainer.log import Norms

# Opens the history of an optimizer, given its index and the first step of the fit.
Opening = Callable[[int, int], HistoryWriter]

_NORM = Row._fields.index("norm")


class Recorder:
    """Reads the steps of all optimizers of a fit, if anybody wants them.

    Args:
        clippers: Whose steps, by optimizer.
        opening: Opens the history of an optimizer at its first step; None: no history is written.
        histograms: Whether to keep the norms since the last log event, 8 bytes a step.
    """

    def __init__(self, clippers: Mapping[int, Recorded], opening: Opening | None, *, histograms: bool) -> None:
        self._clippers, self._opening, self._histograms = clippers, opening, histograms
        self._writers: dict[int, HistoryWriter] = {}
        self._norms: defaultdict[int, list[Norms]] = defaultdict(list)
        self._first: int | None = None

    def begin(self, step: int) -> None:
        """Note the number of the first batch, which is where the history of this fit begins."""
        if self._first is None:
            self._first = step

    def readers(self, index: int) -> tuple[Reader, ...]:
        """Who is to be told of the steps of the optimizer of this index."""
        wanted = self._opening is not None or self._histograms
        return (partial(self._take, index),) if wanted else ()

    def open(self, index: int) -> None:
        """Open the history of this optimizer: at its first step, so that a folder that will not do is known at once.

        Raises:
            HistoryFormatError: If the folder holds something that this run must not go on with.
        """
        if self._opening is None or index in self._writers:
            return
        try:
            self._writers[index] = self._opening(index, self._first or 0)
        except HistoryError as error:
            self._give_up(error)

    def flush(self) -> None:
        """Write what nobody has looked at, in one packed copy from the device for each optimizer."""
        for clipper in self._clippers.values():
            clipper.look()

    def take_norms(self) -> dict[int, Norms]:
        """By optimizer the norms since the last call, `(n,)`, if histograms are wanted."""
        self.flush()
        found = {index: np.concatenate(norms) for index, norms in self._norms.items()}
        self._norms.clear()
        return found

    def state_dict(self) -> dict[int, Tensor]:
        """By optimizer the norms since the last log event, if histograms are wanted."""
        self.flush()
        return {index: torch.from_numpy(np.concatenate(norms)) for index, norms in self._norms.items()}

    def load_state_dict(self, state: Mapping[int, Tensor]) -> None:
        """Go on in the middle of a window."""
        if self._histograms:
            self._norms.update({index: [norms.numpy()] for index, norms in state.items()})

    def close(self, *, device_answers: bool = True) -> None:
        """Write the rest, unless it lies on a device that does not answer any more, and close the files."""
        for clipper in self._clippers.values():
            if device_answers or not clipper.is_on_device:
                clipper.look()
        writers, self._writers = self._writers, {}
        for writer in writers.values():
            try:
                writer.close()
            except HistoryError as error:
                self._give_up(error)

    def _take(self, index: int, packed: Packed) -> None:
        if self._histograms:
            self._norms[index].append(packed.rows[:, _NORM].copy())
        self.open(index)
        if index not in self._writers:
            return
        try:
            self._writers[index].append(*packed)
        except HistoryError as error:
            self._give_up(error)

    def _give_up(self, error: HistoryError) -> None:
        """Go on without the history: training is worth more."""
        if self._opening is not None:
            self._opening = None
            rank_zero_warn(
                f"{error.strerror}: {error.filename}; training goes on, and its further steps are not recorded"
            )
        writers, self._writers = self._writers, {}
        for writer in writers.values():
            with contextlib.suppress(HistoryError):
                writer.close()


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
