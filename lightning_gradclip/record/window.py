"""The steps since somebody looked: kept where they were made until one packed copy fetches them for all readers.

A step costs three appends. When somebody looks, or the buffer is full, its steps go in one copy to the host, from there
to the readers, such as a history, and, when the window is asked for its metrics, into running aggregates.

One rule says which steps the metrics of a window cover: all of those whose norm is finite, as it is too where entries
that were not have been replaced by zero. The others are counted, and there is nothing else to say of them. So numbers
of one window can be held against each other: what is not known of some of its steps is left out, never averaged over
the rest. (A norm of a scope is averaged over those of the steps in which it had a gradient.)
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lightning_gradclip import checks
from lightning_gradclip.record.aggregate import Aggregate, summed
from lightning_gradclip.record.context import FIELDS, NOTHING, Context, fetched, on_host
from lightning_gradclip.record.numbers import WindowNumbers
from lightning_gradclip.record.step import Row

# Below a mebibyte of rows and two of norms, however rarely somebody looks.
_CAPACITY = 1024
_SCOPE_ENTRIES = 2**18

_NORM = Row._fields.index("norm")

Numbers: TypeAlias = npt.NDArray[np.float64]


class Packed(NamedTuple):
    """Consecutive steps on the host: their numbers, `n`, and rows, `(n, len(Row._fields))`.

    And the measured scopes, `S`, with their norms, `(n, S)`, NaN for absent ones. The rest is as `Context` has it: its
    first fields, `(n, len(FIELDS))`, scopes with thresholds of their own, `T`, these, `(n, T)`, and of some steps, by
    their place, the scopes with the largest shares.
    """

    steps: list[int]
    rows: Numbers
    scopes: tuple[str, ...]
    norms: Numbers
    context: Numbers
    threshold_scopes: tuple[str, ...] = ()
    thresholds: Numbers = np.empty((0, 0))
    shares: tuple[tuple[int, tuple[str, ...], tuple[float, ...]], ...] = ()


Reader: TypeAlias = Callable[[Packed], None]


class Window:
    """Every step since the last `clear`, in bounded memory, and counts since the start.

    Each of the readers is told of every step once, in order, many at a time.
    """

    def __init__(self, *readers: Reader) -> None:
        self._readers = readers
        self._step_numbers: list[int] = []
        self._rows: list[Row | Tensor] = []
        self._norms: list[Tensor] = []
        self._scopes: tuple[str, ...] = ()
        self._contexts: list[Context] = []
        self._threshold_scopes: tuple[str, ...] = ()
        self._capacity = _CAPACITY
        # What the readers were told of and the aggregates were not; norms of the latest scopes.
        self._rows_seen: list[Numbers] = []
        self._norms_seen: list[Numbers] = []
        self._count_seen = 0
        self._aggregate = Aggregate()
        # Sum and count by scope: one torchmetrics object for each would take a quarter of a millisecond a scope.
        self._by_scope: dict[str, tuple[float, int]] = {}
        self._since_start = dict.fromkeys(("skipped", "nonfinite", "overflows"), 0.0)
        self._disclaimed = False

    def count_by_entry(self, flag: bool) -> None:
        """Take the steps from here on for such as have no factor, and whose `clipped` is a share of entries; or not."""
        self._add_up()
        self._aggregate.by_entry = flag

    def disclaim(self) -> None:
        """Say of no step any more, those not yet told included, which norm the optimizer received."""
        self._disclaimed = True

    def add(
        self,
        step: int,
        row: Row | Tensor,
        scopes: tuple[str, ...] = (),
        norms: Tensor | None = None,
        context: Context = NOTHING,
    ) -> None:
        """Record one step by its number, for the readers, its row, norms of the measured scopes, `(S,)`, and the rest.

        Tensors must not be written again.
        """
        if context.scopes is not self._threshold_scopes and context.scopes != self._threshold_scopes:
            self.look()
            self._threshold_scopes = context.scopes
            self._capacity = _capacity_for(self._scopes, context.scopes)
        if scopes is not self._scopes and scopes != self._scopes:
            self.look()
            self._add_up_scopes()
            self._scopes = scopes
            self._capacity = _capacity_for(scopes, self._threshold_scopes)
        self._step_numbers.append(step)
        self._contexts.append(context)
        self._rows.append(row)
        if norms is not None:
            self._norms.append(norms)
        if len(self._rows) + self._count_seen >= self._capacity:
            self._add_up()

    def look(self) -> None:
        """Tell the readers of all steps that they have not seen, which makes the host wait for the device."""
        if not self._rows:
            return
        packed = self._packed()
        self._step_numbers, self._rows, self._norms, self._contexts = [], [], [], []
        self._rows_seen.append(packed.rows)
        self._count_seen += len(packed.rows)
        if packed.scopes:
            covered = np.isfinite(packed.rows[:, _NORM, None])
            self._norms_seen.append(np.where(covered, packed.norms, np.nan))
        if self._disclaimed and self._readers:
            packed = packed._replace(rows=_without(packed.rows, "norm_clipped"))
        for reader in self._readers:
            reader(packed)

    def compute(self) -> dict[str, float]:
        """Means, maximum, minimum and rate over the steps since the last `clear`; counts since the start.

        Left out is what is not known of every step with a finite norm, and without such a step all but the counts.
        """
        self._add_up()
        result = self._aggregate.compute() if self._aggregate.update_called else {}
        if self._disclaimed:
            result.pop("norm_clipped", None)
        result.update((name, count) for name, count in self._since_start.items() if count or name != "overflows")
        return result

    def scope_norms(self) -> dict[str, float]:
        """Of the measured scopes the mean norm over the same steps, but for those in which a scope had no gradient."""
        self._add_up()
        return {name: total / count for name, (total, count) in self._by_scope.items() if count}

    def clear(self) -> None:
        """Begin a new window; the counts go on."""
        self._add_up()
        self._aggregate.reset()
        self._by_scope = {}

    def tell(self, reader: Reader) -> None:
        """Tell one more reader of the steps from now on, for whom nothing is looked up beside their rows."""
        self._readers += (reader,)

    @property
    def has_readers(self) -> bool:
        """Whether anybody is told of the steps."""
        return bool(self._readers)

    @property
    def is_empty(self) -> bool:
        """Whether no step was recorded since the last `clear`."""
        return not (self._rows or self._rows_seen or self._aggregate.update_called)

    @property
    def is_on_device(self) -> bool:
        """Whether looking would have to fetch something from a device other than the CPU."""
        told = (value for context in self._contexts for value in context)
        return any(isinstance(one, Tensor) and not one.is_cpu for one in (*self._rows, *self._norms, *told))

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain types only; the readers are told of all steps up to here."""
        self.look()
        return {
            "rows": _joined(self._rows_seen, len(Row._fields)),
            "scopes": list(self._scopes),
            "scope_norms": _joined(self._norms_seen, len(self._scopes)),
            "aggregate": _copied(self._aggregate.state_dict()) if self._aggregate.update_called else {},
            "by_scope": {name: list(pair) for name, pair in self._by_scope.items()},
            "since_start": dict(self._since_start),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` left off, to the bit; the readers are not told of these steps again."""
        self._step_numbers, self._rows, self._norms, self._scopes = [], [], [], tuple(state["scopes"])
        self._contexts = []
        self._by_scope = {name: (total, count) for name, (total, count) in state["by_scope"].items()}
        self._since_start = dict(state["since_start"])
        self._rows_seen, self._norms_seen = (
            [on_host(matrix).copy()] if len(matrix := state[name]) else [] for name in ("rows", "scope_norms")
        )
        self._count_seen, self._capacity = len(state["rows"]), _capacity_for(self._scopes, ())
        self._threshold_scopes = ()
        self._aggregate.reset()
        if state["aggregate"]:
            self._aggregate.load_state_dict(_copied(state["aggregate"]))
            # An update without a row marks the metric as seen without changing it.
            self._aggregate.update(torch.zeros(0, len(Row._fields), dtype=torch.float64, device="cpu"))

    def _packed(self) -> Packed:
        contexts, steps = self._contexts, len(self._rows)
        thresholds = [one.thresholds for one in contexts if one.thresholds is not None]
        told = list(zip(*(one[: len(FIELDS)] for one in contexts), strict=True))
        rows, norms, limits, *columns = fetched(self._rows, self._norms, thresholds, *told)
        norms, limits = (found if len(found) else np.empty((steps, 0)) for found in (norms, limits))
        shares = ((place, *one.shares) for place, one in enumerate(contexts) if one.shares is not None)
        of_scopes = np.concatenate(columns, axis=1), self._threshold_scopes, limits, tuple(shares)
        return Packed(self._step_numbers, rows, self._scopes, norms, *of_scopes)

    def _add_up(self) -> None:
        """Take all steps into the aggregates."""
        self.look()
        self._add_up_scopes()
        if not self._rows_seen:
            return
        rows = _joined(self._rows_seen, len(Row._fields))
        self._rows_seen, self._count_seen = [], 0
        self._aggregate.update(rows)
        finite, overflow, skipped = (rows[:, Row._fields.index(name)] for name in ("finite", "overflow", "skipped"))
        calm = 1 - overflow
        counts = torch.stack((skipped * calm, (1 - finite) * calm, overflow)).sum(1).tolist()
        for name, count in zip(self._since_start, counts, strict=True):
            self._since_start[name] += count

    def _add_up_scopes(self) -> None:
        if not self._norms_seen:
            return
        matrix = _joined(self._norms_seen, len(self._scopes))
        self._norms_seen = []
        finite = torch.isfinite(matrix)
        before = [self._by_scope.get(name, (0.0, 0)) for name in self._scopes]
        totals = torch.tensor([total for total, _ in before], dtype=matrix.dtype, device="cpu")
        totals = summed(totals, torch.where(finite, matrix, 0.0).T)
        counts = (count + more for (_, count), more in zip(before, finite.sum(0).tolist(), strict=True))
        self._by_scope.update(zip(self._scopes, zip(totals.tolist(), counts, strict=True), strict=True))


class Recorded:
    """What keeps a record of its steps: the common part of a clipper and of what stands in for one."""

    def __init__(self, window: Window) -> None:
        self._window = window
        self._steps = 0

    @property
    def serves_any(self) -> bool:
        """Whether there is any parameter to serve."""
        return True

    @property
    def steps(self) -> int:
        """Steps recorded since the start, those before a restart included; of a clipper those with some gradient."""
        return self._steps

    @property
    def has_news(self) -> bool:
        """Whether a step was recorded since the last `metrics()`."""
        return not self._window.is_empty

    @property
    def is_on_device(self) -> bool:
        """Whether looking at its steps makes the host wait for a device other than the CPU."""
        return self._window.is_on_device

    def tell(self, reader: Reader) -> None:
        """Tell this reader of the rows of all steps from now on, many at a time."""
        self._window.tell(reader)

    def look(self) -> None:
        """Tell all readers of the steps that they have not seen."""
        self._window.look()

    def disclaim(self) -> None:
        """Leave out from now on the norm that the optimizer received, since somebody else writes gradients too."""
        self._window.disclaim()

    def metrics(self, *, reset: bool = True) -> dict[str, float]:
        """The steps since the last call, aggregated.

        Args:
            reset: Whether the next call is about the steps from here on; False only looks.

        Returns:
            Over the steps whose norm is finite, also those that were dropped for their size and those in which entries
            were replaced by zero: `norm`, `norm_clipped` (means), `norm_max`, `limit` (mean), `coef_min`, `clip_rate`
            (share of the steps that changed anything), `clipped` (mean share of the scopes with a gradient that were
            over their limit, or of the entries outside the bounds, where there are several). What is not known of all
            these steps is left out, such as the limit while a method has not learned one yet. `norm/<scope>` with
            `measure_per`: mean over those of the steps in which it had a gradient.

            Of all steps since the start: `skipped` and `nonfinite` (counts), and `overflows` (dropped by a GradScaler,
            and in neither of the two). Of the step that was looked at last for it: `stalled`, the share
            of the parameters that clipping leaves less than an optimizer of Adam's kind can feel.
        """
        return (self.take() if reset else self.peeked()).flat()

    def peek(self) -> dict[str, float]:
        """Now `metrics(reset=False)`."""
        return checks.renamed("peek()", "metrics(reset=False)", self.metrics(reset=False))

    def peeked(self) -> WindowNumbers:
        """`numbers` of a window that stays as it was: the last bit of later sums must not depend on who has looked."""
        state = self._window.state_dict()
        found = self.numbers()
        self._window.load_state_dict(state)
        return found

    def numbers(self) -> WindowNumbers:
        """The open window, with the norms of scopes apart."""
        return WindowNumbers(self._window.compute(), self._window.scope_norms())

    def take(self) -> WindowNumbers:
        """The same, and clear it."""
        result = self.numbers()
        self._window.clear()
        return result

    def state_dict(self) -> dict[str, Any]:
        """Step and open window; tensors and plain types only."""
        return {"step": self._steps, "window": self._window.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` left off."""
        self._steps = state["step"]
        self._window.load_state_dict(state["window"])


def _capacity_for(scopes: tuple[str, ...], threshold_scopes: tuple[str, ...]) -> int:
    return max(1, min(_CAPACITY, _SCOPE_ENTRIES // max(1, len(scopes), len(threshold_scopes))))


def _without(rows: Numbers, field: str) -> Numbers:
    rows = rows.copy()
    rows[:, Row._fields.index(field)] = math.nan
    return rows


def _joined(matrices: Sequence[Numbers], width: int) -> Tensor:
    return torch.from_numpy(np.concatenate(matrices) if matrices else np.empty((0, width)))


def _copied(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in state.items()}
