"""The history of one optimizer in a run: opened at its first step, and kept as long as that is possible."""

import contextlib
import os
import warnings
from collections.abc import Callable, Generator
from itertools import count
from pathlib import Path
from typing import Any

from lightning_gradclip.record.files import HistoryError, HistoryFormatError
from lightning_gradclip.record.history import read_steps
from lightning_gradclip.record.history_writer import HistoryWriter
from lightning_gradclip.record.owner import HistoryOwnedError
from lightning_gradclip.record.step import Row
from lightning_gradclip.record.window import Packed


class Kept:
    """Writes the steps that it is told of. Where that fails training goes on without, after a warning.

    Args:
        folder: Where; a folder that another run holds stays with that one, and a new one beside it is taken.
        settings: The rest of what a `HistoryWriter` is told, but for its columns.
    """

    def __init__(self, folder: Path, **settings: Any) -> None:
        self.folder, self._settings = folder, settings
        self._writer: HistoryWriter | None = None
        self._given_up = self._has_changed = False

    def open(self, step: int) -> None:
        """Begin at this step, unless that is done already: so that a folder that will not do is known at once.

        Raises:
            HistoryFormatError: If the folder holds something else; it is not tried again.
        """
        if self._writer is None and not self._given_up:
            # What is refused is not tried again.
            self._given_up = True
            with self._giving_up():
                self._writer = self._opened(step)
                self.folder, self._given_up = self._writer.folder, False

    def take(self, packed: Packed) -> None:
        """Write some steps."""
        if self._has_changed:
            # Opened again it holds both.
            self.close()
            self._has_changed = False
        self.open(packed.steps[0])
        if self._writer is not None:
            with self._giving_up():
                self._writer.append(*packed)
                self.folder = self._writer.folder

    def change(self, **settings: Any) -> None:
        """Say of the steps that are still to be taken that they have other settings."""
        self._settings, self._has_changed = self._settings | settings, True

    def close(self) -> None:
        """Close the files; a step that comes later opens them again, and goes on."""
        writer, self._writer = self._writer, None
        if writer is not None:
            with self._giving_up():
                writer.close()

    def __getstate__(self) -> dict[str, Any]:
        # Whoever gets a copy, in this process or another, must not write to the same files.
        return {**vars(self), "_writer": None}

    def _opened(self, step: int) -> HistoryWriter:
        held = 0
        if step == 0:
            # What is wrong with the folder the writer will say.
            with contextlib.suppress(OSError, HistoryFormatError):
                held = len(read_steps(self.folder)[0])
        try:
            writer = self._write(self.folder, step)
        except HistoryOwnedError as error:
            own = next(path for number in count(2) if not (path := _beside(self.folder, number)).exists())
            writer = self._write(own, step)
            warnings.warn(f"{error}; the history of this run is in {own}", stacklevel=2)
            return writer
        if held:
            warnings.warn(
                f"{self.folder} held a history of {held:,} steps, which that of this run replaces, as it begins at "
                "step 0; to keep both name another folder with history=",
                stacklevel=2,
            )
        return writer

    def _write(self, folder: Path, step: int) -> HistoryWriter:
        return HistoryWriter(folder, columns=Row._fields, start_step=step, **self._settings)

    @contextlib.contextmanager
    def _giving_up(self) -> Generator[None, None, None]:
        """Go on without a history where one cannot be written: training is worth more."""
        try:
            yield
        except HistoryError as error:
            warnings.warn(
                f"{error.strerror}: {error.filename}; training goes on, and its further steps are not recorded",
                stacklevel=2,
            )
            writer, self._writer, self._given_up = self._writer, None, True
            if writer is not None:
                with contextlib.suppress(HistoryError):
                    writer.close()


def _beside(folder: Path, number: int) -> Path:
    return folder.with_name(f"{folder.name}-{number}")


def finish(look: Callable[[], None], kept: Kept, process: int) -> None:
    """Have the rest written; but not what a fork has inherited, which its parent writes."""
    if os.getpid() == process:
        look()
        kept.close()
