"""The steps between two log events: buffered rows, aggregated by torchmetrics when somebody looks."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_gradclip.record.aggregate import Aggregate
from lightning_gradclip.record.step import Row

_CAPACITY = 1024
_SCOPE_ENTRIES = 2**18


class Window:
    """Every step since the last `clear`, in bounded memory, and counts since the start.

    A step costs one append. A full buffer is folded into the running aggregates; so is an open one when the
    aggregates are asked for.
    """

    def __init__(self) -> None:
        self._rows: list[Row | Tensor] = []
        self._scope_norms: list[Tensor] = []
        self._scopes: tuple[str, ...] = ()
        self._aggregate = Aggregate()
        # Sum and count by scope: one torchmetrics object for each would take a quarter of a millisecond a scope.
        self._by_scope: dict[str, tuple[float, int]] = {}
        self._since_start = dict.fromkeys(("skipped", "nonfinite", "overflows"), 0.0)

    def add(self, row: Row | Tensor) -> None:
        """Record one step; the tensor must not be written again."""
        self._rows.append(row)
        if len(self._rows) >= _CAPACITY:
            self._fold()

    def add_scopes(self, names: tuple[str, ...], norms: Tensor) -> None:
        """Record the norms of the measured scopes of the same step, `(len(names),)`; NaN for absent ones."""
        if names != self._scopes:
            self._fold_scopes()
            self._scopes = names
        self._scope_norms.append(norms)
        if len(self._scope_norms) >= min(_CAPACITY, _SCOPE_ENTRIES / max(1, len(names))):
            self._fold_scopes()

    def compute(self) -> dict[str, float]:
        """Means, maximum, minimum and rate over the steps since the last `clear`; counts since the start.

        Without a finite step in the window its norms are left out.
        """
        self._fold()
        self._fold_scopes()
        result = self._aggregate.compute() if self._aggregate.update_called else {}
        result.update((name, count) for name, count in self._since_start.items() if count or name != "overflows")
        result.update((f"norm/{name}", total / count) for name, (total, count) in self._by_scope.items() if count)
        return result

    def clear(self) -> None:
        """Begin a new window; the counts go on."""
        self._fold()
        self._fold_scopes()
        self._aggregate.reset()
        self._by_scope = {}

    @property
    def is_empty(self) -> bool:
        """Whether no step was recorded since the last `clear`."""
        return not self._rows and not self._aggregate.update_called

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain types only."""
        return {
            "rows": self._matrix(),
            "scopes": list(self._scopes),
            "scope_norms": _stacked(self._scope_norms, len(self._scopes)),
            "aggregate": _copied(self._aggregate.state_dict()) if self._aggregate.update_called else {},
            "by_scope": {name: list(pair) for name, pair in self._by_scope.items()},
            "since_start": dict(self._since_start),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` left off, to the bit."""
        self._rows = [Row(*values) for values in state["rows"].tolist()]
        self._scopes = tuple(state["scopes"])
        self._scope_norms = list(state["scope_norms"].clone().unbind())
        self._by_scope = {name: (total, count) for name, (total, count) in state["by_scope"].items()}
        self._since_start = dict(state["since_start"])
        self._aggregate.reset()
        if state["aggregate"]:
            self._aggregate.load_state_dict(_copied(state["aggregate"]))
            # An update without a row marks the metric as seen without changing it.
            self._aggregate.update(torch.zeros(0, len(Row._fields), dtype=torch.float64, device="cpu"))

    def _matrix(self) -> Tensor:
        """The buffered rows on the host: one packed copy."""
        on_host = [row for row in self._rows if not isinstance(row, Tensor)]
        on_device = [row for row in self._rows if isinstance(row, Tensor)]
        matrix = torch.tensor(on_host, dtype=torch.float64, device="cpu").view(-1, len(Row._fields))
        # Rows on the host come from a checkpoint where the others are on a device: they are older.
        return torch.cat((matrix, torch.stack(on_device).cpu().double())) if on_device else matrix

    def _fold(self) -> None:
        if not self._rows:
            return
        rows = self._matrix()
        self._rows = []
        self._aggregate.update(rows)
        finite, overflow, skipped = (rows[:, Row._fields.index(name)] for name in ("finite", "overflow", "skipped"))
        calm = 1 - overflow
        counts = torch.stack((skipped * calm, (1 - finite) * calm, overflow)).sum(1).tolist()
        for name, count in zip(self._since_start, counts, strict=True):
            self._since_start[name] += count

    def _fold_scopes(self) -> None:
        if not self._scope_norms:
            return
        matrix = _stacked(self._scope_norms, len(self._scopes))
        self._scope_norms = []
        finite = torch.isfinite(matrix)
        sums, counts = torch.where(finite, matrix, 0.0).sum(0), finite.sum(0)
        for name, total, count in zip(self._scopes, sums.tolist(), counts.tolist(), strict=True):
            before = self._by_scope.get(name, (0.0, 0))
            self._by_scope[name] = (before[0] + total, before[1] + count)


def _copied(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in state.items()}


def _stacked(rows: Sequence[Tensor], width: int) -> Tensor:
    return torch.stack(list(rows)).cpu() if rows else torch.zeros(0, width, dtype=torch.float64, device="cpu")
