"""A .npy file that grows: rows are appended, and its header counts the complete ones.

NumPy's header is padded to one sector of a disk, so that a row count of any length fits and is written at once. An
append writes the rows behind those that are counted and then the count: whoever reads in between, or after a kill,
finds whole rows only. What lies behind the counted rows is dropped by the next writer.
"""

import math
import os
import re
from functools import lru_cache
from pathlib import Path

import numpy as np
import numpy.typing as npt

HEADER_BYTES = 512
_COUNT = re.compile(rb"'shape': \((\d+),")


class HistoryFormatError(ValueError):
    """A file or folder is no history of this format, or a damaged one, or one that this run must not go on with."""


class GrowingArray:
    """Appends rows to a .npy file; the file is made if there is none.

    Args:
        path: The file.
        dtype: Of an element, little-endian.
        row_shape: Shape of one row; () for a one-dimensional array.
        keep: How many of the rows in an existing file stay; those behind them are dropped. None: all.

    Raises:
        OSError: If the file cannot be written.
        HistoryFormatError: If an existing file is not a growing array of this dtype and shape.
    """

    def __init__(
        self, path: Path, dtype: np.dtype, row_shape: tuple[int, ...] = (), *, keep: int | None = None
    ) -> None:
        self._dtype, self._row_shape = dtype, row_shape
        self._row_bytes = dtype.itemsize * math.prod(row_shape)
        if not path.exists():
            replace_file(path, _header(dtype, (0, *row_shape)))
        held = count_rows(path, dtype, row_shape)
        self.rows = held if keep is None else min(held, keep)
        # Unbuffered: what is written is with the operating system, and survives the death of this process.
        self._file = path.open("r+b", buffering=0)
        try:
            self._set_count(self.rows)
            self._file.truncate(self._end)
        except OSError:
            self._file.close()
            raise

    def append(self, rows: npt.NDArray[np.generic]) -> None:
        """Write rows, `(n, *row_shape)`; if that fails none of them counts, and appending may be tried again."""
        self._write(self._end, np.ascontiguousarray(rows, self._dtype).tobytes())
        self._set_count(self.rows + len(rows))

    def drop(self, keep: int) -> None:
        """Drop all rows behind the first `keep`."""
        self._set_count(min(self.rows, keep))

    def close(self) -> None:
        """Hand everything to the disk and close the file."""
        if not self._file.closed:
            try:
                os.fsync(self._file.fileno())
            finally:
                self._file.close()

    @property
    def _end(self) -> int:
        return HEADER_BYTES + self.rows * self._row_bytes

    def _set_count(self, rows: int) -> None:
        self._write(0, _header(self._dtype, (rows, *self._row_shape)))
        self.rows = rows

    def _write(self, offset: int, content: bytes) -> None:
        while content:
            written = os.pwrite(self._file.fileno(), content, offset)
            content, offset = content[written:], offset + written


def count_rows(path: Path, dtype: np.dtype, row_shape: tuple[int, ...] = ()) -> int:
    """How many complete rows a growing array holds.

    Raises:
        OSError: If the file cannot be read.
        HistoryFormatError: If it is not a growing array of this dtype and shape.
    """
    with path.open("rb") as file:
        header = file.read(HEADER_BYTES)
        size = file.seek(0, os.SEEK_END)
    if len(header) < HEADER_BYTES:
        raise HistoryFormatError(f"{path} is cut off: {size} bytes, where the header alone has {HEADER_BYTES}")
    found = _COUNT.search(header)
    if found is None or header != _header(dtype, (int(found[1]), *row_shape)):
        raise HistoryFormatError(f"{path} is damaged, or was not written by this package: its header is not ours")
    # After a power failure the count may have reached the disk and the rows not.
    row_bytes = dtype.itemsize * math.prod(row_shape)
    return min(int(found[1]), (size - HEADER_BYTES) // row_bytes)


def read_rows(path: Path, dtype: np.dtype, row_shape: tuple[int, ...] = ()) -> npt.NDArray[np.generic]:
    """The complete rows of a growing array, `(rows, *row_shape)`, mapped from the file and read only when looked at."""
    rows = count_rows(path, dtype, row_shape)
    shape = (rows, *row_shape)
    return np.memmap(path, dtype, "r", HEADER_BYTES, shape) if rows else np.zeros(shape, dtype)


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


def _header(dtype: np.dtype, shape: tuple[int, ...]) -> bytes:
    """The header of .npy format 1.0, with its keys in NumPy's own order."""
    text = f"{{'descr': {_description(dtype)}, 'fortran_order': False, 'shape': {shape!r}, }}"
    length = HEADER_BYTES - 10
    return b"\x93NUMPY\x01\x00" + length.to_bytes(2, "little") + text.encode("ascii").ljust(length - 1) + b"\n"
