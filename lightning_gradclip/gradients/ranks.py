"""Local sizes to global sizes: the only file in which ranks exchange what they measured.

Where every rank holds whole gradients, as in one process and under DDP, which averages them before the clipper sees
them, nothing is communicated. Where some are cut into pieces, each rank adds up the p-th powers of its pieces, and one
all-reduce makes the norms of all, the same bits on every rank.

Each parameter's sum counts by its share: a parameter cut into `pieces` different pieces on `holders` ranks is there
`holders / pieces` times, so each sum counts `pieces / holders`. That holds for any mix of whole parameters, meshes and
FSDP groups, as long as all ranks serve the same parameters in the same order, which is checked once.
"""

import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_gradclip.gradients.norms import Tensors, home, integers_on
from lightning_gradclip.select import layout
from lightning_gradclip.select.layout import Layout
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
    """Reduces the sizes of the same parameters at every step; made by all ranks at the same time.

    Of the ranks in the group, or all, which must serve the same parameters: a RuntimeError says if they do not.
    `numels` are the numbers of entries of the parameters over all ranks.
    """

    def __init__(
        self,
        names: Sequence[str],
        params: Sequence[Tensor],
        layouts: Sequence[Layout],
        group: dist.ProcessGroup | None = None,
    ) -> None:
        self._params = params
        self._group = group
        self.numels = tuple(
            parameter.numel() if one.numel is None else one.numel
            for parameter, one in zip(params, layouts, strict=True)
        )
        self._wide = any(parameter.dtype in (torch.float64, torch.complex128) for parameter in params)
        self._kept: dict[torch.device, Tensor] = {}
        self._first: torch.device | None = None
        self._require_same(names)
        rank = dist.get_rank()
        holds = torch.tensor([float(one.ranks is None or rank in one.ranks) for one in layouts], device="cpu")
        pieces = torch.tensor([one.pieces for one in layouts], dtype=torch.float64, device="cpu")
        self._shares = holds * pieces / self._all_reduce(holds.clone())

    @property
    def device(self) -> torch.device:
        """Where numbers about the parameters belong, which some frameworks move, all of them, after this was made."""
        first = self._params[0].device
        if first != self._first:
            self._first, self._home = first, home(self._params)
        return self._home

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
            norms: Vectors of p-norms of what this rank holds, `(P,)`, or `(U,)` with their parameters as `owner`.
            present: For each parameter whether this rank has a gradient of it.
            norm_type: The p of the norms, in (0, inf].
            numbers: Vectors of numbers, `(P,)`, to be added up; not beside inf-norms.
            owner: The parameter that each norm belongs to, `(U,)`.

        Norms keep the dtype in which they were measured; on CPU the widest in which a rank measured them.
        """
        device = self.device
        shares = self._shares_on(device)
        joined = torch.cat([one.to(device, torch.float64) for one in norms])
        share = (shares if owner is None else shares[owner]).repeat(len(norms))
        wide = [one.dtype == torch.float64 for one in norms]
        flags = integers_on((*map(int, present), *map(int, wide)), device).to(torch.float64)
        others = torch.cat([flags, *(one.to(device, torch.float64).mul(shares).sum().view(1) for one in numbers)])
        if math.isinf(norm_type):
            # MAX loses NaN on some backends.
            together = torch.cat([joined.nan_to_num(nan=math.inf, posinf=math.inf), others])
            found, others = self._all_reduce(together, dist.ReduceOp.MAX).split([len(joined), len(others)])
        elif self._wide or norm_type > _MOST_SAFE_POWER:
            found, others = self._gathered(joined, share, others, norm_type)
        else:
            together = torch.cat([joined.pow(norm_type) * share, others])
            powers, others = self._all_reduce(together).split([len(joined), len(others)])
            found = powers.pow(1.0 / norm_type)
        there, wider, totals = others.split([len(present), len(wide), len(numbers)])
        # A rank that has a gradient need not look.
        nothing = not any(present) and not there.any().item()
        # On a device, where looking would make the host wait, all ranks measure in the same.
        wide = wider.tolist() if device.type == "cpu" else wide
        pieces = zip(found.chunk(len(norms)), norms, wide, strict=True)
        found = tuple(one.to(torch.float64 if is_wide else local.dtype) for one, local, is_wide in pieces)
        return Reduced(found, there, totals.unbind(), nothing)

    def anywhere(self, flags: Sequence[bool]) -> list[bool]:
        """For each flag whether it is up on some rank, in one collective."""
        found = torch.tensor(flags, dtype=torch.float64, device="cpu")
        return [one > 0 for one in self._all_reduce(found, dist.ReduceOp.MAX).tolist()]

    def _gathered(self, norms: Tensor, share: Tensor, others: Tensor, norm_type: float) -> tuple[Tensor, Tensor]:
        """The same where powers could leave the range of float64: every rank gets all norms and scales them."""
        per_rank = self._all_gather(torch.cat([norms, share, others]))
        theirs, shares, rest = per_rank.split([len(norms), len(share), len(others)], dim=1)
        largest = theirs.amax(dim=0)
        scale = torch.where((largest > 0) & torch.isfinite(largest), largest, 1.0)
        return scale * ((theirs / scale).pow(norm_type) * shares).sum(dim=0).pow(1.0 / norm_type), rest.sum(dim=0)

    def _shares_on(self, device: torch.device) -> Tensor:
        if device not in self._kept:
            self._kept[device] = self._shares.to(device)
        return self._kept[device]

    def _require_same(self, names: Sequence[str]) -> None:
        """Refuse to go on where the ranks would add up norms of different parameters."""
        mine = [len(names), zlib.crc32("\n".join(names).encode())]
        everyone = self._all_gather(torch.tensor(mine, dtype=torch.float64, device="cpu")).tolist()
        other = next((rank for rank, theirs in enumerate(everyone) if theirs != everyone[0]), None)
        if other is not None:
            raise RuntimeError(
                f"rank {other} serves {everyone[other][0]:.0f} parameters and rank 0 {everyone[0][0]:.0f} with other "
                "names or in another order, so their norms cannot be added up; give the optimizer the same parameters, "
                "in the same order, on every rank"
            )

    # What is given to these two is not to be used any more.
    def _all_reduce(self, vector: Tensor, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> Tensor:
        carried = vector.to(_carrier(vector.device))
        dist.all_reduce(carried, op=op, group=self._group)
        return carried.to(vector.device)

    def _all_gather(self, vector: Tensor) -> Tensor:
        """The vectors of all ranks, `(world, N)`."""
        carried = vector.to(_carrier(vector.device))
        found = [torch.empty_like(carried) for _ in range(dist.get_world_size(self._group))]
        dist.all_gather(found, carried, group=self._group)
        return torch.stack(found).to(vector.device)


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


def reducer_for(selection: Selection) -> Reducer | None:
    """A reducer where ranks hold pieces, else None."""
    cut = [one.ranks for one in selection.layouts if one.pieces > 1]
    if not cut:
        return None
    group: Any = None
    if None not in cut:
        ranks = sorted({rank for ranks in cut for rank in ranks or ()})
        if dist.get_rank() not in ranks:
            return None
        if len(ranks) < dist.get_world_size():
            group = dist.new_group(ranks, use_local_synchronization=True)
    return Reducer(selection.names, selection.params, selection.layouts, group)


def settled(gradient: Tensor, parameter: Tensor) -> Tensor:
    """A gradient laid out like its parameter: what is still to be added up over ranks is added up, by a collective."""
    if not layout.is_distributed(gradient) or not layout.is_distributed(parameter):
        return gradient
    wanted = parameter.placements
    return gradient if gradient.placements == wanted else gradient.redistribute(placements=wanted)


def is_first_rank() -> bool:
    """Whether this process speaks for all of them."""
    return not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0


def _carrier(device: torch.device) -> torch.device:
    """The device whose tensors the ranks can exchange: NCCL knows no CPU tensors, which offloaded gradients are."""
    kinds = [one.partition(":")[0] for one in str(dist.get_backend_config()).split(",")]
    return device if device.type in kinds else torch.device("cpu" if "cpu" in kinds else kinds[-1])
