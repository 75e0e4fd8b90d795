"""ValueClip against `torch.nn.utils.clip_grad_value_` and `torch.clamp`, bit for bit."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import SGD

from kit import reference
from kit.clipping import random
from kit.drawn import given, settings, st
from kit.gradients import SHAPES, Witness, named, normal
from lightning_gradclip import Clipper, StepStats, ValueClip

# Dtypes, and whole numbers of the same width.
DTYPES = {
    torch.float64: torch.int64,
    torch.float32: torch.int32,
    torch.float16: torch.int16,
    torch.bfloat16: torch.int16,
}
HALF = [torch.float16, torch.bfloat16]
# On one side and on both, at zero, at infinity, beyond every entry.
BOUNDS = [(-0.5, 2.0), (-2.0, 0.1), (0.0, 1.0), (-1.0, 0.0), (-math.inf, 0.3), (-0.3, math.inf), (-1e4, 1e4)]
# Compared at once by the implementation.
CHUNK = 2**18


def clip(
    gradients: Mapping[str, Tensor | None], method: ValueClip, **options: Any
) -> tuple[dict[str, Tensor | None], StepStats]:
    """Clip copies of these gradients."""
    pairs = named({name: None if one is None else one.clone() for name, one in gradients.items()})
    stats = Clipper(pairs, method, **options).step()
    return {name: parameter.grad for name, parameter in pairs}, stats


def within(low: float, high: float) -> ValueClip:
    return ValueClip(min_value=low, max_value=high)


def above(value: Tensor) -> Tensor:
    """The next larger number of its dtype; the value is positive."""
    return (value.view(DTYPES[value.dtype]) + 1).view(value.dtype)


def assert_equal(clipped: Tensor | None, expected: Tensor) -> None:
    """To the bit, with NaN in the same places."""
    assert clipped is not None
    assert clipped.dtype == expected.dtype
    assert torch.equal(clipped.isnan(), expected.isnan())
    assert torch.equal(clipped.nan_to_num(7.0), expected.nan_to_num(7.0))


def assert_reported(stats: StepStats, before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> None:
    """Both norms, and the share of the entries that changed."""
    pairs = [(reference.array(before[name]), reference.array(after[name])) for name in before]
    assert stats.norm.item() == pytest.approx(reference.joint_norm([one for one, _ in pairs], 2.0), rel=1e-6)
    assert stats.norm_clipped.item() == pytest.approx(reference.joint_norm([one for _, one in pairs], 2.0), rel=1e-6)
    changed = sum(int((one != other).sum()) for one, other in pairs)
    assert stats.clipped.item() == changed / max(1, sum(one.size for one, _ in pairs))


class TestAgainstTorch:
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("bound", [1e-3, 0.1, 0.7, 1.0, 2.5, 100.0])
    def test_zero_centered_bounds_are_those_of_clip_grad_value_(self, dtype: torch.dtype, bound: float) -> None:
        gradients = normal(0, dtype=dtype)
        theirs = named({name: gradient.clone() for name, gradient in gradients.items()})
        torch.nn.utils.clip_grad_value_([parameter for _, parameter in theirs], bound)
        clipped, stats = clip(gradients, ValueClip(max_value=bound))
        for name, parameter in theirs:
            assert_equal(clipped[name], parameter.grad)
        assert_reported(stats, gradients, clipped)

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize(("low", "high"), BOUNDS)
    def test_two_bounds_are_those_of_clamp(self, dtype: torch.dtype, low: float, high: float) -> None:
        gradients = normal(1, dtype=dtype)
        clipped, stats = clip(gradients, within(low, high))
        for name, gradient in gradients.items():
            assert_equal(clipped[name], gradient.clamp(low, high))
        assert_reported(stats, gradients, clipped)
        assert stats.limit.item() == high

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize(("low", "high"), BOUNDS)
    def test_what_is_not_finite_goes_the_way_of_clamp(self, dtype: torch.dtype, low: float, high: float) -> None:
        gradients = normal(2, dtype=dtype)
        gradients["encoder.weight"][0] = torch.tensor([math.inf, -math.inf, math.nan])
        gradients["head.bias"][1] = math.nan
        gradients["scale"] = torch.tensor(math.inf, dtype=dtype)
        clipped, stats = clip(gradients, within(low, high), nonfinite="ignore")
        for name, gradient in gradients.items():
            assert_equal(clipped[name], gradient.clamp(low, high))
        # NaN lies on no side.
        expected = [((one < low) | (one > high)).mean() * one.size for one in map(reference.array, gradients.values())]
        assert stats.clipped.item() * sum(one.numel() for one in gradients.values()) == pytest.approx(sum(expected))
        assert stats.finite.item() is False

    @settings(derandomize=True, deadline=None, max_examples=100)
    @given(
        exponents=st.lists(st.integers(-30, 30), min_size=len(SHAPES), max_size=len(SHAPES)),
        bounds=st.tuples(st.floats(-30, 30), st.floats(-30, 30)).map(lambda pair: (-(10 ** pair[0]), 10 ** pair[1])),
        seed=st.integers(0, 100),
    )
    def test_gradients_and_bounds_of_any_scale(
        self, exponents: list[int], bounds: tuple[float, float], seed: int
    ) -> None:
        drawn = zip(normal(seed).items(), exponents, strict=True)
        gradients = {name: gradient * 10.0**exponent for (name, gradient), exponent in drawn}
        clipped, stats = clip(gradients, within(*bounds))
        for name, gradient in gradients.items():
            assert_equal(clipped[name], gradient.clamp(*bounds))
        assert_reported(stats, gradients, clipped)

    @pytest.mark.parametrize("dtype", HALF, ids=str)
    @pytest.mark.parametrize("share", [0.0, 0.3, 0.5 - 1e-9, 0.5, 0.5 + 1e-9, 0.7])
    def test_a_bound_between_two_half_numbers_is_the_one_that_torch_takes(
        self, dtype: torch.dtype, share: float
    ) -> None:
        for start in (0.1, 0.5, 1.0, 3.0):
            first = torch.tensor([start], dtype=dtype)
            second = above(first)
            bound = first.item() + share * (second - first).item()
            gradients = {"w": torch.cat([-above(second), -second, -first, first, second, above(second)])}
            clipped, stats = clip(gradients, ValueClip(max_value=bound))
            assert_equal(clipped["w"], gradients["w"].clamp(-bound, bound))
            assert_reported(stats, gradients, clipped)

    @pytest.mark.parametrize("dtype", HALF, ids=str)
    def test_a_bound_below_the_smallest_half_number_is_zero(self, dtype: torch.dtype) -> None:
        gradients = {"w": torch.tensor([1e-3, -1.0, 0.0], dtype=dtype)}
        clipped, stats = clip(gradients, ValueClip(max_value=1e-45))
        assert clipped["w"].tolist() == [0, 0, 0]
        assert_reported(stats, gradients, clipped)

    @pytest.mark.parametrize(
        ("dtype", "beyond"), [(torch.float16, 1e5), (torch.bfloat16, 1e39), (torch.float32, 1e39)], ids=str
    )
    def test_a_bound_beyond_the_dtype_bounds_nothing(self, dtype: torch.dtype, beyond: float) -> None:
        # torch.clamp raises: "value cannot be converted to type ... without overflow".
        gradients = {"w": torch.tensor([3.0, -3.0, 0.5], dtype=dtype)}
        assert clip(gradients, within(-1.0, beyond))[0]["w"].tolist() == [3, -1, 0.5]
        assert clip(gradients, within(-beyond, 1.0))[0]["w"].tolist() == [1, -3, 0.5]
        assert clip(gradients, ValueClip(max_value=beyond))[0]["w"].tolist() == [3, -3, 0.5]


def channels_last(*shape: int) -> Tensor:
    return random(*shape).contiguous(memory_format=torch.channels_last)


LAYOUTS: dict[str, Callable[[], Tensor]] = {
    "0-d": lambda: torch.tensor(-3.0),
    "channels-last": lambda: channels_last(8, 6, 20, 20),
    "transposed": lambda: random(200, 100).t(),
    "every other column": lambda: random(10, 8)[:, ::2],
    "offset": lambda: random(40)[3:],
    "expanded": lambda: torch.tensor([[2.0], [-0.25]]).expand(2, 3),
    "empty": lambda: torch.zeros(0, 4),
    "large": lambda: random(2 * CHUNK + 5),
    "large channels-last": lambda: channels_last(64, 32, 12, 12),
    "large transposed": lambda: random(701, 400).t(),
}


class TestLayouts:
    @pytest.mark.parametrize("layout", LAYOUTS)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_the_layout_does_not_matter(self, layout: str, dtype: torch.dtype) -> None:
        pairs = named({"a": LAYOUTS[layout]().to(dtype), "b": random(4, seed=1)})
        before = {name: parameter.grad.clone() for name, parameter in pairs}
        strides = pairs[0][1].grad.stride()
        stats = Clipper(pairs, within(-0.5, 1.0)).step()
        after = {name: parameter.grad for name, parameter in pairs}
        for name, gradient in before.items():
            assert_equal(after[name], gradient.clamp(-0.5, 1.0))
        assert 0 in strides or after["a"].stride() == strides
        assert_reported(stats, before, after)

    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_within_the_bounds_no_layout_is_written(self, layout: str) -> None:
        pairs = named({"a": LAYOUTS[layout]()})
        witness = Witness(pairs)
        stats = Clipper(pairs, ValueClip(max_value=10.0)).step()
        assert witness.written() == set()
        assert (stats.clipped.item(), stats.norm_clipped.item()) == (0.0, stats.norm.item())

    @pytest.mark.parametrize("size", [CHUNK, CHUNK + 1, 2 * CHUNK + 1])
    def test_every_chunk_of_a_large_gradient_counts(self, size: int) -> None:
        gradients = {"w": torch.full((size,), 0.25)}
        places = sorted({0, CHUNK - 2, min(CHUNK, size - 1), size - 1})
        gradients["w"][places] = -4.0
        clipped, stats = clip(gradients, ValueClip(max_value=0.5))
        assert_equal(clipped["w"], gradients["w"].clamp(-0.5, 0.5))
        assert stats.clipped.item() == len(places) / size
        assert_reported(stats, gradients, clipped)

    @pytest.mark.parametrize(
        ("weights", "written"), [([1.0, 1.0, 1.0], True), ([3.0, -2.5, -0.4], False), ([3.0, -2.5, 1.0], True)]
    )
    def test_a_sparse_gradient_is_clamped_as_the_sum_it_stands_for(self, weights: list[float], written: bool) -> None:
        sparse, dense = nn.Embedding(6, 3, sparse=True), nn.Embedding(6, 3)
        # Row 1 three times, row 4 once: its summands lie on the other side of the bound than their sum.
        words, factors = torch.tensor([1, 4, 1, 1]), torch.tensor([weights[0], 0.5, *weights[1:]])
        for embedding in (sparse, dense):
            (embedding(words) * factors[:, None]).sum().backward()
        gradient, before = sparse.weight.grad, {"w": dense.weight.grad.clone()}
        assert not gradient.is_coalesced()
        stats = Clipper(sparse.named_parameters(), ValueClip(max_value=0.75)).step()
        assert sparse.weight.grad.is_sparse
        assert_equal(sparse.weight.grad.to_dense(), before["w"].clamp(-0.75, 0.75))
        # Of all entries, those that are not stored included.
        assert_reported(stats, before, {"w": sparse.weight.grad})
        assert (sparse.weight.grad is not gradient) == written
        assert gradient._values()[:, 0].tolist() == factors.tolist()


class TestWrites:
    def test_it_cuts_and_never_rescales(self) -> None:
        clipped, _ = clip({"w": torch.tensor([3.0, -0.5])}, ValueClip(max_value=1.0))
        assert clipped["w"].tolist() == [1.0, -0.5]

    def test_a_norm_far_above_the_bound_is_none_of_its_business(self) -> None:
        pairs = named({"a": torch.full((10_000,), 0.4), "b": -torch.ones(3) / 2})
        witness = Witness(pairs)
        stats = Clipper(pairs, ValueClip(max_value=0.5)).step()
        assert stats.norm.item() > 40
        assert witness.written() == set()
        assert (stats.clipped.item(), stats.norm_clipped.item()) == (0.0, stats.norm.item())

    def test_only_gradients_with_an_entry_outside_are_written(self) -> None:
        gradients = {
            "above": torch.tensor([0.1, 2.0]),
            "inside": torch.tensor([0.9, -0.9]),
            "absent": None,
            "below": torch.tensor([-1.5, 0.1]),
            "zero": torch.zeros(3),
            "0-d": torch.tensor(1.25),
        }
        pairs = named(gradients)
        witness = Witness(pairs)
        stats = Clipper(pairs, ValueClip(max_value=1.0)).step()
        assert witness.written() == {"above", "below", "0-d"}
        assert all(parameter.grad is gradients[name] for name, parameter in pairs)
        assert stats.clipped.item() == 3 / 10

    def test_nan_alone_is_not_written(self) -> None:
        pairs = named({"nan": torch.tensor([math.nan, 0.5]), "outside": torch.tensor([2.0])})
        witness = Witness(pairs)
        stats = Clipper(pairs, ValueClip(max_value=1.0), nonfinite="ignore").step()
        assert witness.written() == {"outside"}
        assert stats.clipped.item() == 1 / 3

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("bound", [0.1, 0.3, 0.5, 0.7, 1.0, 17.0])
    def test_an_entry_at_the_bound_is_within_and_the_next_one_is_not(self, dtype: torch.dtype, bound: float) -> None:
        edge = torch.tensor([bound], dtype=dtype)
        pairs = named({"at": torch.cat([edge, -edge, edge * 0]), "next": above(edge), "minus": -above(edge)})
        witness = Witness(pairs)
        stats = Clipper(pairs, ValueClip(max_value=bound)).step()
        assert witness.written() == {"next", "minus"}
        assert torch.equal(torch.cat([pairs[1][1].grad, pairs[2][1].grad]), torch.cat([edge, -edge]))
        assert stats.clipped.item() == 2 / 5

    def test_one_entry_of_each_side_is_enough(self) -> None:
        # Norms just above and just below the nearer bound.
        for entry in (0.5000001, -0.5000001):
            clipped, stats = clip({"w": torch.tensor([entry])}, within(-0.5, 0.5))
            assert (abs(clipped["w"].item()), stats.clipped.item()) == (0.5, 1.0)
        for low, high in ((-0.5, 8.0), (-8.0, 0.5)):
            inside, outside = (0.6, -0.6) if high > 1 else (-0.6, 0.6)
            clipped, stats = clip({"w": torch.tensor([inside, outside])}, within(low, high))
            assert clipped["w"].tolist() == [pytest.approx(inside), math.copysign(0.5, outside)]
            assert stats.clipped.item() == 0.5

    def test_observing_writes_nothing_and_reports_what_clipping_would_do(self) -> None:
        gradients = normal(3, scale=2.0)
        _, done = clip(gradients, within(-0.5, 1.0))
        pairs = named(gradients)
        witness = Witness(pairs)
        clipper = Clipper(pairs, within(-0.5, 1.0), action="observe")
        seen = clipper.step()
        assert witness.written() == set()
        assert 0 < seen.norm_clipped < seen.norm
        for name in ("norm", "norm_clipped", "limit", "clipped", "finite", "skipped"):
            assert torch.equal(getattr(seen, name), getattr(done, name)), name
        assert clipper.metrics()["norm_clipped"] == done.norm_clipped.item()


class TestStatistics:
    def test_a_step_with_entries_outside(self) -> None:
        gradients = {
            "a": torch.tensor([3.0, -0.5, 0.25]),
            "b": None,
            "c": torch.tensor([[-7.0, 1.0], [0.5, 0.0]]),
            "d": torch.zeros(1),
        }
        _, stats = clip(gradients, within(-2.0, 1.0), measure_per="parameter")
        assert stats.norm.item() == pytest.approx(math.sqrt(9 + 0.25 + 0.0625 + 49 + 1 + 0.25), rel=1e-6)
        assert stats.norm_clipped.item() == pytest.approx(math.sqrt(1 + 0.25 + 0.0625 + 4 + 1 + 0.25), rel=1e-6)
        assert stats.limit.item() == 1.0
        assert math.isnan(stats.coef.item())
        assert stats.clipped.item() == 2 / 8
        assert (stats.finite.item(), stats.skipped.item()) == (True, False)
        assert stats.scopes == ("model",)
        assert stats.sizes.tolist() == [stats.norm.item()]
        assert stats.limits.tolist() == [1.0]

    def test_a_step_within(self) -> None:
        _, stats = clip({"a": torch.tensor([0.3, 0.4])}, ValueClip(max_value=0.5))
        assert stats.norm.item() == stats.norm_clipped.item() == pytest.approx(0.5, rel=1e-6)
        assert (stats.limit.item(), stats.clipped.item()) == (0.5, 0.0)
        assert math.isnan(stats.coef.item())

    @pytest.mark.parametrize("scale", [1e-30, 1e-3, 1e3, 1e30])
    def test_norms_of_any_scale(self, scale: float) -> None:
        gradients = normal(4, scale=scale)
        clipped, stats = clip(gradients, ValueClip(max_value=0.5 * scale))
        assert 0 < stats.clipped.item() < 1
        assert_reported(stats, gradients, clipped)

    def test_the_window_has_no_coefficient(self) -> None:
        pairs = named({"encoder.w": torch.zeros(2), "head.w": torch.zeros(2)})
        clipper = Clipper(pairs, within(-1.0, 2.0), measure_per="layer")
        # Outside, within, outside on the other side.
        for entries in ([6.0, 8.0], [0.6, 0.8], [-3.0, 0.0]):
            for _, parameter in pairs:
                parameter.grad = torch.tensor(entries)
            clipper.step()
        root = math.sqrt(2)
        expected = {
            "norm": root * (10 + 1 + 3) / 3,
            "norm_clipped": root * (math.sqrt(8) + 1 + 1) / 3,
            "norm_max": root * 10,
            "limit": 2.0,
            "clip_rate": 2 / 3,
            "clipped": 1 / 2,
            "skipped": 0.0,
            "nonfinite": 0.0,
            "norm/encoder": 14 / 3,
            "norm/head": 14 / 3,
        }
        assert clipper.metrics() == pytest.approx(expected, rel=1e-6)
        assert clipper.metrics() == {"skipped": 0.0, "nonfinite": 0.0}

    def test_a_dropped_step_leaves_nothing_and_has_no_coefficient_either(self) -> None:
        pairs = named({"w": torch.tensor([3.0])})
        clipper = Clipper(pairs, ValueClip(), action="skip")
        with pytest.warns(RuntimeWarning, match="dropped optimizer step 0"):
            clipper.step()
        metrics = clipper.metrics()
        assert "coef_min" not in metrics
        assert (metrics["norm_clipped"], metrics["clipped"], metrics["clip_rate"], metrics["skipped"]) == (0, 1, 1, 1)


class TestSchedules:
    def run(self, method: ValueClip, count: int) -> list[tuple[float, float]]:
        """What is left of -100 and 100 at each step."""
        pairs = named({"w": torch.zeros(2)})
        clipper = Clipper(pairs, method)
        result = []
        for step in range(count):
            pairs[0][1].grad = torch.tensor([-100.0, 100.0])
            stats = clipper.step()
            low, high = method.bounds(step)
            assert stats.limit.item() == high
            assert stats.clipped.item() == ((low > -100) + (high < 100)) / 2
            result.append(tuple(pairs[0][1].grad.tolist()))
        return result

    def test_one_schedule_moves_both_sides(self) -> None:
        method = ValueClip(max_value={1: 4.0, 3: 2.0})
        assert self.run(method, 5) == [(-4, 4), (-4, 4), (-3, 3), (-2, 2), (-2, 2)]

    def test_each_side_has_its_own(self) -> None:
        method = ValueClip(max_value={0: 4.0, 4: 2.0}, min_value={2: -1.0, 4: -3.0})
        assert self.run(method, 6) == [(-1, 4), (-1, 3.5), (-1, 3), (-2, 2.5), (-3, 2), (-3, 2)]

    def test_a_side_may_be_open_for_a_while(self) -> None:
        method = ValueClip(max_value={0: math.inf, 2: 1.0}, min_value={0: -5.0, 3: -math.inf})
        assert self.run(method, 5) == [(-5, 100), (-100, 100), (-100, 1), (-100, 1), (-100, 1)]
        method = ValueClip(max_value={0: math.inf, 1: 1.0, 2: math.inf})
        assert self.run(method, 3) == [(-100, 100), (-1, 1), (-100, 100)]

    def test_a_side_may_be_closed_for_a_while(self) -> None:
        method = ValueClip(max_value={0: 0.0, 2: 2.0}, min_value=-1.0)
        assert self.run(method, 3) == [(-1, 0), (-1, 1), (-1, 2)]

    def test_an_open_side_writes_nothing_and_has_no_limit(self) -> None:
        pairs = named({"w": torch.tensor([3e38, -3e38])})
        witness = Witness(pairs)
        clipper = Clipper(pairs, ValueClip(max_value=math.inf))
        stats = clipper.step()
        assert witness.written() == set()
        assert (stats.limit.item(), stats.clipped.item()) == (math.inf, 0.0)
        assert "limit" not in clipper.metrics()

    def test_it_goes_on_after_a_resume(self) -> None:
        pairs = named({"w": torch.tensor([0.0])})
        method = ValueClip(max_value={0: 10.0, 5: 5.0})
        clipper = Clipper(pairs, method)
        for _ in range(3):
            clipper.step()
        resumed = Clipper(pairs, method)
        resumed.load_state_dict(clipper.state_dict())
        assert resumed.step().limit.item() == 7.0


class TestPolicies:
    SPOILED = (math.nan, 3.0, math.inf, -0.5)

    def test_a_step_with_an_entry_outside_is_dropped(self) -> None:
        gradients = {"a": torch.tensor([2.0, 0.5, -1.5]), "b": torch.zeros(5)}
        said = (
            "dropped optimizer step 0: 0.125 of the entries lie outside [-1.5, 1]. Parameters and optimizer state stay "
            "as they are; further dropped steps are counted, not announced"
        )
        with pytest.warns(RuntimeWarning, match="dropped") as record:
            clipped, stats = clip(gradients, within(-1.5, 1.0), action="skip")
        assert [str(one.message) for one in record] == [said]
        assert clipped == {"a": None, "b": None}
        assert (stats.skipped.item(), stats.coef.item(), stats.norm_clipped.item()) == (True, 0.0, 0.0)
        assert stats.clipped.item() == 1 / 8

    def test_a_step_within_is_not(self) -> None:
        pairs = named({"a": torch.tensor([1.0, -1.5] * 50)})
        witness = Witness(pairs)
        stats = Clipper(pairs, within(-1.5, 1.0), action="skip").step()
        assert stats.skipped.item() is False
        assert witness.written() == set()

    def test_too_many_in_a_row_are_an_error_with_the_same_words(self) -> None:
        pairs = named({"a": torch.tensor([2.0])})
        clipper = Clipper(pairs, ValueClip(max_value=1.0), action="skip", max_consecutive_skips=0)
        with pytest.raises(FloatingPointError, match=r"step 0: 1 of the entries lie outside \[-1, 1\]; training"):
            clipper.step()

    def test_not_finite_and_skip(self) -> None:
        with pytest.warns(RuntimeWarning, match=r"dropped optimizer step 0: non-finite gradients in w\."):
            clipped, stats = clip({"w": torch.tensor(self.SPOILED)}, ValueClip(max_value=1.0))
        assert clipped == {"w": None}
        assert stats.skipped.item() is True

    def test_not_finite_and_raise(self) -> None:
        pairs = named({"w": torch.tensor(self.SPOILED)})
        witness = Witness(pairs)
        with pytest.raises(FloatingPointError, match="optimizer step 0 in w;"):
            Clipper(pairs, ValueClip(max_value=1.0), nonfinite="raise").step()
        assert witness.written() == set()

    def test_not_finite_and_zero(self) -> None:
        clipped, stats = clip({"w": torch.tensor(self.SPOILED)}, ValueClip(max_value=1.0), nonfinite="zero")
        assert clipped["w"].tolist() == [0, 1, 0, -0.5]
        assert (stats.finite.item(), stats.skipped.item(), stats.clipped.item()) == (False, False, 0.25)
        assert stats.norm.item() == pytest.approx(math.sqrt(9.25), rel=1e-6)
        assert stats.norm_clipped.item() == pytest.approx(math.sqrt(1.25), rel=1e-6)

    def test_not_finite_and_zero_and_then_dropped(self) -> None:
        with pytest.warns(RuntimeWarning, match=r"0\.25 of the entries lie outside \[-1, 1\]"):
            clipped, stats = clip(
                {"w": torch.tensor(self.SPOILED)}, ValueClip(max_value=1.0), nonfinite="zero", action="skip"
            )
        assert clipped == {"w": None}
        assert (stats.finite.item(), stats.skipped.item()) == (False, True)

    def test_not_finite_and_ignore(self) -> None:
        pairs = named({"w": torch.tensor(self.SPOILED)})
        clipper = Clipper(pairs, ValueClip(max_value=1.0), nonfinite="ignore")
        stats = clipper.step()
        assert_equal(pairs[0][1].grad, torch.tensor([math.nan, 1.0, 1.0, -0.5]))
        assert (stats.finite.item(), stats.skipped.item(), stats.clipped.item()) == (False, False, 0.5)
        assert clipper.metrics() == {"skipped": 0.0, "nonfinite": 1.0}

    def test_infinity_alone_is_bounded(self) -> None:
        clipped, stats = clip({"w": torch.tensor([math.inf, 0.5])}, ValueClip(max_value=1.0), nonfinite="ignore")
        assert clipped["w"].tolist() == [1.0, 0.5]
        assert stats.norm.item() == math.inf
        assert stats.norm_clipped.item() == pytest.approx(math.sqrt(1.25), rel=1e-6)

    @pytest.mark.parametrize("action", ["clip", "observe"])
    def test_a_scaler_is_unscaled_or_seen_through(self, action: str) -> None:
        # A power of two: exact.
        scale = 1024.0
        gradients = normal(5)
        pairs = named({name: gradient * scale for name, gradient in gradients.items()})
        optimizer = SGD([parameter for _, parameter in pairs], lr=0.1)
        scaler = GradScaler("cpu", init_scale=scale)
        scaler.scale(torch.ones(()))
        witness = Witness(pairs)
        # Without looking through the scale every entry would lie outside.
        method = within(-0.25, 0.5)
        stats = Clipper(pairs, method, optimizer=optimizer, action=action, measure_per="layer").step(scaler)
        clipped, expected = clip(gradients, method)
        assert 0 < expected.clipped.item() < 1
        for name in ("norm", "norm_clipped", "limit", "clipped"):
            assert torch.equal(getattr(stats, name), getattr(expected, name)), name
        if action == "observe":
            assert witness.written() == set()
        else:
            for name, parameter in pairs:
                assert_equal(parameter.grad, clipped[name])


class TestComplex:
    SAID = (
        "parameter 'b' is complex, and complex numbers have no order to clamp by; leave it out with exclude='b', "
        "or clip it by norm"
    )

    def test_a_complex_parameter_is_refused_by_name(self) -> None:
        pairs = named({"a": torch.ones(2), "b": torch.ones(2, dtype=torch.complex64)})
        with pytest.raises(TypeError) as failure:
            Clipper(pairs, ValueClip())
        assert str(failure.value) == self.SAID

    def test_it_can_be_left_out(self) -> None:
        pairs = named({"a": torch.ones(2), "b": torch.ones(2, dtype=torch.complex64)})
        witness = Witness(pairs)
        Clipper(pairs, ValueClip(), exclude="b").step()
        assert witness.written() == {"a"}

    def test_one_that_joins_later_is_refused_then(self) -> None:
        pairs = named({"a": torch.ones(2), "b": torch.ones(2, dtype=torch.complex64)})
        optimizer = SGD([pairs[0][1]], lr=0.1)
        clipper = Clipper(pairs, ValueClip(), optimizer=optimizer)
        clipper.step()
        optimizer.add_param_group({"params": [pairs[1][1]]})
        with pytest.raises(TypeError) as failure:
            clipper.step()
        assert str(failure.value) == self.SAID


class TestArguments:
    def test_defaults(self) -> None:
        assert dataclasses.asdict(ValueClip()) == {"max_value": 0.5, "min_value": None}
        method = ValueClip()
        assert (method.per, method.scopes, method.norm_type) == ("element", ("element",), 2.0)
        assert method.may_grow is False
        assert method.bounds(0) == (-0.5, 0.5)

    def test_numbers_and_schedules_become_plain(self) -> None:
        method = ValueClip(max_value=OmegaConf.create({1000: 1, 0: 10}), min_value=np.float32(-2))
        assert type(method.max_value) is dict
        assert list(method.max_value.items()) == [(0, 10.0), (1000, 1.0)]
        assert type(method.min_value) is float
        assert repr(method) == "ValueClip(max_value={0: 10.0, 1000: 1.0}, min_value=-2.0)"

    @pytest.mark.parametrize(
        ("arguments", "error", "said"),
        [
            (
                {"max_value": -1},
                ValueError,
                "max_value must be > 0, got -1; to measure without clipping use method=None",
            ),
            (
                {"max_value": 0.0},
                ValueError,
                "max_value must be > 0, got 0.0; to measure without clipping use method=None",
            ),
            (
                {"max_value": math.nan},
                ValueError,
                "max_value must be > 0, got nan; to measure without clipping use method=None",
            ),
            (
                {"max_value": {0: 1.0, 5: -2.0}},
                ValueError,
                "max_value[5] must be > 0, got -2.0; to measure without clipping use method=None",
            ),
            (
                {"max_value": "abc"},
                TypeError,
                "max_value must be a number or a schedule such as {0: 10.0, 1000: 1.0}, got 'abc' (str)",
            ),
            (
                {"max_value": True},
                TypeError,
                "max_value must be a number or a schedule such as {0: 10.0, 1000: 1.0}, got True (bool)",
            ),
            (
                {"max_value": None},
                TypeError,
                "max_value must be a number or a schedule such as {0: 10.0, 1000: 1.0}, got None (NoneType)",
            ),
            (
                {"max_value": {0: None}},
                TypeError,
                "max_value[0] must be a number, got None (NoneType); to measure without clipping use method=None",
            ),
            (
                {"max_value": {}},
                ValueError,
                "max_value is an empty schedule; give at least one point, max_value={0: 1.0}",
            ),
            (
                {"max_value": {-1: 1.0}},
                ValueError,
                "max_value's step must be >= 0, got -1; write max_value={0: 10.0, 1000: 1.0}",
            ),
            (
                {"max_value": -0.1, "min_value": -1.0},
                ValueError,
                "max_value must be >= 0, got -0.1; the bounds must hold zero between them",
            ),
            (
                {"min_value": 0.1},
                ValueError,
                "min_value must be <= 0, got 0.1; the bounds must hold zero between them",
            ),
            (
                {"min_value": {0: -1.0, 9: 0.5}},
                ValueError,
                "min_value[9] must be <= 0, got 0.5; the bounds must hold zero between them",
            ),
            (
                {"min_value": math.nan},
                ValueError,
                "min_value must be <= 0, got nan; the bounds must hold zero between them",
            ),
            (
                {"min_value": "one"},
                TypeError,
                "min_value must be a number or a schedule such as {0: 10.0, 1000: 1.0}, got 'one' (str)",
            ),
            (
                {"min_value": False},
                TypeError,
                "min_value must be a number or a schedule such as {0: 10.0, 1000: 1.0}, got False (bool)",
            ),
            (
                {"min_value": 0, "max_value": 0},
                ValueError,
                "min_value=0.0 and max_value=0.0 both reach 0, which would set every gradient to zero; "
                "keep one of them away from it",
            ),
            (
                {"min_value": {0: -1.0, 9: 0.0}, "max_value": {0: 1.0, 9: 0.0}},
                ValueError,
                "min_value={0: -1.0, 9: 0.0} and max_value={0: 1.0, 9: 0.0} both reach 0, "
                "which would set every gradient to zero; keep one of them away from it",
            ),
        ],
        ids=str,
    )
    def test_what_is_wrong_is_said_with_value_and_remedy(
        self, arguments: dict[str, object], error: type[Exception], said: str
    ) -> None:
        with pytest.raises(error) as failure:
            ValueClip(**arguments)
        assert str(failure.value) == said


class TestWithoutDetails:
    """What costs passes of its own is left out; what is done to the gradients is the same."""

    @staticmethod
    def both(gradients: Mapping[str, Tensor | None], method: ValueClip, **options: Any) -> list[Any]:
        result = []
        for detailed in (True, False):
            pairs = named({name: None if one is None else one.clone() for name, one in gradients.items()})
            clipper = Clipper(pairs, method, **options)
            clipper.detailed = detailed
            stats = clipper.step()
            result.append(({name: parameter.grad for name, parameter in pairs}, stats))
        return result

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize(("low", "high"), BOUNDS)
    @pytest.mark.parametrize("bad", [None, math.nan, math.inf, -math.inf])
    def test_gradients_are_the_same(self, bad: float | None, low: float, high: float, dtype: torch.dtype) -> None:
        gradients = {**normal(3, dtype=dtype), "large": random(2**14 + 1, dtype=dtype), "none": None}
        if bad is not None:
            gradients["large"][77] = gradients["encoder.weight"][1, 1] = bad
        (exact, told), (fast, silent) = self.both(gradients, within(low, high), nonfinite="ignore")
        for name, one in exact.items():
            assert (one is None) == (fast[name] is None)
            if one is not None:
                assert_equal(fast[name], one)
                assert_equal(one, gradients[name].clamp(low, high))
        for name in ("norm", "limit", "finite", "skipped"):
            assert getattr(silent, name).item() == pytest.approx(getattr(told, name).item(), rel=0, nan_ok=True), name
        outside = told.clipped.item() > 0
        assert math.isnan(silent.clipped.item()) == outside
        # That nothing is outside shows without a close look.
        after = math.nan if outside else told.norm.item()
        assert silent.norm_clipped.item() == pytest.approx(after, rel=0, nan_ok=True)
        assert outside or silent.clipped.item() == 0

    @pytest.mark.parametrize("bound", [0.1, 100.0])
    def test_the_same_steps_are_dropped_and_announced(self, bound: float) -> None:
        for detailed in (True, False):
            pairs = named(normal(3))
            clipper = Clipper(pairs, ValueClip(max_value=bound), action="skip")
            clipper.detailed = detailed
            if bound == 0.1:
                share = r"0\.\d+" if detailed else "some"
                with pytest.warns(RuntimeWarning, match=rf"{share} of the entries lie outside \[-0.1, 0.1\]"):
                    stats = clipper.step()
            else:
                stats = clipper.step()
            assert stats.skipped.item() == (bound == 0.1)
            assert all((parameter.grad is None) == (bound == 0.1) for _, parameter in pairs)

    @pytest.mark.parametrize("action", ["clip", "skip", "observe"])
    @pytest.mark.filterwarnings("ignore:dropped optimizer step:RuntimeWarning")
    def test_a_window_leaves_out_what_is_not_known_of_every_step(self, action: str) -> None:
        pairs = named(normal(0))
        all_told, some_told = (Clipper(pairs, ValueClip(max_value=1.0), action=action) for _ in range(2))
        for step in range(9):
            some_told.detailed = step % 3 == 2
            given = normal(step, scale=1e-3 if step % 2 else 1.0)
            for clipper in (some_told, all_told):
                for name, parameter in pairs:
                    parameter.grad = given[name].clone()
                clipper.step()
        every, some = all_told.metrics(), some_told.metrics()
        # Nothing is left of a dropped step, which shows without a close look.
        unknown = {"clipped"} if action == "skip" else {"clipped", "norm_clipped"}
        assert every.keys() - some.keys() == unknown
        assert some == {name: value for name, value in every.items() if name not in unknown}
