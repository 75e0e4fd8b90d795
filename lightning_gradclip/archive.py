"""All sizes of each scope since the start, with exact quantiles: eight bytes a step and scope.

Sorting everything at each step would cost more and more. The sizes lie in a long sorted row and a short unsorted one
that is merged into it when it is full: an order statistic of both is found by sorting the short row with as many
neighbours of its place in the long one.

The state is `sorted`, `(S, N)`, and `recent`, `(S, M)` with M < 1024, where +inf stands for no size; and `count`,
`(S,)`, the sizes in both.
"""

import math

import torch
from torch import Tensor

from lightning_gradclip import ring

State = dict[str, Tensor]

_RECENT = 1024


def fresh(size: Tensor, like: State | None = None) -> State:
    """Archives that are empty, one for each scope in `size`, `(S,)`, with rows as long as those of `like`."""
    widths = {name: like[name].shape[1] if like else 0 for name in ("sorted", "recent")}
    rows = {name: size.new_full((len(size), width), math.inf) for name, width in widths.items()}
    return {**rows, "count": torch.zeros_like(size, dtype=torch.long)}


def pushed(state: State, size: Tensor, active: Tensor) -> State:
    """The state after storing the sizes of active scopes, `(S,)`."""
    column = torch.where(active, size, math.inf)[:, None]
    long, recent = state["sorted"], torch.cat((state["recent"], column), dim=1)
    count = state["count"] + active
    if recent.shape[1] == _RECENT:
        long = torch.cat((long, recent), dim=1).sort(dim=1).values
        recent = recent[:, :0]
        if long.device.type == "cpu":
            # Elsewhere the host does not look; what is cut off here is no size.
            long = long[:, : int(count.max())].contiguous()
    return {"sorted": long, "recent": recent, "count": count}


def quantile(state: State, q: float) -> Tensor:
    """The q-quantile of all sizes, by linear interpolation, `(S,)`; +inf where there are none."""
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


def _at(rows: Tensor, places: Tensor) -> Tensor:
    """The entries at these places, `(S, K)`; +inf beyond the end."""
    width = rows.shape[1]
    if width == 0:
        return rows.new_full(places.shape, math.inf)
    return torch.where(places < width, rows.gather(1, places.clamp_max(width - 1)), math.inf)
