"""Normalize against the rule of optax and a float64 reference."""

import dataclasses
import math
from collections.abc import Callable, Mapping

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.nn import Parameter
from torch.optim import SGD

from kit import reference
from kit.clipping import arrays, assert_clipped, clip, random
from kit.drawn import given, settings, st
from kit.gradients import SCOPES, SHAPES, Witness, named, normal, two_groups
from lightning_gradclip import Clipper, GradientClipping, Normalize

NORM_TYPES = [0.5, 1.0, 2.0, 3.0, math.inf]
HALF = [torch.float16, torch.bfloat16]


def model(*tensors: Tensor) -> dict[str, Tensor]:
    """Gradients of one scope, the last one in the second group."""
    names = [f"encoder.{i}" for i in range(len(tensors) - 1)]
    return dict(zip([*names, "head"], tensors, strict=True))


def one_scope(gradients: Mapping[str, Tensor]) -> dict[str, str]:
    return dict.fromkeys(gradients, "model")


class TestAgainstTheRule:
    @pytest.mark.parametrize("scale", [1e-12, 1e-6, 1.0, 1e9])
    @pytest.mark.parametrize("target", [0.1, 1.0, 7.0])
    @pytest.mark.parametrize("smoothing", [0.0, 1e-6, 1e3])
    def test_it_is_normalize_by_update_norm_of_optax(self, scale: float, target: float, smoothing: float) -> None:
        # optax: g / ((norm + eps) / scale_factor), with the joint 2-norm.
        gradients = normal(0, scale, dtype=torch.float64)
        clipped, stats = clip(gradients, Normalize(target=target, smoothing=smoothing))
        given_arrays = arrays(gradients)
        norm = math.sqrt(sum(float((one**2).sum()) for one in given_arrays.values()))
        exact = {name: one / ((norm + smoothing) / target) for name, one in given_arrays.items()}
        assert_clipped(clipped, exact, rtol=1e-12)
        assert stats.norm.item() == pytest.approx(norm, rel=1e-12)
        assert stats.coef.item() == pytest.approx(target / (norm + smoothing), rel=1e-12)

    @pytest.mark.parametrize("per", Normalize.scopes)
    @pytest.mark.parametrize("p", NORM_TYPES)
    @pytest.mark.parametrize("scale", [1e-25, 1.0, 1e25])
    @pytest.mark.parametrize("smoothing", [0.0, 10.0])
    def test_every_scope_and_norm(self, per: str, p: float, scale: float, smoothing: float) -> None:
        gradients = normal(1, scale)
        gradients["head.bias"] *= 30
        method = Normalize(target=2.0, smoothing=smoothing, norm_type=p, per=per)
        clipped, stats = clip(gradients, method)
        exact, sizes, coefs = reference.normalize(arrays(gradients), SCOPES[per], target=2.0, smoothing=smoothing, p=p)
        assert_clipped(clipped, exact)
        assert stats.scopes == tuple(sizes)
        assert stats.sizes.tolist() == pytest.approx(list(sizes.values()), rel=1e-6)
        assert stats.limits.tolist() == [2.0] * len(sizes)
        assert stats.coef.item() == pytest.approx(min(coefs.values()), rel=1e-6)
        assert stats.clipped.item() == np.mean([size > 2.0 for size in sizes.values()])
        after = reference.joint_norm(list(exact.values()), p)
        assert stats.norm_clipped.item() == pytest.approx(after, rel=1e-6)

    @settings(derandomize=True, deadline=None, max_examples=100)
    @given(
        exponents=st.lists(st.integers(-30, 30), min_size=len(SHAPES), max_size=len(SHAPES)),
        target=st.floats(1e-5, 1e5),
        smoothing=st.sampled_from([0.0, 1e-6, 1e3]),
        p=st.sampled_from(NORM_TYPES),
        per=st.sampled_from(Normalize.scopes),
        seed=st.integers(0, 100),
    )
    def test_gradients_of_any_scale(
        self, exponents: list[int], target: float, smoothing: float, p: float, per: str, seed: int
    ) -> None:
        drawn = zip(normal(seed).items(), exponents, strict=True)
        gradients = {name: one * 10.0**exponent for (name, one), exponent in drawn}
        clipped, _ = clip(gradients, Normalize(target=target, smoothing=smoothing, norm_type=p, per=per))
        exact, _, _ = reference.normalize(arrays(gradients), SCOPES[per], target=target, smoothing=smoothing, p=p)
        assert_clipped(clipped, exact)


class TestDtypes:
    @pytest.mark.parametrize("dtype", HALF, ids=str)
    @pytest.mark.parametrize("per", Normalize.scopes)
    @pytest.mark.parametrize(("scale", "target"), [(1.0, 0.1), (1e-3, 2.5), (100.0, 1.0)])
    def test_half_gradients_are_within_one_unit_in_the_last_place(
        self, dtype: torch.dtype, per: str, scale: float, target: float
    ) -> None:
        gradients = normal(2, scale, dtype=dtype)
        clipped, stats = clip(gradients, Normalize(target=target, per=per))
        exact, sizes, _ = reference.normalize(arrays(gradients), SCOPES[per], target=target)
        assert stats.sizes.tolist() == pytest.approx(list(sizes.values()), rel=1e-6)
        for name, expected in exact.items():
            assert clipped[name].dtype == dtype
            error = np.abs(reference.array(clipped[name]) - expected)
            assert (error <= reference.ulp(expected, dtype)).all()

    def test_mixed_dtypes_share_one_norm(self) -> None:
        dtypes = [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64]
        gradients = model(*(random(6, seed=i, dtype=torch.float64).to(dtype) for i, dtype in enumerate(dtypes)))
        clipped, _ = clip(gradients, Normalize(target=9.0))
        exact, _, _ = reference.normalize(arrays(gradients), one_scope(gradients), target=9.0)
        for (name, expected), dtype in zip(exact.items(), dtypes, strict=True):
            assert clipped[name].dtype == dtype
            rtol = torch.finfo(dtype).eps if dtype in HALF else 1e-6
            np.testing.assert_allclose(reference.array(clipped[name]), expected, rtol=rtol, atol=0)

    @pytest.mark.parametrize(
        ("dtype", "entry"),
        [
            *((torch.float32, entry) for entry in (1e-20, 1e-36, 1e-40, 1e-45)),
            *((torch.float64, entry) for entry in (1e-45, 1e-160, 1e-300)),
            *((torch.float16, entry) for entry in (1e-4, 6e-8)),
            *((torch.bfloat16, entry) for entry in (1e-20, 1e-38)),
        ],
        ids=str,
    )
    @pytest.mark.parametrize("target", [1e-3, 0.5])
    def test_the_smallest_gradients_grow_to_the_target(self, dtype: torch.dtype, entry: float, target: float) -> None:
        gradients = model(torch.full((3,), entry, dtype=dtype), torch.full((), entry, dtype=dtype))
        clipped, stats = clip(gradients, Normalize(target=target, smoothing=0.0))
        rtol = torch.finfo(dtype).eps if dtype in HALF else 1e-6
        for gradient in clipped.values():
            np.testing.assert_allclose(reference.array(gradient), target / 2, rtol=rtol)
        assert stats.norm_clipped.item() == pytest.approx(target, rel=1e-6)

    @pytest.mark.parametrize("entry", [1e-310, 5e-324])
    def test_a_factor_beyond_float64_leaves_gradients_finite(self, entry: float) -> None:
        gradients = model(torch.tensor([entry, -entry], dtype=torch.float64), torch.zeros(1, dtype=torch.float64))
        clipped, stats = clip(gradients, Normalize(smoothing=0.0))
        assert 0 < clipped["encoder.0"].norm().item() < 1.001
        assert clipped["head"].tolist() == [0]
        assert 0 < stats.norm_clipped.item() < 1.001

    @pytest.mark.parametrize(
        ("dtype", "entry"), [(torch.float32, torch.finfo(torch.float32).max), (torch.float64, 1e300)], ids=str
    )
    def test_the_largest_gradients_shrink_to_the_target(self, dtype: torch.dtype, entry: float) -> None:
        gradients = model(torch.full((2,), entry, dtype=dtype), torch.zeros(2, dtype=dtype))
        clipped, _ = clip(gradients, Normalize(target=5.0))
        assert clipped["encoder.0"].tolist() == pytest.approx([5 / math.sqrt(2)] * 2, rel=1e-6)
        assert clipped["head"].tolist() == [0, 0]


LAYOUTS: dict[str, Callable[[], Tensor]] = {
    "0-d": lambda: torch.tensor(-3.0),
    "channels-last": lambda: random(8, 6, 20, 20).contiguous(memory_format=torch.channels_last),
    "transposed": lambda: random(200, 100).t(),
    "every other column": lambda: random(10, 8)[:, ::2],
    "expanded": lambda: torch.tensor(2.0).expand(5, 3),
    "empty": lambda: torch.zeros(0, 4),
}


class TestLayouts:
    @pytest.mark.parametrize("layout", LAYOUTS)
    @pytest.mark.parametrize("per", ["model", "parameter"])
    def test_the_layout_does_not_matter(self, layout: str, per: str) -> None:
        pairs = named(model(LAYOUTS[layout](), random(4, seed=1)))
        before = {name: reference.array(parameter.grad).copy() for name, parameter in pairs}
        Clipper(pairs, Normalize(target=100.0, per=per)).step()
        scopes = {name: name if per == "parameter" else per for name in before}
        exact, _, _ = reference.normalize(before, scopes, target=100.0)
        assert_clipped({name: parameter.grad for name, parameter in pairs}, exact)

    def test_a_sparse_embedding_gradient_counts_its_duplicates_as_their_sum(self) -> None:
        sparse, dense = nn.Embedding(6, 3, sparse=True), nn.Embedding(6, 3)
        dense.load_state_dict(sparse.state_dict())
        # Row 1 three times: the norm of the summands is another one.
        words, factors = torch.tensor([1, 4, 1, 1]), torch.tensor([[1.0], [0.5], [-3.0], [1.5]])
        for embedding in (sparse, dense):
            (embedding(words) * factors).sum().backward()
        before = {"w": reference.array(dense.weight.grad)}
        stats = Clipper(sparse.named_parameters(), Normalize(target=7.0)).step()
        exact, sizes, _ = reference.normalize(before, {"w": "model"}, target=7.0)
        assert stats.norm.item() == pytest.approx(sizes["model"], rel=1e-6)
        assert sparse.weight.grad.is_sparse
        assert_clipped({"w": sparse.weight.grad}, exact)


class TestGrowth:
    @pytest.mark.parametrize("per", Normalize.scopes)
    @pytest.mark.parametrize("smoothing", [0.0, 1e-6])
    def test_gradients_of_zero_stay_zero(self, per: str, smoothing: float) -> None:
        gradients = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
        pairs = named(gradients)
        witness = Witness(pairs)
        clipper = Clipper(pairs, Normalize(smoothing=smoothing, per=per), optimizer=two_groups(pairs))
        stats = clipper.step()
        assert witness.written() == set()
        assert (stats.norm.item(), stats.norm_clipped.item(), stats.coef.item()) == (0.0, 0.0, 1.0)
        assert clipper.metrics()["clip_rate"] == 0.0

    def test_one_scope_of_zeros_among_others_stays_as_it_is(self) -> None:
        gradients = normal(3)
        gradients["head.weight"].zero_()
        pairs = named(gradients)
        witness = Witness(pairs)
        Clipper(pairs, Normalize(smoothing=0.0, per="parameter")).step()
        assert witness.written() == set(SHAPES) - {"head.weight"}
        for name, parameter in pairs:
            assert parameter.grad.norm().item() == pytest.approx(float(name != "head.weight"), rel=1e-6)

    @pytest.mark.parametrize(
        ("norm", "smoothing", "expected"),
        [
            (1e-30, 0.0, 1.0),
            (1e30, 0.0, 1.0),
            (1e-6, 1e-6, 0.5),
            (1e-9, 1e-6, 1e-3 / 1.001),
            (1.0, 1e-6, 1 / 1.000001),
            (1.0, 3.0, 0.25),
            # Far below the smoothing the factor is constant.
            (1e-3, 1e6, 1e-9),
            (1e-5, 1e6, 1e-11),
        ],
    )
    def test_smoothing_is_the_norm_that_is_raised_to_half_the_target(
        self, norm: float, smoothing: float, expected: float
    ) -> None:
        clipped, stats = clip(model(torch.tensor([0.6, 0.8]) * norm, torch.zeros(1)), Normalize(smoothing=smoothing))
        assert clipped["encoder.0"].norm().item() == pytest.approx(expected, rel=2e-6)
        assert stats.norm_clipped.item() == pytest.approx(expected, rel=2e-6)

    @pytest.mark.parametrize("per", Normalize.scopes)
    @pytest.mark.parametrize("p", NORM_TYPES)
    def test_without_smoothing_twice_is_once(self, per: str, p: float) -> None:
        method = Normalize(target=3.0, smoothing=0.0, norm_type=p, per=per)
        once, _ = clip(normal(4, scale=1e-4), method)
        twice, stats = clip(once, method)
        assert stats.sizes.tolist() == pytest.approx([3.0] * len(stats.sizes), rel=1e-6)
        for name, gradient in twice.items():
            torch.testing.assert_close(gradient, once[name], rtol=1e-6, atol=0)

    def test_absent_gradients_count_as_nothing_and_stay_absent(self) -> None:
        gradients = {"encoder.a": None, "encoder.b": torch.tensor([3.0]), "head.a": None, "head.b": torch.tensor([4.0])}
        clipped, stats = clip(gradients, Normalize(smoothing=0.0))
        assert stats.norm.item() == 5.0
        assert_clipped(clipped, {"encoder.b": np.array([0.6]), "head.b": np.array([0.8])})


class TestSteps:
    def targets(self, method: Normalize, count: int) -> list[float]:
        pair = ("w", Parameter(torch.zeros(2)))
        clipper = Clipper([pair], method)
        result = []
        for step in range(count):
            pair[1].grad = torch.tensor([3.0, 4.0]) * 10.0 ** (step - 2)
            assert clipper.step().limit.item() == pytest.approx(pair[1].grad.norm().item(), rel=1e-6)
            result.append(pair[1].grad.norm().item())
        return result

    def test_a_schedule_counts_the_steps_of_the_clipper(self) -> None:
        method = Normalize(target={2: 10.0, 6: 2.0}, smoothing=0.0)
        assert self.targets(method, 8) == pytest.approx([10, 10, 10, 8, 6, 4, 2, 2], rel=1e-6)

    def test_a_schedule_goes_on_after_a_resume(self) -> None:
        pairs = named(model(torch.tensor([1.0])))
        method = Normalize(target={0: 10.0, 5: 5.0})
        clipper = Clipper(pairs, method)
        for _ in range(3):
            clipper.step()
        resumed = Clipper(pairs, method)
        resumed.load_state_dict(clipper.state_dict())
        assert resumed.step().limit.item() == 7.0

    def test_the_window_counts_every_step_that_was_rescaled(self) -> None:
        pairs = named({"w": torch.zeros(1)})
        clipper = Clipper(pairs, Normalize(target=2.0, smoothing=0.0))
        for entry in (4.0, 0.5, 0.0, 2.0):
            pairs[0][1].grad = torch.tensor([entry])
            clipper.step()
        expected = {"norm": 6.5 / 4, "norm_clipped": 1.5, "norm_max": 4.0, "limit": 2.0, "coef_min": 0.5}
        # Zero stays, and two is two already.
        expected |= {"clip_rate": 0.5, "skipped": 0.0, "nonfinite": 0.0}
        assert clipper.metrics() == pytest.approx(expected, rel=1e-6)

    def test_observing_writes_nothing_and_reports_what_would_be_done(self) -> None:
        gradients = normal(5)
        method = Normalize(target=0.25, per="layer")
        _, done = clip(gradients, method)
        pairs = named(gradients)
        witness = Witness(pairs)
        seen = Clipper(pairs, method, optimizer=two_groups(pairs), action="observe").step()
        assert witness.written() == set()
        assert seen.norm_clipped.item() == pytest.approx(0.25 * math.sqrt(3), rel=1e-5)
        for name in ("norm", "norm_clipped", "coef", "clipped", "sizes", "limits"):
            assert torch.equal(getattr(seen, name), getattr(done, name)), name

    @pytest.mark.parametrize("action", ["clip", "observe"])
    def test_a_scaler_is_unscaled_or_seen_through(self, action: str) -> None:
        # A power of two: exact.
        scale = 1024.0
        gradients = normal(6)
        pairs = named({name: gradient * scale for name, gradient in gradients.items()})
        scaler = GradScaler("cpu", init_scale=scale)
        scaler.scale(torch.ones(()))
        optimizer = SGD([parameter for _, parameter in pairs], lr=0.1)
        # Next to the norm, so that the scaled norm would give another factor.
        method = Normalize(smoothing=3.0)
        stats = Clipper(pairs, method, optimizer=optimizer, action=action).step(scaler)
        clipped, expected = clip(gradients, method)
        for name in ("norm", "norm_clipped", "coef"):
            assert torch.equal(getattr(stats, name), getattr(expected, name)), name
        for name, parameter in pairs:
            assert torch.equal(parameter.grad, gradients[name] * scale if action == "observe" else clipped[name])

    @pytest.mark.parametrize("bad", [math.nan, math.inf])
    def test_a_scope_that_is_not_finite_is_let_through_and_the_others_are_rescaled(self, bad: float) -> None:
        gradients = normal(7)
        gradients["head.bias"][0] = bad
        clipped, stats = clip(gradients, Normalize(smoothing=0.0, per="parameter"), nonfinite="ignore")
        assert torch.equal(clipped["head.bias"].nan_to_num(), gradients["head.bias"].nan_to_num())
        for name in set(SHAPES) - {"head.bias"}:
            assert clipped[name].norm().item() == pytest.approx(1.0, rel=1e-6)
        assert stats.finite.item() is False

    def test_zeroed_entries_do_not_count(self) -> None:
        gradients = model(torch.tensor([math.inf, 3.0]), torch.tensor([math.nan, 4.0]))
        clipped, stats = clip(gradients, Normalize(target=10.0, smoothing=0.0), nonfinite="zero")
        assert_clipped(clipped, {"encoder.0": np.array([0.0, 6.0]), "head": np.array([0.0, 8.0])})
        assert (stats.finite.item(), stats.skipped.item()) == (False, False)


class TestArguments:
    @pytest.mark.parametrize("make", [lambda method, **words: Clipper([], method, **words), GradientClipping])
    def test_a_limit_is_needed_to_skip(self, make: Callable[..., object]) -> None:
        with pytest.raises(ValueError, match="skip") as failure:
            make(Normalize(), action="skip")
        assert str(failure.value) == (
            "action='skip' drops steps over a limit, but Normalize(target=1.0, smoothing=1e-06, norm_type=2.0, "
            "per='model') also scales gradients up; use action='clip', or a method that only limits"
        )

    def test_defaults(self) -> None:
        assert dataclasses.asdict(Normalize()) == {
            "target": 1.0,
            "smoothing": 1e-6,
            "norm_type": 2.0,
            "per": "model",
        }
        assert Normalize().may_grow is True

    def test_numbers_and_schedules_become_plain(self) -> None:
        method = Normalize(target=OmegaConf.create({1000: 1, 0: 10}), smoothing=0, norm_type=np.float64(1))
        assert type(method.target) is dict
        assert list(method.target.items()) == [(0, 10.0), (1000, 1.0)]
        assert (type(method.smoothing), type(method.norm_type)) == (float, float)
        assert repr(method) == "Normalize(target={0: 10.0, 1000: 1.0}, smoothing=0.0, norm_type=1.0, per='model')"

    @pytest.mark.parametrize(
        ("arguments", "error", "said"),
        [
            ({"target": 0}, ValueError, "target must be > 0, got 0"),
            ({"target": -1.0}, ValueError, "target must be > 0, got -1.0"),
            ({"target": math.inf}, ValueError, "target must be finite, got inf"),
            ({"target": math.nan}, ValueError, "target must be > 0, got nan"),
            ({"target": {0: 1.0, 5: math.inf}}, ValueError, "target[5] must be finite, got inf"),
            ({"target": {0: 0.0, 5: 1.0}}, ValueError, "target[0] must be > 0, got 0.0"),
            (
                {"target": "one"},
                TypeError,
                "target must be a number or a schedule such as {0: 10.0, 1000: 1.0}, got 'one' (str)",
            ),
            (
                {"target": True},
                TypeError,
                "target must be a number or a schedule such as {0: 10.0, 1000: 1.0}, got True (bool)",
            ),
            (
                {"target": None},
                TypeError,
                "target must be a number or a schedule such as {0: 10.0, 1000: 1.0}, got None (NoneType)",
            ),
            ({"target": {}}, ValueError, "target is an empty schedule; give at least one point, target={0: 1.0}"),
            ({"smoothing": -1e-9}, ValueError, "smoothing must be >= 0, got -1e-09"),
            ({"smoothing": math.inf}, ValueError, "smoothing must be finite, got inf"),
            ({"smoothing": math.nan}, ValueError, "smoothing must be >= 0, got nan"),
            ({"smoothing": "one"}, TypeError, "smoothing must be a number, got 'one' (str)"),
            ({"smoothing": {0: 1.0}}, TypeError, "smoothing must be a number, got {0: 1.0} (dict)"),
            ({"norm_type": 0}, ValueError, "norm_type must be > 0, got 0; the usual norm is norm_type=2"),
            (
                {"norm_type": "one"},
                TypeError,
                "norm_type must be a number, got 'one' (str); the usual norm is norm_type=2",
            ),
            (
                {"per": "modl"},
                ValueError,
                "per must be one of 'model', 'group', 'layer', 'parameter', got 'modl'; did you mean 'model'?",
            ),
            ({"per": "unit"}, ValueError, "per must be one of 'model', 'group', 'layer', 'parameter', got 'unit'"),
        ],
        ids=str,
    )
    def test_what_is_wrong_is_said_with_its_value(
        self, arguments: dict[str, object], error: type[Exception], said: str
    ) -> None:
        with pytest.raises(error) as failure:
            Normalize(**arguments)
        assert str(failure.value) == said
