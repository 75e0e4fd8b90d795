"""What optimizers of Adam's kind remember of past gradients, and divide the next ones by: read here, never written.

They keep a mean of the squares of the gradients that they were given, laid out over the ranks like the gradients, and
step by g / (sqrt(v) + eps). What others keep, quantized or factored squares among it, counts as nothing known.
"""

import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_gradclip.select import layout

# Under which name a square is kept. With amsgrad both of the first are, and the first is what divides.
_KEYS = ("max_exp_avg_sq", "exp_avg_sq", "square_avg", "sum")
# Those that add eps before the mean is corrected for its start, and not after.
_EARLY = {"RAdam"}


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
    early = type(inner).__name__ in _EARLY
    found = [_moment(inner.state.get(one), groups.get(id(one)), layout.local(one)) for one in params]
    return [one and one._replace(early=early) for one in found]


def ripeness(moments: Sequence[Moment | None], like: Tensor) -> Tensor:
    """For each the share of the mean that is there, 1 - beta ** steps, by which Adam divides it, `(P,)`; else 1."""
    betas = numbers_on(tuple(0.0 if one is None else one.beta for one in moments), like.device, like.dtype)
    steps = [1.0 if one is None else one.steps for one in moments]
    if any(isinstance(one, Tensor) and not one.is_cpu for one in steps):
        seen = torch.stack([torch.as_tensor(one).to(like).view(()) for one in steps])
    else:
        seen = torch.tensor([float(one) for one in steps], dtype=like.dtype, device="cpu").to(like.device)
    return 1.0 - betas.pow(seen)


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
        return Moment(square, 0.0, 1.0, eps)
    return Moment(square, float(betas[1]), steps, eps)


def _eps(group: Mapping[str, Any]) -> float | None:
    eps = group.get("eps")
    return float(eps) if isinstance(eps, Real) else None
