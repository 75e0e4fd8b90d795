"""A look, once, at ranks that do not all exchange their norms: right where all of them have the same."""

import itertools
import json
import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from lightning_gradclip.gradients import ranks
from lightning_gradclip.gradients.norms import Tensors
from lightning_gradclip.gradients.read import fingerprints
from lightning_gradclip.select import holders

# The clippers of all ranks see their first gradients in the same order.
_numbers = itertools.count()
# Seconds that a rank waits in its first step for what the last one says. Those that go in step need milliseconds; ranks
# that do not are told later.
_PATIENCE = 1.0


class _Note(NamedTuple):
    """What a rank tells of its first gradients."""

    norm: float
    total: float
    names: int
    settings: dict[str, str]


class Watch:
    """Has each rank leave a note about its first gradients; the last one compares and tells the others.

    Args:
        settings: What ought to be the same on all ranks, by its name.
    """

    def __init__(self, settings: Mapping[str, str]) -> None:
        self._settings = dict(settings)
        self._board: ranks.Board | None = None
        self._steps = 0

    def look(self, names: Sequence[str], gradients: Tensors, norm: Any = None) -> "Watch | None":
        """Compare, once there are gradients; settings that differ are told to all ranks, gradients by the last one.

        Args:
            names: The parameters that the norm is about.
            gradients: Those of this rank.
            norm: Of all of them, where other ranks have parts of it.

        Returns:
            Itself; None once all has been told.

        Raises:
            RuntimeError: If another rank has refused to go on.
        """
        if not ranks.are_several():
            return None
        if self._board is not None:
            self._steps += 1
            # Each look is a message to the first rank.
            is_due = self._steps & (self._steps - 1) == 0
            return None if is_due and self._is_told(self._board, patience=0.0) else self
        own = fingerprints(gradients)
        total = own[:, 1].sum().item() if norm is None else 0.0
        norm = own[:, 0].square().sum().sqrt().item() if norm is None else float(norm)
        if not 0 < norm < math.inf or math.isnan(total):
            return self
        self._board = _next_board()
        note = _Note(norm, total, holders.checksum("\n".join(names)), self._settings)
        notes = self._board.leave(json.dumps(note))
        if notes is not None:
            self._compare(self._board, [_Note(*json.loads(one)) for one in notes])
        return None if self._is_told(self._board, _PATIENCE) else self

    def _compare(self, board: ranks.Board, notes: Sequence[_Note]) -> None:
        said = holders.disagreements([one.settings for one in notes], range(len(notes)))
        board.conclude(json.dumps({"settings": said}))
        if not said and (apart := _differences(notes)):
            warnings.warn(apart, RuntimeWarning, stacklevel=3)

    def _is_told(self, board: ranks.Board, patience: float) -> bool:
        """Whether there is a word for all; passes it on."""
        text = board.conclusion(patience)
        said: dict[str, str] = json.loads(text or "{}")
        if "refused" in said:
            raise RuntimeError(said["refused"])
        if said.get("settings"):
            message = f"ranks clip by different settings, {said['settings']}: copies of one model drift apart; "
            warnings.warn(message + "give every rank the same", RuntimeWarning, stacklevel=3)
        return text is not None


def refuse(said: str) -> None:
    """Let all ranks know, at their next look, that this one goes no further, and why."""
    _next_board().conclude(json.dumps({"refused": said}))


def _next_board() -> ranks.Board:
    return ranks.Board(f"lightning_gradclip/{next(_numbers)}")


def _differences(notes: Sequence[_Note]) -> str:
    """In what the gradients of ranks that ought to be alike differ; empty: in nothing."""
    first = notes[0]
    for rank, one in enumerate(notes):
        apart = max(abs(one.norm - first.norm), abs(one.total - first.total))
        if one.names != first.names or apart > holders.ALIKE * first.norm:
            return (
                f"ranks clip by norms of their own, {first.norm:.4g} on rank 0 and {one.norm:.4g} on rank {rank}: "
                "nothing has averaged their gradients, and none of them is cut among all ranks. If these are copies of "
                "one model, wrap it in DistributedDataParallel, or average the gradients before they are clipped. "
                f"{holders.REMEDY}"
            )
    return ""
