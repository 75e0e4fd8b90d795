"""Clipping gradients that FSDP2 has cut, on two processes, beside torch's `clip_grad_norm_`.

python benchmarks/cost/sharded.py [--quick]    # writes results/sharded.md and sharded.json
"""

import argparse
import os
import statistics
import time
import warnings
from typing import Any

import timing
import torch
import torch.distributed as dist
from timing import ratio, shown, table
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.multiprocessing.spawn import start_processes
from torch.nn.utils import clip_grad_norm_

from lightning_gradclip import Clipper, NormClip

WORLD = 2
# Layers of 32 x 32, two parameters each; and a few large ones.
MODELS = {"300 parameters, 158,400 in all": (150, 32), "8 parameters, 16.8M in all": (4, 2048)}
LIMITS = {"within the limit": 1e9, "clipped": 1e-3}


def measure(rank: int, rounds: int, answers: Any) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(WORLD), MASTER_ADDR="127.0.0.1", MASTER_PORT="29517")
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo")
    found: dict[str, dict[str, list[float]]] = {}
    for label, (layers, width) in MODELS.items():
        model = nn.Sequential(*(nn.Linear(width, width) for _ in range(layers)))
        fully_shard(model, mesh=init_device_mesh("cpu", (WORLD,)))
        model(torch.randn(4, width)).square().mean().backward()
        for what, limit in LIMITS.items():
            clipper = Clipper(model, NormClip(max_norm=limit))
            cases = {
                "ours": clipper.step,
                "torch": lambda model=model, limit=limit: clip_grad_norm_(model.parameters(), limit),
            }
            times: dict[str, list[float]] = {name: [] for name in cases}
            for _ in range(rounds):
                for name, case in cases.items():
                    # Clipping changes what is clipped next.
                    for parameter in model.parameters():
                        parameter.grad.to_local().fill_(1.0)
                    dist.barrier()
                    begin = time.perf_counter()
                    case()
                    times[name].append((time.perf_counter() - begin) * 1e6)
            # The first calls plan and allocate.
            found[f"{label}, {what}"] = {name: values[rounds // 5 :] for name, values in times.items()}
    if rank == 0:
        answers.put(found)
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="few rounds")
    quick = parser.parse_args().quick
    rounds = 25 if quick else 125
    where = timing.machine()
    answers = torch.multiprocessing.get_context("fork").SimpleQueue()
    context = start_processes(measure, (rounds, answers), nprocs=WORLD, join=False, start_method="fork")
    found = answers.get()
    context.join()
    rows, data = [], {}
    for label, times in found.items():
        one = ratio(times["ours"], times["torch"])
        ours, theirs = (statistics.median(times[name]) for name in ("ours", "torch"))
        rows.append([label, f"{ours:,.0f}", f"{theirs:,.0f}", shown(one)])
        data[label] = {"ours": ours, "torch": theirs, "ratio": one}
    text = "FSDP2 on two processes with one thread each, exchanging by gloo; microseconds of wall time on rank 0.\n\n"
    text += table(["gradients", "`Clipper.step()`", "`clip_grad_norm_`", "ratio (quartiles)"], rows)
    timing.write("sharded", "Sharded", text, data, where, quick=quick)


if __name__ == "__main__":
    main()
