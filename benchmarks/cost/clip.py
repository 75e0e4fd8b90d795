"""What clipping costs beside torch, timm, zclip and autoclip, and beside reading the gradients once.

python benchmarks/cost/clip.py [--quick]    # writes results/clip.md and clip.json
pip install --no-deps -r tests/peers.txt    # timm, zclip and autoclip; what is missing is left out
"""

import argparse
import gc
import math
import statistics
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import cases
import sets
import timing
import torch
from cases import Rivals
from timing import Times, interleave, micros, ratio, shown, table
from torch.nn import Parameter
from torch.nn.utils import clip_grad_norm_

Part = tuple[str, dict[str, Any]]

NORM_HEAD = ["gradients", "measure / torch", "step / torch", "clipped step / torch", "measure / read limit"]
NORM_HEAD += ["read limit / torch", "clipped limit / torch"]
NORM_HEAD += ["wall: measure", "wall: step", "wall: read limit", "wall: clipped", "wall: clipped limit"]
NORM_HEAD += ["norm error", "torch's"]
NORM_TEXT = (
    "Clipping by norm. Ratios to `torch.nn.utils.clip_grad_norm_`: median (quartiles) over rounds, of CPU time with "
    f"one thread. wall: best round to best round, {timing.DEFAULT_THREADS} threads. busy: others used the machine, so "
    "that wall time would say nothing.\n"
    "`step` is `Clipper.step()`, `measure` the same without a method. Limits are native passes over as many bytes: one "
    "that reads, and for a clipped step one that reads and writes (`_foreach_mul_`) as well.\n\n"
)
OTHER_TEXT = (
    "Other methods, CPU time with one thread; wall as above. The limit is one native pass that reads each tensor that "
    "is measured, and native calls for what is written: `clamp_`, the optimizer's step. For AGC it is torch's "
    "`vector_norm` of the rows of each gradient and weight, which has timm's bits, and `_foreach_mul_`; many small "
    "tensors take less time together.\n\n"
)


def by_norm(rounds: int, quick: bool) -> Part:
    rows, absolute, data = [], [], {}
    for name, (shapes, dtype) in sets.SETS.items():
        if quick and len(shapes) == len(sets.GPT2):
            continue
        params = sets.parameters(shapes, dtype)
        timed, reads = cases.by_norm(params), cases.reading(params)
        times, best = interleave(timed | reads, rounds=rounds), timing.best_wall(timed | reads, rounds)
        medians = {case: statistics.median(one.cpu) for case, one in times.items()}
        read, errors = min(reads, key=medians.__getitem__), norm_errors(params)
        found, walls = norm_ratios(times, read), norm_walls(best, list(reads))
        rows.append([name, *map(shown, found.values()), *map(best_shown, walls), *(f"{one:.0e}" for one in errors)])
        absolute.append([name, *(micros(times[case].cpu) for case in [*timed, read]), read])
        data[name] = {"ratios": found, "wall ratios": walls, "errors": errors, "cpu us": medians, "wall us": best}
        data[name]["read by"] = read
        print(rows[-1], flush=True)
        del params, timed
        gc.collect()
    micro = ["torch", "measure", "step", "torch, clipped", "step, clipped", "multiply", "read limit", "read by"]
    text = NORM_TEXT + table(NORM_HEAD, rows) + "\nMedians in microseconds of CPU time, one thread:\n\n"
    return text + table(["gradients", *micro], absolute), data


def norm_ratios(times: Mapping[str, Times], read: str) -> dict[str, list[float]]:
    cpu = {case: one.cpu for case, one in times.items()}
    read_and_written = [one + two for one, two in zip(cpu[read], cpu["multiply"], strict=True)]
    return {
        "measure": ratio(cpu["measure"], cpu["torch"]),
        "step": ratio(cpu["step"], cpu["torch"]),
        "clipped": ratio(cpu["step clipped"], cpu["torch clipped"]),
        "of read": ratio(cpu["measure"], cpu[read]),
        "limit": ratio(cpu[read], cpu["torch"]),
        "clipped limit": ratio(read_and_written, cpu["torch clipped"]),
    }


def norm_walls(best: Mapping[str, float], reads: list[str]) -> list[float | None]:
    if not best:
        return [None] * 5
    fastest = min(best[one] for one in reads)
    walls = [one / best["torch"] for one in (best["measure"], best["step"], fastest)]
    return walls + [one / best["torch clipped"] for one in (best["step clipped"], fastest + best["multiply"])]


def norm_errors(params: list[Parameter]) -> tuple[float, float]:
    """Relative errors of our norm and torch's against float64."""
    exact = math.sqrt(sum(one.grad.double().square().sum().item() for one in params))
    mine = cases.step_of(params, None)().norm.item()
    return abs(mine / exact - 1), abs(clip_grad_norm_(params, 1e9).item() / exact - 1)


def best_shown(wall: float | None) -> str:
    return "busy" if wall is None else f"{wall:.2f}"


def others(rounds: int, quick: bool) -> Part:
    rows, data = [], {}
    for name, one in made(quick):
        timed = {"theirs": one.theirs, "ours": one.ours, "limit": one.limit}
        times, best = interleave(timed, rounds=rounds), timing.best_wall(timed, rounds)
        mine, limit = (ratio(times[case].cpu, times["theirs"].cpu) for case in ("ours", "limit"))
        walls = [best[case] / best["theirs"] if best else None for case in ("ours", "limit")]
        absolute = (micros(times[case].cpu) for case in ("ours", "theirs"))
        rows.append([name, shown(mine), shown(limit), *map(best_shown, walls), *absolute])
        data[name] = {"ratio": mine, "limit ratio": limit, "wall ratios": walls}
        data[name] |= {case: statistics.median(one.cpu) for case, one in times.items()}
        print(rows[-1], flush=True)
    head = ["what", "ours / theirs", "limit / theirs", "wall: ours", "wall: limit", "ours, us", "theirs, us"]
    return OTHER_TEXT + table(head, rows), data


def made(quick: bool) -> Iterator[tuple[str, Rivals]]:
    """One after the other, since the large ones take a gigabyte."""
    for group in cases.rivals(quick):
        for name, make in group.items():
            one = make()
            yield f"{name}{one.note}", one
            del one
            gc.collect()


def adaptive(rounds: int, quick: bool) -> Part:
    makers: dict[str, Callable[[], timing.Case]] = cases.adaptive(quick) | cases.published_adaptive()
    times = interleave({name: make() for name, make in makers.items()}, rounds=rounds)
    base = times["NormClip()"].cpu
    rows, data = [], {}
    for name, one in times.items():
        above = statistics.median([a - b for a, b in zip(one.cpu, base, strict=True)])
        rows.append([name, micros(one.cpu), f"{above:+.1f}"])
        data[name] = {"us": statistics.median(one.cpu), "above": above}
    text = "Adaptive limits on the MLP, microseconds of CPU time per step, one thread; the norms vary by 5 %.\n\n"
    return text + table(["method", "step, us", "above NormClip()"], rows), data


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="few rounds, and no GPT-2; under a minute")
    quick = parser.parse_args().quick
    torch.manual_seed(0)
    torch.set_num_threads(1)
    where, rounds = timing.machine(), 3 if quick else 9
    parts = {"norm": by_norm, "other": others, "adaptive": adaptive}
    found = {name: part(rounds, quick) for name, part in parts.items()}
    text = "\n".join(part for part, _ in found.values())
    data = {name: figures for name, (_, figures) in found.items()}
    timing.write("clip", "Clipping", text, data, where, quick=quick)


if __name__ == "__main__":
    main()
