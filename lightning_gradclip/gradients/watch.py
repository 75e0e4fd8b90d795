"""A look, once, at ranks that exchange nothing: each clips by its own norm, which is right where all have the same."""

import itertools
import json
import math
import warnings
from collections.abc import Mapping, Sequence

from lightning_gradclip.gradients import ranks
from lightning_gradclip.gradients.norms import Tensors
from lightning_gradclip.gradients.read import fingerprints
from lightning_gradclip.select import holders

# The clippers of all ranks see their first gradients in the same order.
_numbers = itertools.count()


class Watch:
    """Has each rank leave a note about its first gradients; the last one compares, so that nobody waits.

    Args:
        settings: What ought to be the same on all ranks, by its name.
    """

    def __init__(self, settings: Mapping[str, str]) -> None:
        self._settings = settings

    def look(self, names: Sequence[str], gradients: Tensors) -> bool:
        """Whether this rank has left its note: not before it has a gradient to compare; warns whoever is the last."""
        if not ranks.are_several():
            return True
        found = fingerprints(gradients)
        norm, total = found[:, 0].square().sum().sqrt().item(), found[:, 1].sum().item()
        if not 0 < norm < math.inf or math.isnan(total):
            return False
        note = json.dumps([norm, total, holders.checksum("\n".join(names)), self._settings])
        notes = ranks.last_to_leave(f"lightning_gradclip/{next(_numbers)}", note)
        if notes is not None and (said := _differences([json.loads(one) for one in notes])):
            warnings.warn(said, RuntimeWarning, stacklevel=2)
        return True


def _differences(notes: Sequence[tuple[float, float, int, dict[str, str]]]) -> str:
    """What ranks that ought to be alike disagree about; empty: nothing."""
    if said := holders.disagreements([one[3] for one in notes], range(len(notes))):
        return f"ranks clip by different settings, {said}: copies of one model drift apart; give every rank the same"
    norm, total, names, _ = notes[0]
    for rank, (its_norm, its_total, its_names, _) in enumerate(notes):
        if its_names != names or max(abs(its_norm - norm), abs(its_total - total)) > holders.ALIKE * norm:
            return (
                f"ranks clip by norms of their own, {norm:.4g} on rank 0 and {its_norm:.4g} on rank {rank}: nothing "
                "has averaged their gradients, and none of them is cut. If these are copies of one model, wrap it in "
                f"DistributedDataParallel, or average the gradients before they are clipped. {holders.REMEDY}"
            )
    return ""
