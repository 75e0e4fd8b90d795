"""What clipping costs on a CUDA device, beside torch's `clip_grad_norm_(foreach=True)`.

    python benchmarks/cost/on_cuda.py [--device cpu]    # writes results/cuda.md and cuda.json

Times are of CUDA events around ten steps, in turn, medians over rounds. The share of the peak is that of the bytes that
an unclipped step must read, in the time of that step, of the device's memory bandwidth. `--device cpu` runs everything
once with small sets, to see that it works; its figures mean nothing.
"""

import argparse
import statistics
import time
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import sets
import timing
import torch
from timing import ratio, shown, table
from torch.nn import Parameter
from torch.nn.utils import clip_grad_norm_

from lightning_gradclip import Clipper, NormClip

# A decoder of 1.3 billion parameters: 24 blocks of width 2048.
LARGE: sets.Shapes = [(50257, 2048), (2048, 2048), *sets.transformer(2048) * 24, (2048,), (2048,)]
SETS = {"GPT-2 small": sets.GPT2, "ResNet-50": sets.RESNET50, "2,000 of 1,000": sets.MANY, "1.3B": LARGE}
SMALL = {"MLP": sets.MLP, "2,000 of 1,000": sets.MANY}
CALLS = 10


class Falling(NormClip):
    """A limit a little below the norm, so that every step clips and leaves the gradients nearly as they are."""

    on_floats = True

    def limit(self, size: Any, weight: torch.Tensor | None, step: int) -> Any:
        super().limit(size, weight, step)
        return size * (1 - 1e-6)


def timed(case: Callable[[], Any], device: torch.device) -> float:
    """Microseconds per call on the device."""
    if device.type != "cuda":
        start = time.perf_counter()
        case()
        return (time.perf_counter() - start) * 1e6
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(CALLS):
        case()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / CALLS * 1e3


def gradients(shapes: sets.Shapes, dtype: torch.dtype, device: torch.device) -> list[Parameter]:
    made = [Parameter(torch.empty(shape, dtype=dtype, device=device).normal_(std=0.02)) for shape in shapes]
    for one in made:
        one.grad = torch.randn_like(one).mul_(1e-3)
    return made


def cases(params: list[Parameter]) -> dict[str, Callable[[], Any]]:
    """An unclipped step and one that always writes; then both with a fused optimizer's step."""
    named = sets.named(params)
    ours = Clipper(named, NormClip(max_norm=1e9), nonfinite="ignore")
    clips = Clipper(named, Falling(), nonfinite="ignore")
    # Asked for where it is installed; elsewhere its columns show torch's function once more.
    by_kernel = {"nonfinite": "ignore", "triton": find_spec("triton") is not None}
    optimizer = torch.optim.SGD(params, lr=0.0, fused=True)
    folded = Clipper(named, Falling(), optimizer=optimizer, nonfinite="ignore", fold=True)

    def theirs_and_step() -> None:
        clip_grad_norm_(params, 1e9, foreach=True)
        optimizer.step()

    def folded_and_step() -> None:
        folded.step()
        optimizer.step()

    return {
        "torch": lambda: clip_grad_norm_(params, 1e9, foreach=True),
        "ours": ours.step,
        "ours, clipped": clips.step,
        "torch + step": theirs_and_step,
        "ours, folded + step": folded_and_step,
        "kernel": Clipper(named, NormClip(max_norm=1e9), **by_kernel).step,
        "kernel, clipped": Clipper(named, Falling(), **by_kernel).step,
    }


def compare(params: list[Parameter], device: torch.device, peak: float | None, rounds: int) -> tuple[list[str], Any]:
    todo = cases(params)
    times: dict[str, list[float]] = {name: [] for name in todo}
    for case in todo.values():
        case()
    for _ in range(rounds):
        for name, case in todo.items():
            times[name].append(timed(case, device))
    size = sum(one.grad.numel() * one.grad.element_size() for one in params)
    speed = size / statistics.median(times["ours"]) / 1e3
    found = {
        "unclipped": ratio(times["ours"], times["torch"]),
        "clipped": ratio(times["ours, clipped"], times["torch"]),
        "folded": ratio(times["ours, folded + step"], times["torch + step"]),
        "kernel": ratio(times["kernel"], times["torch"]),
        "kernel, clipped": ratio(times["kernel, clipped"], times["torch"]),
    }
    share = f"{speed / peak:.0%}" if peak else "unknown"
    medians = {name: statistics.median(one) for name, one in times.items()}
    return [*map(shown, found.values()), f"{speed:,.0f}", share], {"ratios": found, "us": medians, "GB/s": speed}


def peak_of(device: torch.device) -> float | None:
    """The memory bandwidth of the device in GB/s: two transfers in each cycle of the memory's clock."""
    if device.type != "cuda":
        return None
    properties = torch.cuda.get_device_properties(device)
    rate, width = (getattr(properties, name, None) for name in ("memory_clock_rate", "memory_bus_width"))
    return 2 * rate * 1e3 * width / 8 / 1e9 if rate and width else None


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    device = torch.device(parser.parse_args().device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("CUDA is not available: nothing measured")
        return
    on_cuda = device.type == "cuda"
    where = timing.machine() | {"device": torch.cuda.get_device_name() if on_cuda else "cpu, to try the script"}
    peak, rows, data = peak_of(device), [], {}
    with warnings.catch_warnings(record=True) as warned:
        for name, shapes in (SETS if on_cuda else SMALL).items():
            for dtype in (torch.float32, torch.bfloat16):
                torch.manual_seed(0)
                params = gradients(shapes, dtype, device)
                title = f"{name}, {str(dtype).removeprefix('torch.')}"
                row, data[title] = compare(params, device, peak, rounds=15 if on_cuda else 2)
                rows.append([title, *row])
                del params
    # Where the kernel cannot be used a warning says why.
    text = "\n\n".join(
        [
            f"Ratios to torch; triton {timing.version('triton') or 'is not installed'}.",
            *(str(one.message) for one in warned),
        ]
    )
    text += "\n\n"
    head = ["gradients", "unclipped", "clipped", "folded, with the optimizer's step"]
    head += ["unclipped, triton=True", "clipped, triton=True", "GB/s, unclipped", "of the peak"]
    text += table(head, rows)
    if on_cuda:
        timing.write("cuda", "On a CUDA device", text, data, where)
    else:
        print(text)


if __name__ == "__main__":
    main()
