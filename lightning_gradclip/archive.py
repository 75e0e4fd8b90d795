"""All sizes of each scope since the start, with exact quantiles: eight bytes a step and scope.

Sorting everything at each step would cost more and more. The sizes lie in a long sorted row and a short unsorted one
that is merged into it when it is full: an order statistic of both takes a sort of the short row and a binary search
in the long one.

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
    long, count = state["sorted"], state["count"]
    recent = state["recent"].sort(dim=1).values
    # How many of all sizes come before each of the recent ones.
    ranks = torch.searchsorted(long, recent) + torch.arange(recent.shape[1], device=recent.device)
    position = q * (count - 1).clamp_min(0).to(recent.dtype)
    below = position.floor()
    low, high = (_of_rank(rank.long()[:, None], long, recent, ranks) for rank in (below, position.ceil()))
    return torch.where(count > 0, ring.interpolated(low, high, position - below), math.inf)


def _of_rank(rank: Tensor, long: Tensor, recent: Tensor, ranks: Tensor) -> Tensor:
    """The size that `rank`, `(S, 1)`, others come before, `(S,)`."""
    # So many of the recent sizes come before it; either the next of them has this rank, or one of the long row.
    before = (ranks < rank).sum(dim=1, keepdim=True)
    of_recent = _at(recent, before)
    return torch.where(_at(ranks, before) == rank, of_recent, _at(long, rank - before))[:, 0]


def _at(rows: Tensor, place: Tensor) -> Tensor:
    """The entries at `place`, `(S, 1)`; anything where there is none."""
    if rows.shape[1] == 0:
        return torch.full_like(place, -1).to(rows.dtype)
    return rows.gather(1, place.clamp(0, rows.shape[1] - 1))
