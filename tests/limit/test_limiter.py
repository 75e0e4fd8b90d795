"""One scope in floats: what is done, learned and saved is what the same rule does on tensors."""

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from kit.drawn import given, settings, st
from kit.running_max import RunningMax
from kit.streams import LEARNERS, Fed, noisy
from lightning_gradclip import (
    ClipMethod,
    Clipper,
    EmaClip,
    Normalize,
    NormClip,
    QuantileClip,
    SigmaClip,
    StepStats,
    ZClip,
)
from lightning_gradclip.limit.limiter import ScopeLimiter
from lightning_gradclip.methods.numbers import Number

RULES: Mapping[str, Callable[[], ClipMethod]] = {
    **LEARNERS,
    "norm": lambda: NormClip(max_norm=3.0),
    "norm with a floor": lambda: NormClip(max_norm=3.0, min_norm=2.3),
    "root mean square": lambda: NormClip(max_norm=0.7, statistic="rms"),
    "1-norm": lambda: NormClip(max_norm=3.0, norm_type=1.0),
    "inf-norm": lambda: NormClip(max_norm=3.0, norm_type=math.inf),
    "schedule": lambda: NormClip(max_norm={0: 5.0, 100: 1.0}),
    "normalize": lambda: Normalize(target=0.7),
    "lowest quantile": lambda: QuantileClip(q=0.0, window=5),
    "highest quantile": lambda: QuantileClip(q=1.0, window=5),
    "window of one": lambda: QuantileClip(window=1),
    "window of one with current": lambda: QuantileClip(window=1, include_current=True),
    "autoclip": lambda: QuantileClip(q=0.3, window=None, include_current=True),
    "zclip with a limit": lambda: ZClip(warmup=8, max_norm=4.0),
    "ema with a first limit": lambda: EmaClip(warmup=8, beta=0.9, warmup_max_norm=2.0),
}
# Where torch rounds a square root, or adds up the sizes of a window, otherwise than exactly.
IN_THE_LAST_DIGIT = {name for name in RULES if "zclip" in name or "sigma" in name}
FIELDS = ("norm", "norm_clipped", "limit", "coef", "clipped", "finite", "skipped")


def on_tensors(method: ClipMethod) -> ClipMethod:
    """The same rule, which gets tensors."""
    kind = type(method)
    same: ClipMethod = object.__new__(type(kind.__name__, (kind,), {"on_floats": False}))
    vars(same).update(vars(method))
    return same


def numbers(stats: StepStats) -> list[float]:
    return [*(getattr(stats, name).item() for name in FIELDS), stats.sizes.item(), stats.limits.item()]


def streams() -> Iterator[Any]:
    smooth = noisy(150, seed=3)
    yield pytest.param(smooth.tolist(), id="smooth")
    yield pytest.param(np.ceil(smooth).tolist(), id="ties")
    odd = smooth.tolist()
    for step, norm in ((2, 0.0), (5, math.nan), (6, math.inf), (30, 0.0), (31, None), (40, math.nan), (41, 1e-300)):
        odd[step] = [norm]
    yield pytest.param(odd, id="odd")


@pytest.mark.parametrize("rows", list(streams()))
@pytest.mark.parametrize("name", RULES)
def test_a_run_is_the_same_in_floats_and_on_tensors(name: str, rows: Sequence[Sequence[float | None]]) -> None:
    floats = Fed(RULES[name](), size=3, nonfinite="ignore")
    tensors = Fed(on_tensors(RULES[name]()), size=3, nonfinite="ignore")
    assert isinstance(floats.clipper._limiter, ScopeLimiter)
    assert floats.clipper._limiter.takes_floats
    assert not tensors.clipper._limiter.takes_floats
    rel = 1e-12 if name in IN_THE_LAST_DIGIT else 0
    clipped = 0
    for row in rows:
        one, other = floats.step(row), tensors.step(row)
        clipped += one.coef.item() != 1
        assert numbers(one) == pytest.approx(numbers(other), rel=rel, abs=0, nan_ok=True)
        for (_, a), (_, b) in zip(floats.pairs, tensors.pairs, strict=True):
            if a.grad is None or b.grad is None:
                assert a.grad is b.grad
            else:
                torch.testing.assert_close(a.grad, b.grad, rtol=rel, atol=0, equal_nan=True)
    # A window that holds nothing but the current size allows it.
    assert clipped or name == "window of one with current"
    one, other = floats.clipper.state_dict()["learned"], tensors.clipper.state_dict()["learned"]
    assert one["fingerprint"] == other["fingerprint"]
    assert one["values"].keys() == other["values"].keys()
    for key, value in one["values"].items():
        expected = other["values"][key]
        if key == "recent":
            # Kept in order of arrival on tensors, with infinities for steps that taught nothing.
            expected = expected[torch.isfinite(expected)].sort().values[None]
        torch.testing.assert_close(value, expected, rtol=rel, atol=0)
    assert floats.clipper.metrics() == pytest.approx(tensors.clipper.metrics(), rel=1e-12, nan_ok=True)


@pytest.mark.parametrize("name", LEARNERS)
@pytest.mark.parametrize("cut", [0, 1, 7, 20])
@pytest.mark.parametrize("first", ["floats", "tensors"])
def test_what_one_path_saved_the_other_goes_on_with(name: str, cut: int, first: str) -> None:
    rows = noisy(60, seed=5).tolist()
    # A step that teaches nothing leaves its mark in some states.
    rows[3] = [0.0]
    make = {"floats": RULES[name], "tensors": lambda: on_tensors(RULES[name]())}
    straight, before = Fed(make[first]()), Fed(make[first]())
    after = Fed(make["tensors" if first == "floats" else "floats"]())
    expected = straight.limits(rows)[cut:]
    before.limits(rows[:cut])
    after.clipper.load_state_dict(before.clipper.state_dict())
    np.testing.assert_allclose(after.limits(rows[cut:]), expected, rtol=1e-12)


@pytest.mark.parametrize("name", LEARNERS)
def test_a_run_that_measures_other_scopes_as_well_is_the_same(name: str) -> None:
    rows = noisy(60, scopes=2, seed=5).tolist()
    plain, measuring = Fed(RULES[name](), 2), Fed(RULES[name](), 2, measure_per="layer")
    # The joint norm is joined from other pieces.
    np.testing.assert_allclose(measuring.limits(rows), plain.limits(rows), rtol=1e-12)


class Doubled(NormClip):
    """Says nothing about floats."""

    def limit(self, size: Tensor, weight: Tensor | None, step: int) -> Tensor:
        assert isinstance(size, Tensor)
        return 2 * super().limit(size, weight, step)


class Counting(ZClip):
    def update(self, size: Tensor, limit: Tensor, active: Tensor) -> None:
        assert isinstance(size, Tensor)
        super().update(size, limit, active)


class Said(NormClip):
    on_floats = True

    def limit(self, size: Number, weight: Tensor | None, step: int) -> Number:
        assert isinstance(size, float)
        return 2 * super().limit(size, weight, step)


class Weighing(NormClip):
    on_floats = True
    needs_weight = True

    def limit(self, size: Number, weight: Tensor | None, step: int) -> Number:
        assert weight is not None
        return weight


class TestWhoGetsFloats:
    @pytest.mark.parametrize(
        "method", [Doubled(), Counting(), RunningMax(), Weighing()], ids=lambda one: type(one).__name__
    )
    def test_rules_that_do_not_say_so_and_rules_that_weigh_get_tensors(self, method: ClipMethod) -> None:
        assert not method.takes_floats
        fed = Fed(method, size=3)
        assert not fed.clipper._limiter.takes_floats
        for norm in (3.0, 4.0, 5.0):
            assert fed.step([norm]).norm.item() == pytest.approx(norm)

    def test_rules_that_say_so_get_floats(self) -> None:
        fed = Fed(Said())
        assert fed.step([3.0]).limit.item() == 2.0
        assert fed.norms() == pytest.approx([2.0], rel=1e-6)

    @pytest.mark.parametrize("name", RULES)
    def test_ours_do(self, name: str) -> None:
        assert RULES[name]().takes_floats


SIZES = st.one_of(
    st.floats(min_value=0),
    st.floats(0, 10),
    st.sampled_from([0.0, 5e-324, 1e-310, 1e-160, 1.7e308, math.inf, math.nan]),
)
EXTREMES: Mapping[str, Callable[[], ClipMethod]] = {
    **RULES,
    "ema without bounds": lambda: EmaClip(warmup=1, ratio=math.inf),
    "ema near zero": lambda: EmaClip(warmup=2, ratio=5e-324, warmup_max_norm=5e-324),
    "ema of large ones": lambda: EmaClip(warmup=1, ratio=1.7e308, beta=0.0),
    "zclip without bounds": lambda: ZClip(warmup=2, z_threshold=math.inf),
    "zclip of large ones": lambda: ZClip(warmup=2, z_threshold=1e308, clip_factor=1e308, memory="faithful"),
    "zclip near zero": lambda: ZClip(warmup=2, z_threshold=5e-324, alpha=0.0, clip_factor=5e-324),
    "sigma without bounds": lambda: SigmaClip(k=math.inf, window=2, warmup=2),
    "mean": lambda: SigmaClip(k=0, window=3, warmup=2),
    "norm near zero": lambda: NormClip(max_norm=5e-324),
    "a large floor": lambda: NormClip(max_norm=math.inf, min_norm=1e308),
    "normalize to a large norm": lambda: Normalize(target=1.7e308, smoothing=0.0),
    "normalize to nearly nothing": lambda: Normalize(target=5e-324, smoothing=0.0),
}


@settings(derandomize=True, deadline=None, max_examples=500)
@given(
    name=st.sampled_from(sorted(EXTREMES)),
    sizes=st.lists(SIZES, min_size=1, max_size=8),
    nonfinite=st.sampled_from(["skip", "ignore", "zero"]),
)
def test_no_number_is_too_extreme(name: str, sizes: list[float], nonfinite: str) -> None:
    fed = Fed(EXTREMES[name](), nonfinite=nonfinite, max_consecutive_skips=None)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "dropped optimizer step", RuntimeWarning)
        for size in sizes:
            stats = fed.step([size])
            if math.isfinite(stats.norm.item()):
                assert stats.limit.item() > 0
                assert stats.coef.item() >= 0
    resumed = Fed(EXTREMES[name]())
    resumed.clipper.load_state_dict(fed.clipper.state_dict())
    assert numbers(resumed.step([1.0])) == pytest.approx(numbers(fed.step([1.0])), nan_ok=True)


def test_a_scaler_whose_scale_sank_to_zero_is_no_division_by_zero() -> None:
    fed = Fed(None)
    optimizer = torch.optim.SGD([parameter for _, parameter in fed.pairs], lr=0.1)
    clipper = Clipper(fed.pairs, None, optimizer=optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=1.0, backoff_factor=1e-30)
    for _ in range(3):
        scaler.scale(torch.ones(()))
        fed.give([math.nan])
        stats = clipper.step(scaler)
        scaler.step(optimizer)
        scaler.update()
        assert not stats.finite
    assert scaler.get_scale() == 0
    fed.give([1.0])
    assert not clipper.step(scaler).finite
