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
