"""Writes a history: once per window of steps, so that a step costs next to nothing."""

import contextlib
import dataclasses
import json
import math
import sys
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lightning_gradclip.record.history import (
    FORMAT,
    NORM,
    STEP,
    VERSION,
    GrowingArray,
    HistoryError,
    HistoryFormatError,
    Norms,
    Steps,
    described_parts,
    norms_of,
    read_meta,
    read_steps,
    replace_file,
)

# The package is there before any of its modules. It imports this one, so that nothing is imported from it here.
_RELEASE: str = sys.modules["lightning_gradclip"].__version__


class HistoryWriter:
    """Writes the history of one optimizer. In a distributed run only rank zero has one.

    Opened on an existing history it goes on there: rows of `start_step` and later are dropped, those before stay.

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
        self.folder = Path(folder)
        self._picked, self._width = _pick(columns), len(columns)
        self._last_step = start_step
        self._part: GrowingArray | None = None
        self._part_names: tuple[str, ...] = ()
        self._part_first = 0
        self._parts = 0
        segment = {
            "from_step": start_step,
            "method": None if method is None else _describe(method),
            "action": action,
            "norm_type": _plain(getattr(method, "norm_type", 2.0)),
            "measure_per": measure_per,
        }
        about = {"format": FORMAT, "version": VERSION, "package": _RELEASE, "name": name, "optimizer": optimizer}
        with self._writing():
            self.folder.mkdir(parents=True, exist_ok=True)
            keep = _rows_before(self.folder, start_step)
            _write_json(self.folder / "meta.json", {**about, "segments": _segments(self.folder, segment, keep)})
            self._steps = GrowingArray(self.folder / "steps.npy", STEP, keep)
            self._resume_parts()

    def append(
        self,
        steps: npt.ArrayLike,
        rows: npt.ArrayLike,
        scopes: Sequence[str] = (),
        scope_norms: npt.ArrayLike | None = None,
    ) -> None:
        """Write some steps; cheapest when called once for many of them.

        Args:
            steps: Their numbers on Lightning's own axis, integers `(n,)`, never falling.
            rows: What happened, `(n, len(columns))`; flags are 1.0 or 0.0.
            scopes: Names of the measured scopes, `S`.
            scope_norms: Their norms at these steps, `(n, S)`, NaN where absent.

        Raises:
            HistoryError: If the file system refuses. None of these steps is recorded then; the history before them
                stays as it is, and later calls may succeed.
            ValueError: If shapes do not fit, or a step is smaller than the one before.
        """
        packed = self._packed(steps, rows)
        if not len(packed):
            return
        norms = _checked_norms(scopes, scope_norms, len(packed))
        with self._writing():
            if self._part is not None:
                # Norms whose steps could not be written.
                self._part.drop(self._steps.rows - self._part_first)
            if norms.size:
                self._append_scopes(tuple(scopes), norms)
            self._steps.append(packed)
        self._last_step = int(packed["step"][-1])

    def close(self) -> None:
        """Hand everything to the disk; the folder can be opened again at any step.

        Raises:
            HistoryError: If the file system refuses.
        """
        with self._writing(), contextlib.ExitStack() as stack:
            for file in (self._steps, self._part):
                if file is not None:
                    stack.callback(file.close)

    def __enter__(self) -> "HistoryWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _packed(self, steps: npt.ArrayLike, rows: npt.ArrayLike) -> Steps:
        numbers, matrix = np.asarray(steps), np.asarray(rows)
        if numbers.ndim != 1 or matrix.shape != (len(numbers), self._width):
            raise ValueError(
                f"append() got steps of shape {numbers.shape} and rows of shape {matrix.shape}; "
                f"they must be (n,) and (n, {self._width})"
            )
        packed = np.empty(len(numbers), STEP)
        packed["step"] = numbers
        for name, column in self._picked.items():
            # A flag is set where its number is not zero.
            packed[name] = matrix[:, column]
        order = packed["step"]
        if len(numbers) and (order[0] < self._last_step or (order[1:] < order[:-1]).any()):
            raise ValueError(
                f"step {order.min()} comes after step {max(self._last_step, order.max())}; "
                "to go back open the history again with start_step="
            )
        return packed

    def _append_scopes(self, names: tuple[str, ...], norms: Norms) -> None:
        """Write the norms of the rows that `steps.npy` is about to get."""
        row, part = self._steps.rows, self._part
        if part is None or names != self._part_names or self._part_first + part.rows != row:
            part = self._begin_part(names, row)
        part.append(norms)

    def _begin_part(self, names: tuple[str, ...], row: int) -> GrowingArray:
        if self._part is not None:
            self._part.close()
            self._part = None
        path = self.folder / f"scopes.{self._parts}.json"
        path.with_suffix(".npy").unlink(missing_ok=True)
        _write_json(path, {"first_row": row, "names": names})
        self._part = GrowingArray(path.with_suffix(".npy"), norms_of(names), 0)
        self._part_names, self._part_first, self._parts = names, row, self._parts + 1
        return self._part

    def _resume_parts(self) -> None:
        """Drop the norms of dropped rows, and go on with the last part if it ends where the rows do."""
        kept = self._steps.rows
        for path, first, names in described_parts(self.folder):
            matrix = path.with_suffix(".npy")
            if first >= kept or not matrix.exists():
                path.unlink()
                matrix.unlink(missing_ok=True)
                continue
            if self._part is not None:
                self._part.close()
            self._part = GrowingArray(matrix, norms_of(names), kept - first)
            self._part_names, self._part_first = names, first
            self._parts = int(path.name.split(".")[1]) + 1

    @contextlib.contextmanager
    def _writing(self) -> Generator[None, None, None]:
        try:
            yield
        except OSError as error:
            what = f"cannot write the history: {error.strerror or error}"
            raise HistoryError(error.errno, what, str(error.filename or self.folder)) from error


def _pick(columns: Sequence[str]) -> dict[str, int]:
    wanted = [name for name in STEP.names or () if name != "step"]
    if missing := [name for name in wanted if name not in columns]:
        raise ValueError(
            f"columns={tuple(columns)!r} lack {', '.join(missing)}; pass the names of all columns of a row"
        )
    return {name: list(columns).index(name) for name in wanted}


def _checked_norms(scopes: Sequence[str], norms: npt.ArrayLike | None, count: int) -> Norms:
    # What is beyond float32 is infinite there, which is what a reader should see.
    with np.errstate(over="ignore"):
        matrix = np.asarray(np.empty((count, 0)) if norms is None else norms).astype(NORM)
    if matrix.shape != (count, len(scopes)):
        raise ValueError(f"append() got scope_norms of shape {matrix.shape}; it must be {(count, len(scopes))}")
    return matrix


def _rows_before(folder: Path, start_step: int) -> int:
    """How many rows of a history come before this step; none where there is no history yet."""
    some = (folder / "steps.npy").exists()
    if some or (folder / "meta.json").exists():
        read_meta(folder)
    # The first that comes not before, or else the number of all.
    return int(np.append(read_steps(folder)["step"] >= start_step, True).argmax()) if some else 0


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


def _write_json(path: Path, content: dict[str, Any]) -> None:
    replace_file(path, (json.dumps(content, indent=2, allow_nan=False) + "\n").encode())
