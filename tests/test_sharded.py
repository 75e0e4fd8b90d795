"""Gradients in pieces give what whole gradients give: every layout, every method, every action."""

from typing import Any

import numpy as np
import pytest
import sharded
import torch
from layouts import SPREADS
from sharded import CASES, Run
from torch import Tensor

FLATTENED = [name for name in SPREADS if name.startswith("fsdp1") and name != "fsdp1_none"]


@pytest.fixture(scope="module", params=SPREADS)
def layout(request: pytest.FixtureRequest) -> tuple[str, Run]:
    return request.param, sharded.run(request.param)


@pytest.mark.parametrize("case", CASES)
def test_sharded_equals_dense(layout: tuple[str, Run], case: str) -> None:
    name, run = layout
    first, *others = (taken[case] for taken in run.taken)
    if isinstance(first, ValueError):
        assert name in FLATTENED
        assert CASES[case].method.per == "unit"
        return
    expected = sharded.dense(CASES[case], run.gradients)
    assert_close(first._asdict(), expected._asdict())
    for other in others:
        assert_same_bits(first, other)


def assert_close(ours: Any, theirs: Any, where: str = "") -> None:
    """Equal to 1e-6, in everything that was left."""
    if isinstance(theirs, dict):
        assert ours.keys() == theirs.keys(), where
        for key in theirs:
            assert_close(ours[key], theirs[key], f"{where}/{key}")
    elif isinstance(theirs, (list, tuple)):
        assert len(ours) == len(theirs), where
        for i, (one, other) in enumerate(zip(ours, theirs, strict=True)):
            assert_close(one, other, f"{where}/{i}")
    elif isinstance(theirs, Tensor):
        assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape), where
        np.testing.assert_allclose(ours.numpy(), theirs.numpy(), rtol=1e-6, atol=1e-9, err_msg=where)
    elif isinstance(theirs, float):
        assert ours == pytest.approx(theirs, rel=1e-6, nan_ok=True), where
    else:
        assert ours == theirs, where


def assert_same_bits(one: Any, other: Any) -> None:
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_same_bits(one[key], other[key])
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other)
        for a, b in zip(one, other, strict=True):
            assert_same_bits(a, b)
    elif isinstance(one, Tensor):
        assert one.dtype == other.dtype
        assert torch.equal(
            one.nan_to_num(nan=-1e300 if one.dtype == torch.float64 else -1e30),
            other.nan_to_num(nan=-1e300 if one.dtype == torch.float64 else -1e30),
        )
    else:
        assert one == other or (one != one and other != other)
