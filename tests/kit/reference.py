"""References in float64 NumPy, written from the formulas and independent of the package."""

import math
from collections.abc import Hashable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch

Array = np.ndarray


def array(tensor: torch.Tensor) -> Array:
    """The entries in float64 or complex128; duplicates of a sparse tensor are added up."""
    wide = tensor.detach().to(torch.complex128 if tensor.is_complex() else torch.float64)
    return (wide.to_dense() if wide.is_sparse else wide).numpy()


def p_norm(values: Array, p: float) -> float:
    """The p-norm of all entries, scaled by the largest so that no power leaves the range of float64."""
    magnitude = np.abs(values).ravel()
    largest = float(magnitude.max(initial=0.0))
    if largest == 0 or math.isinf(p) or not math.isfinite(largest):
        return largest
    return largest * float(np.sum((magnitude / largest) ** p)) ** (1 / p)


def joint_norm(arrays: Sequence[Array], p: float) -> float:
    """The p-norm of all entries of several arrays."""
    return p_norm(np.concatenate([np.zeros(0), *(values.ravel() for values in arrays)]), p)


def rms(arrays: Sequence[Array]) -> float:
    """The root mean square of all entries of several arrays."""
    return joint_norm(arrays, 2.0) / math.sqrt(max(1, sum(values.size for values in arrays)))


def coefficient(size: float, limit: float, floor: float = 0.0, epsilon: float = 1e-6) -> float:
    """limit / (size + epsilon) above the limit, floor / size below the floor, 1 elsewhere."""
    if size > limit:
        return limit / (size + epsilon)
    return floor / size if 0 < size < floor else 1.0


def norm_clip(
    gradients: Mapping[str, Array],
    scopes: Mapping[str, Hashable],
    *,
    max_norm: float,
    min_norm: float = 0.0,
    p: float = 2.0,
    statistic: str = "norm",
) -> tuple[dict[str, Array], dict[Hashable, float], dict[Hashable, float]]:
    """Clip by norm; `scopes` says to which scope each gradient belongs.

    Returns the clipped gradients by name, and by scope what was measured and the coefficient.
    """
    members: dict[Hashable, list[Array]] = {}
    for name, gradient in gradients.items():
        members.setdefault(scopes[name], []).append(gradient)
    sizes, coefs = {}, {}
    for scope, arrays in members.items():
        sizes[scope] = rms(arrays) if statistic == "rms" else joint_norm(arrays, p)
        coefs[scope] = coefficient(sizes[scope], max_norm, min_norm, 0.0 if statistic == "rms" else 1e-6)
    return {name: gradients[name] * coefs[scopes[name]] for name in gradients}, sizes, coefs


class Agc(NamedTuple):
    """Gradients by name, and by unit what was measured, what was allowed and the coefficient."""

    gradients: dict[str, Array]
    sizes: dict[str, float]
    limits: dict[str, float]
    coefs: dict[str, float]


def agc(
    gradients: Mapping[str, Array],
    weights: Mapping[str, Array],
    *,
    clip_factor: float = 0.01,
    eps: float = 1e-3,
    per: str = "unit",
) -> Agc:
    """Adaptive gradient clipping: each gradient against the weights of the same name."""
    result = Agc({name: gradient.copy() for name, gradient in gradients.items()}, {}, {}, {})
    for name, gradient in result.gradients.items():
        sliced = per == "unit" and gradient.ndim > 1
        for place in range(len(gradient)) if sliced else [...]:
            unit = f"{name}[{place}]" if sliced else name
            size = p_norm(gradient[place], 2.0)
            limit = clip_factor * max(p_norm(weights[name][place], 2.0), eps)
            coef = limit / max(size, 1e-6) if size > limit and math.isfinite(size) else 1.0
            # Without a condition 1 * -0 and 1 * inf of a complex number would change it.
            if coef != 1:
                gradient[place] *= coef
            result.sizes[unit], result.limits[unit], result.coefs[unit] = size, limit, coef
    return result


def ulp(values: Array, dtype: torch.dtype) -> Array:
    """The distance between neighbours in `dtype` at each value."""
    info = torch.finfo(dtype)
    return np.exp2(np.floor(np.log2(np.maximum(np.abs(values), info.tiny)))) * info.eps


def normalize(
    gradients: Mapping[str, Array],
    scopes: Mapping[str, Hashable],
    *,
    target: float = 1.0,
    smoothing: float = 1e-6,
    p: float = 2.0,
) -> tuple[dict[str, Array], dict[Hashable, float], dict[Hashable, float]]:
    """Rescale every scope to the norm `target`; returns what `norm_clip` returns."""
    sizes, coefs = {}, {}
    for scope in dict.fromkeys(scopes[name] for name in gradients):
        sizes[scope] = joint_norm([gradient for name, gradient in gradients.items() if scopes[name] == scope], p)
        coefs[scope] = target / (sizes[scope] + smoothing) if sizes[scope] else 1.0
    return {name: gradients[name] * coefs[scopes[name]] for name in gradients}, sizes, coefs


def quantile_limits(sizes: Array, *, q: float, window: int | None, include_current: bool = False) -> Array:
    """Limits of QuantileClip for the sizes of one scope, all to be remembered."""
    limits = []
    for i in range(len(sizes)):
        past = list(sizes[: i + 1 if include_current else i])[0 if window is None else -window :]
        limits.append(np.percentile(past, 100 * q) if past else math.inf)
    return np.array(limits)


def sigma_limits(sizes: Array, *, k: float, window: int, warmup: int) -> Array:
    """Limits of SigmaClip for the sizes of one scope, all to be remembered."""
    limits = []
    for i in range(len(sizes)):
        past = [float(size) for size in sizes[max(0, i - window) : i]]
        if len(past) < warmup:
            limits.append(math.inf)
            continue
        mean = math.fsum(past) / len(past)
        variance = math.fsum((size - mean) ** 2 for size in past) / (len(past) - 1)
        limits.append(mean + k * math.sqrt(variance))
    return np.array(limits)


def olmo_drops(norms: Sequence[float], *, sigma_factor: float = 6.0, length: int = 128) -> list[bool]:
    """Whether OLMo-core's SkipStepOptimizer drops each step, by the rule for the gradient norm alone.

    Its list holds the current norm and at most `length` before it; there must be half of `length` in it.
    """
    held: list[float] = []
    drops = []
    for norm in norms:
        held = [*held, float(norm)][-(length + 1) :]
        previous = np.array(held[:-1], dtype=np.float64)
        active = len(held) >= max(2, length // 2)
        drops.append(bool(active and held[-1] - previous.mean() > sigma_factor * previous.std(ddof=1)))
    return drops


class ZClip(NamedTuple):
    """The limit at each step, and the mean and variance after it."""

    limits: Array
    means: Array
    variances: Array


def zclip(
    sizes: Array,
    *,
    z_threshold: float = 2.5,
    alpha: float = 0.97,
    warmup: int = 25,
    mode: str = "reciprocal",
    clip_factor: float = 1.0,
    max_norm: float = math.inf,
    memory: str = "winsorized",
) -> ZClip:
    """ZClip for the sizes of one scope, all to be remembered."""
    result = ZClip([], [], [])
    mean = variance = math.nan
    for i, size in enumerate(map(float, sizes)):
        limit = math.inf
        if i < warmup:
            first = sizes[: i + 1].astype(np.float64)
            mean, variance = float(np.mean(first)), float(np.var(first))
        else:
            sd = math.sqrt(variance)
            z = (size - mean) / (sd + 1e-6)
            is_spike = size > mean + z_threshold * sd if mode == "max" else z > z_threshold
            if not is_spike:
                # The largest size that would have been none.
                limit = mean + z_threshold * (sd if mode == "max" else sd + 1e-6)
            elif mode == "reciprocal":
                limit = clip_factor * (mean + z_threshold * sd / (z / z_threshold))
            else:
                limit = clip_factor * (mean if mode == "mean" else mean + z_threshold * sd)
            if memory == "winsorized":
                kept = min(size, mean + z_threshold * max(sd, 0.01 * mean))
            else:
                kept = limit if is_spike else size
            mean = alpha * mean + (1 - alpha) * kept
            variance = alpha * variance + (1 - alpha) * (kept - mean) ** 2
        result.limits.append(min(limit, max_norm))
        result.means.append(mean)
        result.variances.append(variance)
    return ZClip(*map(np.array, result))


class Ema(NamedTuple):
    """The limits at each step and gamma after it, `(steps, scopes)`; +inf and 0 stand for none."""

    limits: Array
    gammas: Array


def ema(
    sizes: Array, *, ratio: float = 1.04, beta: float = 0.99, warmup: int = 100, warmup_max_norm: float = math.inf
) -> Ema:
    """EmaClip for the sizes of all scopes, `(steps, scopes)`; 0 stands for no gradient."""
    gammas, counts = [0.0] * sizes.shape[1], [0] * sizes.shape[1]
    result = Ema([], [])
    for row in sizes.tolist():
        joint = math.sqrt(math.fsum(size**2 for size in row))
        shared = warmup_max_norm / (joint + 1e-6) if joint > warmup_max_norm else math.inf
        limits = []
        for scope, size in enumerate(row):
            if size == 0:
                limits.append(ratio * gammas[scope] if counts[scope] >= warmup else math.inf)
                continue
            limits.append(ratio * gammas[scope] if counts[scope] >= warmup else shared * size)
            after = min(size, limits[-1])
            if counts[scope] == 0:
                gammas[scope] = after
            elif counts[scope] < warmup:
                gammas[scope] = min(gammas[scope], after)
            else:
                gammas[scope] = beta * gammas[scope] + (1 - beta) * after
            counts[scope] += 1
        result.limits.append(limits)
        result.gammas.append(list(gammas))
    return Ema(*map(np.array, result))
