"""What a step exchanges, and what agreeing costs, on up to 1,024 ranks: stages of a pipeline, sharded in two ways.

One process is the first of so many ranks, in a group of torch that only pretends to exchange anything. What all ranks
would have told it is made by hand, and its numbers are compared with what they have to be.

python benchmarks/ranks/many.py [--quick]    # prints a table
"""

import argparse
import math
import time
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.nn import Parameter
from torch.testing._internal.distributed.fake_pg import FakeStore

from lightning_gradclip import AGC, ClipMethod, Clipper, NormClip
from lightning_gradclip.gradients.ranks import Meeting
from lightning_gradclip.select import holders

# Stages, ranks over which each is sharded, and ranks of its tensor parallelism.
SHAPES = [(2, 2, 2), (4, 4, 4), (8, 8, 4), (8, 16, 8)]
LAYERS, MATRICES, NORMS, STEPS = 10, 7, 2, 5
METHODS: dict[str, Callable[[], ClipMethod]] = {
    "NormClip()": lambda: NormClip(max_norm=1e9),
    'NormClip(per="parameter")': lambda: NormClip(max_norm=1e9, per="parameter"),
    "AGC()": lambda: AGC(clip_factor=1e9),
}


def piece(mesh: DeviceMesh, *placements: Any) -> Parameter:
    """A parameter and its gradient, of 512 entries along each dim."""
    shape = torch.Size([512] * len(placements))
    like = {"shape": shape, "stride": torch.empty(shape, device="meta").stride()}
    held = torch.ones([size // mesh.size(dim) for dim, size in enumerate(shape)])
    whole = [DTensor.from_local(held.clone(), mesh, placements, run_check=False, **like) for _ in range(2)]
    result = Parameter(whole[0])
    result.grad = whole[1]
    return result


def stage(mesh: DeviceMesh) -> list[tuple[str, Parameter]]:
    """Matrices that are cut both ways, and norms that the ranks of tensor parallelism hold copies of."""
    both, sharded = mesh["dp", "tp"], mesh["dp"]
    pairs: list[tuple[str, Parameter]] = []
    for layer in range(LAYERS):
        pairs += [(f"{layer}.matrix{i}", piece(both, Shard(0), Shard(1))) for i in range(MATRICES)]
        pairs += [(f"{layer}.norm{i}", piece(sharded, Shard(0))) for i in range(NORMS)]
    return pairs


class Exchange:
    """Counts what is exchanged."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, int]] = []

    def watching(self) -> Any:
        return patch.multiple(
            Meeting,
            _reduced=self._counted("all_reduce", Meeting._reduced),
            each=self._counted("all_gather", Meeting.each),
        )

    def _counted(self, kind: str, call: Any) -> Any:
        def counted(meeting: Meeting, vector: Tensor, *rest: Any) -> Tensor:
            self.calls.append((kind, vector.numel() * vector.element_size()))
            return call(meeting, vector, *rest)

        return counted


def seconds(call: Callable[[], Any]) -> tuple[float, Any]:
    began = time.perf_counter()
    result = call()
    return time.perf_counter() - began, result


def agreeing(clipper: Clipper, mesh: DeviceMesh) -> float:
    """Seconds for making out who holds what, from what all ranks would have told."""
    selection, (stages, sharded, tensor) = clipper._selection, mesh.mesh.shape
    world = mesh.mesh.numel()
    place = torch.arange(world).view(stages, sharded, tensor)
    of_stage, of_shard, of_tensor = (
        one.flatten() for one in torch.meshgrid(*map(torch.arange, place.shape), indexing="ij")
    )
    card = holders.served(selection)
    held = torch.zeros(world, 2, len(card), dtype=torch.float64)
    for i, name in enumerate(selection.names):
        is_norm = "norm" in name
        held[:, 0, i] = (of_stage * sharded * tensor + (of_tensor if is_norm else 0)).double()
        held[:, 1, i] = (of_shard if is_norm else of_shard * tensor + of_tensor).double()
    evidence = torch.ones(world, len(card), 4, dtype=torch.float64)
    # Each stage has gradients of its own.
    evidence[:, :, 0] += of_stage[:, None]
    everyone = holders.Holders(tuple(range(world)), of_stage, [card] * stages, held)
    took, share = seconds(lambda: everyone.share(selection, 0, evidence))
    # As if they had.
    clipper._reducer._holders = everyone
    clipper._reducer._take(evidence)
    clipper._limiter.serve(selection, clipper._reducer)
    assert len(share.everything.names) == stages * len(card)
    expected = [1.0 / tensor if "norm" in name else 1.0 for name in selection.names]
    assert share.shares.tolist() == expected
    return took


def measured(shape: tuple[int, int, int]) -> dict[str, Any]:
    world = shape[0] * shape[1] * shape[2]
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world)
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("pp", "dp", "tp"))
    pairs, found = stage(mesh), {}
    for label, method in METHODS.items():
        exchange = Exchange()
        with exchange.watching():
            built, clipper = seconds(lambda method=method: Clipper(pairs, method(), process_group=mesh["pp"]))
            told = sum(size for _, size in exchange.calls)
            agreed = agreeing(clipper, mesh)
            clipper.step()
            exchange.calls.clear()
            step = min(seconds(clipper.step)[0] for _ in range(STEPS))
        kinds = {kind for kind, _ in exchange.calls}
        collectives = f"{len(exchange.calls) / STEPS:g} {', '.join(kinds)}"
        found[label] = [collectives, exchange.calls[0][1], told, built * 1e3, agreed * 1e3, step * 1e6]
    dist.destroy_process_group()
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="8 and 64 ranks")
    quick = parser.parse_args().quick
    torch.set_num_threads(1)
    print(f"{LAYERS * (MATRICES + NORMS)} parameters in each stage; what this rank sends, without a network\n")
    header = ["ranks: pp x dp x tp", "method", "a step exchanges", "bytes", "`Clipper()` tells, bytes", "it takes, ms"]
    header += ["who holds what, ms, once", "a step, microseconds"]
    print(f"| {' | '.join(header)} |\n|{' --- |' * len(header)}")
    for shape in SHAPES[:2] if quick else SHAPES:
        for label, (collectives, sent, told, built, agreed, step) in measured(shape).items():
            ranks = f"{math.prod(shape):,}: {' x '.join(map(str, shape))}"
            cells = [ranks, f"`{label}`", collectives, f"{sent:,}", f"{told:,}"]
            print(f"| {' | '.join([*cells, *(f'{one:,.0f}' for one in (built, agreed, step))])} |")


if __name__ == "__main__":
    main()
