"""Gradients in pieces give what whole gradients give: every layout, every method, every action."""

import math
from typing import Any

import numpy as np
import pytest
import torch

from kit import reference, sharded, workers
from kit.layouts import SPREADS, net
from kit.pieces import digest
from kit.sharded import CASES, CORE, Case, Run, Taken
from lightning_gradclip import AGC, NormClip

pytestmark = pytest.mark.distributed

FLATTENED = {name for name in SPREADS if name.startswith("fsdp1")} - {"fsdp1_none"}
# Of each kind of cutting rows one layout takes every case; the others take some of each kind.
THOROUGH = {"fsdp1_full", "fsdp2"}


# Where the same pieces are only more, some of which hold no entry of a short bias.
FEW = [
    *("norm model p=2", "norm group p=2", "norm parameter p=2", "norm layer p=inf", "rms parameter", "value"),
    *("normalize parameter", "agc unit", "agc parameter", "quantile parameter", "zclip parameter", "ema model"),
    *("skip norm model", "measure parameter only", "norm model p=1", "norm model p=3"),
]


def cases(name: str) -> dict[str, Case]:
    labels = CASES if name in THOROUGH else FEW if name.endswith(("_4", "_hybrid")) else CORE
    return {label: CASES[label] for label in labels}


@workers.once
def spreads() -> dict[str, Run]:
    return sharded.run_all({name: cases(name) for name in SPREADS})


@pytest.mark.parametrize(("name", "label"), [(name, label) for name in SPREADS for label in cases(name)])
def test_sharded_equals_dense(name: str, label: str) -> None:
    assert_like_dense(name, label, spreads()[name], torch.float32)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_in_other_precisions(dtype: torch.dtype) -> None:
    core = {label: CASES[label] for label in FEW}
    names = sorted({"fsdp1_full", "fsdp2"} & SPREADS.keys())
    for name, run in sharded.run_all(dict.fromkeys(names, core), dtype, seed=1).items():
        for label in FEW:
            assert_like_dense(name, label, run, dtype)


_DENSE: dict[tuple[str, bytes], Taken] = {}


def dense(label: str, run: Run, dtype: torch.dtype) -> Taken:
    """What one process does; layouts that come to the same gradients, to the last bit, share it."""
    key = label, run.bits
    if key not in _DENSE:
        _DENSE[key] = sharded.dense(CASES[label], run.gradients, dtype)
    return _DENSE[key]


def assert_like_dense(name: str, label: str, run: Run, dtype: torch.dtype) -> None:
    first, *others = (taken[label] for taken in run.taken)
    if isinstance(first, ValueError):
        assert name in FLATTENED
        assert CASES[label].method.per == "unit"
        return
    expected = dense(label, run, dtype)
    assert_close(first._asdict(), expected._asdict(), f"{name} {label} ")
    bits = digest(first)
    assert all(digest(other) == bits for other in others)
    if name.startswith(("ddp", "fsdp2")) and label.startswith("agc unit"):
        # Where rows are whole, even their rounding is that of one process.
        matrices = [key for key, one in expected.gradients.items() if one.ndim == 2]
        assert digest([first.gradients[key] for key in matrices]) == digest(
            [expected.gradients[key] for key in matrices]
        )


BY_FORMULA = [label for label in CORE if label.startswith(("norm ", "rms ", "agc "))]


@pytest.mark.parametrize(
    ("name", "label"), [(name, label) for name in SPREADS for label in BY_FORMULA if label in cases(name)]
)
def test_against_the_formulas(name: str, label: str) -> None:
    run = spreads()[name]
    method, taken = CASES[label].method, run.taken[0][label]
    if isinstance(taken, ValueError):
        return
    # The scopes are in the order of the optimizer's groups.
    ordered = sorted(run.gradients.items(), key=lambda pair: pair[0].endswith("bias"))
    gradients = {key: reference.array(one) for key, one in ordered}
    if isinstance(method, AGC):
        weights = {key: reference.array(one) for key, one in net().named_parameters()}
        exact = reference.agc(gradients, weights, clip_factor=method.clip_factor, eps=method.eps, per=method.per)
        clipped, sizes = exact.gradients, exact.sizes
        limits = list(exact.limits.values())
        assert taken.steps[0]["limits"].tolist() == pytest.approx(limits, rel=1e-6)
    else:
        assert isinstance(method, NormClip)
        scopes = {
            "model": dict.fromkeys(gradients, ""),
            "group": {key: key.endswith("bias") for key in gradients},
            "layer": {key: key.rpartition(".")[0] for key in gradients},
            "parameter": {key: key for key in gradients},
        }[method.per]
        options: dict[str, Any] = {"p": method.norm_type, "statistic": method.statistic}
        clipped, sizes, _ = reference.norm_clip(gradients, scopes, max_norm=method.max_norm, **options)
    assert taken.steps[0]["sizes"].tolist() == pytest.approx(list(sizes.values()), rel=1e-6)
    total = reference.joint_norm(list(gradients.values()), method.norm_type)
    assert taken.steps[0]["norm"].item() == pytest.approx(total, rel=1e-6)
    changed = 0
    for key, one in clipped.items():
        np.testing.assert_allclose(taken.gradients[key].numpy(), one, rtol=1e-6, atol=1e-9, err_msg=f"{name} {key}")
        changed += not np.allclose(one, gradients[key])
    assert changed


def assert_close(ours: Any, theirs: Any, where: str) -> None:
    """Equal to 1e-6, in everything that was left; gradients in what their dtype can tell apart."""
    if isinstance(theirs, dict):
        assert ours.keys() == theirs.keys(), where
        for key in theirs:
            assert_close(ours[key], theirs[key], f"{where}/{key}")
    elif isinstance(theirs, (list, tuple)):
        assert len(ours) == len(theirs), where
        for i, (one, other) in enumerate(zip(ours, theirs, strict=True)):
            assert_close(one, other, f"{where}/{i}")
    elif isinstance(theirs, torch.Tensor):
        assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape), where
        if torch.equal(ours, theirs):
            return
        rtol = max(1e-6, torch.finfo(theirs.dtype).eps) if theirs.is_floating_point() else 0.0
        np.testing.assert_allclose(
            reference.array(ours), reference.array(theirs), rtol=rtol, atol=1e-9, equal_nan=True, err_msg=where
        )
    elif isinstance(theirs, float):
        assert math.isnan(ours) if math.isnan(theirs) else ours == pytest.approx(theirs, rel=1e-6), where
    else:
        assert ours == theirs, where
