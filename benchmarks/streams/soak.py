"""A million steps of each adaptive method on a tiny model: memory and time per step must not grow.

python benchmarks/streams/soak.py [STEPS]
"""

import resource
import sys
import time
from pathlib import Path

import torch
from torch.nn import Parameter

from lightning_gradclip import ClipMethod, Clipper, EmaClip, NormClip, QuantileClip, SigmaClip, ZClip

METHODS: dict[str, ClipMethod] = {
    "NormClip()": NormClip(),
    "QuantileClip()": QuantileClip(),
    "SigmaClip()": SigmaClip(),
    "ZClip()": ZClip(),
    "EmaClip()": EmaClip(),
    "QuantileClip(window=None)": QuantileClip(window=None),
}


def resident() -> float:
    """Memory of this process in MiB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


def main() -> None:
    steps = int(sys.argv[1]) if len(sys.argv) > 1 else 1_000_000
    torch.set_num_threads(1)
    print(f"{steps:,} steps, CPU time of the first and last tenth, resident memory after each\n")
    print("| method | first, us a step | last, us a step | first, MiB | last, MiB | state, bytes |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name, method in METHODS.items():
        parameter = Parameter(torch.zeros(8))
        clipper = Clipper([("layer.weight", parameter)], method)
        generator = torch.Generator().manual_seed(0)
        times, memory = [], []
        for _ in range(10):
            begin = time.process_time()
            for _ in range(steps // 10):
                parameter.grad = torch.randn(8, generator=generator)
                clipper.step()
            times.append((time.process_time() - begin) / (steps // 10) * 1e6)
            memory.append(resident())
            clipper.metrics()
        values = clipper.state_dict()["learned"]["values"].values()
        state = sum(value.numel() * value.element_size() for value in values)
        row = (f"{times[0]:.0f}", f"{times[-1]:.0f}", f"{memory[0]:.1f}", f"{memory[-1]:.1f}", f"{state:,}")
        print(f"| `{name}` | " + " | ".join(row) + " |", flush=True)


if __name__ == "__main__":
    main()
