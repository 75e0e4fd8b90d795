"""Adaptive clipping on five streams of norms that real training produces, ours beside the published implementations.

    python benchmarks/streams/robustness.py     # prints a Markdown table
    pip install --no-deps -r tests/peers.txt    # the published implementations

Two tensors get gradients of known norm for 5,000 steps, with 5 % noise and one spike of 20 times the norm in 100
steps, and one thing happens. A cell gives, of the steps after that, the share of the spikes that were at least halved
and of the other steps that were reduced at all, and how many steps passed until the latter share, over the next 100
steps, was within ten percentage points of what it is at that time when nothing happens.
"""

import importlib.metadata
import math
import warnings
from collections import deque
from collections.abc import Callable, Iterable

import numpy as np
import torch
from torch import Tensor
from torch.nn import Parameter

from lightning_gradclip import ClipMethod, Clipper, EmaClip, QuantileClip, SigmaClip, ZClip

STEPS, EVENT = 5000, 1000
WARM = 5  # a step in every warm-up
SPIKES = np.random.default_rng(2).random(STEPS) < np.where(np.arange(STEPS) < 200, 0.0, 0.01)
Norms = np.ndarray  # (STEPS, 2)


def steady() -> Norms:
    norms = np.exp(np.random.default_rng(0).normal(0.0, 0.05, (STEPS, 2)))
    norms[SPIKES] *= 20
    return norms


def with_nan() -> Norms:
    norms = steady()
    norms[EVENT, 1] = math.nan
    return norms


def with_infinity_in_warmup() -> Norms:
    norms = steady()
    norms[WARM, 1] = math.inf
    return norms


def with_shift() -> Norms:
    norms = steady()
    norms[EVENT:] *= 2
    return norms


def with_zero_in_warmup() -> Norms:
    norms = steady()
    norms[WARM, 1] = 0.0
    return norms


def with_outliers() -> Norms:
    norms = steady()
    outliers = np.random.default_rng(1).random(STEPS) < 0.05
    norms[outliers & ~SPIKES] *= 10
    return norms


STREAMS: dict[str, tuple[Callable[[], Norms], int]] = {
    "one NaN": (with_nan, EVENT),
    "inf in the warm-up": (with_infinity_in_warmup, WARM),
    "level x 2": (with_shift, EVENT),
    "a zero in the warm-up": (with_zero_in_warmup, WARM),
    "5 % outliers x 10": (with_outliers, 0),
}


class Ours:
    """One of our methods; gradients of the two tensors go in, norms of what is left come out."""

    def __init__(self, method: ClipMethod, action: str = "clip") -> None:
        self.params = tensors()
        named = [(f"layer{i}.weight", parameter) for i, parameter in enumerate(self.params)]
        self.clipper = Clipper(named, method, action=action, max_consecutive_skips=None)

    def __call__(self, gradients: list[Tensor]) -> list[float]:
        give(self.params, gradients)
        self.clipper.step()
        return left(self.params)


class PublishedZClip:
    def __init__(self, **settings: object) -> None:
        from zclip import ZClip as Published

        self.model = torch.nn.ParameterList(tensors())
        self.clip = Published(max_grad_norm=None, **settings)

    def __call__(self, gradients: list[Tensor]) -> list[float]:
        give(self.model, gradients)
        self.clip.step(self.model)
        return left(self.model)


class PublishedQuantileClip:
    def __init__(self, per_parameter: bool) -> None:
        from autoclip.torch import QuantileClip as Published

        self.params = tensors()
        self.clip = Published(self.params, quantile=0.9, history_length=1000, global_threshold=not per_parameter)

    def __call__(self, gradients: list[Tensor]) -> list[float]:
        give(self.params, gradients)
        self.clip.step()
        return left(self.params)


class PublishedAutoClip:
    """The rule of the paper as its authors publish it: append, take the percentile, clip."""

    def __init__(self) -> None:
        self.params, self.history = tensors(), []

    def __call__(self, gradients: list[Tensor]) -> list[float]:
        give(self.params, gradients)
        self.history.append(float(torch.nn.utils.get_total_norm([p.grad for p in self.params])))
        torch.nn.utils.clip_grad_norm_(self.params, np.percentile(self.history, 10))
        return left(self.params)


class PublishedAdaGC:
    """Clips inside the optimizer; with beta1 = 0 its first moment is the clipped gradient."""

    def __init__(self) -> None:
        from pytorch_optimizer import AdaGC

        self.params = tensors()
        settings = {"beta": 0.99, "lambda_rel": 1.04, "warmup_steps": 101, "weight_decay": 0.0}
        self.optimizer = AdaGC(self.params, lr=0.0, betas=(0.0, 0.999), **settings)

    def __call__(self, gradients: list[Tensor]) -> list[float]:
        give(self.params, gradients)
        self.optimizer.step()
        return [float(self.optimizer.state[parameter]["exp_avg"].norm()) for parameter in self.params]


class PublishedSkipStep:
    """The rule of OLMo-core's SkipStepOptimizer for the norm, which is not on the package index."""

    def __init__(self) -> None:
        self.params, self.norms = tensors(), deque(maxlen=129)

    def __call__(self, gradients: list[Tensor]) -> list[float]:
        give(self.params, gradients)
        self.norms.append(torch.nn.utils.get_total_norm([p.grad for p in self.params]))
        if len(self.norms) >= 64:
            std, mean = torch.std_mean(torch.stack(list(self.norms)[:-1]))
            if not self.norms[-1] - mean <= 6 * std:
                return [0.0, 0.0]
        return left(self.params)


CLIPPERS: dict[str, Callable[[], Callable[[list[Tensor]], list[float]]]] = {
    "`QuantileClip()`": lambda: Ours(QuantileClip()),
    "autoclip 0.2.1 `QuantileClip`": lambda: PublishedQuantileClip(per_parameter=False),
    "`autoclip` (q 0.1, all steps)": lambda: Ours(QuantileClip(q=0.1, window=None, include_current=True)),
    "AutoClip as published": PublishedAutoClip,
    "`SigmaClip()`": lambda: Ours(SigmaClip()),
    "`skip_spikes`": lambda: Ours(SigmaClip(k=6, warmup=63), action="skip"),
    "OLMo-core's skip rule": PublishedSkipStep,
    "`ZClip()`": lambda: Ours(ZClip()),
    '`ZClip(memory="faithful")`': lambda: Ours(ZClip(memory="faithful")),
    "zclip 1.0.0": PublishedZClip,
    "`EmaClip()`": lambda: Ours(EmaClip()),
    "`adagc`": lambda: Ours(EmaClip(per="parameter", warmup_max_norm=1.0)),
    "pytorch_optimizer 4.1.0 `AdaGC`": PublishedAdaGC,
}


def tensors() -> list[Parameter]:
    return [Parameter(torch.zeros(4)) for _ in range(2)]


def give(params: Iterable[Parameter], gradients: list[Tensor]) -> None:
    for parameter, gradient in zip(params, gradients, strict=True):
        parameter.grad = gradient.clone()


def left(params: Iterable[Parameter]) -> list[float]:
    return [0.0 if parameter.grad is None else float(parameter.grad.norm()) for parameter in params]


def drive(clip: Callable[[list[Tensor]], list[float]], norms: Norms) -> np.ndarray:
    """The smaller factor of the two gradients in each step; NaN where one is not finite."""
    factors = np.ones(STEPS)
    for step, pair in enumerate(norms):
        after = clip([torch.full((4,), norm / 2, dtype=torch.float32) for norm in pair])
        factors[step] = min(out / norm if norm else 1.0 for out, norm in zip(after, pair, strict=True))
        if not np.isfinite(after).all():
            factors[step] = math.nan
    return factors


def share_of_others(factors: np.ndarray, first: int) -> np.ndarray:
    """The share of reduced steps, spikes apart, over the 100 steps that begin at each."""
    reduced = np.where(SPIKES, 0.0, factors < 0.999)[first:]
    return np.convolve(reduced, np.ones(100), "valid") / np.convolve(~SPIKES[first:], np.ones(100), "valid")


def cell(factors: np.ndarray, usual: np.ndarray, event: int) -> str:
    after, spikes = factors[event + 1 :], SPIKES[event + 1 :]
    if bad := int(np.isnan(after).sum()):
        return f"gradients not finite in {bad:,} steps"
    halved = (after[spikes] <= 0.5).mean()
    steps = np.nonzero(share_of_others(factors, event + 1) <= share_of_others(usual, event + 1) + 0.1)[0]
    recovered = "never" if not len(steps) else "at once" if steps[0] == 0 else f"{steps[0]:,} steps"
    if halved < 0.25:
        recovered = "disabled"
    return f"{halved:.0%} / {(after[~spikes] < 0.999).mean():.0%} / {recovered}"


def main() -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    names = ("torch", "lightning-gradclip", "zclip", "autoclip", "pytorch_optimizer")
    print(", ".join(f"{name} {importlib.metadata.version(name)}" for name in names), end="\n\n")
    print("| spikes halved / others cut / recovered | " + " | ".join(["nothing", *STREAMS]) + " |")
    print("| --- |" + " --- |" * (len(STREAMS) + 1))
    for name, make in CLIPPERS.items():
        usual = drive(make(), steady())
        cells = [cell(usual, usual, WARM)]
        cells += [cell(drive(make(), norms()), usual, event) for norms, event in STREAMS.values()]
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
