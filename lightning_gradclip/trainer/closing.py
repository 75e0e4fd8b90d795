"""The last word of a fit: what its steps were, one line of advice, and where their history is."""

from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

from lightning_gradclip.act.policy import Options
from lightning_gradclip.record.tally import Tally, history_in
from lightning_gradclip.record.window import Recorded
from lightning_gradclip.trainer.lightning import rank_zero_info


class Closing:
    """Hears of every step of a fit, and says once what they were."""

    def __init__(self, *, speaks: bool = True) -> None:
        self._speaks = speaks
        self._tallies: defaultdict[int, Tally] = defaultdict(Tally)

    def attend(self, recorded: Recorded, index: int) -> None:
        """Count the steps of the optimizer of this index."""
        if self._speaks:
            recorded.tell(self._tallies[index].take)

    def say(self, name: str, folders: Mapping[int, Path], options: Options) -> None:
        """Log on rank zero a line about each optimizer that stepped, and one where the history is, if there is one."""
        tallies, self._tallies = self._tallies, defaultdict(Tally)
        several, observed = len(tallies) > 1, options.method is None or not options.policy.writes
        for index, tally in sorted(tallies.items()):
            if tally.steps:
                who = f"{name}, optimizer {index}" if several else name
                rank_zero_info(f"{who}: {tally.sentence(observed=observed)}")
        for one in sorted(
            {str(folder.parent if several else folder) for folder in folders.values()} if tallies else ()
        ):
            rank_zero_info(f"{name}: {history_in(one)}")
