"""What clipping costs beside torch, timm, zclip and autoclip, and beside reading the gradients once.

    python benchmarks/cost/clip.py [--quick]     # writes results/clip.md and clip.json
    pip install --no-deps -r tests/peers.txt    # timm, zclip and autoclip; what is missing is left out

A clipped step really clips: the limit falls a little at each call, so that nothing has to be restored or copied while
the clock runs. Gradients are the same numbers for all, and contenders that write have their own copy.
"""

import argparse
import copy
import gc
import importlib.util
import math
import statistics
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, distribution
from typing import Any

import sets
import timing
import torch
from timing import Case, interleave, micros, ratio, shown, table
from torch import Tensor
from torch.nn import Parameter
from torch.nn.utils import clip_grad_norm_, clip_grad_value_

from lightning_gradclip import AGC, ClipMethod, Clipper, EmaClip, NormClip, QuantileClip, SigmaClip, ValueClip, ZClip
from lightning_gradclip.gradients.read import Meter

# What a limit is multiplied by at each call.
FALL = 0.9999


class FallingNorm(NormClip):
    """A limit that is always a little below the norm."""

    on_floats = True

    def limit(self, size: Any, weight: Tensor | None, step: int) -> Any:
        super().limit(size, weight, step)
        return size * FALL


class FallingValue(ValueClip):
    def bounds(self, step: int) -> tuple[float, float]:
        low, high = super().bounds(step)
        return low * FALL**step, high * FALL**step


class FallingAGC(AGC):
    def limit(self, size: Tensor, weight: Tensor | None, step: int) -> Tensor:
        return super().limit(size, weight, step) * FALL**step


def falling(call: Callable[[float], Any], start: float) -> Case:
    """A published function whose limit falls at each call."""
    at = start

    def case() -> None:
        nonlocal at
        at *= FALL
        call(at)

    return case


def clone(params: list[Parameter]) -> list[Parameter]:
    """The same weights, with a copy of the gradients."""
    made = [Parameter(one.detach()) for one in params]
    for new, old in zip(made, params, strict=True):
        new.grad = old.grad.clone()
    return made


def step_of(params: list[Parameter], method: ClipMethod | None, **options: Any) -> Case:
    return Clipper(sets.named(params), method, **options).step


def measuring(params: list[Parameter], norm_type: float = 2.0) -> Case:
    meter = Meter(norm_type)

    def measure() -> float | None:
        with torch.no_grad():
            return meter.joint([one.grad for one in params])

    return measure


def reading(params: list[Parameter]) -> dict[str, Case]:
    """Single native calls that read as many bytes once, from one buffer."""
    size = sum(one.grad.numel() * one.grad.element_size() for one in params)
    buffer = torch.ones(size // 8, dtype=torch.int64)
    array = buffer.numpy()
    return {"torch.sum of int64": lambda: torch.sum(buffer), "numpy.max of int64": array.max}


def native_read(params: list[Parameter]) -> Case:
    return reading(params)["torch.sum of int64"]


def native_multiply(params: list[Parameter]) -> Case:
    """One pass that reads and writes the gradients, and leaves them as they are."""
    gradients, one = [parameter.grad for parameter in params], torch.ones(())
    return lambda: torch._foreach_mul_(gradients, one)


def native_agc(params: list[Parameter], share: float) -> Case:
    """torch's norms of rows, which give timm's bits, and one product of the gradients where some units are over."""
    matrices = [one.grad.view(len(one) if one.ndim > 1 else 1, -1) for one in params]
    weights = [one.detach().view(one.grad.shape[0] if one.ndim > 1 else 1, -1) for one in params]
    ones = [torch.ones(len(one), 1) for one in matrices]

    def case() -> None:
        for matrix in (*matrices, *weights):
            torch.linalg.vector_norm(matrix, dim=1)
        if share:
            torch._foreach_mul_(matrices, ones)

    return case


def after(*cases: Case) -> Case:
    def case() -> None:
        for one in cases:
            one()

    return case


def norm_errors(params: list[Parameter]) -> tuple[float, float]:
    """Relative errors of our norm and torch's against float64."""
    exact = math.sqrt(sum(one.grad.double().square().sum().item() for one in params))
    return abs(measuring(params)() / exact - 1), abs(clip_grad_norm_(params, 1e9).item() / exact - 1)


def compare_norms(rounds: int, quick: bool) -> tuple[str, dict[str, Any]]:
    rows, absolute, data = [], [], {}
    for name, (shapes, dtype) in sets.SETS.items():
        if quick and len(shapes) == len(sets.GPT2):
            continue
        params = sets.parameters(shapes, dtype)
        theirs, mine = clone(params), clone(params)
        start = clip_grad_norm_(theirs, 1e9).item()
        cases = {
            "torch": lambda p=params: clip_grad_norm_(p, 1e9),
            "measure": measuring(params),
            "step": step_of(params, NormClip(max_norm=1e9)),
            "torch clipped": falling(lambda limit, p=theirs: clip_grad_norm_(p, limit), start),
            "step clipped": step_of(mine, FallingNorm()),
            "multiply": native_multiply(params),
        }
        reads = reading(params)
        times, best = interleave(cases | reads, rounds=rounds), timing.best_wall(cases | reads, rounds)
        read = min(list(times)[len(cases) :], key=lambda case: statistics.median(times[case].cpu))
        errors = norm_errors(params)
        found = {
            "measure": ratio(times["measure"].cpu, times["torch"].cpu),
            "step": ratio(times["step"].cpu, times["torch"].cpu),
            "clipped": ratio(times["step clipped"].cpu, times["torch clipped"].cpu),
            "of read": ratio(times["measure"].cpu, times[read].cpu),
            "limit": ratio(times[read].cpu, times["torch"].cpu),
            "clipped limit": ratio(
                [one + two for one, two in zip(times[read].cpu, times["multiply"].cpu, strict=True)],
                times["torch clipped"].cpu,
            ),
        }
        walls: list[float | None] = [None] * 5
        if best:
            fastest = min(best[one] for one in reads)
            walls = [best["measure"] / best["torch"], best["step"] / best["torch"], fastest / best["torch"]]
            walls += [one / best["torch clipped"] for one in (best["step clipped"], fastest + best["multiply"])]
        cells = ["busy" if one is None else f"{one:.2f}" for one in walls] + [f"{error:.0e}" for error in errors]
        rows.append([name, *map(shown, found.values()), *cells])
        absolute.append([name, *(micros(times[case].cpu) for case in [*cases, read]), read])
        medians = {case: statistics.median(one.cpu) for case, one in times.items()}
        data[name] = {"ratios": found, "wall ratios": walls, "errors": errors, "cpu us": medians, "wall us": best}
        data[name]["read by"] = read
        print(rows[-1], flush=True)
        del params, theirs, mine, cases
        gc.collect()
    head = ["gradients", "measure / torch", "step / torch", "clipped step / torch", "measure / read limit"]
    head += ["read limit / torch", "clipped limit / torch"]
    head += ["wall: measure", "wall: step", "wall: read limit", "wall: clipped", "wall: clipped limit"]
    head += ["norm error", "torch's"]
    text = "Clipping by norm. Ratios to `torch.nn.utils.clip_grad_norm_`: median (quartiles) over rounds, of CPU time "
    text += f"with one thread. wall: best round to best round, {timing.DEFAULT_THREADS} threads. "
    text += "busy: others used the machine, so that wall time would say nothing.\n"
    text += "`measure` is the norm alone, `step` is `Clipper.step()`. Limits are native passes over as many "
    text += "bytes: one that reads, and for a clipped step one that reads and writes (`_foreach_mul_`) as well.\n\n"
    text += table(head, rows) + "\nMedians in microseconds of CPU time, one thread:\n\n"
    micro = ["torch", "measure", "step", "torch, clipped", "step, clipped", "multiply", "read limit", "read by"]
    return text + table(["gradients", *micro], absolute), data


def pairs(rounds: int, found: dict[str, tuple[Case, Case, Case]]) -> tuple[list[list[str]], dict[str, Any]]:
    """Ours and theirs side by side, and the native passes that ours cannot do without."""
    rows, data = [], {}
    for name, (mine, theirs, native) in found.items():
        cases = {"theirs": theirs, "ours": mine, "limit": native}
        times, best = interleave(cases, rounds=rounds), timing.best_wall(cases, rounds)
        quotients = [ratio(times[one].cpu, times["theirs"].cpu) for one in ("ours", "limit")]
        walls = [best[one] / best["theirs"] if best else None for one in ("ours", "limit")]
        told = ["busy" if one is None else f"{one:.2f}" for one in walls]
        rows.append([name, *map(shown, quotients), *told, micros(times["ours"].cpu), micros(times["theirs"].cpu)])
        data[name] = {"ratio": quotients[0], "limit ratio": quotients[1], "wall ratios": walls}
        data[name] |= {key: statistics.median(one.cpu) for key, one in times.items()}
        print(rows[-1], flush=True)
    return rows, data


def others(rounds: int, quick: bool) -> tuple[str, dict[str, Any]]:
    rows, data = [], {}
    groups = [infinity, values, folding, agc]
    for group in groups:
        for cases in group(quick):
            new, figures = pairs(rounds, cases)
            rows += new
            data |= figures
            gc.collect()
    head = ["what", "ours / theirs", "limit / theirs", "wall: ours", "wall: limit", "ours, us", "theirs, us"]
    text = (
        "Other methods, CPU time with one thread; wall as above. The limit is one native pass that reads each tensor "
    )
    text += "that is measured, and native calls for what is written: `clamp_`, the optimizer's step. For AGC it is "
    text += "torch's `vector_norm` of the rows of each gradient and weight, which has timm's bits, and "
    text += "`_foreach_mul_`; many small tensors take less time together.\n\n"
    return text + table(head, rows), data


def infinity(quick: bool) -> Any:
    params = sets.parameters(sets.RESNET50 if quick else sets.GPT2)
    yield {
        f"inf-norm, measuring, {'ResNet-50' if quick else 'GPT-2 small'} / `clip_grad_norm_(norm_type=inf)`": (
            measuring(params, math.inf),
            lambda: clip_grad_norm_(params, 1e9, norm_type=math.inf),
            native_read(params),
        )
    }


def values(quick: bool) -> Any:
    shapes = sets.RESNET50 if quick else sets.GPT2
    for title, bound in (("unclipped", 1e9), ("clipped", 2.5)):
        mine = sets.parameters(shapes, size=1.0)
        theirs = clone(mine)
        clipper = Clipper(sets.named(mine), FallingValue(max_value=bound))
        clipper.detailed = False
        name = f"value, {title}, {'ResNet-50' if quick else 'GPT-2 small'} / `clip_grad_value_`"
        native = native_read(mine)
        if title == "clipped":
            native = after(native, lambda p=theirs: [one.grad.clamp_(-2.5, 2.5) for one in p])
        yield {name: (clipper.step, falling(lambda limit, p=theirs: clip_grad_value_(p, limit), bound), native)}


def folding(quick: bool) -> Any:
    del quick
    for title, part in (("unclipped", 1e9), ("clipped", 0.5)):
        mine = sets.parameters(sets.RESNET50)
        for one in mine:
            one.data.normal_(std=0.05)
        theirs = [Parameter(one.detach().clone()) for one in mine]
        for new, old in zip(theirs, mine, strict=True):
            new.grad = old.grad.clone()
        norm = clip_grad_norm_(theirs, 1e9).item()
        one, two = (torch.optim.AdamW(params, lr=1e-6, fused=True) for params in (mine, theirs))
        clip = step_of(mine, NormClip(max_norm=part * norm), optimizer=one, fold=True)

        def ours(clip: Case = clip, optimizer: Any = one) -> None:
            clip()
            optimizer.step()

        def published(limit: float, params: Any = theirs, optimizer: Any = two) -> None:
            clip_grad_norm_(params, limit)
            optimizer.step()

        native = after(native_read(mine), two.step)
        yield {
            f"clip + fused AdamW step, {title}, ResNet-50, `fold=True`": (ours, falling(published, part * norm), native)
        }


def agc(quick: bool) -> Any:
    try:
        location = distribution("timm").locate_file("timm/utils/agc.py")
    except PackageNotFoundError:
        return
    # The package around this file wants torchvision.
    spec = importlib.util.spec_from_file_location("timm_agc", str(location))
    timm = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(timm)
    models = {"ResNet-50": sets.RESNET50, "ViT-tiny": sets.VIT_TINY, "2,000 of 1,000": sets.MANY}
    if not quick:
        models["GPT-2 small"] = sets.GPT2
    for model, shapes in models.items():
        for share in (0.0, 0.1):
            mine = sets.parameters(shapes, size=1e-6)
            for one in mine:
                one.data.normal_(std=0.05)
                units = (one.shape[0], *[1] * (one.ndim - 1)) if one.ndim > 1 else (1,)
                one.grad *= torch.where(torch.rand(units) < share, 1e4, 1.0)
            theirs = clone(mine)
            equal = agc_is_equal(mine, timm.adaptive_clip_grad)
            name = f"AGC, {share:.0%} of the units, {model} / timm ({'same bits' if equal else 'NOT the same bits'})"
            clip = falling(lambda limit, p=theirs: timm.adaptive_clip_grad(p, limit), 0.01)
            yield {name: (step_of(mine, FallingAGC()), clip, native_agc(clone(mine), share))}


def agc_is_equal(params: list[Parameter], published: Callable[..., None]) -> bool:
    mine, theirs = clone(params), clone(params)
    step_of(mine, AGC())()
    published(theirs, 0.01)
    return all(torch.equal(one.grad, two.grad) for one, two in zip(mine, theirs, strict=True))


def adaptive(rounds: int, quick: bool) -> tuple[str, dict[str, Any]]:
    """Adaptive methods on the MLP after many steps, beside NormClip."""
    gradients = sets.parameters(sets.MLP)
    long = 10_000 if quick else 100_000
    methods: dict[str, tuple[ClipMethod, int]] = {
        "NormClip()": (NormClip(max_norm=1e9), 100),
        "QuantileClip()": (QuantileClip(q=1.0), 1100),
        "QuantileClip(window=None), 1,000 steps": (QuantileClip(q=1.0, window=None), 1000),
        f"QuantileClip(window=None), {long:,} steps": (QuantileClip(q=1.0, window=None), long),
        "SigmaClip()": (SigmaClip(k=99), 1100),
        "ZClip()": (ZClip(z_threshold=99), 1100),
        "EmaClip()": (EmaClip(ratio=99), 1100),
    }
    cases = {name: warmed(gradients, method, steps) for name, (method, steps) in methods.items()}
    cases |= published_adaptive(gradients)
    times = interleave(cases, rounds=rounds)
    base = times["NormClip()"].cpu
    rows, data = [], {}
    for name, one in times.items():
        above = statistics.median([a - b for a, b in zip(one.cpu, base, strict=True)])
        rows.append([name, micros(one.cpu), f"{above:+.1f}"])
        data[name] = {"us": statistics.median(one.cpu), "above": above}
    text = "Adaptive limits on the MLP, microseconds of CPU time per step, one thread; the norms vary by 5 %.\n\n"
    return text + table(["method", "step, us", "above NormClip()"], rows), data


def warmed(params: list[Parameter], method: ClipMethod, steps: int) -> Case:
    """Steps with norms that vary, as a history of equal norms would flatter a sorted one."""
    mine = clone(params)
    clipper = Clipper(sets.named(mine), copy.deepcopy(method))
    factors = [math.exp(math.sin(i * 12.9898) * 0.05) for i in range(997)]
    gradients = [one.grad for one in mine]
    originals = [one.clone() for one in gradients]
    for step in range(steps):
        torch._foreach_copy_(gradients, originals)
        torch._foreach_mul_(gradients, factors[step % len(factors)])
        clipper.step()
    return varied(mine, clipper.step)


def varied(params: list[Parameter], clip: Case) -> Case:
    """Change one entry before each step, which costs all the same."""
    entry, steps = params[0].grad.view(-1).numpy(), 0

    def case() -> None:
        nonlocal steps
        steps += 1
        entry[0] = 1e-3 * (1 + steps * 0.618034 % 1)
        clip()

    return case


def published_adaptive(params: list[Parameter]) -> dict[str, Case]:
    cases = {}
    if timing.version("zclip"):
        from zclip import ZClip as Published

        mine = clone(params)
        model, peer = torch.nn.ParameterList(mine), Published(max_grad_norm=None, z_thresh=99)
        for own, copied in zip(model, mine, strict=True):
            own.grad = copied.grad
        cases["zclip's ZClip"] = varied(mine, lambda: peer.step(model))
    if timing.version("autoclip"):
        from autoclip.torch import QuantileClip as PublishedQuantile

        other = clone(params)
        quantile = PublishedQuantile(other, quantile=1.0, history_length=1000, global_threshold=True)
        for _ in range(1100):
            quantile.step()
        cases["autoclip's QuantileClip"] = varied(other, quantile.step)
    return cases


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="few rounds, and no GPT-2; under a minute")
    quick = parser.parse_args().quick
    torch.manual_seed(0)
    torch.set_num_threads(1)
    where, rounds = timing.machine(), 3 if quick else 9
    parts = {"norm": compare_norms, "other": others, "adaptive": adaptive}
    found = {name: part(rounds, quick) for name, part in parts.items()}
    text = "\n".join(part for part, _ in found.values())
    data = {name: figures for name, (_, figures) in found.items()}
    timing.write("clip-quick" if quick else "clip", "Clipping", text, data, where)


if __name__ == "__main__":
    main()
