"""The record of a run, step by step, in a folder beside its logs; written and read with NumPy alone.

    meta.json        what was recorded: format and version, and the settings of each part of the run
    steps.npy        one row a step: `pandas.DataFrame(numpy.load("steps.npy"))`
    scopes.0.npy     with measure_per: the norms of each scope at each step, float32 `(rows, scopes)`, NaN where absent
    scopes.0.json    the names of these scopes, and the row of steps.npy that the first row belongs to
    scopes.1.npy     the same from where the scopes changed, for example when layers were unfrozen

Each .npy file grows: rows are appended, and its header counts the complete ones. NumPy's header is padded to one sector
of a disk, so that a row count of any length fits and is written at once. An append writes the rows behind those that
are counted and then the count: whoever reads in between, or after a kill, finds whole rows only. What lies behind the
counted rows is dropped by the next writer.

A row of steps.npy takes 52 bytes: 52 MB for a million steps. Norms are float64, as clipping computes them, so that a
decision can be repeated from the record, and so that an exploding norm has a number beyond the 3e38 of float32. Norms
of scopes are there to be looked at, and there are many of them: float32.
"""

import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

FORMAT, VERSION = "lightning-gradclip history", 1
_SETTINGS = {"from_step", "method", "action", "norm_type", "measure_per"}
STEP = np.dtype(
    [
        ("step", "<i8"),  # on Lightning's own axis, as in the loggers; several optimizer steps of a batch share it
        ("norm", "<f8"),
        ("norm_clipped", "<f8"),
        ("limit", "<f8"),
        ("coef", "<f8"),
        ("clipped", "<f8"),
        ("finite", "?"),
        ("skipped", "?"),
        ("changed", "?"),
        ("overflow", "?"),
    ]
)
NORM = np.dtype("<f4")

Steps: TypeAlias = npt.NDArray[np.void]
Norms: TypeAlias = npt.NDArray[np.float32]

HEADER_BYTES = 512
_COUNT = re.compile(rb"'shape': \((\d+),")


class HistoryError(OSError):
    """The history could not be written, as on a full disk; what was written before stays readable."""


class HistoryFormatError(ValueError):
    """A file or folder is no history of this format, or a damaged one, or one that this run must not go on with."""


class GrowingArray:
    """Appends rows of one type to a .npy file, made if there is none; of the rows it holds the first `keep` stay."""

    def __init__(self, path: Path, row: np.dtype, keep: int) -> None:
        self._row = row
        if not path.exists():
            replace_file(path, _header(row, 0))
        self.rows = min(count_rows(path, row), keep)
        # Unbuffered: what is written is with the operating system, and survives the death of this process.
        self._file = path.open("r+b", buffering=0)
        try:
            self._set_count(self.rows)
            self._file.truncate(self._end)
        except OSError:
            self._file.close()
            raise

    def append(self, rows: npt.NDArray[np.generic]) -> None:
        """Write `n` rows; if that fails none of them counts, and appending may be tried again."""
        self._write(self._end, rows.tobytes())
        self._set_count(self.rows + len(rows))

    def drop(self, keep: int) -> None:
        """Drop all rows behind the first `keep`."""
        if keep < self.rows:
            self._set_count(keep)

    def close(self) -> None:
        """Hand everything to the disk and close the file."""
        if not self._file.closed:
            try:
                os.fsync(self._file.fileno())
            finally:
                self._file.close()

    @property
    def _end(self) -> int:
        return HEADER_BYTES + self.rows * self._row.itemsize

    def _set_count(self, rows: int) -> None:
        self._write(0, _header(self._row, rows))
        self.rows = rows

    def _write(self, offset: int, content: bytes) -> None:
        while content:
            written = os.pwrite(self._file.fileno(), content, offset)
            content, offset = content[written:], offset + written


def count_rows(path: Path, row: np.dtype) -> int:
    """How many complete rows a growing array holds; a HistoryFormatError if it is none of such rows."""
    with path.open("rb") as file:
        header = file.read(HEADER_BYTES)
        size = file.seek(0, os.SEEK_END)
    if len(header) < HEADER_BYTES:
        raise HistoryFormatError(f"{path} is cut off: {size} bytes, where the header alone has {HEADER_BYTES}")
    found = _COUNT.search(header)
    if found is None or header != _header(row, int(found[1])):
        raise HistoryFormatError(f"{path} is damaged, or was not written by this package: its header is not ours")
    # After a power failure the count may have reached the disk and the rows not.
    return min(int(found[1]), (size - HEADER_BYTES) // row.itemsize)


def read_rows(path: Path, row: np.dtype) -> npt.NDArray[Any]:
    """The complete rows of a growing array, mapped from the file and read only when looked at."""
    shape = (count_rows(path, row), *row.shape)
    return np.memmap(path, row.base, "r", HEADER_BYTES, shape) if shape[0] else np.zeros(shape, row.base)


def norms_of(scopes: Sequence[str]) -> np.dtype:
    """The type of the rows of a part: of each scope its norm."""
    return np.dtype((NORM, (len(scopes),)))


def replace_file(path: Path, content: bytes) -> None:
    """Write a whole file or leave what is there: a temporary file beside it takes its name when it is complete."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@lru_cache
def _description(dtype: np.dtype) -> str:
    return repr(np.lib.format.dtype_to_descr(dtype))


def _header(row: np.dtype, rows: int) -> bytes:
    """The header of .npy format 1.0, with its keys in NumPy's own order."""
    text = f"{{'descr': {_description(row.base)}, 'fortran_order': False, 'shape': {(rows, *row.shape)!r}, }}"
    length = HEADER_BYTES - 10
    return b"\x93NUMPY\x01\x00" + length.to_bytes(2, "little") + text.encode("ascii").ljust(length - 1) + b"\n"


@dataclass(frozen=True)
class ScopePart:
    """The norms of the measured scopes over some consecutive steps.

    Attributes:
        first_row: The row of `History.steps` that the first row of `norms` belongs to.
        names: The scopes, `S` of them.
        norms: Before clipping, float32 `(rows, S)`, NaN where a scope had no gradient; mapped from the file.
    """

    first_row: int
    names: tuple[str, ...]
    norms: Norms


class History:
    """Reads what a `HistoryWriter` wrote, also while it goes on writing.

    Args:
        folder: The folder of one optimizer's history.

    Raises:
        OSError: If a file cannot be read.
        HistoryFormatError: If this is not a history, or it is damaged, or of another version.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.meta = read_meta(self.folder)
        """Format, version, name and optimizer of the callback; `segments`: the settings, each `from_step` on."""
        try:
            # Parts are written before the rows they belong to, so they are read after them.
            self.steps = read_steps(self.folder)
            """One row a step, `(rows,)`, with the fields of `STEP`."""
            self.parts = tuple(part for part in _read_parts(self.folder, len(self.steps)) if len(part.norms))
            """The norms of the measured scopes; none without `measure_per`."""
        except FileNotFoundError as error:
            raise HistoryFormatError(f"{self.folder} holds no steps: {error.filename} is missing") from error

    def scope_norms(self) -> tuple[tuple[str, ...], Norms]:
        """All parts joined: names in order of appearance, `S`, and norms, `(len(steps), S)`, NaN where absent."""
        names = tuple(dict.fromkeys(name for part in self.parts for name in part.names))
        place = {name: column for column, name in enumerate(names)}
        joined = np.full((len(self.steps), len(names)), np.nan, NORM)
        for part in self.parts:
            rows = slice(part.first_row, part.first_row + len(part.norms))
            joined[rows, [place[name] for name in part.names]] = part.norms
        return names, joined


def read_meta(folder: Path) -> dict[str, Any]:
    """What `meta.json` says, once it is sure that this version understands it; else a HistoryFormatError."""
    path = folder / "meta.json"
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise HistoryFormatError(f"{folder} is not a history: it has no meta.json") from error
    except ValueError as error:
        raise HistoryFormatError(f"{path} is damaged: {error}") from error
    if not isinstance(meta, dict) or meta.get("format") != FORMAT:
        raise HistoryFormatError(f"{path} was not written by lightning-gradclip; name the folder of a history")
    if meta.get("version") != VERSION:
        raise HistoryFormatError(
            f"{folder} is a history of version {meta.get('version')!r}, written by lightning-gradclip "
            f"{meta.get('package')!r}, and this version reads {VERSION}; use that release, or another folder"
        )
    segments = meta.get("segments")
    if not (isinstance(segments, list) and segments and all(set(one) >= _SETTINGS for one in segments)):
        raise HistoryFormatError(f"{path} is damaged: it does not say which settings were used")
    return meta


def read_steps(folder: Path) -> Steps:
    """The complete rows of `steps.npy`, `(rows,)`, mapped from the file."""
    return read_rows(folder / "steps.npy", STEP)


def described_parts(folder: Path) -> Iterator[tuple[Path, int, tuple[str, ...]]]:
    """Each `scopes.<number>.json`, in the order in which they were written, and the first row and names in it."""
    numbered = ((path.name.split("."), path) for path in folder.glob("scopes.*.json"))
    for _, path in sorted((int(words[1]), path) for words, path in numbered if words[1].isdecimal()):
        try:
            about = json.loads(path.read_text(encoding="utf-8"))
            first_row, names = int(about["first_row"]), tuple(str(name) for name in about["names"])
        except (ValueError, KeyError, TypeError) as error:
            raise HistoryFormatError(f"{path} is damaged: it does not name the scopes of a part") from error
        yield path, first_row, names


def _read_parts(folder: Path, total: int) -> Iterator[ScopePart]:
    for path, first_row, names in described_parts(folder):
        matrix = path.with_suffix(".npy")
        # A kill may have come between the two files.
        if matrix.exists() and first_row < total:
            yield ScopePart(first_row, names, read_rows(matrix, norms_of(names))[: total - first_row])
