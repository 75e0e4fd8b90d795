"""The last sizes of each scope: a ring of fixed length, so that a step costs the same however long the run is.

The state is `ring`, `(S, window)`, whose unfilled places hold +inf, and `count`, `(S,)`, the sizes ever stored. Of a
single scope in floats, `ring` is a `Recent` and `count` an int.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_gradclip.methods.numbers import Number, Truth
from lightning_gradclip.methods.recent import Recent

State = Mapping[str, Any]


def fresh(size: Tensor, window: int) -> dict[str, Tensor]:
    """Rings that are empty, one for each scope in `size`, `(S,)`."""
    ring = torch.full((len(size), window), math.inf, dtype=size.dtype, device=size.device)
    return {"ring": ring, "count": torch.zeros_like(size, dtype=torch.long)}


def in_floats(state: State) -> dict[str, Any]:
    """The state of a single scope, from tensors to floats."""
    (ring,), count = state["ring"].tolist(), state["count"].item()
    window = len(ring)
    ordered = [ring[i % window] for i in range(max(0, count - window), count)]
    return {"ring": Recent(ordered, window), "count": count}


def rows(state: State) -> dict[str, Tensor]:
    """The state as tensors, whatever it is."""
    ring, count = state.get("ring"), state.get("count", 0)
    if not isinstance(ring, Recent):
        return dict(state)
    places = torch.full((1, ring.window), math.inf, dtype=torch.float64, device="cpu")
    for i, size in enumerate(ring.sizes, start=count - len(ring.sizes)):
        places[0, i % ring.window] = size
    return {"ring": places, "count": torch.tensor([count], device="cpu")}


def pushed(state: State, size: Number, active: Truth) -> dict[str, Any]:
    """The state after storing the sizes of active scopes, `(S,)`; the oldest make room. What was before is lost."""
    ring, count = state["ring"], state["count"]
    if isinstance(ring, Recent):
        ring.push(size)
        return {"ring": ring, "count": count + 1}
    return _stored(ring, count, size, active)


def quantile(state: State, q: float, current: Number = None) -> Number:
    """The q-quantile of what is stored, by linear interpolation, `(S,)`; +inf for an empty ring.

    With `current`, sizes `(S,)`, of what is stored after them.
    """
    ring, count = state["ring"], state["count"]
    if isinstance(ring, Recent):
        return ring.quantile(q, current if current is not None and 0 < current < math.inf else None)
    if current is not None:
        stored = _stored(ring, count, current, torch.isfinite(current) & (current > 0))
        ring, count = stored["ring"], stored["count"]
    stored = count.clamp_max(ring.shape[1])
    if stored.device.type == "cpu":
        # All scopes have as many as long as none was ever absent; then no row needs sorting.
        least, most = torch.aminmax(stored) if len(stored) > 1 else (stored, stored)
        if (filled := int(least.item())) == int(most.item()):
            return _quantile_of_all(ring, filled, q)
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


def mean_and_std(state: State) -> tuple[Number, Number]:
    """Mean and sample standard deviation (over n - 1) of what is stored, `(S,)` each; at least two must be stored.

    Those of floats are summed exactly and may differ from those of tensors in the last digit.
    """
    ring = state["ring"]
    if isinstance(ring, Recent):
        return ring.mean_and_std()
    window = ring.shape[1]
    stored = state["count"].clamp_max(window)
    if stored.device.type != "cpu" or bool((stored < window).any()):
        filled = torch.arange(window, device=ring.device) < stored[:, None]
        mean = torch.where(filled, ring, 0.0).sum(1) / stored.clamp_min(1)
        deviation = torch.where(filled, ring - mean[:, None], 0.0)
    else:
        # The same sums without the mask, to the bit.
        mean = ring.sum(1) / window
        deviation = ring - mean[:, None]
    return mean, (deviation.square().sum(1) / (stored - 1).clamp_min(1)).sqrt()


def _stored(ring: Tensor, count: Tensor, size: Tensor, active: Tensor) -> dict[str, Tensor]:
    place = (count % ring.shape[1])[:, None]
    new = torch.where(active[:, None], size[:, None], ring.gather(1, place))
    return {"ring": ring.scatter(1, place, new), "count": count + active}


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
