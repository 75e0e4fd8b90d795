"""One clipper for each optimizer of a fit, and what a checkpoint knows of them."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from lightning_utilities.core.rank_zero import rank_zero_warn

from lightning_gradclip.clipper import Clipper
from lightning_gradclip.limit.learned import require_same_meaning
from lightning_gradclip.methods.method import ClipMethod, Unlimited
from lightning_gradclip.record.window import Recorded
from lightning_gradclip.select.groups import recognised


class Clippers(dict[int, Recorded]):
    """Clippers by the index of their optimizer; each comes at the first step of its optimizer.

    What a checkpoint holds of an optimizer that has not stepped yet is kept, and saved again. With `relearn` the
    learned values of checkpoints are left behind.
    """

    def __init__(self, *, relearn: bool = False) -> None:
        super().__init__()
        self._saved: dict[int, Any] = {}
        self._relearn, self._from_outside = relearn, True

    @property
    def is_waiting(self) -> bool:
        """Whether there are states that no clipper has taken up yet."""
        return bool(self._saved)

    def take_up(self, clipper: Recorded, index: int) -> None:
        """Serve the optimizer of this index with this clipper, from where a checkpoint or another one left off."""
        if index in self._saved:
            state = self._saved.pop(index)
            if isinstance(clipper, Clipper):
                clipper.load_state_dict(state, strict=self._from_outside, relearn=self._relearn and self._from_outside)
            else:
                clipper.load_state_dict(state)
        self[index] = clipper

    def recognise(self, optimizers: Sequence[Collection[str]]) -> dict[int, int]:
        """Give each optimizer the saved state that is about its parameters, whatever its place was.

        A checkpoint of 0.1.0, and one of a model whose parameters are all called otherwise now, knows places only.

        Args:
            optimizers: The names of the parameters of each.

        Returns:
            For each place the one before, of those that have moved.
        """
        of_parameters = {index: state.get("parameters", ()) for index, state in self._saved.items()}
        places = {now: before for now, before in enumerate(recognised(of_parameters, optimizers)) if before is not None}
        if not places:
            places = {index: index for index in self._saved if index < len(optimizers)}
        if lost := sorted(self._saved.keys() - places.values()):
            rank_zero_warn(
                f"dropped the clipping state of optimizers {lost}: the module configures {len(optimizers)}, none of "
                "which has their parameters"
            )
        self._saved = {now: self._saved[before] for now, before in places.items()}
        moved = {now: before for now, before in places.items() if now != before}
        if moved:
            words = ", ".join(f"{before} is now {now}" for now, before in moved.items())
            rank_zero_warn(
                f"the optimizers come in another order than before: {words}. The clipping state follows their "
                "parameters; metrics and histories are numbered by place"
            )
        return moved

    def refuse_others(self, method: ClipMethod | None) -> None:
        """Refuse states that hold what another method has learned, unless that is left behind."""
        for state in self._saved.values():
            if "learned" in state and not self._relearn:
                require_same_meaning(method or Unlimited(), state["learned"])

    def put_back(self) -> None:
        """Make states of all clippers, for others that take their place: in mid-training, or after it."""
        self._saved = self.state_dict()
        self._from_outside = False
        self.clear()

    def state_dict(self) -> dict[int, Any]:
        """The states of all, by index."""
        return {**self._saved, **{index: clipper.state_dict() for index, clipper in self.items()}}

    def load_state_dict(self, state: Mapping[int, Any]) -> None:
        """Hand these states to the clippers that come."""
        self._saved, self._from_outside = dict(state), True
        self.clear()
