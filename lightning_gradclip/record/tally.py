"""What the steps of a run were, counted in bounded memory and said in a sentence at its end."""

import math
import shlex

import numpy as np

from lightning_gradclip.record.rule import LEAST, SHARE, limit_for
from lightning_gradclip.record.step import Row
from lightning_gradclip.record.window import Numbers, Packed

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

    def sentence(self, *, observed: bool) -> str:
        """What the steps were, of which some `observed` ones would have been clipped; and one line of advice."""
        would = "would have been clipped" if observed else "clipped"
        share = f"{_percent(self.changed / self.finite)} {would}" if self.finite else "none with a finite norm"
        parts = [f"{self.steps:,} step{'s' if self.steps > 1 else ''}, {share}"]
        norms = self.norms
        if len(norms):
            parts.append(
                f"norm: median {np.median(norms):.3g}, largest {self.largest:.3g} at step {self.largest_step:,}"
            )
        parts += [f"{self.bad:,} with NaN or infinite gradients"] * bool(self.bad)
        parts += [f"{self.dropped:,} dropped" if self.dropped else "none dropped"]
        return f"{'; '.join(parts)}. {_advice(norms)}"

    def _keep(self, norms: Numbers) -> None:
        self._norms.append(norms.copy())
        self._held += len(norms)
        while self._held > 2 * _KEPT:
            kept = np.concatenate(self._norms)[::2]
            self._norms, self._held, self._every = [kept], len(kept), 2 * self._every


def history_in(folder: str) -> str:
    """Where the history is, and the command that draws it."""
    return f"history in {folder}; to see it: lightning-gradclip report {shlex.quote(folder)}"


def _advice(norms: Numbers) -> str:
    if len(norms) < LEAST:
        return f"Too few steps for advice on a limit: {len(norms)} with a finite norm, {LEAST} are needed."
    return f"A fixed limit of {limit_for(norms):g} on the whole norm would clip {_percent(SHARE)} of steps like these."


def _percent(share: float) -> str:
    return f"{share * 100:.3g} %" if share == 0 or share >= 0.001 else "less than 0.1 %"
