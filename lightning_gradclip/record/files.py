"""Files that grow while somebody reads them, and files that are there whole or not at all; NumPy alone.

A growing array is a .npy file whose header counts the complete rows. NumPy's header is padded to one sector of a disk,
so that a row count of any length fits and is written at once. An append writes the rows behind those that are counted
and then the count: whoever reads in between, or after a kill, finds whole rows only. What lies behind the counted rows
is dropped by the next writer.
"""

import errno
import json
import os
import re
import stat
from functools import lru_cache
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

HEADER_BYTES = 512
# Nothing that describes a run is as long.
_LONGEST_JSON = 2**26
_COUNT = re.compile(rb"'shape': \((\d{1,18}),")


class HistoryError(OSError):
    """The history could not be written, as on a full disk; what was written before stays readable."""


class HistoryFormatError(ValueError):
    """A file or folder is no history of this format, or a damaged one, or one that this run must not go on with."""


class GrowingArray:
    """Appends rows of one type to a .npy file, made if there is none; of the rows it holds the first `keep` stay."""

    def __init__(self, path: Path, row: np.dtype, keep: int) -> None:
        self._row = row
        if not path.exists():
            replace_file(path, header_of(row, 0))
        self.rows = min(count_rows(path, row)[0], keep)
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

    @property
    def is_deleted(self) -> bool:
        """Whether nobody else can find the file any more; one that was moved is not deleted."""
        return os.fstat(self._file.fileno()).st_nlink == 0

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
        self._write(0, header_of(self._row, rows))
        self.rows = rows

    def _write(self, offset: int, content: bytes) -> None:
        while content:
            written = os.pwrite(self._file.fileno(), content, offset)
            content, offset = content[written:], offset + written


def open_file(path: Path) -> IO[bytes]:
    """A file to read from; an OSError or HistoryFormatError for what is none, such as a pipe that nobody fills."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    mode = os.fstat(descriptor).st_mode
    if stat.S_ISREG(mode):
        return open(descriptor, "rb")
    os.close(descriptor)
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    raise HistoryFormatError(f"{path} is a pipe or a device, and no file")


def read_json(path: Path) -> Any:
    """What a JSON file says, whose kind is up to the caller; a HistoryFormatError if it is none."""
    with open_file(path) as file:
        content = file.read(_LONGEST_JSON)
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise HistoryFormatError(f"{path} is damaged: {error}") from error


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a whole JSON file or leave what is there."""
    replace_file(path, (json.dumps(content, indent=2, allow_nan=False) + "\n").encode())


def read_header(path: Path) -> tuple[bytes, int]:
    """The header of a growing array and how many bytes follow it; a HistoryFormatError if it is cut off."""
    with open_file(path) as file:
        header = file.read(HEADER_BYTES)
        size = file.seek(0, os.SEEK_END)
    if len(header) < HEADER_BYTES:
        raise HistoryFormatError(f"{path} is cut off: {size} bytes, where the header alone has {HEADER_BYTES}")
    return header, size - HEADER_BYTES


def holds_rows_of(header: bytes, row: np.dtype) -> int | None:
    """How many rows of this type a header counts; None if it is no such header."""
    found = _COUNT.search(header)
    return int(found[1]) if found is not None and header == header_of(row, int(found[1])) else None


def count_rows(path: Path, row: np.dtype) -> tuple[int, int]:
    """How many complete rows a growing array holds, and how many it counts; a HistoryFormatError if it is none of such.

    After a power failure the count may have reached the disk and the rows not.
    """
    header, size = read_header(path)
    counted = holds_rows_of(header, row)
    if counted is None:
        raise HistoryFormatError(f"{path} is damaged, or was not written by this package: its header is not ours")
    return min(counted, size // row.itemsize), counted


def read_rows(path: Path, row: np.dtype) -> tuple[npt.NDArray[Any], int]:
    """The complete rows, mapped from the file and read only when looked at, and how many are counted."""
    held, counted = count_rows(path, row)
    shape = (held, *row.shape)
    return (np.memmap(path, row.base, "r", HEADER_BYTES, shape) if held else np.zeros(shape, row.base)), counted


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


def header_of(row: np.dtype, rows: int) -> bytes:
    """The header of .npy format 1.0, with its keys in NumPy's own order."""
    text = f"{{'descr': {_description(row.base)}, 'fortran_order': False, 'shape': {(rows, *row.shape)!r}, }}"
    length = HEADER_BYTES - 10
    return b"\x93NUMPY\x01\x00" + length.to_bytes(2, "little") + text.encode("ascii").ljust(length - 1) + b"\n"
