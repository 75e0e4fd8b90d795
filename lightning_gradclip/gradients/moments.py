"""What optimizers of Adam's kind remember of past gradients, and divide the next ones by: read here, never written.

They keep a mean of the squares of the gradients that they were given, laid out over the ranks like the gradients, and
step by g / (sqrt(v) + eps). What others keep, quantized or factored squares among it, counts as nothing known.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_gradclip.gradients import norms
from lightning_gradclip.gradients.norms import CHUNK, CHUNK_ON_DEVICE, Tensors, vector_norm
from lightning_gradclip.select import layout

# Under which name a square is kept. With amsgrad both of the first are, and the first is what divides.
_KEYS = ("max_exp_avg_sq", "exp_avg_sq", "square_avg", "sum")
# Those that add eps before the mean is corrected for its start, and not after.
_EARLY = {"RAdam"}
# Those that keep a mean which is corrected for its start already.
_CORRECTED = {"StableAdamW"}
# No mean square counts as less: a gradient beside it would seem without bounds.
_LEAST = 1e-32


class Moment(NamedTuple):
    """What an optimizer knows of one parameter's past gradients.

    Attributes:
        square: What this rank holds of the mean square.
        beta: Share of the old mean that was kept at each step; 0 where the mean is not to be corrected for its start.
        steps: How many steps it has seen.
        eps: What is added to the root before dividing by it.
        early: Whether it is added before the mean is corrected.
    """

    square: Tensor
    beta: float
    steps: float | Tensor
    eps: float
    early: bool = False


def keeps_any(optimizer: Optimizer) -> bool:
    """Whether the optimizer may be of that kind: nothing else has an eps in each of its groups' settings."""
    return any(_eps(group) is not None for group in optimizer.param_groups)


def moments_of(optimizer: Optimizer, params: Sequence[Tensor]) -> list[Moment | None]:
    """What is known of each of these parameters, None where nothing is: before the first step of the optimizer too."""
    groups = {id(one): group for group in optimizer.param_groups for one in group["params"]}
    # Wrappers such as Fabric's have the state that was there when they were made.
    inner = getattr(optimizer, "optimizer", optimizer)
    name = type(inner).__name__
    found = [_moment(inner.state.get(one), groups.get(id(one)), layout.local(one)) for one in params]
    found = [one and one._replace(early=name in _EARLY) for one in found]
    return [one and one._replace(beta=0.0) for one in found] if name in _CORRECTED else found


def means_of(optimizer: Optimizer, params: Sequence[Tensor]) -> list[Moment | None]:
    """The same where it is a mean, as of RMSprop and not of Adagrad, and always with the correction that it needs."""
    groups = {id(one): group for group in optimizer.param_groups for one in group["params"]}
    inner = getattr(optimizer, "optimizer", optimizer)
    found: list[Moment | None] = []
    for parameter, moment in zip(params, moments_of(optimizer, params), strict=True):
        alpha = groups.get(id(parameter), {}).get("alpha", 0.0)
        if moment is not None and "sum" in inner.state[parameter]:
            moment = None
        found.append(moment._replace(beta=float(alpha)) if moment is not None and alpha else moment)
    return found


def seasoned(moments: Sequence[Moment | None], like: Tensor, least: int) -> Tensor:
    """For each whether it is known and has seen so many steps, `(P,)`, 1 or 0."""
    steps = [-1.0 if one is None else one.steps for one in moments]
    return (_steps_on(steps, like) >= least).to(like)


def surprises(gradients: Tensors, moments: Sequence[Moment | None], ripe: Tensor) -> Tensor:
    """For each the 2-norm of g / sqrt(v) of what this rank holds, `(P,)`, v being corrected for its start.

    0 where nothing is known of v, or there is no gradient. Entries that have never had a gradient, with v = 0, are left
    out; v counts as no less than eps squared, nor than 1e-32.
    """
    found = torch.zeros_like(ripe)
    for place, (gradient, moment) in enumerate(zip(gradients, moments, strict=True)):
        if gradient is None or moment is None:
            continue
        share = ripe[place].to(moment.square.device)
        pieces = [
            vector_norm(_beside(some, square, share, max(moment.eps**2, _LEAST)), 2.0)
            for some, square in chunks(gradient, moment.square)
        ]
        if pieces:
            found[place] = norms.joint_norm(torch.stack(pieces), 2.0).to(found)
    return found


def spikes(
    gradients: Tensors, moments: Sequence[Moment | None], bounds: Tensor, local: Tensor
) -> tuple[Tensor, Tensor]:
    """How many entries of each lie beyond its bound, and the 2-norms without what is beyond, `(P,)`.

    Bounds, `(P,)`, are in units of sqrt(v), v as the optimizer keeps it. `local` are the norms as they are.
    """
    counts, clamped = torch.zeros_like(local), local.clone()
    for place, (gradient, moment) in enumerate(zip(gradients, moments, strict=True)):
        if gradient is None or moment is None:
            continue
        beyond, pieces = [], []
        for some, square in chunks(gradient, moment.square):
            kept = kept_within(some, square, bounds[place].to(square.device))
            beyond.append((kept != some).sum())
            pieces.append(vector_norm(kept.to(norms.widest(kept.device)), 2.0))
        if pieces:
            counts[place] = torch.stack(beyond).sum().to(counts)
            without = norms.joint_norm(torch.stack(pieces), 2.0).to(clamped)
            clamped[place] = without.where(counts[place] > 0, local[place])
    return counts, clamped


def kept_within(values: Tensor, square: Tensor, bound: Tensor) -> Tensor:
    """A copy of the values in which none is beyond `bound`, 0-d, times the root of its mean square.

    What has never had a gradient, with a mean square of 0, stays as it is, and NaN too.
    """
    root = square.to(torch.promote_types(square.dtype, torch.float32)).sqrt() * bound
    root = torch.where(root > 0, root, math.inf).to(values)
    return torch.clamp(values, -root, root)


def chunks(values: Tensor, square: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Entries and their mean squares side by side, 1-d, as many at a time as stay in the cache."""
    if values.is_sparse:
        values = values.coalesce()
        square, values = square[values.indices().unbind()], values.values()
    order = sorted(range(values.dim()), key=values.stride, reverse=True)
    size = CHUNK if values.is_cpu else CHUNK_ON_DEVICE
    pair = (one.permute(order).reshape(-1).split(size) for one in (values, square))
    yield from zip(*pair, strict=True)


def ripeness(moments: Sequence[Moment | None], like: Tensor) -> Tensor:
    """For each the share of the mean that is there, 1 - beta ** steps, by which Adam divides it, `(P,)`; else 1."""
    betas = numbers_on(tuple(0.0 if one is None else one.beta for one in moments), like.device, like.dtype)
    return 1.0 - betas.pow(_steps_on([1.0 if one is None else one.steps for one in moments], like))


def felt_beside(moments: Sequence[Moment | None], ripe: Tensor) -> Tensor:
    """For each the eps that is added to the root of its corrected mean, `(P,)`; NaN where nothing is known."""
    eps = tuple(math.nan if one is None else one.eps for one in moments)
    early = tuple(0.5 if one is not None and one.early else 0.0 for one in moments)
    given, power = (numbers_on(values, ripe.device, ripe.dtype) for values in (eps, early))
    return given / ripe.pow(power)


@lru_cache(maxsize=64)
def numbers_on(values: tuple[float, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    """Numbers as a tensor, kept: copying them to a device anew would make the host wait for it."""
    return torch.tensor(values, dtype=dtype, device="cpu").to(device)


def _moment(state: Mapping[str, Any] | None, group: Mapping[str, Any] | None, parameter: Tensor) -> Moment | None:
    eps = None if group is None else _eps(group)
    # Adadelta adds its eps before it takes the root.
    if not state or group is None or eps is None or "rho" in group:
        return None
    square = next((layout.local(state[key]) for key in _KEYS if isinstance(state.get(key), Tensor)), None)
    if square is None or type(square) is not Tensor or square.is_complex() or square.shape != parameter.shape:
        return None
    betas = group.get("betas")
    steps = state.get("step", group.get("step"))
    if betas is None or steps is None:
        return Moment(square, 0.0, math.inf if steps is None else steps, eps)
    return Moment(square, float(betas[1]), steps, eps)


def _eps(group: Mapping[str, Any]) -> float | None:
    eps = group.get("eps")
    return float(eps) if isinstance(eps, Real) else None


def _steps_on(steps: Sequence[float | Tensor], like: Tensor) -> Tensor:
    if any(isinstance(one, Tensor) and not one.is_cpu for one in steps):
        return torch.stack([torch.as_tensor(one).to(like).view(()) for one in steps])
    return torch.tensor([float(one) for one in steps], dtype=like.dtype, device="cpu").to(like.device)


def _beside(values: Tensor, square: Tensor, ripe: Tensor, least: float) -> Tensor:
    wide = norms.widest(values.device)
    mean = square.to(wide)
    return torch.where(mean > 0, values.to(wide) / (mean / ripe.to(wide)).clamp_min(least).sqrt(), 0.0)
