"""Streams of gradient norms as real trainings have them, and clippers that are fed with given norms."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import Parameter

from lightning_gradclip import ClipMethod, Clipper, EmaClip, QuantileClip, SigmaClip, StepStats, ZClip

Array = np.ndarray

# Each method that learns in each of its kinds, with memories and warm-ups so short that a test sees all of their life.
LEARNERS: Mapping[str, Callable[..., ClipMethod]] = {
    "quantile": lambda **options: QuantileClip(**{"q": 0.8, "window": 12, **options}),
    "quantile of all": lambda **options: QuantileClip(**{"q": 0.8, "window": None, **options}),
    "quantile with current": lambda **options: QuantileClip(
        **{"q": 0.6, "window": 12, "include_current": True, **options}
    ),
    "sigma": lambda **options: SigmaClip(**{"k": 1.0, "window": 12, "warmup": 8, **options}),
    "zclip": lambda **options: ZClip(**{"warmup": 8, "z_threshold": 0.5, **options}),
    "zclip faithful": lambda **options: ZClip(**{"warmup": 8, "z_threshold": 0.5, "memory": "faithful", **options}),
    "zclip to the mean": lambda **options: ZClip(**{"warmup": 8, "z_threshold": 0.5, "mode": "mean", **options}),
    "zclip to the largest": lambda **options: ZClip(**{"warmup": 8, "z_threshold": 0.5, "mode": "max", **options}),
    # Without a limit of the joint norm no scope depends on another.
    "ema": lambda **options: EmaClip(**{"warmup": 8, "warmup_max_norm": torch.inf, "beta": 0.9, **options}),
}

# Of the relative noise around a level, as the tests of level shifts take it.
NOISES = (0.0, 0.02, 0.05, 0.3)


def noisy(count: int, scopes: int = 1, *, seed: int = 0, spikes: float = 0.03) -> Array:
    """Norms, `(count, scopes)`: a level that sinks from 6 towards 2, drifts and is noisy; and spikes of 3 to 30 times.

    Args:
        count: Steps.
        scopes: Columns; each has its own drift, noise and spikes.
        seed: Which of the streams.
        spikes: The share of the steps that are spikes.
    """
    rng = np.random.default_rng(seed)
    shape = (count, scopes)
    level = 2.0 + 4.0 * np.exp(-np.arange(count) / 400)[:, None]
    drift = np.cumsum(rng.normal(scale=0.01, size=shape), axis=0)
    spike = np.where(rng.random(shape) < spikes, rng.uniform(3, 30, shape), 1.0)
    return level * np.exp(drift + rng.normal(scale=0.2, size=shape)) * spike


def shifted(before: int, after: int, factors: Sequence[float], *, seed: int = 0) -> tuple[Array, list[float]]:
    """Norms around 1 and then around a factor: a column for each factor with each of NOISES; and their factors."""
    of_column = [factor for factor in factors for _ in NOISES]
    noise = np.random.default_rng(seed).normal(size=(before + after, len(of_column))) * (NOISES * len(factors))
    levels = np.where(np.arange(before + after)[:, None] < before, 1.0, of_column)
    return levels * np.exp(noise), of_column


class Fed:
    """A clipper with a layer of one parameter for each norm of a row; the norm of its gradient is what the row says.

    Args:
        method: The method under test.
        names: Names of the layers, or how many.
        dtype: Of parameters and gradients; in float64 what is measured is exactly what the row says.
        size: How many entries a parameter has.
        options: For the Clipper.
    """

    def __init__(
        self,
        method: ClipMethod | None,
        names: int | Iterable[str] = 1,
        *,
        dtype: torch.dtype = torch.float64,
        size: int = 1,
        **options: Any,
    ) -> None:
        chosen = [f"layer{i}" for i in range(names)] if isinstance(names, int) else names
        self.pairs = [(f"{name}.weight", Parameter(torch.zeros(size, dtype=dtype))) for name in chosen]
        self.direction = torch.arange(1, size + 1, dtype=torch.float64)
        self.direction /= self.direction.norm()
        self.clipper = Clipper(self.pairs, method, **options)

    def give(self, norms: Sequence[float | None]) -> None:
        """Gradients of these norms; None: no gradient."""
        for (_, parameter), norm in zip(self.pairs, norms, strict=True):
            parameter.grad = None if norm is None else (self.direction * float(norm)).to(parameter.dtype)

    def step(self, norms: Sequence[float | None]) -> StepStats:
        self.give(norms)
        return self.clipper.step()

    def limits(self, rows: Iterable[Sequence[float | None]]) -> Array:
        """The limits at each of these steps, `(steps, scopes)`."""
        return np.array([self.step(row).limits.tolist() for row in rows])

    def norms(self) -> list[float]:
        """What the gradients are now."""
        return [parameter.grad.double().norm().item() for _, parameter in self.pairs]

    def clipped(self, rows: Iterable[Sequence[float]]) -> Array:
        """The norms after clipping at each of these steps, `(steps, layers)`."""
        result = []
        for row in rows:
            self.step(row)
            result.append(self.norms())
        return np.array(result)

    @property
    def memory(self) -> dict[str, Tensor]:
        """Copies of the learned values."""
        return self.clipper.state_dict()["learned"]["values"]
