"""A run as report and advice see it, whether every step was recorded or only what a logger kept."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from lightning_gradclip.record.history import History, ScopePart
from lightning_gradclip.report import RunError

Numbers: TypeAlias = npt.NDArray[np.float64]
Flags: TypeAlias = npt.NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class Run:
    """Points in the order of their steps, `n` of them; all arrays are `(n,)`."""

    name: str  # what the reader of the page calls it
    each_step: bool  # whether a point is one step; otherwise it covers the steps between two log events
    step: npt.NDArray[np.int64]  # on Lightning's own axis
    norm: Numbers  # before clipping, NaN where it was not finite; a mean where a point is not one step
    norm_max: Numbers  # the largest of the steps of a point
    norm_clipped: Numbers  # after clipping; 0 for a dropped step
    limit: Numbers  # NaN where there was none, or more than one
    coef: Numbers  # the smallest factor applied
    changed: Numbers  # share of the steps that clipping changed; NaN for a step that was not finite
    skipped: Numbers  # dropped steps, those of `overflows` not among them
    nonfinite: Numbers  # steps with NaN or infinite gradients, those of `overflows` not among them
    overflows: Numbers  # steps that the GradScaler dropped while it calibrated itself
    parts: tuple[ScopePart, ...] = ()  # norms of scopes; `first_row` is a position in the arrays above
    segments: tuple[Mapping[str, Any], ...] = ()  # settings, each `from_step` on; empty where a logger kept none
    optimizer: int | None = None  # its index, where there are several
    loss: Numbers | None = None  # of the batches of a step, NaN where nobody told
    lr: Numbers | None = None  # learning rate
    damage: tuple[str, ...] = ()  # what could not be read, a line each
    history: History | None = None  # where every step is recorded; its rows are those of the arrays above

    def __len__(self) -> int:
        return len(self.step)

    @cached_property
    def sizes(self) -> Numbers:
        """The finite norms greater than zero, as they came: what a limit would have been compared with."""
        return self.norm_max[np.isfinite(self.norm_max) & (self.norm_max > 0)]

    @property
    def settings(self) -> Mapping[str, Any] | None:
        """The latest settings, if they are known."""
        return self.segments[-1] if self.segments else None

    @property
    def observed(self) -> bool:
        """Whether nothing was written, so that clipping is what would have happened."""
        return bool(self.segments) and all(one["action"] == "observe" or one["method"] is None for one in self.segments)

    @property
    def norm_type(self) -> float:
        """The p of the p-norm; 2 where a logger did not keep it."""
        return float(self.settings["norm_type"]) if self.settings else 2.0


def from_history(history: History, name: str = "") -> Run:
    """The run that a history recorded; a RunError if it holds no step."""
    rows, segments = history.steps, tuple(history.meta["segments"])
    if not len(rows):
        raise RunError(f"{history.folder} holds no steps yet")
    # Also where entries that were not finite have been replaced: the steps that the metrics of a logger cover.
    finite = np.isfinite(rows["norm"])
    norm = np.where(finite, rows["norm"], np.nan)
    # A learned limit has a threshold at all steps, and a limit at those that were over it.
    in_force = np.where(np.isfinite(rows["threshold"]) & (rows["threshold"] > 0), rows["threshold"], rows["limit"])
    return Run(
        name=name,
        each_step=True,
        step=np.array(rows["step"]),
        norm=norm,
        norm_max=norm,
        norm_clipped=np.where(finite, rows["norm_clipped"], np.nan),
        limit=comparable(in_force, rows["coef"], segments),
        coef=np.where(finite, rows["coef"], np.nan),
        changed=np.where(finite, rows["changed"], np.nan),
        skipped=(rows["skipped"] & ~rows["overflow"]).astype(float),
        nonfinite=(~rows["finite"] & ~rows["overflow"]).astype(float),
        overflows=rows["overflow"].astype(float),
        parts=history.parts,
        segments=segments,
        optimizer=history.meta["optimizer"],
        loss=np.array(rows["loss"]),
        lr=np.array(rows["lr"]),
        damage=history.damage,
        history=history,
    )


def comparable(limit: Numbers, coef: Numbers, segments: tuple[Mapping[str, Any], ...] = ()) -> Numbers:
    """The limits that a norm can be held against, `(n,)`: not those of entries or of root mean squares; else NaN."""
    methods = [one["method"] for one in segments if one["method"]]
    if any(method.get("settings", {}).get("statistic", "norm") != "norm" for method in methods):
        return np.full(len(limit), np.nan)
    # Where entries are limited there is no factor.
    return np.where(np.isfinite(limit) & np.isfinite(coef), limit, np.nan)
