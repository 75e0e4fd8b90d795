"""Steps that nobody has looked at yet, kept where they were made until one packed copy fetches them."""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lightning_gradclip.record.step import Row, StepStats

# Below a mebibyte of rows and two of norms, however rarely somebody looks.
_CAPACITY = 1024
_SCOPE_ENTRIES = 2**18

Numbers = npt.NDArray[np.float64]


class Packed(NamedTuple):
    """Consecutive steps on the host, `n` of them.

    Attributes:
        steps: Their numbers on Lightning's own axis.
        rows: `(n, len(Row._fields))`.
        scopes: The measured scopes, `S`.
        norms: Of these scopes, `(n, S)`, NaN for absent ones.
    """

    steps: list[int]
    rows: Numbers
    scopes: tuple[str, ...]
    norms: Numbers


class Pending:
    """Collects steps of one optimizer, without waiting for the device."""

    def __init__(self) -> None:
        self._steps: list[int] = []
        self._rows: list[Row | Tensor] = []
        self._scopes: tuple[str, ...] = ()
        self._norms: list[Tensor] = []

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def on_device(self) -> bool:
        """Whether something is kept that has to be fetched from a device other than the CPU."""
        return any(isinstance(one, Tensor) and one.device.type != "cpu" for one in (*self._rows, *self._norms))

    def takes(self, stats: StepStats) -> bool:
        """Whether there is room for this step, beside others of the same scopes."""
        count = len(self._rows)
        names = stats.measured_scopes
        if count and names is not self._scopes and names != self._scopes:
            return False
        return count < _CAPACITY and (count + 1) * len(names) <= max(_SCOPE_ENTRIES, len(names))

    def add(self, step: int, stats: StepStats) -> None:
        """Keep one step; its tensors must not be written again."""
        self._steps.append(step)
        self._rows.append(stats.row)
        self._scopes = stats.measured_scopes
        if stats.measured is not None:
            self._norms.append(stats.measured)

    def take(self) -> Packed:
        """All that is kept, in one copy from the device; nothing is kept after that."""
        steps, rows, norms, width = self._steps, self._rows, self._norms, len(self._scopes)
        self._steps, self._rows, self._norms = [], [], []
        first = next((row for row in rows if isinstance(row, Tensor)), None)
        parts = [torch.stack(norms)] if norms else []
        if first is not None:
            parts.insert(0, torch.stack([row if isinstance(row, Tensor) else first.new_tensor(row) for row in rows]))
        if not parts:
            return Packed(steps, np.array(rows, np.float64), self._scopes, np.empty((len(rows), 0)))
        whole = torch.cat([part.to(parts[0]) for part in parts], 1).cpu().double().numpy()
        split = whole.shape[1] - width
        return Packed(
            steps,
            whole[:, :split] if first is not None else np.array(rows, np.float64),
            self._scopes,
            whole[:, split:],
        )
