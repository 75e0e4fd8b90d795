"""What a history holds beside its rows: numbers of scopes, in parts, and at some steps where most of the norm was.

Both are written before the rows that they belong to. What belongs to rows that then could not be written is dropped at
the next append.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TypeAlias

import numpy as np

from lightning_gradclip.record.files import GrowingArray, read_rows, write_json
from lightning_gradclip.record.history import SHARES, Norms, described_part, norms_of, numbered

# The place of a step among those that are written, and up to three scopes with their shares of its squared norm.
Share: TypeAlias = tuple[int, Sequence[str], Sequence[float]]


class Parts:
    """The parts of one kind in a folder; of those that are there the first `keep` rows of the history stay."""

    def __init__(self, folder: Path, kind: str, keep: int) -> None:
        self._kind = kind
        self._part: GrowingArray | None = None
        self._names: tuple[str, ...] = ()
        self._first = self._next = 0
        for number in numbered(folder, kind):
            path = folder / f"{kind}.{number}.json"
            matrix = path.with_suffix(".npy")
            first, names = described_part(path) if path.exists() else (keep, ())
            if first >= keep or not matrix.exists():
                path.unlink(missing_ok=True)
                matrix.unlink(missing_ok=True)
                continue
            self.close()
            # Goes on with the last part if it ends where the rows do.
            self._part = GrowingArray(matrix, norms_of(names), keep - first)
            self._names, self._first, self._next = names, first, number + 1

    def append(self, folder: Path, row: int, names: tuple[str, ...], numbers: Norms) -> None:
        """Write the numbers of the rows that `steps.npy` is about to get, of which `row` is the first."""
        if self._part is not None:
            # Those whose steps could not be written.
            self._part.drop(row - self._first)
        if not numbers.size:
            return
        if self._part is None or names != self._names or self._first + self._part.rows != row:
            self._part = self._begin(folder, row, names)
        self._part.append(numbers)

    def close(self) -> None:
        """Hand everything to the disk."""
        part, self._part = self._part, None
        if part is not None:
            part.close()

    def _begin(self, folder: Path, row: int, names: tuple[str, ...]) -> GrowingArray:
        self.close()
        path = folder / f"{self._kind}.{self._next}.json"
        path.with_suffix(".npy").unlink(missing_ok=True)
        write_json(path, {"first_row": row, "names": names})
        part = GrowingArray(path.with_suffix(".npy"), norms_of(names), 0)
        self._names, self._first, self._next = names, row, self._next + 1
        return part


class Shares:
    """The scopes with the largest shares at steps that stand out; made when there is one."""

    def __init__(self, folder: Path, keep: int) -> None:
        path = folder / "shares.npy"
        self._file: GrowingArray | None = None
        self._kept = 0
        if path.exists():
            self._kept = int(np.searchsorted(read_rows(path, SHARES)[0]["row"], keep))
            self._file = GrowingArray(path, SHARES, self._kept)
        # Rows of the history when these were kept.
        self._row = keep

    def append(self, folder: Path, row: int, shares: Sequence[Share]) -> None:
        """Write those of the rows that `steps.npy` is about to get, of which `row` is the first."""
        if row > self._row:
            self._kept, self._row = 0 if self._file is None else self._file.rows, row
        if self._file is not None:
            self._file.drop(self._kept)
        if not shares:
            return
        self._file = self._file or GrowingArray(folder / "shares.npy", SHARES, 0)
        packed = np.zeros(len(shares), SHARES)
        for place, (at, names, parts) in enumerate(shares):
            packed["row"][place] = row + at
            packed["scope"][place, : len(names)] = [_trimmed(name) for name in names]
            packed["share"][place, : len(parts)] = parts
        self._file.append(packed)

    def close(self) -> None:
        """Hand everything to the disk."""
        if self._file is not None:
            self._file.close()


def _trimmed(name: str) -> bytes:
    """As much of a name as has room, in whole characters."""
    return name.encode()[: SHARES["scope"].base.itemsize].decode(errors="ignore").encode()
