"""One clipper for each optimizer of a fit, and what a checkpoint knows of them."""

from collections.abc import Mapping
from typing import Any

from lightning_utilities.core.rank_zero import rank_zero_warn

from lightning_gradclip.record.window import Recorded


class Clippers(dict[int, Recorded]):
    """Clippers by the index of their optimizer; each comes at the first step of its optimizer.

    What a checkpoint holds of an optimizer that has not stepped yet is kept, and saved again.
    """

    def __init__(self) -> None:
        super().__init__()
        self._saved: dict[int, Any] = {}

    def take_up(self, clipper: Recorded, index: int) -> None:
        """Serve the optimizer of this index with this clipper, from where a checkpoint left off."""
        if index in self._saved:
            clipper.load_state_dict(self._saved.pop(index))
        self[index] = clipper

    def expect(self, count: int) -> None:
        """Drop with a warning what a checkpoint holds of optimizers beyond this many."""
        if lost := sorted(index for index in self._saved if index >= count):
            rank_zero_warn(f"dropped the clipping state of optimizers {lost}: the module configures {count}")
            self._saved = {index: state for index, state in self._saved.items() if index < count}

    def state_dict(self) -> dict[int, Any]:
        """The states of all, by index."""
        return {**self._saved, **{index: clipper.state_dict() for index, clipper in self.items()}}

    def load_state_dict(self, state: Mapping[int, Any]) -> None:
        """Hand these states to the clippers that come."""
        self._saved = dict(state)
        self.clear()
