"""Writes a history: once per window of steps, so that a step costs next to nothing."""

import contextlib
import dataclasses
import errno
import fcntl
import math
import os
import sys
import warnings
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lightning_gradclip.record.files import (
    GrowingArray,
    HistoryError,
    HistoryFormatError,
    count_rows,
    header_of,
    replace_file,
    write_json,
)
from lightning_gradclip.record.history import (
    CONTEXT,
    FORMAT,
    NORM,
    STEP,
    VERSION,
    Norms,
    Steps,
    blank,
    read_meta,
    read_steps,
)
from lightning_gradclip.record.owner import Owner
from lightning_gradclip.record.parts import Parts, Share, Shares

# The package is there before any of its modules. It imports this one, so that nothing is imported from it here.
_RELEASE: str = sys.modules["lightning_gradclip"].__version__


class HistoryWriter:
    """Writes the history of one optimizer. In a distributed run only rank zero has one.

    Opened on an existing history it goes on there: rows of `start_step` and later are dropped, those before stay. A
    folder that is deleted meanwhile is made again, with a warning; one that is moved is followed.

    Args:
        folder: Where; made if missing.
        columns: Names of the columns that `append` receives, in their order: `Row._fields`. The fields of `STEP` are
            picked by name.
        start_step: The step that comes first, on Lightning's own axis; 0 for a new run.
        method: The clipping method, a dataclass; None where nothing is clipped.
        action: "clip", "skip" or "observe".
        measure_per: What `scopes` in `append` are; None where there are none.
        name: The callback's.
        optimizer: Index of the optimizer, where there are several; None: the only one.

    Raises:
        HistoryError: If the folder cannot be written.
        HistoryOwnedError: If another writer holds the folder, here or on another machine.
        HistoryFormatError: If the folder holds a history of another version, a damaged one, or one of norms with
            another `norm_type`.
        ValueError: If a field of `STEP` is not among `columns`.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        columns: Sequence[str],
        start_step: int = 0,
        method: object | None = None,
        action: str = "clip",
        measure_per: str | None = None,
        name: str = "gradclip",
        optimizer: int | None = None,
    ) -> None:
        self.folder = Path(folder).absolute()
        self._picked, self._width = _pick(columns), len(columns)
        self._last_step = start_step
        self._settings = {
            "method": None if method is None else _describe(method),
            "action": action,
            "norm_type": _plain(getattr(method, "norm_type", 2.0)),
            "measure_per": measure_per,
        }
        self._about = {"format": FORMAT, "version": VERSION, "package": _RELEASE, "name": name, "optimizer": optimizer}
        with self._writing():
            self._open(start_step)

    def append(
        self,
        steps: npt.ArrayLike,
        rows: npt.ArrayLike,
        scopes: Sequence[str] = (),
        scope_norms: npt.ArrayLike | None = None,
        context: npt.ArrayLike | None = None,
        threshold_scopes: Sequence[str] = (),
        thresholds: npt.ArrayLike | None = None,
        shares: Sequence[Share] = (),
    ) -> None:
        """Write some steps; cheapest when called once for many of them.

        Args:
            steps: Their numbers on Lightning's own axis, integers `(n,)`, never falling.
            rows: What happened, `(n, len(columns))`; flags are 1.0 or 0.0.
            scopes: Names of the measured scopes, `S`.
            scope_norms: Their norms at these steps, `(n, S)`, NaN where absent.
            context: What else is known, `(n, 5)`: threshold, loss, learning rate, epoch and batch, NaN where unknown.
            threshold_scopes: Names of the scopes that have a threshold of their own, `T`.
            thresholds: From which norm on each is clipped, `(n, T)`.
            shares: Of steps that stand out, by rising place among these `n`: the scopes with the largest shares.

        Raises:
            HistoryError: If the file system refuses. None of these steps is recorded then; the history before them
                stays as it is, and later calls may succeed.
            ValueError: If shapes do not fit, or a step is smaller than the one before.
        """
        packed = self._packed(steps, rows, context)
        if not len(packed):
            return
        norms = _checked_norms("scope_norms", scopes, scope_norms, len(packed))
        limits = _checked_norms("thresholds", threshold_scopes, thresholds, len(packed))
        with self._writing():
            self._follow(int(packed["step"][0]))
            row = self._steps.rows
            self._norms.append(self.folder, row, tuple(scopes), norms)
            self._limits.append(self.folder, row, tuple(threshold_scopes), limits)
            self._shares.append(self.folder, row, shares)
            self._steps.append(packed)
        self._last_step = int(packed["step"][-1])

    def close(self) -> None:
        """Hand everything to the disk and give the folder up; it can be opened again at any step.

        Raises:
            HistoryError: If the file system refuses.
        """
        with self._writing():
            self._closing.close()

    def __enter__(self) -> "HistoryWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _open(self, start_step: int, *, anew: bool = False) -> None:
        """Take the folder over from this step on; `anew` where what it held before is lost."""
        self.folder.mkdir(parents=True, exist_ok=True)
        # What is none of ours stays as it is, without a lock too.
        _rows_before(self.folder, start_step)
        with contextlib.ExitStack() as stack:
            self._owner = Owner(self.folder)
            stack.callback(self._owner.close)
            keep = _rows_before(self.folder, start_step)
            segment = {"from_step": start_step, **self._settings}
            meta = {**self._about, "segments": _segments(self.folder, segment, keep)}
            if anew:
                meta["lost_before"] = start_step
            _modernize(self.folder, keep)
            write_json(self.folder / "meta.json", meta)
            self._steps = GrowingArray(self.folder / "steps.npy", STEP, keep)
            stack.callback(self._steps.close)
            self._norms, self._limits = (Parts(self.folder, kind, keep) for kind in ("scopes", "thresholds"))
            self._shares = Shares(self.folder, keep)
            for part in (self._norms, self._limits, self._shares):
                stack.callback(part.close)
            # Follows the folder, whatever it is called.
            self._directory = os.open(self.folder, os.O_RDONLY)
            stack.callback(os.close, self._directory)
            self._closing = stack.pop_all()

    def _follow(self, step: int) -> None:
        """Go on where the folder is by now, or make it again."""
        if self._steps.is_deleted:
            warnings.warn(
                f"{self.folder} was deleted while the history of this run was written to it, so the steps before "
                f"{step:,} are lost; it is made again for those that come",
                stacklevel=2,
            )
            self._closing.close()
            try:
                self._open(step, anew=True)
            except HistoryFormatError as error:
                raise HistoryError(errno.EEXIST, str(error), str(self.folder)) from error
        elif not self.folder.exists() or not os.path.samestat(os.fstat(self._directory), self.folder.stat()):
            self.folder = _path_of(self._directory)
            self._owner.moved(self.folder)

    def _packed(self, steps: npt.ArrayLike, rows: npt.ArrayLike, context: npt.ArrayLike | None) -> Steps:
        numbers, matrix = np.asarray(steps), np.asarray(rows)
        if numbers.ndim != 1 or matrix.shape != (len(numbers), self._width):
            raise ValueError(
                f"append() got steps of shape {numbers.shape} and rows of shape {matrix.shape}; "
                f"they must be (n,) and (n, {self._width})"
            )
        packed = blank(len(numbers))
        packed["step"] = numbers
        for name, column in self._picked.items():
            # A flag is set where its number is not zero.
            packed[name] = matrix[:, column]
        _fill_context(packed, context)
        order = packed["step"]
        if len(numbers) and (order[0] < self._last_step or (order[1:] < order[:-1]).any()):
            raise ValueError(
                f"step {order.min()} comes after step {max(self._last_step, order.max())}; "
                "to go back open the history again with start_step="
            )
        return packed

    @contextlib.contextmanager
    def _writing(self) -> Generator[None, None, None]:
        try:
            yield
        except OSError as error:
            what = f"cannot write the history: {error.strerror or error}"
            raise HistoryError(error.errno, what, str(error.filename or self.folder)) from error


def _pick(columns: Sequence[str]) -> dict[str, int]:
    wanted = [name for name in STEP.names or () if name not in ("step", *CONTEXT)]
    if missing := [name for name in wanted if name not in columns]:
        raise ValueError(
            f"columns={tuple(columns)!r} lack {', '.join(missing)}; pass the names of all columns of a row"
        )
    return {name: list(columns).index(name) for name in wanted}


def _checked_norms(what: str, scopes: Sequence[str], norms: npt.ArrayLike | None, count: int) -> Norms:
    # What is beyond float32 is infinite there, which is what a reader should see.
    with np.errstate(over="ignore"):
        matrix = np.asarray(np.empty((count, 0)) if norms is None else norms).astype(NORM)
    if matrix.shape != (count, len(scopes)):
        raise ValueError(f"append() got {what} of shape {matrix.shape}; it must be {(count, len(scopes))}")
    return matrix


def _fill_context(packed: Steps, context: npt.ArrayLike | None) -> None:
    """Write what is known beside the numbers of a step; where nobody told, its limit is the threshold."""
    if context is not None:
        matrix = np.asarray(context)
        if matrix.shape != (len(packed), len(CONTEXT)):
            raise ValueError(f"append() got context of shape {matrix.shape}; it must be {(len(packed), len(CONTEXT))}")
        for name, column in zip(CONTEXT, matrix.T, strict=True):
            packed[name] = np.where(np.isnan(column), -1, column) if STEP[name].kind == "i" else column
    packed["threshold"] = np.where(np.isnan(packed["threshold"]), packed["limit"], packed["threshold"])


def _rows_before(folder: Path, start_step: int) -> int:
    """How many rows of a history come before this step; none where there is no history yet."""
    some = (folder / "steps.npy").exists()
    if some or (folder / "meta.json").exists():
        read_meta(folder)
    # The first that comes not before, or else the number of all.
    return int(np.append(read_steps(folder)[0]["step"] >= start_step, True).argmax()) if some else 0


def _modernize(folder: Path, keep: int) -> None:
    """Write the rows that are kept anew if they are of an earlier version."""
    path = folder / "steps.npy"
    if path.exists():
        try:
            count_rows(path, STEP)
        except HistoryFormatError:
            kept = read_steps(folder)[0][:keep]
            replace_file(path, header_of(STEP, len(kept)) + kept.tobytes())


def _path_of(directory: int) -> Path:
    """Where an open folder is by now."""
    # Where there is no /proc.
    if (name := getattr(fcntl, "F_GETPATH", None)) is not None:
        return Path(os.fsdecode(fcntl.fcntl(directory, name, bytes(1024)).rstrip(b"\0")))
    return Path(os.readlink(f"/proc/self/fd/{directory}"))


def _segments(folder: Path, segment: dict[str, Any], keep: int) -> list[dict[str, Any]]:
    """The settings of the rows that are kept, and those of the rows to come."""
    if not keep:
        return [segment]
    earlier = [one for one in read_meta(folder)["segments"] if one["from_step"] < segment["from_step"]]
    last = earlier[-1]
    if last["norm_type"] != segment["norm_type"]:
        raise HistoryFormatError(
            f"{folder} holds norms with norm_type={last['norm_type']}, and this run measures "
            f"norm_type={segment['norm_type']}; use another folder"
        )
    same = all(last[key] == segment[key] for key in segment if key != "from_step")
    return earlier if same else [*earlier, segment]


def _describe(method: object) -> dict[str, Any]:
    """Class and settings of a method in types that JSON knows."""
    fields = dataclasses.fields(method) if dataclasses.is_dataclass(method) else ()
    settings = {field.name: _plain(getattr(method, field.name)) for field in fields}
    return {"class": type(method).__name__, "settings": settings}


def _plain(value: Any) -> Any:
    """The value in types that JSON knows: it has no infinity, and no keys but strings."""
    if isinstance(value, Mapping):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    if value is None or isinstance(value, (int, str)) or (isinstance(value, float) and math.isfinite(value)):
        return value
    return str(value)
