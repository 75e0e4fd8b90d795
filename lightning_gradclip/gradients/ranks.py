"""Who meets and how: the only file that talks to other ranks."""

import time
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_gradclip.select import layout

# Seconds between two looks for what another rank is about to say.
_PAUSE = 0.002


class Meeting:
    """Some ranks of the run, or all, that exchange numbers; whatever one of them asks for all ask for together."""

    def __init__(self, ranks: Iterable[int] | None = None) -> None:
        wanted = sorted(range(dist.get_world_size()) if ranks is None else ranks)
        self._group = None if len(wanted) == dist.get_world_size() else _group_of(wanted)
        self.ranks = tuple(wanted if self._group is None else dist.get_process_group_ranks(self._group))
        self.place = self.ranks.index(dist.get_rank())

    # What is given to these is not to be used any more.
    def total(self, vector: Tensor) -> Tensor:
        """The sum of the vectors of all ranks."""
        return self._reduced(vector, dist.ReduceOp.SUM)

    def largest(self, vector: Tensor) -> Tensor:
        """The largest of each number; NaN, which gets lost on some backends, is not to be among them."""
        return self._reduced(vector, dist.ReduceOp.MAX)

    def each(self, vector: Tensor) -> Tensor:
        """The vectors of all ranks, which are of one length, `(R, N)`."""
        carried = vector.to(carrier(vector.device))
        found = [torch.empty_like(carried) for _ in self.ranks]
        dist.all_gather(found, carried, group=self._group)
        return torch.stack(found).to(vector.device)

    def texts(self, text: str) -> list[str]:
        """The texts of all ranks."""
        mine = text.encode()
        lengths = self.each(torch.tensor([float(len(mine))], device="cpu")).flatten().int().tolist()
        padded = torch.zeros(max(*lengths, 1), dtype=torch.uint8, device="cpu")
        padded[: len(mine)] = torch.tensor(list(mine), dtype=torch.uint8, device="cpu")
        rows = zip(self.each(padded), lengths, strict=True)
        return [bytes(row[:length].tolist()).decode() for row, length in rows]

    def home(self) -> torch.device:
        """Where numbers belong that are about nothing on this rank."""
        return carrier(torch.device("cpu"))

    def _reduced(self, vector: Tensor, op: dist.ReduceOp.RedOpType) -> Tensor:
        carried = vector.to(carrier(vector.device))
        dist.all_reduce(carried, op=op, group=self._group)
        return carried.to(vector.device)


def average(value: Tensor) -> float:
    """The mean over all ranks of the run of a number, 0-d, which the host waits for."""
    if not are_several():
        return value.item()
    meeting = Meeting()
    return meeting.total(value.view(1)).item() / len(meeting.ranks)


def members(process_group: Any) -> tuple[int, ...] | None:
    """The ranks of a ProcessGroup or a DeviceMesh, in its order; None for None.

    Raises:
        TypeError: If it is neither.
        ValueError: If this rank is not one of them.
    """
    if process_group is None:
        return None
    mesh = getattr(process_group, "mesh", None)
    if isinstance(mesh, Tensor):
        ranks = tuple(mesh.flatten().tolist())
    elif dist.is_available() and isinstance(process_group, dist.ProcessGroup):
        ranks = tuple(dist.get_process_group_ranks(process_group))
    elif dist.is_available() and process_group == dist.GroupMember.NON_GROUP_MEMBER:
        ranks = ()
    else:
        raise TypeError(
            f"process_group must be a ProcessGroup or a DeviceMesh, got {process_group!r} "
            f"({type(process_group).__name__}); write process_group=mesh['pp'], or None where ranks hold the same"
        )
    if dist.get_rank() not in ranks:
        raise ValueError(
            f"process_group has the ranks {list(ranks)}, and this one, {dist.get_rank()}, is not among them; "
            "give each rank the group that it is in, such as process_group=mesh['pp']"
        )
    return ranks


def are_several() -> bool:
    """Whether this process is one of several of a run."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def count() -> int:
    """How many processes the run has."""
    return dist.get_world_size()


def this_rank() -> int:
    """The number of this process in the run."""
    return dist.get_rank()


def is_first_rank() -> bool:
    """Whether this process speaks for all of them."""
    return not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0


class Board:
    """Where ranks leave notes for whoever comes last, who tells the others what they come to: no collective.

    Args:
        key: Its name, the same on all ranks.
    """

    def __init__(self, key: str) -> None:
        self._key = key
        # Where the run keeps what its ranks met by; there is no public way to it.
        self._store: Any = dist.distributed_c10d._get_default_store()  # pyright: ignore[reportPrivateUsage]

    def leave(self, note: str) -> list[str] | None:
        """The notes of all ranks for whoever leaves the last one, None for the others."""
        self._store.set(f"{self._key}/{dist.get_rank()}", note)
        if self._store.add(f"{self._key}/left", 1) != dist.get_world_size():
            return None
        return [self._store.get(f"{self._key}/{rank}").decode() for rank in range(dist.get_world_size())]

    def conclude(self, said: str) -> None:
        """Tell all ranks."""
        self._store.set(f"{self._key}/said", said)

    def conclusion(self, patience: float) -> str | None:
        """What all ranks are told; None if nothing is there after so many seconds."""
        end = time.monotonic() + patience
        while not self._store.check([f"{self._key}/said"]):
            if time.monotonic() >= end:
                return None
            time.sleep(_PAUSE)
        return self._store.get(f"{self._key}/said").decode()


def settled(gradient: Tensor, parameter: Tensor) -> Tensor:
    """A gradient laid out like its parameter: what is still to be added up over ranks is added up, by a collective."""
    if not layout.is_distributed(gradient) or not layout.is_distributed(parameter):
        return gradient
    wanted = parameter.placements
    return gradient if gradient.placements == wanted else gradient.redistribute(placements=wanted)


def carrier(device: torch.device) -> torch.device:
    """The device whose tensors the ranks can exchange: NCCL knows no CPU tensors, which offloaded gradients are."""
    kinds = [one.partition(":")[0] for one in str(dist.get_backend_config()).split(",")]
    return device if device.type in kinds else torch.device("cpu" if "cpu" in kinds else kinds[-1])


def _group_of(ranks: Sequence[int]) -> dist.ProcessGroup:
    """The group of these ranks: one that the run has, such as that of a mesh, or a new one, which ends with the run."""
    # torch keeps them in this table until the run destroys them, and has no public way to ask for one.
    known: dict[Any, dict[int, int]] = dist.distributed_c10d._world.pg_group_ranks  # pyright: ignore[reportPrivateUsage]
    usual = str(dist.get_backend_config())
    for group, places in known.items():
        # Some are made for the host alone, for checkpoints.
        if sorted(places) == ranks and str(dist.get_backend_config(group)) == usual:
            return group
    made: Any = dist.new_group(list(ranks), use_local_synchronization=True)
    return made
