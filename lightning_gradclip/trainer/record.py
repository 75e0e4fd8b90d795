"""Every step of a fit: into the history on the disk, and to whoever wants a histogram of the norms."""

import contextlib
from collections import defaultdict
from collections.abc import Callable, Mapping
from functools import partial

import numpy as np
import torch
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor

from lightning_gradclip.clipper import Clipper
from lightning_gradclip.record.history import HistoryError
from lightning_gradclip.record.history_writer import HistoryWriter
from lightning_gradclip.record.pending import Packed, Pending
from lightning_gradclip.record.step import Row, StepStats
from lightning_gradclip.trainer.deepspeed import Delegated
from lightning_gradclip.trainer.histograms import Norms

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
