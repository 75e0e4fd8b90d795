"""Every step of a fit: into the history on the disk, and to whoever wants a histogram of the norms."""

import os
from collections import defaultdict
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from lightning_gradclip.act.policy import Options
from lightning_gradclip.record.kept import Kept
from lightning_gradclip.record.step import Row
from lightning_gradclip.record.window import Numbers, Packed, Reader, Recorded
from lightning_gradclip.trainer.lightning import Callback, MisconfigurationException, Trainer

# The history of an optimizer by its index.
Keeping = Callable[[int], Kept]

_NORM = Row._fields.index("norm")


class Recorder:
    """Reads the steps of all optimizers of a fit for their histories, if any, and for histograms: 8 bytes a step."""

    def __init__(self, clippers: Mapping[int, Recorded], keeping: Keeping | None, *, histograms: bool) -> None:
        self._clippers, self._keeping, self._histograms = clippers, keeping, histograms
        self._kept: dict[int, Kept] = {}
        self._norms: defaultdict[int, list[Numbers]] = defaultdict(list)
        self._first: int | None = None
        self.step = 0

    def begin(self, step: int) -> None:
        """Note the number of a batch, which its steps get; that of the first is where the history of the fit begins."""
        self.step = step
        if self._first is None:
            self._first = step

    def readers(self, index: int) -> tuple[Reader, ...]:
        """Who is to be told of the steps of the optimizer of this index."""
        return (partial(self._take, index),) if self._keeping is not None or self._histograms else ()

    def open(self, index: int) -> None:
        """Open the history of this optimizer: at its first step, so that a folder that will not do is known at once."""
        if self._keeping is not None:
            if index not in self._kept:
                self._kept[index] = self._keeping(index)
            self._kept[index].open(self._first or 0)

    def change(self, index: int, **settings: Any) -> None:
        """Say of the steps to come of this optimizer that they have other settings."""
        if index in self._kept:
            self._kept[index].change(**settings)

    @property
    def folders(self) -> dict[int, Path]:
        """Where the history of each optimizer is, of those that have one."""
        return {index: kept.folder for index, kept in self._kept.items() if kept.folder.is_dir()}

    def take_norms(self) -> dict[int, Tensor]:
        """The same as `state_dict`, for a histogram; the next one begins."""
        found = self.state_dict()
        self._norms.clear()
        return found

    def state_dict(self) -> dict[int, Tensor]:
        """By optimizer the norms since the last log event, `(n,)`, if histograms are wanted.

        Writes what is pending too: a run that resumes here takes the steps after it, and none of those before.
        """
        for clipper in self._clippers.values():
            clipper.look()
        return {index: torch.from_numpy(np.concatenate(norms)) for index, norms in self._norms.items()}

    def load_state_dict(self, state: Mapping[int, Tensor]) -> None:
        """Go on in the middle of a window."""
        if self._histograms:
            self._norms = defaultdict(list, {index: [norms.numpy()] for index, norms in state.items()})

    def close(self, *, device_answers: bool = True) -> None:
        """Write the rest, unless it lies on a device that does not answer any more, and close the files."""
        for clipper in self._clippers.values():
            if device_answers or not clipper.is_on_device:
                clipper.look()
        for kept in self._kept.values():
            kept.close()
        # What may still come would begin the history anew.
        self._keeping = None

    def _take(self, index: int, packed: Packed) -> None:
        if self._histograms:
            self._norms[index].append(packed.rows[:, _NORM].copy())
        self.open(index)
        if self._keeping is not None:
            self._kept[index].take(packed)


def histories(
    trainer: Trainer, history: bool | str, name: str, options: Options, *, several: bool, only: int | None
) -> Keeping | None:
    """The histories of a fit by optimizer; None where none is written: on other ranks, and in a `fast_dev_run`.

    With `several` each optimizer has a folder of its own; else they are of the `only` one that was chosen, if any.
    """
    if history is False or trainer.fast_dev_run or not trainer.is_global_zero:  # type: ignore[attr-defined]
        return None
    folder = _in_logs(trainer, name) if history is True else _named(trainer, history)
    settings = {"method": options.method, "action": options.policy.action, "measure_per": options.measure_per}
    return partial(_kept, folder, several, only, name=name, **settings)


def _kept(folder: Path, several: bool, only: int | None, index: int, **settings: Any) -> Kept:
    place, of = (folder / str(index), index) if several else (folder, only)
    return Kept(place, optimizer=of, **settings)


def _named(trainer: Trainer, history: str) -> Path:
    folders = [getattr(one, "history", None) for one in cast("list[Callback]", trainer.callbacks)]  # type: ignore[attr-defined]
    if sum(isinstance(one, str) and _is_same(one, history) for one in folders) > 1:
        raise MisconfigurationException(
            f"two callbacks would write their histories to {history}; give each a folder of its own, or history=True"
        )
    return Path(history).expanduser()


def _is_same(one: str, other: str) -> bool:
    """Whether two spellings are of one folder."""
    return os.path.realpath(os.path.expanduser(one)) == os.path.realpath(os.path.expanduser(other))


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
    version = logger.version if isinstance(logger.version, str) else f"version_{logger.version}"
    return os.path.join(logger.save_dir or trainer.default_root_dir, str(logger.name), version)
