"""Local sizes to global sizes: what all ranks know together of what each of them measured.

Where every rank holds whole gradients, as in one process and under DDP, which averages them before the clipper sees
them, nothing is communicated. Where some are cut into pieces, or ranks hold different parameters, each rank adds up the
p-th powers of what it holds, and one all-reduce makes the norms of all, the same bits on every rank.

Each sum counts by its share: a piece that `n` ranks hold counts 1 / n on each of them. Who holds what is agreed once,
and with it the settings; whether copies are copies is seen in the first step in which they have gradients.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_gradclip.gradients import ranks, watch
from lightning_gradclip.gradients.norms import Tensors, home, integers_on
from lightning_gradclip.gradients.ranks import Meeting
from lightning_gradclip.gradients.read import fingerprints
from lightning_gradclip.select import holders, layout
from lightning_gradclip.select.holders import Holders, Served
from lightning_gradclip.select.parameters import Selection

# The p-th powers of float32 numbers, 1e-45 to 3e38, stay within float64 up to here.
_MOST_SAFE_POWER = 6.0


@dataclass(frozen=True, slots=True)
class Reduced:
    """What all ranks know together: vectors of p-norms, and for each vector of numbers its total, as they were given.

    `present` is more than 0 for each parameter of which some rank has a gradient, `(P,)`; None: as on this rank.
    `nothing` says that this rank has none at all, and no other rank has.
    """

    norms: tuple[Tensor, ...]
    present: Tensor | None = None
    totals: tuple[Tensor, ...] = ()
    nothing: bool = False


class Reducer:
    """Reduces the sizes of the same parameters at every step; made by all ranks of a meeting at the same time.

    Args:
        selection: The parameters that this rank serves.
        meeting: The ranks that hold them, pieces of them, copies, or what belongs to one norm with them.
        settings: What must be the same on all ranks, by its name.
        apart: The ranks, in order, over which different parameters are held; None: all serve the same ones.

    Attributes:
        everything: The parameters of all ranks, `(P,)`, with stand-ins for those of which nothing is here.
        numels: The numbers of entries of them over all ranks.
        in_doubt: Whether `prove` is to be asked before the next step.

    Raises:
        RuntimeError: If ranks disagree about a setting, or serve different parameters that nothing sets apart.
    """

    def __init__(
        self,
        selection: Selection,
        meeting: Meeting,
        settings: Mapping[str, str] | None = None,
        apart: Sequence[int] | None = None,
    ) -> None:
        self._selection, self._meeting = selection, meeting
        position = 0 if apart is None else apart.index(ranks.this_rank())
        card = holders.served(selection)
        positions = _agreed(meeting, settings or {}, card, position)
        cards = [card] if apart is None else _cards(card, apart)
        self._width = max(map(len, cards))
        here = holders.held(selection, ranks.this_rank())
        self._holders = Holders(meeting.ranks, positions, cards, self._each(here.T, fill=-1.0).transpose(1, 2))
        self._steps = 0
        self._take(None)
        self.in_doubt = self._holders.must_be_copies

    @property
    def device(self) -> torch.device:
        """Where numbers about the parameters belong, which some frameworks move, all of them, after this was made."""
        if not self._selection.params:
            return self._meeting.home()
        first = self._selection.params[0].device
        if first != self._first:
            self._first, self._home = first, home(self._selection.params)
        return self._home

    @property
    def has_met_all(self) -> bool:
        """Whether the norms are of all ranks of the run."""
        return len(self._meeting.ranks) == ranks.count()

    def here(self, of_all: Sequence[int]) -> Sequence[int]:
        """Of numbers for the parameters of all ranks, those for the ones that this rank serves."""
        return of_all if self._places is None else [of_all[place] for place in self._places]

    def own(self, of_all: Tensor) -> Tensor:
        """The same of a vector, `(P,)`."""
        return of_all if self._places is None else of_all[integers_on(self._places, of_all.device)]

    def prove(self, gradients: Tensors) -> bool:
        """See whether copies are copies, by the gradients of this step; all ranks ask before the same step.

        Returns:
            Whether other parameters are served than before: what was taken for copies were several.

        Raises:
            RuntimeError: If they are none, and nothing sets ranks apart.
        """
        self._steps += 1
        # What has no gradient yet shows itself later, and whoever never has one does not cost a collective a step.
        if self._steps & (self._steps - 1):
            return False
        held = [layout.local(one) for one in self._selection.params]
        mine = torch.cat([fingerprints(gradients), fingerprints(held)], dim=1)
        before = self.everything.names
        self._take(self._each(mine))
        return self.everything.names != before

    def _take(self, evidence: Tensor | None) -> None:
        """Know who holds what."""
        share = self._holders.share(self._selection, self._meeting.place, evidence)
        self.everything, self._places, self.in_doubt = share.everything, share.places, share.undecided
        self.numels = tuple(
            parameter.numel() if one.numel is None else one.numel
            for parameter, one in zip(self.everything.params, self.everything.layouts, strict=True)
        )
        self._wide = any(one.dtype in (torch.float64, torch.complex128) for one in self.everything.params)
        self._own_shares = share.shares
        self._kept: dict[torch.device, tuple[Tensor, Tensor]] = {}
        self._first: torch.device | None = None

    def reduce(
        self,
        norms: Sequence[Tensor],
        present: Sequence[bool],
        norm_type: float,
        numbers: Sequence[Tensor] = (),
        owner: Tensor | None = None,
    ) -> Reduced:
        """Global norms from local ones, in one collective.

        Args:
            norms: Vectors of p-norms of what this rank holds of the parameters that it serves.
            present: For each of them whether this rank has a gradient of it.
            norm_type: The p of the norms, in (0, inf].
            numbers: Vectors of numbers, like the norms, to be added up; not beside inf-norms.
            owner: Where norms are of parts of the parameters of all ranks, `(U,)`, the one that each belongs to.

        Returned norms are of the parameters of all ranks, `(P,)`, or of the parts, `(U,)`. They keep the dtype in which
        they were measured; on CPU the widest in which a rank measured them.
        """
        device = self.device
        own, shares = self._shares_on(device)
        vectors = [one.to(device, torch.float64) for one in norms]
        joined = torch.cat(vectors if owner is not None else [self._spread(one) for one in vectors])
        share = (shares if owner is None else shares[owner]).repeat(len(norms))
        wide = [one.dtype == torch.float64 for one in norms]
        there = self._spread(integers_on(tuple(map(int, present)), device).to(torch.float64))
        flags = integers_on(tuple(map(int, wide)), device).to(torch.float64)
        totals = [one.to(device, torch.float64).mul(own).sum().view(1) for one in numbers]
        others = torch.cat([there, flags, *totals])
        if math.isinf(norm_type):
            # MAX loses NaN on some backends.
            together = torch.cat([joined.nan_to_num(nan=math.inf, posinf=math.inf), others])
            found, others = self._meeting.largest(together).split([len(joined), len(others)])
        elif self._wide or norm_type > _MOST_SAFE_POWER:
            found, others = self._gathered(joined, share, others, norm_type)
        else:
            together = torch.cat([joined.pow(norm_type) * share, others])
            powers, others = self._meeting.total(together).split([len(joined), len(others)])
            found = powers.pow(1.0 / norm_type)
        there, wider, totals = others.split([len(there), len(wide), len(numbers)])
        # A rank that has a gradient need not look.
        nothing = not any(present) and not there.any().item()
        # On a device, where looking would make the host wait, all ranks measure in the same.
        wide = wider.tolist() if device.type == "cpu" else wide
        pieces = zip(found.chunk(len(norms)), norms, wide, strict=True)
        found = tuple(one.to(torch.float64 if is_wide else local.dtype) for one, local, is_wide in pieces)
        return Reduced(found, there, totals.unbind(), nothing)

    def anywhere(self, flags: Sequence[bool]) -> list[bool]:
        """For each parameter of all ranks whether its flag is up on some of them, in one collective."""
        found = self._spread(torch.tensor(flags, dtype=torch.float64, device="cpu"))
        return [one > 0 for one in self._meeting.largest(found).tolist()]

    def _spread(self, own: Tensor) -> Tensor:
        """Numbers for the parameters that this rank serves, among zeros for those of others."""
        if self._places is None:
            return own
        spread = own.new_zeros(len(self.numels))
        return spread.index_add_(0, integers_on(self._places, own.device), own)

    def _gathered(self, norms: Tensor, share: Tensor, others: Tensor, norm_type: float) -> tuple[Tensor, Tensor]:
        """The same where powers could leave the range of float64: every rank gets all norms and scales them."""
        per_rank = self._meeting.each(torch.cat([norms, share, others]))
        theirs, shares, rest = per_rank.split([len(norms), len(share), len(others)], dim=1)
        largest = theirs.amax(dim=0)
        scale = torch.where((largest > 0) & torch.isfinite(largest), largest, 1.0)
        return scale * ((theirs / scale).pow(norm_type) * shares).sum(dim=0).pow(1.0 / norm_type), rest.sum(dim=0)

    def _shares_on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """The shares of the parameters that this rank serves, and of those of all ranks."""
        if device not in self._kept:
            own = self._own_shares.to(device)
            self._kept[device] = own, self._spread(own)
        return self._kept[device]

    def _each(self, own: Tensor, *, fill: float = 0.0) -> Tensor:
        """Rows for the parameters of each rank, `(R, P, N)`, from those of this one, filled up to as many."""
        padded = own.new_full((self._width, own.shape[1]), fill)
        padded[: len(own)] = own
        return self._meeting.each(padded.flatten()).to("cpu").view(len(self._meeting.ranks), *padded.shape)


def reduced(
    reducer: Reducer | None,
    gradients: Tensors,
    norms: Sequence[Tensor],
    norm_type: float,
    numbers: Sequence[Tensor] = (),
    owner: Tensor | None = None,
) -> Reduced:
    """What all ranks know: `Reducer.reduce` where ranks hold pieces, else what this one knows."""
    if reducer is None:
        return Reduced(tuple(norms), totals=tuple(one.sum() for one in numbers))
    present = [gradient is not None for gradient in gradients]
    return reducer.reduce(norms, present, norm_type, numbers, owner)


def reducer_for(
    selection: Selection,
    settings: Mapping[str, str] | None = None,
    apart: Sequence[int] | None = None,
    unmatched: Mapping[str, str] | None = None,
) -> Reducer | None:
    """A reducer where ranks hold pieces, or are apart, or have parameters that nobody keeps alike; else None.

    Refuses what is `unmatched` on all ranks that are apart, by its name, with what it says.
    """
    reached = _spread_over(selection)
    if apart is not None and len(apart) > 1:
        if reached is not None and ranks.this_rank() in reached:
            # Some may not know that others are apart.
            _agreed(Meeting(reached), settings or {})
        _require_match(unmatched or {}, apart)
        return Reducer(selection, Meeting(_reached(selection, apart)), settings, apart)
    if reached is None or ranks.this_rank() in reached:
        return None if reached is None else Reducer(selection, Meeting(reached), settings)
    whole = next((name for name, one in zip(selection.names, selection.layouts, strict=True) if not one.piece), None)
    if whole is not None:
        inside, aside = (holders.named(sorted(some)) for some in (reached, {*range(ranks.count())} - reached))
        said = (
            f"parameter {whole!r} is whole on {aside}, and others beside it are cut among {inside} only: it would be "
            f"clipped by another norm on {aside} than there. Put it on a mesh of all ranks, or name them: "
            "Clipper(..., process_group=...)"
        )
        watch.refuse(said)
        raise RuntimeError(said)
    return None


def _spread_over(selection: Selection) -> set[int] | None:
    """The ranks among which something is cut, and on which the rest lies beside it; None: nobody has to be asked."""
    ignored = any(one.ignored for one in selection.layouts) and ranks.are_several()
    if not ignored and all(one.pieces == 1 for one in selection.layouts):
        return None
    # What no mesh knows may be on any rank, but is asked for on those of the others.
    of_meshes = [one.ranks for one in selection.layouts if one.distributed or one.pieces > 1]
    if ignored or None in of_meshes:
        return {*range(ranks.count())}
    return {rank for some in of_meshes for rank in some or ()}


def _require_match(unmatched: Mapping[str, str], apart: Sequence[int]) -> None:
    """Refuse what is wrong on every one of the ranks that are apart, by what it says on this one."""
    everywhere = [json.loads(text) for text in Meeting(apart).texts(json.dumps([*unmatched]))]
    for name, said in unmatched.items():
        if all(name in one for one in everywhere):
            raise ValueError(said)


def _reached(selection: Selection, apart: Sequence[int]) -> set[int]:
    """The ranks that belong to one norm: those that are apart, and those that share something with one of them."""
    shared = [{*one.together} for one in selection.layouts if one.together]
    mine = max(shared, key=len, default=set[int]())
    if any(not one <= mine for one in shared):
        # Along several dimensions of a mesh, on each of which something else is cut.
        mine = mine.union(*({*one.ranks} for one in selection.layouts if one.ranks))
    flags = torch.zeros(ranks.count(), dtype=torch.float64, device="cpu")
    flags[[*mine, *apart]] = 1.0
    return {*Meeting(apart).largest(flags).nonzero()[:, 0].tolist()}


def _agreed(meeting: Meeting, settings: Mapping[str, str], card: Sequence[Served] = (), position: int = 0) -> Tensor:
    """The position of each rank; refuse to go on where the ranks would add up what does not belong together."""
    told = holders.written(card), "\n".join(f"{name}: {value}" for name, value in settings.items())
    mine = [len(card), *map(holders.checksum, told), position]
    everyone = meeting.each(torch.tensor(mine, dtype=torch.float64, device="cpu"))
    if (everyone[:, 2] != everyone[0, 2]).any():
        of_ranks = [dict(line.split(": ", 1) for line in text.split("\n")) for text in meeting.texts(told[1])]
        raise RuntimeError(
            f"ranks clip by different settings, {holders.disagreements(of_ranks, meeting.ranks)}; "
            "give every rank the same"
        )
    positions = everyone[:, 3].long()
    for i, (count, *_) in enumerate(everyone.tolist()):
        first = int((positions == positions[i]).nonzero()[0, 0])
        if not torch.equal(everyone[i, :2], everyone[first, :2]):
            raise RuntimeError(
                f"rank {meeting.ranks[i]} serves {count:.0f} parameters and rank {meeting.ranks[first]} "
                f"{everyone[first, 0]:.0f} with other names or shapes or in another order, so their norms cannot be "
                "added up; give the optimizer the same parameters, in the same order, on every rank. "
                f"{holders.REMEDY}"
            )
    return positions


def _cards(card: Sequence[Served], apart: Sequence[int]) -> list[list[Served]]:
    """What is served in each position, from the ranks that are apart from this one."""
    meeting = Meeting(apart)
    texts = dict(zip(meeting.ranks, meeting.texts(holders.written(card)), strict=True))
    return [holders.read(texts[rank]) for rank in apart]
