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

from lightning_gradclip.clipper import Clipper
from lightning_gradclip.record.history import HistoryError, HistoryFormatError, read_steps
from lightning_gradclip.record.history_writer import HistoryWriter
from lightning_gradclip.record.pending import Packed, Pending
from lightning_gradclip.record.step import Row, StepStats
from lightning_gradclip.trainer.deepspeed import Delegated
from lightning_gradclip.trainer.lightning import Callback, MisconfigurationException, Trainer
from lightning_gradclip.trainer.log import Norms

# Opens the history of an optimizer, given its index and the first step of the fit.
Opening = Callable[[int, int], HistoryWriter]

_NORM = Row._fields.index("norm")


class Recorder:
    """Collects the steps of all optimizers of a fit, if anybody wants them.

    Args:
        opening: Opens the history of an optimizer at its first step; None: no history is written.
        histograms: Whether to keep the norms since the last log event, 8 bytes a step.

    Attributes:
        step: The number that the next steps get, on Lightning's own axis.
    """

    def __init__(self, opening: Opening | None, *, histograms: bool) -> None:
        self._opening, self._histograms = opening, histograms
        self._pending: dict[int, Pending] = {}
        self._writers: dict[int, HistoryWriter] = {}
        self._norms: defaultdict[int, list[Norms]] = defaultdict(list)
        self._first: int | None = None
        self.step = 0

    def begin_batch(self, step: int) -> None:
        """Note the number of this batch; that of the first is where the history of this fit begins."""
        self.step = step
        if self._first is None:
            self._first = step

    def listen_to(self, clipper: Clipper | Delegated, index: int) -> None:
        """Record what this clipper does, for the optimizer of this index."""
        if self._opening is not None or self._histograms:
            clipper.listener = partial(self._add, index)

    def flush(self) -> None:
        """Write what is pending, in one packed copy from the device for each optimizer.

        Raises:
            HistoryFormatError: If the folder holds something that this run must not go on with.
        """
        for index, pending in self._pending.items():
            if len(pending):
                self._hand_on(index, pending.take())

    def take_norms(self) -> dict[int, Norms]:
        """Write what is pending; by optimizer the norms since the last call, `(n,)`, if histograms are wanted."""
        self.flush()
        found = {index: np.concatenate(norms) for index, norms in self._norms.items()}
        self._norms.clear()
        return found

    def state_dict(self) -> dict[int, Tensor]:
        """Write what is pending; by optimizer the norms since the last log event, if histograms are wanted."""
        self.flush()
        return {index: torch.from_numpy(np.concatenate(norms)) for index, norms in self._norms.items()}

    def load_state_dict(self, state: Mapping[int, Tensor]) -> None:
        """Go on in the middle of a window."""
        if self._histograms:
            self._norms.update({index: [norms.numpy()] for index, norms in state.items()})

    def close(self, *, device_answers: bool = True) -> None:
        """Write the rest, unless it lies on a device that does not answer any more, and close the files."""
        if not device_answers:
            self._pending = {index: pending for index, pending in self._pending.items() if not pending.on_device}
        self.flush()
        writers, self._writers = self._writers, {}
        for writer in writers.values():
            try:
                writer.close()
            except HistoryError as error:
                self._give_up(error)

    def _add(self, index: int, stats: StepStats) -> None:
        if index not in self._pending:
            self._open(index)
            self._pending[index] = Pending()
        pending = self._pending[index]
        if not pending.takes(stats):
            self._hand_on(index, pending.take())
        pending.add(self.step, stats)

    def _open(self, index: int) -> None:
        # At the first step, so that a run without one leaves nothing, and a folder that will not do is known at once.
        opening, first = self._opening, self.step if self._first is None else self._first
        if opening is None:
            return
        try:
            self._writers[index] = opening(index, first)
        except HistoryError as error:
            self._give_up(error)

    def _hand_on(self, index: int, packed: Packed) -> None:
        if self._histograms:
            self._norms[index].append(packed.rows[:, _NORM].copy())
        if index not in self._writers:
            return
        try:
            steps, rows, scopes, norms = packed
            self._writers[index].append(steps, rows, scopes, norms if scopes else None)
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
