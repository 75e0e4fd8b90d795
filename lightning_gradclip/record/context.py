"""What is known about a step beside its row: where in the run it was, its loss, and from which norm on it was clipped.

Numbers that are on a device stay there until the row is read.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Numbers: TypeAlias = npt.NDArray[np.float64]

UNKNOWN = float("nan")


class Context(NamedTuple):
    """What is known about one step; NaN where nobody told.

    The first five are what a history writes beside a row, in its order. Tensors must not be written again.
    """

    threshold: float | Tensor = UNKNOWN
    """The norm from which on a step is clipped; NaN: the limit of its row."""
    loss: float | Tensor = UNKNOWN
    lr: float | Tensor = UNKNOWN
    epoch: float = UNKNOWN
    batch: float = UNKNOWN
    """Index in its epoch of the first of the accumulated batches."""
    scopes: tuple[str, ...] = ()
    """Where there are several: the scopes of `thresholds`, `T`."""
    thresholds: Tensor | None = None
    """From which norm on each is clipped, `(T,)`."""
    shares: tuple[tuple[str, ...], tuple[float, ...]] | None = None
    """At a step that stands out: the scopes with the largest shares of the squared norm, and these."""


NOTHING = Context()
FIELDS = Context._fields[:5]


def number(value: Any) -> float | Tensor:
    """A number of a loop that goes on: a float where that makes nobody wait, else a copy where it is."""
    if not isinstance(value, Tensor):
        return float(value)
    value = value.detach()
    if value.is_cpu:
        return value.item() if value.numel() == 1 else value.double().mean().item()
    return value.clone() if value.numel() == 1 else value.mean()


def largest_shares(norms: Tensor, names: tuple[str, ...], most: int = 3) -> tuple[tuple[str, ...], tuple[float, ...]]:
    """The scopes with the largest shares of the sum of squares of these norms, `(S,)`; NaN for one that is not finite.

    Waits for the device.
    """
    found = norms.double().cpu()
    finite = torch.isfinite(found)
    if not finite.all():
        worst = torch.nonzero(~finite).flatten().tolist()[:most]
        return tuple(names[place] for place in worst), (UNKNOWN,) * len(worst)
    # Relative to the largest, so that no square overflows.
    squares = (found / found.amax().clamp_min(torch.finfo(found.dtype).tiny)).square()
    shares, places = (squares / squares.sum()).topk(min(most, len(names)))
    return tuple(names[place] for place in places.tolist()), tuple(shares.tolist())


def fetched(*things: Sequence[Any]) -> list[Numbers]:
    """Of each list of `n` rows, vectors or numbers a matrix on the host, `(n, width)`; in one copy from the device."""
    placed = [_stacked(ones) for ones in things]
    away = [one for one in placed if isinstance(one, Tensor)]
    if not away:
        return [one for one in placed if not isinstance(one, Tensor)]
    whole = on_host(torch.cat([one.to(away[0]) for one in away], 1))
    fetched = iter(np.split(whole, np.cumsum([one.shape[1] for one in away])[:-1], axis=1))
    return [next(fetched) if isinstance(one, Tensor) else one for one in placed]


def _stacked(ones: Sequence[Any]) -> Numbers | Tensor:
    first = next((one for one in ones if isinstance(one, Tensor)), None)
    if first is None:
        return np.array(ones, np.float64).reshape(len(ones), -1) if ones else np.empty((0, 0))
    matrix = torch.stack([one.to(first) if isinstance(one, Tensor) else first.new_tensor(one) for one in ones])
    matrix = matrix.view(len(ones), -1)
    return on_host(matrix) if matrix.is_cpu else matrix


def on_host(matrix: Tensor) -> Numbers:
    """The same numbers in float64 on the host."""
    return matrix.cpu().double().numpy()
