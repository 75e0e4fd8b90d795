"""Who holds what: from what each rank says of its parameters to the parameters of all, and what each holds of them.

Of one name there may be several on the ranks: pieces of one parameter, copies of it, or others that are called the
same. Pieces and copies that torch has cut or keeps alike say so themselves. The rest is known by what it is: copies
have the same gradients, once there are any, and the same weights. Where nothing sets ranks apart, as stages of a
pipeline and experts are, what goes by one name has to be copies of one parameter; where something does, what is no copy
is a parameter of its own.
"""

import json
import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_gradclip.select.layout import Layout
from lightning_gradclip.select.parameters import Selection

# Copies that differ by more, relative to their norm, are none; kernels may round otherwise on each rank.
ALIKE = 1e-3

REMEDY = (
    "If these ranks hold different parameters, such as stages of a pipeline or experts, name the ranks: "
    "Clipper(..., process_group=mesh['pp']), GradientClipping(..., process_group='pp')"
)


class Served(NamedTuple):
    """One parameter, as a rank that serves it tells the others."""

    name: str
    group: str
    shape: tuple[int, ...]
    dtype: str
    numel: int  # over all ranks
    flattened: bool
    joined: bool
    layer: str

    def standing_in(self) -> tuple[Tensor, Layout]:
        """Something of this shape and dtype where nothing of the parameter is."""
        like = torch.empty(self.shape, dtype=getattr(torch, self.dtype), device="meta")
        return like, Layout(self.numel, flattened=self.flattened, joined=self.joined)


class Share(NamedTuple):
    """What a rank knows of the parameters of all ranks, and of its part in them."""

    everything: Selection  # with stand-ins for parameters of which nothing is here
    places: tuple[int, ...] | None  # where those that it serves are among them; None: they are all
    shares: Tensor  # by how much its norms count, so that pieces and copies add up to one whole, `(P,)`
    undecided: bool  # whether something may yet turn out to be no copy


class NoCopiesError(RuntimeError):
    """Ranks hold something different under one name, and nothing says that they may."""


def served(selection: Selection) -> list[Served]:
    """What this rank serves."""
    found: list[Served] = []
    for i, parameter in enumerate(selection.params):
        one = selection.layouts[i]
        numel = parameter.numel() if one.numel is None else one.numel
        # What FSDP has cut has no shape of its own on any rank.
        shape = (numel,) if one.flattened or one.joined else tuple(parameter.shape)
        kind = str(parameter.dtype).removeprefix("torch.")
        about = shape, kind, numel, one.flattened, one.joined, selection.layers[i]
        found.append(Served(selection.names[i], selection.groups[i], *about))
    return found


def written(card: Sequence[Served]) -> str:
    """What a rank serves, to be sent."""
    return json.dumps(card)


def read(text: str) -> list[Served]:
    """What another rank has written."""
    return [Served(one[0], one[1], tuple(one[2]), *one[3:]) for one in json.loads(text)]


def held(selection: Selection, rank: int) -> Tensor:
    """For each parameter the first rank that shares it, and which piece of it is here, -1 for none; `(2, P)`."""
    first = [min(one.together, default=rank) for one in selection.layouts]
    return torch.tensor([first, [one.piece for one in selection.layouts]], dtype=torch.float64, device="cpu")


def disagreements(settings: Sequence[Mapping[str, str]], ranks: Sequence[int]) -> str:
    """What the settings of ranks disagree about, in words; empty where they agree."""
    said: list[str] = []
    for name in dict.fromkeys(name for one in settings for name in one):
        by_value: dict[str, list[int]] = {}
        for rank, one in zip(ranks, settings, strict=True):
            by_value.setdefault(one.get(name, "absent"), []).append(rank)
        if len(by_value) > 1:
            said.append(f"{name}: " + ", ".join(f"{value} on {named(of)}" for value, of in by_value.items()))
    # Other methods have other arguments.
    return next((one for one in said if one.startswith("method: ")), "; ".join(said))


def checksum(text: str) -> int:
    """A number that texts which differ do not share."""
    return zlib.crc32(text.encode())


def named(ranks: Sequence[int]) -> str:
    """Such as "rank 3" and "ranks 0, 1"; of many the first."""
    listed = ", ".join(map(str, ranks[:8])) + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")
    return f"rank{'s' * (len(ranks) > 1)} {listed}"


class _Name:
    """What goes by one name on some of the ranks: as many times as there are ranks that share it with no other."""

    def __init__(self, name: str, columns: Mapping[int, int], positions: Tensor, held: Tensor) -> None:
        self.name, self.columns = name, columns  # where it is served, by position
        last = int(positions.max())
        column = torch.tensor([columns.get(one, -1) for one in range(last + 1)], device="cpu")[positions]
        first, piece = held[torch.arange(len(held), device="cpu"), :, column].long().unbind(1)
        self.rows = ((column >= 0) & (piece >= 0)).nonzero()[:, 0]  # the ranks that hold some of it, `(H,)`
        self.column, self.positions = column[self.rows], positions[self.rows]
        _, self.member = first[self.rows].unique(return_inverse=True)  # which of those that share it each belongs to
        self.count = int(self.member.max()) + 1 if len(self.rows) else 0
        _, index, counts = torch.stack([self.member, piece[self.rows]]).unique(
            dim=1, return_inverse=True, return_counts=True
        )
        self.alike = counts[index]  # of those that share it, how many hold the same piece

    def totals(self, evidence: Tensor) -> Tensor:
        """Norm and sum of the gradient and of the weights each time, `(count, 4)`."""
        norms, sums = evidence[self.rows, self.column].view(-1, 2, 2).unbind(2)
        parts = torch.stack([norms.square(), sums], dim=2).flatten(1) / self.alike[:, None]
        total = parts.new_zeros(self.count, 4).index_add_(0, self.member, parts).view(-1, 2, 2)
        return torch.stack([total[..., 0].sqrt(), total[..., 1]], dim=2).flatten(1)


class _Kinds(NamedTuple):
    """Which of what goes by one name are copies of one another."""

    of_each: list[int]
    undecided: bool = False
    strangers: tuple[int, int] | None = None  # places of two ranks that ought to have copies and have not


@dataclass(frozen=True)
class Holders:
    """What `R` ranks hold of the parameters that they serve.

    Attributes:
        ranks: Their numbers in the run.
        positions: For each of them its position among ranks that are apart, `(R,)`; 0 where none are.
        cards: What is served in each position.
        held: What `held` says on each of them, filled up with -1, `(R, 2, P)`.
    """

    ranks: Sequence[int]
    positions: Tensor
    cards: Sequence[Sequence[Served]]
    held: Tensor

    @cached_property
    def must_be_copies(self) -> bool:
        """Whether something goes by one name on ranks that do not share it."""
        if len(self.cards) > 1:
            return any(one.count > 1 for one in self._names)
        first, piece = self.held.unbind(1)
        there = piece >= 0
        return bool((first.where(there, math.inf).amin(0) < first.where(there, -math.inf).amax(0)).any())

    def share(self, selection: Selection, place: int, evidence: Tensor | None = None) -> Share:
        """What the rank at this place, with this selection, has to know.

        Args:
            selection: What it serves.
            place: Its place among the ranks.
            evidence: For each rank and parameter norm and sum of the gradient, and of the weights, that it holds,
                `(R, P, 4)`; None: what goes by one name is taken for one parameter.

        Raises:
            NoCopiesError: If something is neither a copy nor set apart.
        """
        if len(self.cards) == 1 and not self.must_be_copies:
            pieces = self.held[:, 1]
            shares = (pieces[place] >= 0) / (pieces == pieces[place]).sum(0)
            return Share(selection, None, shares.double(), undecided=False)
        kinds = [self._kinds(one, evidence) for one in self._names]
        if strange := [i for i, one in enumerate(kinds) if one.strangers]:
            names = [self._names[i].name for i in strange]
            raise NoCopiesError(_refusal(names, [self.ranks[one] for one in kinds[strange[0]].strangers or ()]))
        return self._put_together(selection, place, kinds)

    @cached_property
    def _names(self) -> list[_Name]:
        columns: dict[str, dict[int, int]] = {}
        for position, card in enumerate(self.cards):
            for column, one in enumerate(card):
                columns.setdefault(one.name, {})[position] = column
        return [_Name(name, there, self.positions, self.held) for name, there in columns.items()]

    def _kinds(self, one: _Name, evidence: Tensor | None) -> _Kinds:
        index = torch.zeros(max(1, one.count), dtype=torch.long, device="cpu")
        if one.count < 2 or evidence is None:
            return _Kinds(index.tolist())
        totals = one.totals(evidence)
        gradients, weights = totals.split(2, dim=1)
        seen = bool(torch.isfinite(gradients).all() and (gradients[:, 0] > 0).any())
        apart, left, kind = len(self.cards) > 1, torch.ones_like(index, dtype=torch.bool), 0
        while left.any():
            first = int(left.nonzero()[0, 0])
            alike = _alike(gradients, first) if seen else torch.ones_like(left)
            if apart:
                alike = alike & _alike(weights, first)
            index[left & alike] = kind
            left, kind = left & ~alike, kind + 1
        return _Kinds(index.tolist(), not seen, self._strangers(one, index))

    def _strangers(self, one: _Name, index: Tensor) -> tuple[int, int] | None:
        """Two ranks in the same position that hold different ones."""
        kinds = index[one.member]
        for position in one.columns:
            here = one.positions == position
            first = kinds[here][:1]
            if (other := one.rows[here & (kinds != first)]).numel():
                return int(one.rows[here][0]), int(other[0])
        return None

    def _put_together(self, selection: Selection, place: int, kinds: Sequence[_Kinds]) -> Share:
        position = int(self.positions[place])
        labels: list[str] = []
        params: list[Served | int] = []
        places, shares = [0] * len(selection.params), [0.0] * len(selection.params)
        for one, (index, *_) in zip(self._names, kinds, strict=True):
            own = one.columns.get(position)
            of_rows = torch.tensor(index, device="cpu")[one.member]
            for kind in range(max(index) + 1):
                rows = of_rows == kind
                here = rows & (one.rows == place)
                first = min(one.columns) if not rows.any() else int(one.positions[rows].min())
                # What a rank serves and holds nothing of is any of them.
                is_own = own is not None and bool(here.any() or not (kind or (one.rows == place).any()))
                if is_own and own is not None:
                    places[own] = len(labels)
                    shares[own] = 1.0 / (float(one.alike[here][0]) * index.count(kind)) if here.any() else 0.0
                params.append(own if is_own and own is not None else self.cards[first][one.columns[first]])
                labels.append(one.name if max(index) == 0 else f"rank{first}.{one.name}")
        undecided = any(one.undecided for one in kinds)
        everything = _everything(selection, labels, params)
        return Share(everything, tuple(places), torch.tensor(shares, dtype=torch.float64, device="cpu"), undecided)


def _alike(found: Tensor, place: int) -> Tensor:
    """Which of some norms and sums, `(N, 2)`, are those at this place; what is not finite says nothing."""
    within = ALIKE * torch.maximum(found[:, 0], found[place, 0])
    apart = (found - found[place]).abs() > within[:, None]
    return ~apart.any(dim=1)


def _everything(selection: Selection, labels: Sequence[str], params: Sequence[Served | int]) -> Selection:
    """A selection of own parameters, by their places, and of what stands in for those of others."""
    given: list[tuple[Tensor, Layout]] = []
    groups: list[str] = []
    layers: list[str] = []
    for one, label in zip(params, labels, strict=True):
        if isinstance(one, int):
            given.append((selection.params[one], selection.layouts[one]))
            name, group, layer = selection.names[one], selection.groups[one], selection.layers[one]
        else:
            given.append(one.standing_in())
            name, group, layer = one.name, one.group, one.layer
        # Of several that are called the same the label says on which rank.
        layers.append(label.removesuffix(name) + layer)
        groups.append(group)
    tensors, layouts = zip(*given, strict=True) if given else ((), ())
    of_all = {"names": tuple(labels), "layers": tuple(layers), "groups": tuple(groups)}
    return replace(selection, params=tensors, layouts=layouts, **of_all)


def _refusal(names: Sequence[str], ranks: Sequence[int]) -> str:
    listed = ", ".join(map(repr, names[:3])) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    return (
        f"the gradients of {listed} differ between {named(ranks)}, which hold {'them' if len(names) > 1 else 'it'} "
        "under one name: nothing has averaged them, so that they are no copies of one parameter, and no norm would be "
        f"right. If they are copies, average their gradients before they are clipped, or leave them out with exclude=. "
        f"{REMEDY}"
    )
