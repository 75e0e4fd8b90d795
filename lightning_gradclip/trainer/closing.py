"""The last word of a fit: what its steps were, one line of advice, and where their history is."""

import math
import shlex
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from lightning_gradclip.act.policy import Options
from lightning_gradclip.record.rule import LEAST, SHARE, limit_for
from lightning_gradclip.record.step import Row
from lightning_gradclip.record.window import Numbers, Packed, Recorded
from lightning_gradclip.trainer.lightning import rank_zero_info

_FIELDS = ("norm", "finite", "skipped", "changed", "overflow")
_COLUMNS = [Row._fields.index(name) for name in _FIELDS]
# Up to twice so many norms are kept; of a longer fit every second, fourth, ... step.
_KEPT = 65_536


class Tally:
    """Counts the steps of one optimizer, in bounded memory: at most a mebibyte."""

    def __init__(self) -> None:
        self.steps = self.finite = self.changed = self.dropped = self.bad = 0
        self.largest, self.largest_step = math.nan, 0
        self._norms: list[Numbers] = []
        self._held, self._every = 0, 1

    def take(self, packed: Packed) -> None:
        """Count some steps."""
        norm, finite, skipped, changed, overflow = packed.rows[:, _COLUMNS].T
        self.dropped += int((skipped * (1 - overflow)).sum())
        self.bad += int(((1 - finite) * (1 - overflow)).sum())
        known = np.isfinite(norm)
        self.finite += int(known.sum())
        self.changed += int(changed[known].sum())
        if known.any() and not (most := float(norm[known].max())) <= self.largest:
            self.largest, self.largest_step = most, packed.steps[int(np.where(known, norm, -1.0).argmax())]
        self._keep(norm[-self.steps % self._every :: self._every])
        self.steps += len(norm)

    @property
    def norms(self) -> Numbers:
        """The finite norms above zero, as they came."""
        kept = np.concatenate(self._norms) if self._norms else np.empty(0)
        return kept[np.isfinite(kept) & (kept > 0)]

    def _keep(self, norms: Numbers) -> None:
        self._norms.append(norms.copy())
        self._held += len(norms)
        while self._held > 2 * _KEPT:
            kept = np.concatenate(self._norms)[::2]
            self._norms, self._held, self._every = [kept], len(kept), 2 * self._every


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
                rank_zero_info(f"{who}: {_sentence(tally, observed=observed)}")
        for one in sorted(
            {str(folder.parent if several else folder) for folder in folders.values()} if tallies else ()
        ):
            rank_zero_info(f"{name}: history in {one}; to see it: lightning-gradclip report {shlex.quote(one)}")


def _sentence(tally: Tally, *, observed: bool) -> str:
    would = "would have been clipped" if observed else "clipped"
    share = f"{_percent(tally.changed / tally.finite)} {would}" if tally.finite else "none with a finite norm"
    parts = [f"{tally.steps:,} step{'s' if tally.steps > 1 else ''}, {share}"]
    norms = tally.norms
    if len(norms):
        parts.append(f"norm: median {np.median(norms):.3g}, largest {tally.largest:.3g} at step {tally.largest_step:,}")
    parts += [f"{tally.bad:,} with NaN or infinite gradients"] * bool(tally.bad)
    parts += [f"{tally.dropped:,} dropped" if tally.dropped else "none dropped"]
    return f"{'; '.join(parts)}. {_advice(norms)}"


def _advice(norms: Numbers) -> str:
    if len(norms) < LEAST:
        return f"Too few steps for advice on a limit: {len(norms)} with a finite norm, {LEAST} are needed."
    return f"A fixed limit of {limit_for(norms):g} on the whole norm would clip {_percent(SHARE)} of steps like these."


def _percent(share: float) -> str:
    return f"{share * 100:.3g} %" if share == 0 or share >= 0.001 else "less than 0.1 %"
