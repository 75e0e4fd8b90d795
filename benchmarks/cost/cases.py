"""What is timed: steps of ours, what is published, and native passes that neither can do without.

A clipped step really clips: the limit falls a little at each call, so that nothing has to be restored or copied while
the clock runs. Gradients are the same numbers for all, and contenders that write have their own copy. Of our package
only public names are used, so that the same cases run on any version of it.
"""

import copy
import importlib.util
import math
from collections.abc import Callable, Iterator
from functools import partial
from importlib.metadata import distribution
from typing import Any, NamedTuple

import sets
import timing
import torch
from timing import Case
from torch import Tensor
from torch.nn import Parameter
from torch.nn.utils import clip_grad_norm_, clip_grad_value_

from lightning_gradclip import AGC, ClipMethod, Clipper, EmaClip, NormClip, QuantileClip, SigmaClip, ValueClip, ZClip

# What a limit is multiplied by at each call.
FALL = 0.9999


class Rivals(NamedTuple):
    """Ours and theirs, and the native passes that ours cannot do without."""

    ours: Case
    theirs: Case
    limit: Case
    note: str = ""


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


def by_norm(params: list[Parameter]) -> dict[str, Case]:
    """Clipping by norm, ours and torch's; `measure` is a clipper without a method."""
    theirs, mine = clone(params), clone(params)
    start = clip_grad_norm_(theirs, 1e9).item()
    return {
        "torch": lambda: clip_grad_norm_(params, 1e9),
        "measure": step_of(params, None),
        "step": step_of(params, NormClip(max_norm=1e9)),
        "torch clipped": falling(lambda limit: clip_grad_norm_(theirs, limit), start),
        "step clipped": step_of(mine, FallingNorm()),
        "multiply": native_multiply(params),
    }


def infinity(shapes: sets.Shapes) -> Rivals:
    params = sets.parameters(shapes)
    return Rivals(
        step_of(params, NormClip(max_norm=1e9, norm_type=math.inf)),
        lambda: clip_grad_norm_(params, 1e9, norm_type=math.inf),
        native_read(params),
    )


def value(shapes: sets.Shapes, bound: float, *, clips: bool) -> Rivals:
    mine = sets.parameters(shapes, size=1.0)
    theirs = clone(mine)
    clipper = Clipper(sets.named(mine), FallingValue(max_value=bound))
    clipper.detailed = False
    native = native_read(mine)
    if clips:
        native = after(native, lambda: [one.grad.clamp_(-bound, bound) for one in theirs])
    return Rivals(clipper.step, falling(lambda limit: clip_grad_value_(theirs, limit), bound), native)


def folding(part: float) -> Rivals:
    """Clipping to a part of the norm, and the step of a fused optimizer."""
    mine = weighted(sets.parameters(sets.RESNET50))
    theirs = [Parameter(one.detach().clone()) for one in mine]
    for new, old in zip(theirs, mine, strict=True):
        new.grad = old.grad.clone()
    limit = part * clip_grad_norm_(theirs, 1e9).item()
    one, two = (torch.optim.AdamW(params, lr=1e-6, fused=True) for params in (mine, theirs))
    clip = step_of(mine, NormClip(max_norm=limit), optimizer=one, fold=True)
    published = falling(lambda limit: clip_grad_norm_(theirs, limit), limit)
    return Rivals(after(clip, one.step), after(published, two.step), after(native_read(mine), two.step))


def agc(shapes: sets.Shapes, share: float) -> Rivals:
    """With this share of the units over their limit."""
    mine, published = weighted(sets.parameters(shapes, size=1e-6)), timm_agc()
    for one in mine:
        units = (one.shape[0], *[1] * (one.ndim - 1)) if one.ndim > 1 else (1,)
        one.grad *= torch.where(torch.rand(units) < share, 1e4, 1.0)
    theirs = clone(mine)
    note = " (same bits)" if agc_is_equal(mine, published) else " (NOT the same bits)"
    clip = falling(lambda limit: published(theirs, limit), 0.01)
    return Rivals(step_of(mine, FallingAGC()), clip, native_agc(clone(mine), share), note)


def weighted(params: list[Parameter]) -> list[Parameter]:
    for one in params:
        one.data.normal_(std=0.05)
    return params


def timm_agc() -> Callable[..., None]:
    # The package around this file wants torchvision.
    location = distribution("timm").locate_file("timm/utils/agc.py")
    spec = importlib.util.spec_from_file_location("timm_agc", str(location))
    timm = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(timm)
    return timm.adaptive_clip_grad


def agc_is_equal(params: list[Parameter], published: Callable[..., None]) -> bool:
    mine, theirs = clone(params), clone(params)
    step_of(mine, AGC())()
    published(theirs, 0.01)
    return all(torch.equal(one.grad, two.grad) for one, two in zip(mine, theirs, strict=True))


def rivals(quick: bool) -> Iterator[dict[str, Callable[[], Rivals]]]:
    """Other methods than clipping by norm, group by group; what is named here is made when it is called."""
    model, shapes = ("ResNet-50", sets.RESNET50) if quick else ("GPT-2 small", sets.GPT2)
    yield {f"inf-norm, unclipped, {model} / `clip_grad_norm_(norm_type=inf)`": partial(infinity, shapes)}
    yield {
        f"value, {title}, {model} / `clip_grad_value_`": partial(value, shapes, bound, clips=title == "clipped")
        for title, bound in (("unclipped", 1e9), ("clipped", 2.5))
    }
    yield {
        f"clip + fused AdamW step, {title}, ResNet-50, `fold=True`": partial(folding, part)
        for title, part in (("unclipped", 1e9), ("clipped", 0.5))
    }
    if timing.version("timm"):
        models = {"ResNet-50": sets.RESNET50, "ViT-tiny": sets.VIT_TINY, "2,000 of 1,000": sets.MANY, model: shapes}
        yield {
            f"AGC, {share:.0%} of the units, {name} / timm": partial(agc, several, share)
            for name, several in models.items()
            for share in (0.0, 0.1)
        }


def adaptive(quick: bool) -> dict[str, Callable[[], Case]]:
    """Methods with a memory on the MLP after many steps, beside NormClip."""
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
    return {name: partial(warmed, method, steps) for name, (method, steps) in methods.items()}


def warmed(method: ClipMethod, steps: int) -> Case:
    """Steps with norms that vary, as a history of equal norms would flatter a sorted one."""
    mine = sets.parameters(sets.MLP)
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


def published_adaptive() -> dict[str, Callable[[], Case]]:
    made = {"zclip's ZClip": published_zclip, "autoclip's QuantileClip": published_quantile}
    return {name: make for name, make in made.items() if timing.version(name.partition("'")[0])}


def published_zclip() -> Case:
    from zclip import ZClip as Published

    model, peer = torch.nn.ParameterList(sets.parameters(sets.MLP)), Published(max_grad_norm=None, z_thresh=99)
    return varied(list(model), lambda: peer.step(model))


def published_quantile() -> Case:
    from autoclip.torch import QuantileClip as Published

    params = sets.parameters(sets.MLP)
    peer = Published(params, quantile=1.0, history_length=1000, global_threshold=True)
    for _ in range(1100):
        peer.step()
    return varied(params, peer.step)


def ours() -> dict[str, Callable[[], Case]]:
    """Our case of every row of the clip benchmark; what is named here is made when it is called."""
    made: dict[str, Callable[[], Case]] = {
        f"{case}, {name}": partial(one_by_norm, *kind, case)
        for name, kind in sets.SETS.items()
        for case in ("measure", "step", "step clipped")
    }
    for group in rivals(quick=False):
        made |= {name: partial(ours_among, make) for name, make in group.items()}
    return made | adaptive(quick=False)


def one_by_norm(shapes: sets.Shapes, dtype: torch.dtype, case: str) -> Case:
    return by_norm(sets.parameters(shapes, dtype))[case]


def ours_among(make: Callable[[], Rivals]) -> Case:
    return make().ours
