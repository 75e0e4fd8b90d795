"""Arithmetic on tensors and plain floats alike: a rule with `on_floats = True` is written once and used on both.

The numbers of a single scope whose gradients are on CPU are floats: an operation costs thirty nanoseconds there, and a
microsecond on a tensor. Both give the same bits, but for square roots, which torch does not always round correctly.
"""

import math
from typing import Any, TypeAlias

import torch
from torch import Tensor

# One number for each scope: a tensor `(S,)`, or the plain float of the only one. A truth is a boolean tensor or bool.
Number: TypeAlias = Any
Truth: TypeAlias = Any


def where(condition: Truth, yes: Number, no: Number) -> Number:
    """`yes` where the condition holds, else `no`; both are computed."""
    return torch.where(condition, yes, no) if isinstance(condition, Tensor) else (yes if condition else no)


def divide(dividend: Number, divisor: Number) -> Number:
    """The ratio; over 0 it is infinite, or NaN for 0."""
    if isinstance(divisor, Tensor) and not isinstance(dividend, Tensor):
        # A float over a tensor is for torch a product with the reciprocal, which rounds twice.
        return torch.full_like(divisor, dividend) / divisor
    if isinstance(dividend, Tensor) or divisor:
        return dividend / divisor
    return math.copysign(math.inf, dividend) if abs(dividend) > 0 else math.nan


def minimum(one: Number, other: Number) -> Number:
    """The smaller one, of which at least the first is a tensor or both are floats; NaN if one is."""
    if isinstance(one, Tensor):
        return torch.minimum(one, other) if isinstance(other, Tensor) else one.clamp_max(other)
    return one if one < other or one != one else other


def maximum(one: Number, other: Number) -> Number:
    """The larger one, of which at least the first is a tensor or both are floats; NaN if one is."""
    if isinstance(one, Tensor):
        return torch.maximum(one, other) if isinstance(other, Tensor) else one.clamp_min(other)
    return one if one > other or one != one else other


def sqrt(value: Number) -> Number:
    """The square root of what is not negative."""
    return value.sqrt() if isinstance(value, Tensor) else math.sqrt(value)


def full(like: Number, value: float) -> Number:
    """`value` for every scope."""
    return torch.full_like(like, value) if isinstance(like, Tensor) else value


def real(count: Number, like: Number) -> Number:
    """A count as a number of the kind of `like`."""
    return count.to(like.dtype) if isinstance(count, Tensor) else float(count)


def together(size: Number) -> Number:
    """The joint 2-norm of all scopes, one number."""
    return torch.linalg.vector_norm(size) if isinstance(size, Tensor) else size


def largest(like: Number) -> float:
    """The largest finite number of this kind."""
    return torch.finfo(like.dtype if isinstance(like, Tensor) else torch.float64).max
