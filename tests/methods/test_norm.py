"""NormClip against torch, Keras, optax and a float64 reference."""

import dataclasses
import math
from collections.abc import Callable, Mapping

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor, nn

from kit import reference
from kit.clipping import arrays, assert_clipped, clip, random
from kit.drawn import given, settings, st
from kit.gradients import SCOPES, SHAPES, Witness, named, normal
from lightning_gradclip import Clipper, NormClip

NORM_TYPES = [0.5, 1.0, 2.0, 3.0, math.inf]


def model(*arrays_: Tensor) -> dict[str, Tensor]:
    """Gradients of one scope."""
    return {f"encoder.{i}": one for i, one in enumerate(arrays_)}


def one_scope(gradients: Mapping[str, Tensor]) -> dict[str, str]:
    return dict.fromkeys(gradients, "model")


class TestAgainstTorch:
    @pytest.mark.parametrize("p", NORM_TYPES)
    @pytest.mark.parametrize("share", [0.01, 0.999, 1.5], ids=["far over", "just over", "within"])
    @pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
    def test_gradients_and_norm_are_those_of_clip_grad_norm_(self, p: float, share: float, scale: float) -> None:
        gradients = {name: scale * random(*shape, seed=i) for i, (name, shape) in enumerate(SHAPES.items())}
        # Larger tensors would show the error of torch's own float32 sum.
        gradients["encoder.large"] = scale * random(20, 30, seed=9)
        theirs = named({name: one.clone() for name, one in gradients.items()})
        parameters = [parameter for _, parameter in theirs]
        max_norm = share * reference.joint_norm(list(arrays(gradients).values()), p)
        total = torch.nn.utils.clip_grad_norm_(parameters, max_norm, norm_type=p)
        clipped, stats = clip(gradients, NormClip(max_norm=max_norm, norm_type=p))
        rtol = 1e-5 if p < 1 else 1e-6
        assert stats.norm.item() == pytest.approx(total.item(), rel=rtol)
        assert (stats.coef.item() < 1) == (share < 1)
        assert_clipped(clipped, {name: reference.array(parameter.grad) for name, parameter in theirs}, rtol)

    def test_an_epsilon_next_to_the_norm_is_torchs(self) -> None:
        gradients = model(torch.tensor([3e-6, 4e-6]))
        (pair,) = named({"w": torch.tensor([3e-6, 4e-6])})
        torch.nn.utils.clip_grad_norm_([pair[1]], 1e-6)
        clipped, _ = clip(gradients, NormClip(max_norm=1e-6))
        assert clipped["encoder.0"].tolist() == pytest.approx(pair[1].grad.tolist(), rel=1e-6)
        # Without it the norm would be 1e-6.
        assert clipped["encoder.0"].norm().item() == pytest.approx(1e-6 * 5 / 6, rel=1e-6)


class TestAgainstTheReference:
    @pytest.mark.parametrize("per", NormClip.scopes)
    @pytest.mark.parametrize(("statistic", "p"), [("rms", 2.0), *(("norm", p) for p in NORM_TYPES)])
    @pytest.mark.parametrize("scale", [1e-25, 1e-3, 1.0, 1e25])
    @pytest.mark.parametrize("min_norm", [0.0, 0.4])
    def test_every_scope_and_statistic(self, per: str, statistic: str, p: float, scale: float, min_norm: float) -> None:
        gradients = normal(1, scale)
        gradients["head.bias"] *= 30
        max_norm, min_norm = scale, scale * min_norm
        method = NormClip(max_norm=max_norm, min_norm=min_norm, norm_type=p, per=per, statistic=statistic)
        clipped, stats = clip(gradients, method)
        exact, sizes, coefs = reference.norm_clip(
            arrays(gradients), SCOPES[per], max_norm=max_norm, min_norm=min_norm, p=p, statistic=statistic
        )
        assert any(coef < 1 for coef in coefs.values())
        assert_clipped(clipped, exact)
        assert stats.scopes == tuple(sizes)
        assert stats.sizes.tolist() == pytest.approx(list(sizes.values()), rel=1e-6)
        assert stats.limits.tolist() == [max_norm] * len(sizes)
        assert stats.coef.item() == pytest.approx(min(coefs.values()), rel=1e-6)
        assert stats.clipped.item() == np.mean([size > max_norm for size in sizes.values()])
        assert stats.norm.item() == pytest.approx(reference.joint_norm(list(arrays(gradients).values()), p), rel=1e-6)
        after = reference.joint_norm(list(exact.values()), p)
        assert stats.norm_clipped.item() == pytest.approx(after, rel=1e-6)

    @settings(derandomize=True, deadline=None, max_examples=150)
    @given(
        exponents=st.lists(st.integers(-30, 30), min_size=len(SHAPES), max_size=len(SHAPES)),
        max_norm=st.floats(1e-5, 1e5),
        p=st.sampled_from(NORM_TYPES),
        per=st.sampled_from(NormClip.scopes),
        seed=st.integers(0, 100),
    )
    def test_gradients_of_any_scale(self, exponents: list[int], max_norm: float, p: float, per: str, seed: int) -> None:
        drawn = zip(normal(seed).items(), exponents, strict=True)
        gradients = {name: one * 10.0**exponent for (name, one), exponent in drawn}
        clipped, _ = clip(gradients, NormClip(max_norm=max_norm, norm_type=p, per=per))
        exact, _, _ = reference.norm_clip(arrays(gradients), SCOPES[per], max_norm=max_norm, p=p)
        assert_clipped(clipped, exact)

    @pytest.mark.parametrize("p", [1.0, 2.0, 3.0, math.inf])
    @pytest.mark.parametrize(
        ("values", "max_norm"),
        [
            ([1e30, -2e30], 1.0),
            ([1e30, -2e30], 1e30),
            ([1e-25, 3e-25], 1e-26),
            ([1e-25, 3e-25], 1e-32),
            ([1e38] * 500, 1.0),
            ([3e38] * 500, 1e38),
            ([3e38] * 500, 1e-5),
        ],
    )
    def test_entries_whose_powers_leave_float32(self, values: list[float], max_norm: float, p: float) -> None:
        gradients = model(torch.tensor(values))
        clipped, stats = clip(gradients, NormClip(max_norm=max_norm, norm_type=p))
        exact, sizes, _ = reference.norm_clip(arrays(gradients), one_scope(gradients), max_norm=max_norm, p=p)
        assert stats.norm.item() == pytest.approx(sizes["model"], rel=1e-6)
        assert_clipped(clipped, exact)

    def test_float64_gradients_keep_float64(self) -> None:
        gradients = model(random(40, dtype=torch.float64), random(9, seed=1, dtype=torch.float64))
        clipped, stats = clip(gradients, NormClip(max_norm=0.3))
        exact, sizes, _ = reference.norm_clip(arrays(gradients), one_scope(gradients), max_norm=0.3)
        assert stats.norm.item() == pytest.approx(sizes["model"], rel=1e-14)
        assert_clipped(clipped, exact, rtol=1e-14)


class TestAgainstOthers:
    def test_per_parameter_it_is_the_clipnorm_of_keras(self) -> None:
        # tf.clip_by_norm: t * clip_norm / max(norm(t), clip_norm).
        gradients = normal(2, scale=100.0)
        clipped, _ = clip(gradients, NormClip(max_norm=50.0, per="parameter"))
        exact = {
            name: one * 50.0 / max(math.sqrt(float((one**2).sum())), 50.0) for name, one in arrays(gradients).items()
        }
        assert_clipped(clipped, exact)

    @pytest.mark.parametrize("threshold", [1.0, 1e-8, 1e8])
    def test_rms_per_parameter_is_clip_by_block_rms_of_optax(self, threshold: float) -> None:
        # optax: u / max(1, sqrt(mean(u ** 2)) / threshold), without an epsilon.
        gradients = normal(3, scale=threshold)
        gradients["head.weight"] *= 7
        clipped, stats = clip(gradients, NormClip(max_norm=threshold, per="parameter", statistic="rms"))
        exact = {
            name: one / max(1.0, math.sqrt(float((one**2).mean())) / threshold)
            for name, one in arrays(gradients).items()
        }
        assert 0 < stats.clipped.item() < 1
        assert_clipped(clipped, exact)

    def test_inf_norm_clipping_keeps_the_direction(self) -> None:
        clipped, _ = clip(model(torch.tensor([3.0, -0.5])), NormClip(max_norm=1.0, norm_type=math.inf))
        assert clipped["encoder.0"].tolist() == pytest.approx([1.0, -1 / 6], rel=1e-6)


class TestDtypes:
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("per", NormClip.scopes)
    @pytest.mark.parametrize("max_norm", [0.1, 1.0, 2.5])
    def test_half_gradients_are_within_one_unit_in_the_last_place(
        self, dtype: torch.dtype, per: str, max_norm: float
    ) -> None:
        gradients = normal(4, dtype=dtype)
        clipped, stats = clip(gradients, NormClip(max_norm=max_norm, per=per))
        exact, sizes, _ = reference.norm_clip(arrays(gradients), SCOPES[per], max_norm=max_norm)
        assert stats.sizes.tolist() == pytest.approx(list(sizes.values()), rel=1e-6)
        for name, expected in exact.items():
            assert clipped[name].dtype == dtype
            error = np.abs(reference.array(clipped[name]) - expected)
            assert (error <= reference.ulp(expected, dtype)).all()

    def test_a_float16_norm_above_65504(self) -> None:
        gradients = model(torch.linspace(-6e4, 6e4, 1000).half(), torch.full((3,), 6e4).half())
        clipped, stats = clip(gradients, NormClip(max_norm=1000.0))
        exact, sizes, _ = reference.norm_clip(arrays(gradients), one_scope(gradients), max_norm=1000.0)
        assert stats.norm.item() == pytest.approx(sizes["model"], rel=1e-6)
        assert stats.norm.item() > 65504
        for name, expected in exact.items():
            error = np.abs(reference.array(clipped[name]) - expected)
            assert (error <= reference.ulp(expected, torch.float16)).all()

    def test_mixed_dtypes_share_one_norm(self) -> None:
        dtypes = [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64]
        gradients = model(*(random(6, seed=i, dtype=torch.float64).to(dtype) for i, dtype in enumerate(dtypes)))
        clipped, stats = clip(gradients, NormClip(max_norm=0.5))
        exact, sizes, _ = reference.norm_clip(arrays(gradients), one_scope(gradients), max_norm=0.5)
        assert stats.norm.item() == pytest.approx(sizes["model"], rel=1e-6)
        for (name, expected), dtype in zip(exact.items(), dtypes, strict=True):
            assert clipped[name].dtype == dtype
            rtol = torch.finfo(dtype).eps if dtype in (torch.float16, torch.bfloat16) else 1e-6
            np.testing.assert_allclose(reference.array(clipped[name]), expected, rtol=rtol, atol=0)

    @pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128], ids=str)
    @pytest.mark.parametrize("p", [1.0, 2.0, math.inf])
    def test_complex_gradients_are_scaled_by_the_norm_of_their_magnitudes(self, dtype: torch.dtype, p: float) -> None:
        gradients = model(random(7, dtype=dtype), random(3, seed=1))
        clipped, _ = clip(gradients, NormClip(max_norm=0.2, norm_type=p))
        exact, _, _ = reference.norm_clip(arrays(gradients), one_scope(gradients), max_norm=0.2, p=p)
        assert clipped["encoder.0"].dtype == dtype
        assert_clipped(clipped, exact)


LAYOUTS: dict[str, Callable[[], Tensor]] = {
    "0-d": lambda: torch.tensor(-3.0),
    "channels-last": lambda: random(8, 6, 20, 20).contiguous(memory_format=torch.channels_last),
    "transposed": lambda: random(200, 100).t(),
    "every other column": lambda: random(10, 8)[:, ::2],
    "offset": lambda: random(40)[3:],
    "expanded": lambda: torch.tensor(2.0).expand(5, 3),
    "empty": lambda: torch.zeros(0, 4),
}


class TestLayouts:
    @pytest.mark.parametrize("layout", LAYOUTS)
    @pytest.mark.parametrize("per", ["model", "parameter"])
    def test_the_layout_does_not_matter(self, layout: str, per: str) -> None:
        parameters = named(model(LAYOUTS[layout](), random(4, seed=1)))
        before = {name: reference.array(parameter.grad).copy() for name, parameter in parameters}
        Clipper(parameters, NormClip(max_norm=0.5, per=per)).step()
        scopes = {name: name if per == "parameter" else per for name in before}
        exact, _, _ = reference.norm_clip(before, scopes, max_norm=0.5)
        assert_clipped({name: parameter.grad for name, parameter in parameters}, exact)

    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_within_the_limit_no_layout_is_written(self, layout: str) -> None:
        parameters = named(model(LAYOUTS[layout]()))
        witness = Witness(parameters)
        Clipper(parameters, NormClip(max_norm=1e4)).step()
        assert witness.written() == set()

    def test_a_sparse_embedding_gradient_counts_its_duplicates_as_their_sum(self) -> None:
        sparse, dense = nn.Embedding(6, 3, sparse=True), nn.Embedding(6, 3)
        dense.load_state_dict(sparse.state_dict())
        # Row 1 three times: the norm of the summands is another one.
        words, weights = torch.tensor([1, 4, 1, 1, 5]), torch.tensor([[1.0], [2.0], [-3.0], [4.0], [0.5]])
        for embedding in (sparse, dense):
            (embedding(words).pow(2) * weights).sum().backward()
        assert not sparse.weight.grad.is_coalesced()
        gradients = model(dense.weight.grad.clone())
        stats = Clipper(sparse.named_parameters(), NormClip(max_norm=0.3)).step()
        exact, sizes, _ = reference.norm_clip(arrays(gradients), one_scope(gradients), max_norm=0.3)
        assert stats.norm.item() == pytest.approx(sizes["model"], rel=1e-6)
        assert sparse.weight.grad.is_sparse
        assert_clipped({"encoder.0": sparse.weight.grad}, exact)

    def test_a_sparse_gradient_within_the_limit_stays_as_it_is(self) -> None:
        embedding = nn.Embedding(6, 3, sparse=True)
        embedding(torch.tensor([1, 4, 1])).sum().backward()
        gradient = embedding.weight.grad
        Clipper(embedding.named_parameters(), NormClip(max_norm=100.0)).step()
        assert embedding.weight.grad is gradient
        assert not gradient.is_coalesced()
        assert gradient._values().tolist() == [[1.0] * 3] * 3

    def test_rms_of_a_sparse_gradient_is_over_all_its_entries(self) -> None:
        embedding = nn.Embedding(6, 3, sparse=True)
        embedding(torch.tensor([1, 4, 1])).sum().backward()
        stats = Clipper(embedding.named_parameters(), NormClip(statistic="rms", max_norm=9.0)).step()
        # Row 1 holds three twos, row 4 three ones, the other twelve entries are zero.
        assert stats.sizes.tolist() == pytest.approx([math.sqrt((3 * 4 + 3 * 1) / 18)], rel=1e-6)

    @pytest.mark.parametrize("remove_duplicate", [True, False])
    def test_tied_weights_count_once_and_are_scaled_once(self, remove_duplicate: bool) -> None:
        net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
        net[1].weight = net[0].weight
        for i, parameter in enumerate(net.parameters()):
            parameter.grad = random(*parameter.shape, seed=i)
        gradients = model(*(parameter.grad.clone() for parameter in net.parameters()))
        assert len(gradients) == 3
        pairs = net.named_parameters(remove_duplicate=remove_duplicate)
        stats = Clipper(pairs, NormClip(max_norm=0.5)).step()
        exact, sizes, _ = reference.norm_clip(arrays(gradients), one_scope(gradients), max_norm=0.5)
        assert stats.norm.item() == pytest.approx(sizes["model"], rel=1e-6)
        assert_clipped(dict(zip(gradients, [p.grad for p in net.parameters()], strict=True)), exact)

    def test_absent_gradients_count_as_nothing(self) -> None:
        gradients = {"encoder.a": None, "encoder.b": torch.tensor([3.0]), "head.a": None, "head.b": torch.tensor([4.0])}
        clipped, stats = clip(gradients, NormClip(max_norm=1.0))
        assert stats.norm.item() == 5.0
        assert_clipped(clipped, {"encoder.b": np.array([3 / (5 + 1e-6)]), "head.b": np.array([4 / (5 + 1e-6)])})

    def test_rms_leaves_absent_gradients_out_of_its_count(self) -> None:
        _, stats = clip({"encoder.a": None, "encoder.b": torch.ones(3)}, NormClip(statistic="rms"))
        assert stats.sizes.item() == pytest.approx(1.0, rel=1e-6)


class TestLimits:
    def limits(self, method: NormClip, count: int) -> list[float]:
        pairs = named(model(torch.tensor([100.0])))
        clipper = Clipper(pairs, method)
        result = []
        for _ in range(count):
            pairs[0][1].grad = torch.tensor([100.0])
            stats = clipper.step()
            assert pairs[0][1].grad.item() == pytest.approx(stats.limit.item(), rel=1e-6)
            result.append(stats.limit.item())
        return result

    def test_a_schedule_counts_the_steps_of_the_clipper(self) -> None:
        assert self.limits(NormClip(max_norm={2: 10.0, 6: 2.0}), 8) == [10, 10, 10, 8, 6, 4, 2, 2]

    def test_a_schedule_goes_on_after_a_resume(self) -> None:
        pairs = named(model(torch.tensor([1.0])))
        method = NormClip(max_norm={0: 10.0, 5: 5.0})
        clipper = Clipper(pairs, method)
        for _ in range(3):
            clipper.step()
        resumed = Clipper(pairs, method)
        resumed.load_state_dict(clipper.state_dict())
        assert resumed.step().limit.item() == 7.0

    def test_an_infinite_limit_never_clips(self) -> None:
        pairs = named(model(torch.tensor([3e38, 3e38])))
        witness = Witness(pairs)
        stats = Clipper(pairs, NormClip(max_norm=math.inf)).step()
        assert witness.written() == set()
        assert (stats.limit.item(), stats.clipped.item(), stats.coef.item()) == (math.inf, 0.0, 1.0)

    def test_a_norm_equal_to_the_limit_is_within_it(self) -> None:
        pairs = named(model(torch.tensor([3.0, 4.0])))
        witness = Witness(pairs)
        stats = Clipper(pairs, NormClip(max_norm=5.0)).step()
        assert stats.norm.item() == 5.0
        assert witness.written() == set()

    def test_small_gradients_are_scaled_up_to_min_norm(self) -> None:
        gradients = {
            "encoder.small": torch.tensor([0.03, 0.04]),
            "encoder.zero": torch.zeros(2),
            "encoder.between": torch.tensor([0.6, 0.8]),
            "encoder.large": torch.tensor([3.0, 4.0]),
            "encoder.edge": torch.tensor([0.5, 0.0]),
        }
        pairs = named({name: one.clone() for name, one in gradients.items()})
        witness = Witness(pairs)
        stats = Clipper(pairs, NormClip(max_norm=2.0, min_norm=0.5, per="parameter")).step()
        after = {name: parameter.grad for name, parameter in pairs}
        assert after["encoder.small"].tolist() == pytest.approx([0.3, 0.4], rel=1e-6)
        assert after["encoder.large"].norm().item() == pytest.approx(2.0, rel=1e-6)
        assert witness.written() == {"encoder.small", "encoder.large"}
        assert (stats.clipped.item(), stats.coef.item()) == (0.2, pytest.approx(0.4, rel=1e-6))

    @pytest.mark.parametrize("entry", [1e-20, 1e-36, 1e-40, 1e-45])
    @pytest.mark.parametrize("min_norm", [1e-3, 0.5])
    def test_the_smallest_gradients_are_scaled_up_and_stay_finite(self, entry: float, min_norm: float) -> None:
        gradients = model(torch.full((4,), entry))
        clipped, stats = clip(gradients, NormClip(min_norm=min_norm))
        assert clipped["encoder.0"].tolist() == pytest.approx([min_norm / 2] * 4, rel=1e-6)
        assert stats.norm_clipped.item() == pytest.approx(min_norm, rel=1e-6)

    def test_min_norm_follows_its_schedule(self) -> None:
        pairs = named(model(torch.tensor([1e-3])))
        clipper = Clipper(pairs, NormClip(max_norm=1.0, min_norm={0: 0.0, 2: 0.5}))
        sizes = []
        for _ in range(4):
            pairs[0][1].grad = torch.tensor([1e-3])
            clipper.step()
            sizes.append(pairs[0][1].grad.item())
        assert sizes == pytest.approx([1e-3, 0.25, 0.5, 0.5], rel=1e-6)


class TestArguments:
    def test_defaults(self) -> None:
        assert dataclasses.asdict(NormClip()) == {
            "max_norm": 1.0,
            "norm_type": 2.0,
            "min_norm": 0.0,
            "per": "model",
            "statistic": "norm",
        }
        assert NormClip().may_grow is False
        assert NormClip(min_norm=0.1).may_grow is True
        assert NormClip(min_norm={0: 0.0, 5: 0.1}).may_grow is True

    def test_numbers_and_schedules_become_plain(self) -> None:
        given_schedule = OmegaConf.create({1000: 1, 0: 10})
        method = NormClip(max_norm=given_schedule, norm_type=1, min_norm=0)
        assert type(method.max_norm) is dict
        assert list(method.max_norm.items()) == [(0, 10.0), (1000, 1.0)]
        assert (type(method.norm_type), type(method.min_norm)) == (float, float)
        assert repr(method) == (
            "NormClip(max_norm={0: 10.0, 1000: 1.0}, norm_type=1.0, min_norm=0.0, per='model', statistic='norm')"
        )

    @pytest.mark.parametrize(
        ("arguments", "error", "said"),
        [
            (
                {"max_norm": -1},
                ValueError,
                "max_norm must be > 0, got -1; to measure without clipping use method=None",
            ),
            (
                {"max_norm": 0.0},
                ValueError,
                "max_norm must be > 0, got 0.0; to measure without clipping use method=None",
            ),
            (
                {"max_norm": "abc"},
                TypeError,
                "max_norm must be a number or a schedule such as {0: 10.0, 1000: 1.0}, got 'abc' (str)",
            ),
            (
                {"max_norm": True},
                TypeError,
                "max_norm must be a number or a schedule such as {0: 10.0, 1000: 1.0}, got True (bool)",
            ),
            (
                {"max_norm": None},
                TypeError,
                "max_norm must be a number or a schedule such as {0: 10.0, 1000: 1.0}, got None (NoneType)",
            ),
            (
                {"max_norm": {0: 1.0, 5: -2.0}},
                ValueError,
                "max_norm[5] must be > 0, got -2.0; to measure without clipping use method=None",
            ),
            ({"norm_type": 0}, ValueError, "norm_type must be > 0, got 0; the usual norm is norm_type=2"),
            ({"norm_type": math.nan}, ValueError, "norm_type must be > 0, got nan; the usual norm is norm_type=2"),
            (
                {"norm_type": "one"},
                TypeError,
                "norm_type must be a number, got 'one' (str); the usual norm is norm_type=2",
            ),
            ({"min_norm": -0.1}, ValueError, "min_norm must be >= 0, got -0.1; 0 scales nothing up"),
            (
                {"min_norm": 2.0},
                ValueError,
                "min_norm=2.0 exceeds max_norm=1.0; keep it smaller at every step",
            ),
            (
                {"max_norm": {0: 5.0, 9: 1.0}, "min_norm": {0: 0.5, 9: 1.5}},
                ValueError,
                "min_norm={0: 0.5, 9: 1.5} exceeds max_norm={0: 5.0, 9: 1.0}; keep it smaller at every step",
            ),
            (
                {"per": "modl"},
                ValueError,
                "per must be one of 'model', 'group', 'layer', 'parameter', got 'modl'; did you mean 'model'?",
            ),
            ({"per": "unit"}, ValueError, "per must be one of 'model', 'group', 'layer', 'parameter', got 'unit'"),
            ({"statistic": "mean"}, ValueError, "statistic must be one of 'norm', 'rms', got 'mean'"),
            (
                {"statistic": "rms", "norm_type": 1.0},
                ValueError,
                "statistic='rms' is defined for norm_type=2, got norm_type=1; use norm_type=2 or statistic='norm'",
            ),
        ],
        ids=str,
    )
    def test_what_is_wrong_is_said_with_value_and_remedy(
        self, arguments: dict[str, object], error: type[Exception], said: str
    ) -> None:
        with pytest.raises(error) as failure:
            NormClip(**arguments)
        assert str(failure.value) == said


@pytest.mark.parametrize("per", ["model", "parameter"])
@pytest.mark.parametrize(("value", "dtype"), [(1e-45, torch.float32), (1e-310, torch.float64), (5e-324, torch.float64)])
def test_a_norm_too_small_to_divide_by_is_scaled_up_as_far_as_numbers_reach(
    per: str, value: float, dtype: torch.dtype
) -> None:
    weight = torch.nn.Parameter(torch.zeros(1, dtype=dtype))
    clipper = Clipper([("weight", weight)], NormClip(min_norm=1.0, max_norm=2.0, per=per))
    weight.grad = torch.tensor([value], dtype=dtype)
    stats = clipper.step()
    assert torch.isfinite(stats.coef)
    assert 0 < weight.grad.item() <= 1.0
