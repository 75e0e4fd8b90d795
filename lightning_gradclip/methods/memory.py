"""What methods remember: `LastSizes`, the last sizes of each scope, or `AllSizes`, all of them with exact quantiles.

A memory is kept as tensors with one line a scope, which is what checkpoints hold. That of a single scope on CPU turns
into its float twin, `LastFloats` or `AllFloats`, which does the same at a fraction of the cost, and back at any time.
"""

import math
from bisect import bisect_left, insort
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from lightning_gradclip.methods.numbers import Number, Truth

# Tensors by name, or the float twin under the name "floats".
State = Mapping[str, Any]
# So many sizes lie unsorted in the memory of all before they are merged into the sorted ones.
RECENT = 1024


class Memory:
    """Functions over a state, which the method holds. Tensors of it are never written to; its float twin is."""

    twin: ClassVar[type[Any]]
    _pushed: ClassVar[Callable[[State, Tensor, Tensor], State]]
    _quantile: ClassVar[Callable[[State, float], Tensor]]

    @classmethod
    def in_floats(cls, state: State) -> State:
        """The state of a single scope, from tensors to floats."""
        return {"floats": cls.twin(state)}

    @staticmethod
    def as_tensors(state: State) -> dict[str, Tensor]:
        """The state as tensors, whatever it is."""
        return state["floats"].as_tensors() if "floats" in state else dict(state)

    @staticmethod
    def count(state: State) -> Number:
        """How many sizes were pushed, `(S,)`, whether they are still remembered or not."""
        return state["floats"].count if "floats" in state else state["count"]

    @classmethod
    def pushed(cls, state: State, size: Number, active: Truth) -> State:
        """The state after remembering the sizes of active scopes, `(S,)`."""
        if "floats" not in state:
            return cls._pushed(state, size, active)
        if active:
            state["floats"].push(size)
        return state

    @classmethod
    def quantile(cls, state: State, q: float, current: Number = None) -> Number:
        """The q-quantile of what is remembered, after `current` if given, interpolated, `(S,)`; +inf of nothing."""
        if "floats" in state:
            return state["floats"].quantile(q, current if current is not None and 0 < current < math.inf else None)
        if current is not None:
            state = cls._pushed(state, current, torch.isfinite(current) & (current > 0))
        return cls._quantile(state, q)


class LastFloats:
    """The last sizes of one scope: in a ring, and sorted, so that a step inserts one and takes one out."""

    def __init__(self, state: State) -> None:
        (self._ring,), self.count = state["ring"].tolist(), state["count"].item()
        self._sorted = sorted(self._ring[: self.count])

    def as_tensors(self) -> dict[str, Tensor]:
        ring = torch.tensor([self._ring], dtype=torch.float64, device="cpu")
        return {"ring": ring, "count": torch.tensor([self.count], device="cpu")}

    def push(self, size: float) -> None:
        self._insert(size, self._sorted)
        self._ring[self.count % len(self._ring)] = size
        self.count += 1

    def quantile(self, q: float, current: float | None = None) -> float:
        ordered = self._sorted
        if current is not None:
            self._insert(current, ordered := ordered.copy())
        if not ordered:
            return math.inf
        rank, share = _place(q, len(ordered))
        return _between(ordered[rank], ordered[min(rank + 1, len(ordered) - 1)], share)

    def mean_and_std(self) -> tuple[float, float]:
        """Mean and sample standard deviation (over n - 1); 0 for what needs more sizes."""
        sizes = self._ring[: self.count]
        try:
            mean = math.fsum(sizes) / max(1, len(sizes))
        except OverflowError:  # as a sum of float64 tensors is then
            mean = math.inf
        # The root of the sum of squared deviations, in C and without overflow.
        return mean, math.dist(sizes, [mean] * len(sizes)) / math.sqrt(max(1, len(sizes) - 1))

    def _insert(self, size: float, ordered: list[float]) -> None:
        """Put a size among the sorted ones, where the oldest makes room."""
        if self.count >= len(self._ring):
            del ordered[bisect_left(ordered, self._ring[self.count % len(self._ring)])]
        insort(ordered, size)


class LastSizes(Memory):
    """The last sizes of each scope in rings of fixed length, so that a step costs the same however long the run is.

    The state is `ring`, `(S, length)`, whose unfilled places hold +inf, and `count`, `(S,)`, the sizes ever pushed.
    """

    twin = LastFloats

    @staticmethod
    def fresh(size: Tensor, length: int) -> dict[str, Tensor]:
        """Rings that are empty, one for each scope in `size`, `(S,)`."""
        return {"ring": size.new_full((len(size), length), math.inf), "count": torch.zeros_like(size, dtype=torch.long)}

    @staticmethod
    def mean_and_std(state: State) -> tuple[Number, Number]:
        """Mean and sample standard deviation (over n - 1), `(S,)` each; at least two sizes must be remembered."""
        if "floats" in state:
            # Summed exactly: they may differ from those of tensors in the last digit.
            return state["floats"].mean_and_std()
        ring, length = state["ring"], state["ring"].shape[1]
        filled = state["count"].clamp_max(length)
        if filled.device.type != "cpu" or bool((filled < length).any()):
            there = torch.arange(length, device=ring.device) < filled[:, None]
            mean = torch.where(there, ring, 0.0).sum(1) / filled.clamp_min(1)
            deviation = torch.where(there, ring - mean[:, None], 0.0)
        else:
            # The same sums without the mask, to the bit.
            mean = ring.sum(1) / length
            deviation = ring - mean[:, None]
        return mean, (deviation.square().sum(1) / (filled - 1).clamp_min(1)).sqrt()

    @staticmethod
    def _pushed(state: State, size: Tensor, active: Tensor) -> dict[str, Tensor]:
        ring, count = state["ring"], state["count"]
        place = (count % ring.shape[1])[:, None]
        new = torch.where(active[:, None], size[:, None], ring.gather(1, place))
        return {"ring": ring.scatter(1, place, new), "count": count + active}

    @staticmethod
    def _quantile(state: State, q: float) -> Tensor:
        ring = state["ring"]
        filled = state["count"].clamp_max(ring.shape[1])
        if filled.device.type == "cpu":
            # All scopes have as many as long as none was ever absent; then no row needs sorting.
            least, most = torch.aminmax(filled) if len(filled) > 1 else (filled, filled)
            if 0 < (count := int(least.item())) == int(most.item()):
                return _quantile_of_full(ring[:, :count], q)
        return _interpolated(ring.sort(dim=1).values, q * (filled - 1).clamp_min(0).to(ring.dtype), filled)


class AllFloats:
    """All sizes of one scope: sorted in a long array, and in a short list that is merged into it when it is full.

    Inserting into one sorted list would move megabytes in a long run. An order statistic of both is found by bisection.
    """

    def __init__(self, state: State) -> None:
        # Infinities fill places where another scope had a size.
        long, recent = (state[name][state[name].isfinite()].tolist() for name in ("sorted", "recent"))
        self._long, self._recent = np.fromiter(long, np.float64), sorted(recent)

    @property
    def count(self) -> int:
        return len(self._long) + len(self._recent)

    def as_tensors(self) -> dict[str, Tensor]:
        return {
            "sorted": torch.from_numpy(self._long).clone()[None],
            "recent": torch.tensor([self._recent], dtype=torch.float64, device="cpu"),
            "count": torch.tensor([self.count], device="cpu"),
        }

    def push(self, size: float) -> None:
        insort(self._recent, size)
        if len(self._recent) == RECENT:
            self._long = np.insert(self._long, np.searchsorted(self._long, self._recent), self._recent)
            self._recent = []

    def quantile(self, q: float, current: float | None = None) -> float:
        long, recent = self._long, self._recent
        if current is not None:
            insort(recent := recent.copy(), current)
        if not (count := len(long) + len(recent)):
            return math.inf
        rank, share = _place(q, count)
        # How many recent sizes come before the rank: the fewest of which the next is not below the last long one.
        least, most = max(0, rank - len(long)), min(rank, len(recent))
        taken = bisect_left(range(most), True, least, most, key=lambda i: bool(long[rank - i - 1] <= recent[i]))
        follow = sorted((*long[rank - taken : rank - taken + 2].tolist(), *recent[taken : taken + 2]))
        return _between(follow[0], follow[:2][-1], share)


class AllSizes(Memory):
    """All sizes of each scope since the start: eight bytes a step and scope.

    Sorting everything would cost more and more: a short unsorted row is merged into a long sorted one when it is full.
    An order statistic of both is found by sorting the short row with as many neighbours of its place in the long one.
    The state is `sorted`, `(S, N)`, and `recent`, `(S, M)`, M < 1024, with +inf for no size, and `count`, `(S,)`.
    """

    twin = AllFloats

    @staticmethod
    def fresh(size: Tensor, like: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """Rows that are empty, one for each scope in `size`, `(S,)`, and as long as those of the state `like`."""
        widths = {name: like[name].shape[1] if like else 0 for name in ("sorted", "recent")}
        rows = {name: size.new_full((len(size), width), math.inf) for name, width in widths.items()}
        return {**rows, "count": torch.zeros_like(size, dtype=torch.long)}

    @staticmethod
    def _pushed(state: State, size: Tensor, active: Tensor) -> dict[str, Tensor]:
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

    @staticmethod
    def _quantile(state: State, q: float) -> Tensor:
        long, recent, count = state["sorted"], state["recent"], state["count"]
        position = q * (count - 1).clamp_min(0).to(recent.dtype)
        # With M recent sizes, the one of rank k in both is recent or at one of the places k - M to k of the long row.
        first = (position.floor() - recent.shape[1]).clamp_min(0)
        places = first.long()[:, None] + torch.arange(recent.shape[1] + 2, device=recent.device)
        if width := long.shape[1]:
            near = torch.where(places < width, long.gather(1, places.clamp_max(width - 1)), math.inf)
        else:
            near = recent.new_full(places.shape, math.inf)
        return _interpolated(torch.cat((near, recent), dim=1).sort(dim=1).values, position - first, count)


def _place(q: float, count: int) -> tuple[int, float]:
    """The rank, from 0, of the last of `count` sizes up to the q-quantile, and the share of the way to the next."""
    rank = int(position := q * (count - 1))
    return rank, position - rank


def _between(low: Number, high: Number, share: Number) -> Number:
    """Between two finite order statistics; equal ones, and a share of 0, give exactly `low`."""
    return low + (high - low) * share


def _interpolated(ordered: Tensor, position: Tensor, count: Tensor) -> Tensor:
    """What is at a position, `(S,)`, between two places of each ascending row; +inf where the count is 0."""
    below = position.floor()
    low = ordered.gather(1, below.long()[:, None])[:, 0]
    high = ordered.gather(1, position.ceil().long()[:, None])[:, 0]
    return torch.where(count > 0, _between(low, high, position - below), math.inf)


def _quantile_of_full(rows: Tensor, q: float) -> Tensor:
    """The q-quantile of each unsorted row, `(S,)`, from its nearer end: `topk` is faster than sorting."""
    count = rows.shape[1]
    rank, share = _place(q, count)
    if q >= 0.5:
        top = rows.topk(count - rank, dim=1).values
        return _between(top[:, -1], top[:, max(-2, -top.shape[1])], share)
    bottom = rows.topk(min(rank + 2, count), dim=1, largest=False).values
    return _between(bottom[:, rank], bottom[:, -1], share)
