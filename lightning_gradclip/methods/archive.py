"""All sizes of each scope since the start, with exact quantiles: eight bytes a step and scope.

Sorting everything at each step would cost more and more. The sizes lie in a long sorted row and a short unsorted one
that is merged into it when it is full: an order statistic of both is found by sorting the short row with as many
neighbours of its place in the long one.

The state is `sorted`, `(S, N)`, and `recent`, `(S, M)` with M < 1024, where +inf stands for no size; and `count`,
`(S,)`, the sizes in both. Of a single scope in floats, an `Everything` takes the place of both rows, and `count` is an
int.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_gradclip.methods import ring
from lightning_gradclip.methods.everything import RECENT, Everything
from lightning_gradclip.methods.numbers import Number, Truth

State = Mapping[str, Any]


def fresh(size: Tensor, like: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """Archives that are empty, one for each scope in `size`, `(S,)`, with rows as long as those of `like`."""
    widths = {name: like[name].shape[1] if like else 0 for name in ("sorted", "recent")}
    rows = {name: size.new_full((len(size), width), math.inf) for name, width in widths.items()}
    return {**rows, "count": torch.zeros_like(size, dtype=torch.long)}


def in_floats(state: State) -> dict[str, Any]:
    """The state of a single scope, from tensors to floats."""
    (long,), (recent,) = state["sorted"].tolist(), state["recent"].tolist()
    # Sizes are finite; infinities fill places where another scope had a size.
    stored = Everything(filter(math.isfinite, long), filter(math.isfinite, recent))
    return {"all": stored, "count": state["count"].item()}


def rows(state: State) -> dict[str, Tensor]:
    """The state as tensors, whatever it is; the recent ones of floats are in ascending order."""
    stored = state.get("all")
    if not isinstance(stored, Everything):
        return dict(state)
    return {
        "sorted": torch.from_numpy(stored.long).clone()[None],
        "recent": torch.tensor([stored.recent], dtype=torch.float64, device="cpu"),
        "count": torch.tensor([state["count"]], device="cpu"),
    }


def pushed(state: State, size: Number, active: Truth) -> dict[str, Any]:
    """The state after storing the sizes of active scopes, `(S,)`. What was before is lost."""
    if isinstance(stored := state.get("all"), Everything):
        stored.push(size)
        return {"all": stored, "count": state["count"] + 1}
    return _stored(state, size, active)


def quantile(state: State, q: float, current: Number = None) -> Number:
    """The q-quantile of all sizes, by linear interpolation, `(S,)`; +inf where there are none.

    With `current`, sizes `(S,)`, of all after storing them.
    """
    if isinstance(stored := state.get("all"), Everything):
        return stored.quantile(q, current if current is not None and 0 < current < math.inf else None)
    if current is not None:
        state = _stored(state, current, torch.isfinite(current) & (current > 0))
    long, recent, count = state["sorted"], state["recent"], state["count"]
    position = q * (count - 1).clamp_min(0).to(recent.dtype)
    rank = position.floor().long()[:, None]
    # With M recent sizes, the one of rank k in both rows is recent or lies among the places k - M to k of the long row.
    first = (rank - recent.shape[1]).clamp_min(0)
    places = first + torch.arange(recent.shape[1] + 2, device=recent.device)
    ordered = torch.cat((_at(long, places), recent), dim=1).sort(dim=1).values
    low = ordered.gather(1, rank - first)[:, 0]
    high = ordered.gather(1, position.ceil().long()[:, None] - first)[:, 0]
    return torch.where(count > 0, ring.interpolated(low, high, position - position.floor()), math.inf)


def _stored(state: State, size: Tensor, active: Tensor) -> dict[str, Tensor]:
    column = torch.where(active, size, math.inf)[:, None]
    long, recent = state["sorted"], torch.cat((state["recent"], column), dim=1)
    count = state["count"] + active
    if recent.shape[1] == RECENT:
        long = torch.cat((long, recent), dim=1).sort(dim=1).values
        recent = recent[:, :0]
        if long.device.type == "cpu":
            # Elsewhere the host does not look; what is cut off here is no size.
            long = long[:, : int(count.max())].contiguous()
    return {"sorted": long, "recent": recent, "count": count}


def _at(rows: Tensor, places: Tensor) -> Tensor:
    """The entries at these places, `(S, K)`; +inf beyond the end."""
    width = rows.shape[1]
    if width == 0:
        return rows.new_full(places.shape, math.inf)
    return torch.where(places < width, rows.gather(1, places.clamp_max(width - 1)), math.inf)
