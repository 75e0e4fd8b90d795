"""One clipper for each optimizer of a fit, and what a checkpoint knows of them."""

from collections.abc import Iterator, Mapping
from typing import Any

from lightning_utilities.core.rank_zero import rank_zero_warn

from lightning_gradclip.record.window import Recorded


class Clippers(Mapping[int, Recorded]):
    """Clippers by the index of their optimizer; each comes at the first step of its optimizer.

    What a checkpoint holds of an optimizer that has not stepped yet is kept, and saved again.
    """

    def __init__(self) -> None:
        self._live: dict[int, Recorded] = {}
        self._saved: dict[int, Any] = {}

    def __getitem__(self, index: int) -> Recorded:
        return self._live[index]

    def __iter__(self) -> Iterator[int]:
        return iter(self._live)

    def __len__(self) -> int:
        return len(self._live)

    def take_up(self, clipper: Recorded, index: int) -> None:
        """Serve the optimizer of this index with this clipper, from where a checkpoint left off."""
        if index in self._saved:
            clipper.load_state_dict(self._saved.pop(index))
        self._live[index] = clipper

    def expect(self, count: int) -> None:
        """Drop with a warning what a checkpoint holds of optimizers beyond this many."""
        if lost := sorted(index for index in self._saved if index >= count):
            rank_zero_warn(f"dropped the clipping state of optimizers {lost}: the module configures {count}")
            self._saved = {index: state for index, state in self._saved.items() if index < count}

    def state_dict(self) -> dict[int, Any]:
        """The states of all, by index."""
        return {**self._saved, **{index: clipper.state_dict() for index, clipper in self._live.items()}}

    def load_state_dict(self, state: Mapping[int, Any]) -> None:
        """Hand these states to the clippers that come."""
        self._saved, self._live = dict(state), {}
