"""The last sizes of each scope: a ring of fixed length, so that a step costs the same however long the run is.

The state is `ring`, `(S, window)`, whose unfilled places hold +inf, and `count`, `(S,)`, the sizes ever stored.
"""

import math

import torch
from torch import Tensor

State = dict[str, Tensor]


def fresh(size: Tensor, window: int) -> State:
    """Rings that are empty, one for each scope in `size`, `(S,)`."""
    ring = torch.full((len(size), window), math.inf, dtype=size.dtype, device=size.device)
    return {"ring": ring, "count": torch.zeros_like(size, dtype=torch.long)}


def pushed(state: State, size: Tensor, active: Tensor) -> State:
    """The state after storing the sizes of active scopes, `(S,)`; the oldest make room."""
    place = (state["count"] % state["ring"].shape[1])[:, None]
    kept = state["ring"].gather(1, place)
    new = torch.where(active[:, None], size[:, None], kept)
    return {"ring": state["ring"].scatter(1, place, new), "count": state["count"] + active}


def quantile(state: State, q: float) -> Tensor:
    """The q-quantile of what is stored, by linear interpolation, `(S,)`; +inf for an empty ring."""
    ring = state["ring"]
    stored = state["count"].clamp_max(ring.shape[1])
    if stored.device.type == "cpu":
        # All scopes have as many as long as none was ever absent; then no row needs sorting.
        least, most = torch.aminmax(stored) if len(stored) > 1 else (stored, stored)
        if (count := int(least.item())) == int(most.item()):
            return _quantile_of_all(ring, count, q)
    return quantile_of_sorted(ring.sort(dim=1).values, stored, q)


def quantile_of_sorted(rows: Tensor, count: Tensor, q: float) -> Tensor:
    """The q-quantile of the first `count`, `(S,)`, entries of each ascending row, `(S,)`; +inf where there are none."""
    position = q * (count - 1).clamp_min(0).to(rows.dtype)
    below = position.floor()
    low = rows.gather(1, below.long()[:, None])[:, 0]
    high = rows.gather(1, position.ceil().long()[:, None])[:, 0]
    return torch.where(count > 0, interpolated(low, high, position - below), math.inf)


def interpolated(low: Tensor, high: Tensor, share: Tensor | float) -> Tensor:
    """Between two finite order statistics; equal ones, and a share of 0, give exactly `low`."""
    return low + (high - low) * share


def mean_and_std(state: State) -> tuple[Tensor, Tensor]:
    """Mean and sample standard deviation (over n - 1) of what is stored, `(S,)` each; at least two must be stored."""
    ring = state["ring"]
    window = ring.shape[1]
    stored = state["count"].clamp_max(window)
    if stored.device.type != "cpu" or bool((stored < window).any()):
        filled = torch.arange(window, device=ring.device) < stored[:, None]
        mean = torch.where(filled, ring, 0.0).sum(1) / stored.clamp_min(1)
        deviation = torch.where(filled, ring - mean[:, None], 0.0)
    else:
        # The same sums without the mask: a run that moves between devices keeps its limits to the bit.
        mean = ring.sum(1) / window
        deviation = ring - mean[:, None]
    return mean, (deviation.square().sum(1) / (stored - 1).clamp_min(1)).sqrt()


def _quantile_of_all(ring: Tensor, count: int, q: float) -> Tensor:
    if count == 0:
        return ring[:, 0]
    position = q * (count - 1)
    below = math.floor(position)
    # The order statistics from the nearer end, `topk` being faster than sorting.
    if q >= 0.5:
        top = ring[:, :count].topk(count - below, dim=1).values
        low, high = top[:, -1], top[:, max(-2, -top.shape[1])]
    else:
        bottom = ring[:, :count].topk(min(below + 2, count), dim=1, largest=False).values
        low, high = bottom[:, below], bottom[:, -1]
    return interpolated(low, high, position - below)
