"""Local sizes to global sizes: the only file that knows about ranks.

Under DDP gradients are averaged and bit-identical on all ranks before the clipper sees them, so nothing is
communicated. Gradients that are cut into shards would give local norms that are silently wrong; they are refused.
"""

from collections.abc import Iterable

import torch.distributed as dist
from torch import Tensor


def require_whole(named: Iterable[tuple[str, Tensor]]) -> None:
    """Refuse parameters of which this rank holds only a piece.

    Raises:
        NotImplementedError: If a parameter is a DTensor (FSDP2, tensor parallel) or flattened by FSDP.
    """
    for name, parameter in named:
        kind = _sharding(parameter)
        if kind:
            raise NotImplementedError(
                f"parameter {name!r} is sharded by {kind}, and the norm of one rank's piece is not the norm of the "
                "gradient; train with strategy='ddp', where every rank holds whole gradients"
            )


def global_sizes(sizes: Tensor) -> Tensor:
    """Sizes over all ranks from the sizes on this rank: the same, since every gradient is whole."""
    return sizes


def is_first_rank() -> bool:
    """Whether this process speaks for all of them."""
    return not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0


def _sharding(parameter: Tensor) -> str | None:
    # By name: importing torch.distributed.tensor costs half a second and most runs have no DTensor.
    if any(base.__name__ == "DTensor" for base in type(parameter).__mro__):
        return "FSDP2 or tensor parallelism (DTensor)"
    if getattr(parameter, "_fsdp_flattened", False):
        return "FSDP"
    return None
