"""Clipping gradients that FSDP2 has cut, on two processes, beside torch's `clip_grad_norm_`.

python benchmarks/cost/sharded.py [--quick]    # writes results/sharded.md and sharded.json
"""

import argparse
import statistics
import tempfile
import warnings
from collections.abc import Collection
from typing import Any

import timing
import torch
import torch.distributed as dist
from timing import Times, ratio, shown, table, timed
from torch import nn
from torch.multiprocessing.spawn import start_processes
from torch.nn.utils import clip_grad_norm_

from lightning_gradclip import Clipper, NormClip

WORLD = 2
# Layers of 32 x 32, two parameters each; and a few large ones.
MODELS = {"300 parameters, 158,400 in all": (150, 32), "8 parameters, 16.8M in all": (4, 2048)}
LIMITS = {"within the limit": 1e9, "clipped": 1e-3}
ROWS = {f"{model}, {what}": (*size, limit) for model, size in MODELS.items() for what, limit in LIMITS.items()}


def on_two_processes(rounds: int, labels: Collection[str] = tuple(ROWS)) -> dict[str, dict[str, Times]]:
    """By label the times of ours and of torch's on the first of the processes."""
    answers = torch.multiprocessing.get_context("fork").SimpleQueue()
    with tempfile.NamedTemporaryFile() as meeting:
        told = rounds, labels, meeting.name, answers
        context = start_processes(measure, told, nprocs=WORLD, join=False, start_method="fork")
        found = answers.get()
        context.join()
    return found


def measure(rank: int, rounds: int, labels: Collection[str], meeting: str, answers: Any) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=WORLD)
    found = {label: compare(*ROWS[label], rounds) for label in labels}
    if rank == 0:
        answers.put(found)
    dist.destroy_process_group()


def compare(layers: int, width: int, limit: float, rounds: int) -> dict[str, Times]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = nn.Sequential(*(nn.Linear(width, width) for _ in range(layers)))
    fully_shard(model, mesh=init_device_mesh("cpu", (WORLD,)))
    model(torch.randn(4, width)).square().mean().backward()
    clipper = Clipper(model, NormClip(max_norm=limit))
    cases = {"ours": clipper.step, "torch": lambda: clip_grad_norm_(model.parameters(), limit)}
    times = {name: Times() for name in cases}
    for _ in range(rounds):
        for name, case in cases.items():
            # Clipping changes what is clipped next.
            for parameter in model.parameters():
                parameter.grad.to_local().fill_(1.0)
            dist.barrier()
            times[name].add(*timed(case, 1))
    # The first calls plan and allocate.
    return {name: Times(one.cpu[rounds // 5 :], one.wall[rounds // 5 :]) for name, one in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="few rounds")
    quick = parser.parse_args().quick
    where, rows, data = timing.machine(), [], {}
    for label, times in on_two_processes(25 if quick else 125).items():
        one = ratio(times["ours"].wall, times["torch"].wall)
        ours, theirs = (statistics.median(times[name].wall) for name in ("ours", "torch"))
        rows.append([label, f"{ours:,.0f}", f"{theirs:,.0f}", shown(one)])
        data[label] = {"ours": ours, "torch": theirs, "ratio": one}
    text = "FSDP2 on two processes with one thread each, exchanging by gloo; microseconds of wall time on rank 0.\n\n"
    text += table(["gradients", "`Clipper.step()`", "`clip_grad_norm_`", "ratio (quartiles)"], rows)
    timing.write("sharded", "Sharded", text, data, where, quick=quick)


if __name__ == "__main__":
    main()
