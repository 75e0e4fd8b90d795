"""AGC against timm and a float64 reference."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor, nn
from torch.nn import Parameter

from kit import peers, reference
from kit.clipping import arrays, random
from kit.drawn import given, settings, st
from kit.gradients import Witness, same_bits
from lightning_gradclip import AGC, Clipper, StepStats

SHAPES = {
    "linear.weight": (6, 4),
    "linear.bias": (6,),
    "conv1d.weight": (5, 3, 4),
    "conv2d.weight": (4, 3, 3, 3),
    "conv3d.weight": (3, 2, 2, 3, 3),
    "embedding.weight": (7, 5),
    "scale": (),
    "zero.weight": (4, 3),
    "zero.bias": (4,),
}
# Slices along dim 0, and one for each bias and scalar.
COUNT = 6 + 1 + 5 + 4 + 3 + 7 + 1 + 4 + 1
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]

Tensors = dict[str, Tensor]


def weights_of_the_model(dtype: torch.dtype = torch.float32) -> Tensors:
    drawn = {name: random(*shape, seed=i, dtype=torch.float64) for i, (name, shape) in enumerate(SHAPES.items())}
    return {name: (0.0 * one if name.startswith("zero") else one).to(dtype) for name, one in drawn.items()}


def gradients_over(share: float, weights: Tensors, clip_factor: float) -> Tensors:
    """Gradients with this share of the units over their limit by up to 100 times, the others well within."""
    drawn = arrays({name: random(*one.shape, seed=40 + i).double() for i, (name, one) in enumerate(weights.items())})
    rule = reference.agc(drawn, arrays(weights), clip_factor=clip_factor)
    rng = np.random.default_rng(0)
    over = rng.permutation(COUNT) < round(share * COUNT)
    ratios = np.where(over, 10 ** rng.uniform(0.05, 2, COUNT), rng.uniform(0.05, 0.9, COUNT))
    factors = dict(zip(rule.sizes, ratios * list(rule.limits.values()) / list(rule.sizes.values()), strict=True))
    for name, one in drawn.items():
        for place in range(len(one)) if one.ndim > 1 else [...]:
            one[place] *= factors[name if place is ... else f"{name}[{place}]"]
    return {name: torch.tensor(one, dtype=weights[name].dtype) for name, one in drawn.items()}


def parameters(weights: Mapping[str, Tensor], gradients: Mapping[str, Tensor | None]) -> list[tuple[str, Parameter]]:
    """Parameters with copies of these weights and gradients, in their layouts."""
    pairs = []
    for name, weight in weights.items():
        parameter = Parameter(weight.clone())
        gradient = gradients[name]
        parameter.grad = None if gradient is None else gradient.clone()
        pairs.append((name, parameter))
    return pairs


def after(pairs: list[tuple[str, Parameter]]) -> Tensors:
    return {name: parameter.grad for name, parameter in pairs if parameter.grad is not None}


def clip(
    weights: Mapping[str, Tensor], gradients: Mapping[str, Tensor | None], method: AGC, **options: Any
) -> tuple[Tensors, StepStats]:
    pairs = parameters(weights, gradients)
    stats = Clipper(pairs, method, **options).step()
    return after(pairs), stats


def clip_as_timm(weights: Mapping[str, Tensor], gradients: Mapping[str, Tensor], **arguments: float) -> Tensors:
    pairs = parameters(weights, gradients)
    peers.file("timm", "timm/utils/agc.py").adaptive_clip_grad([one for _, one in pairs], **arguments)
    return after(pairs)


def assert_clipped(clipped: Mapping[str, Tensor], exact: Mapping[str, np.ndarray]) -> None:
    """Half gradients to one unit in the last place, float64 to 1e-14, others to 1e-6."""
    assert clipped.keys() == exact.keys()
    for name, expected in exact.items():
        values, dtype = reference.array(clipped[name]), clipped[name].dtype
        if dtype in (torch.float16, torch.bfloat16):
            assert (np.abs(values - expected) <= reference.ulp(expected, dtype)).all(), name
        else:
            rtol = 1e-14 if dtype in (torch.float64, torch.complex128) else 1e-6
            # Below 1e-38 float32 has fixed steps of 1.4e-45.
            np.testing.assert_allclose(values, expected, rtol=rtol, atol=1.5e-45, err_msg=name)


def assert_same_bits(ours: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> None:
    assert ours.keys() == others.keys()
    assert [name for name in ours if not same_bits(ours[name], others[name])] == []


class TestAgainstTimm:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
    @pytest.mark.parametrize("share", [0.0, 0.1, 1.0])
    @pytest.mark.parametrize("clip_factor", [0.01, 0.16, 1.0])
    def test_gradients_are_those_of_adaptive_clip_grad_to_the_bit(
        self, dtype: torch.dtype, share: float, clip_factor: float
    ) -> None:
        weights = weights_of_the_model(dtype)
        gradients = gradients_over(share, weights, clip_factor)
        clipped, stats = clip(weights, gradients, AGC(clip_factor=clip_factor))
        assert stats.clipped.item() == pytest.approx(round(share * COUNT) / COUNT, abs=1e-15)
        assert_same_bits(clipped, clip_as_timm(weights, gradients, clip_factor=clip_factor))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
    @pytest.mark.parametrize("shape", [(3, 8192), (8192,), (4, 512, 4, 4), (2000, 3), (1, 7), (5, 1), (1,), ()])
    def test_rows_of_up_to_8192_entries_are_equal_to_the_bit(self, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        weights = {"w": random(*shape, dtype=dtype)}
        gradients = {"w": random(*shape, seed=1, dtype=dtype) * 10 ** random(*shape[:1], *[1] * len(shape[1:]), seed=2)}
        gradients["w"] = gradients["w"].to(dtype)
        clipped, _ = clip(weights, gradients, AGC(clip_factor=0.5))
        assert_same_bits(clipped, clip_as_timm(weights, gradients, clip_factor=0.5))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
    @pytest.mark.parametrize("share", [0.0, 0.1, 1.0])
    @pytest.mark.parametrize("mixed", [False, True])
    def test_many_of_one_shape_are_equal_to_the_bit(self, mixed: bool, share: float, dtype: torch.dtype) -> None:
        # Measured in batches, more than one of each shape; those of other shapes come in between.
        shapes = [(40, 33), (6, 4, 3, 3), (40,), (), (3, 8192)] if mixed else [(40, 33)]
        weights = {f"w{i}": random(*shapes[i % len(shapes)], seed=i, dtype=dtype) for i in range(250 if mixed else 450)}
        gradients = {
            name: random(*one.shape, seed=900 + i, dtype=dtype) for i, (name, one) in enumerate(weights.items())
        }
        for i, one in enumerate(gradients.values()):
            over = torch.rand(len(one) if one.ndim > 1 else 1, generator=torch.Generator().manual_seed(i)) < share
            ratios = torch.where(over, 5.0, 0.05).to(dtype)
            one.mul_(ratios.view(-1, *[1] * (one.ndim - 1)) if one.ndim > 1 else ratios[0])
        odd = random(40, 33, seed=7, dtype=dtype)
        odd[3], odd[4, 5] = 0.0, math.nan
        zero = {"zero": torch.zeros(40, 33, dtype=dtype), "odd": odd, "across": random(33, 40, dtype=dtype).t()}
        weights |= zero
        gradients |= {name: random(40, 33, seed=8, dtype=dtype) * (0.0 if share == 0 else 1.0) for name in zero}
        gradients["across"] = (random(33, 40, seed=9, dtype=dtype) * share).t()
        pairs = parameters(weights, gradients)
        clipper = Clipper(pairs, AGC(clip_factor=0.5), nonfinite="ignore")
        for _ in range(2):
            # The second step has a plan.
            for name, parameter in pairs:
                parameter.grad = gradients[name].clone()
            clipper.step()
        expected = clip_as_timm(weights, gradients, clip_factor=0.5)
        # torch makes NaN of a unit whose limit is NaN, because its weights are.
        expected["odd"][4] = gradients["odd"][4]
        clipped = after(pairs)
        if dtype is torch.float32:
            # Of entries that lie apart torch adds one after the other, and is further off than we are.
            torch.testing.assert_close(clipped.pop("across"), expected.pop("across"), rtol=1e-6, atol=0.0)
        assert_same_bits(clipped, expected)

    @pytest.mark.parametrize("size", [2e-9, 3e-7, 9e-7, 2e-6])
    def test_sizes_around_1e6_are_floored_as_timms(self, size: float) -> None:
        weights, gradients = {"w": torch.zeros(2, 1)}, {"w": torch.tensor([[size], [-size]])}
        clipped, stats = clip(weights, gradients, AGC(clip_factor=1e-6))
        assert stats.clipped.item() == 1
        assert_same_bits(clipped, clip_as_timm(weights, gradients, clip_factor=1e-6))
        assert stats.coef.item() == pytest.approx(1e-9 / max(size, 1e-6), rel=1e-6)

    @pytest.mark.parametrize("eps", [1e-6, 1e-3, 10.0])
    def test_eps_is_timms(self, eps: float) -> None:
        weights, gradients = weights_of_the_model(), gradients_over(0.5, weights_of_the_model(), 0.01)
        clipped, _ = clip(weights, gradients, AGC(eps=eps))
        assert_same_bits(clipped, clip_as_timm(weights, gradients, eps=eps))

    def test_a_sparse_embedding_is_clipped_as_timm_clips_a_dense_one(self) -> None:
        sparse, dense = nn.Embedding(6, 3, sparse=True), nn.Embedding(6, 3)
        dense.load_state_dict(sparse.state_dict())
        # Token 1 three times: the norm of the summands is another one.
        words, factors = torch.tensor([1, 4, 1, 1, 5]), torch.tensor([[1.0], [2.0], [-3.0], [4.0], [1e-6]])
        for embedding in (sparse, dense):
            (embedding(words).pow(2) * factors).sum().backward()
        assert not sparse.weight.grad.is_coalesced()
        stats = Clipper(sparse.named_parameters(), AGC()).step()
        peers.file("timm", "timm/utils/agc.py").adaptive_clip_grad(dense.parameters())
        assert stats.clipped.item() == 2 / 6
        assert sparse.weight.grad.is_sparse
        np.testing.assert_allclose(
            reference.array(sparse.weight.grad), reference.array(dense.weight.grad), rtol=1e-6, atol=0
        )


class TestAgainstTheReference:
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("share", [0.0, 0.1, 1.0])
    @pytest.mark.parametrize("clip_factor", [0.01, 0.3])
    def test_units_of_every_layer_and_dtype(self, dtype: torch.dtype, share: float, clip_factor: float) -> None:
        weights = weights_of_the_model(dtype)
        gradients = gradients_over(share, weights, clip_factor)
        clipped, stats = clip(weights, gradients, AGC(clip_factor=clip_factor))
        exact = reference.agc(arrays(gradients), arrays(weights), clip_factor=clip_factor)
        assert all(one.dtype == dtype for one in clipped.values())
        assert_clipped(clipped, exact.gradients)
        rtol = 1e-14 if dtype == torch.float64 else 1e-6
        assert stats.scopes == tuple(exact.sizes)
        assert stats.sizes.tolist() == pytest.approx(list(exact.sizes.values()), rel=rtol)
        assert stats.limits.tolist() == pytest.approx(list(exact.limits.values()), rel=rtol)
        assert stats.coef.item() == pytest.approx(min(exact.coefs.values()), rel=rtol)
        assert stats.clipped.item() == pytest.approx(round(share * COUNT) / COUNT, abs=1e-15)
        assert stats.norm.item() == pytest.approx(reference.joint_norm(list(arrays(gradients).values()), 2.0), rel=rtol)
        assert stats.norm_clipped.item() == pytest.approx(
            reference.joint_norm(list(exact.gradients.values()), 2.0), rel=rtol
        )

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("coalesced", [True, False])
    def test_a_sparse_gradient_of_every_dtype(self, dtype: torch.dtype, coalesced: bool) -> None:
        weights = {"embedding.weight": random(7, 5, seed=1, dtype=torch.float64).to(dtype)}
        weights["embedding.weight"][4] = 0
        values = random(6, 5, seed=2, dtype=torch.float64).to(dtype)
        values[2] *= 1e-4
        tokens = torch.tensor([[5, 1, 3, 5, 4, 0]])
        gradient = torch.sparse_coo_tensor(tokens, values, (7, 5), check_invariants=True)
        gradients = {"embedding.weight": gradient.coalesce() if coalesced else gradient}
        exact = reference.agc(arrays({"embedding.weight": gradient.coalesce()}), arrays(weights), clip_factor=0.1)
        clipped, stats = clip(weights, gradients, AGC(clip_factor=0.1))
        # Tokens 2 and 6 have no gradient, that of token 3 is small.
        assert [coef < 1 for coef in exact.coefs.values()] == [True, True, False, False, True, True, False]
        assert clipped["embedding.weight"].is_sparse
        assert clipped["embedding.weight"].dtype == dtype
        assert_clipped(clipped, exact.gradients)
        assert stats.sizes.tolist() == pytest.approx(list(exact.sizes.values()), rel=1e-6)
        assert stats.clipped.item() == 4 / 7

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("share", [0.0, 0.1, 1.0])
    def test_per_parameter_each_tensor_is_one_unit(self, dtype: torch.dtype, share: float) -> None:
        weights = weights_of_the_model(dtype)
        gradients = gradients_over(share, weights, 0.02)
        clipped, stats = clip(weights, gradients, AGC(clip_factor=0.02, per="parameter"))
        exact = reference.agc(arrays(gradients), arrays(weights), clip_factor=0.02, per="parameter")
        assert_clipped(clipped, exact.gradients)
        assert stats.scopes == tuple(SHAPES)
        assert stats.sizes.tolist() == pytest.approx(list(exact.sizes.values()), rel=1e-6)
        assert stats.limits.tolist() == pytest.approx(list(exact.limits.values()), rel=1e-6)
        assert stats.clipped.item() == np.mean([coef < 1 for coef in exact.coefs.values()])

    @pytest.mark.parametrize("per", AGC.scopes)
    @settings(derandomize=True, deadline=None, max_examples=40)
    @given(
        exponents=st.lists(st.integers(-25, 25), min_size=len(SHAPES), max_size=len(SHAPES)),
        weight_exponent=st.integers(-6, 6),
        clip_factor=st.floats(1e-4, 1e2),
        eps=st.floats(1e-6, 1.0),
        seed=st.integers(0, 100),
    )
    def test_gradients_of_any_scale(
        self, per: str, exponents: list[int], weight_exponent: int, clip_factor: float, eps: float, seed: int
    ) -> None:
        weights = {name: one * 10.0**weight_exponent for name, one in weights_of_the_model().items()}
        gradients = {
            name: random(*shape, seed=seed + i) * 10.0**exponent
            for i, ((name, shape), exponent) in enumerate(zip(SHAPES.items(), exponents, strict=True))
        }
        clipped, stats = clip(weights, gradients, AGC(clip_factor=clip_factor, eps=eps, per=per))
        exact = reference.agc(arrays(gradients), arrays(weights), clip_factor=clip_factor, eps=eps, per=per)
        assert_clipped(clipped, exact.gradients)
        assert stats.norm_clipped.item() == pytest.approx(
            reference.joint_norm(list(exact.gradients.values()), 2.0), rel=1e-6
        )
        # What is small is left as it is.
        assert all((clipped[name].abs() <= gradients[name].abs()).all() for name in SHAPES)

    @pytest.mark.parametrize("clip_factor", [1e-6, 100.0])
    @pytest.mark.parametrize("entry", [3e38, 1e25, 1e19, 1e-25, 1e-45])
    @pytest.mark.parametrize("shape", [(), (1,), (3,), (2, 1), (2, 4), (2, 9000)])
    def test_entries_whose_squares_leave_float32(
        self, shape: tuple[int, ...], entry: float, clip_factor: float
    ) -> None:
        # The first unit is extreme, the last is within any limit here, and keeps its bits.
        weights, gradients = {"w": torch.zeros(shape)}, {"w": torch.full(shape, entry)}
        if len(shape) > 1:
            gradients["w"][-1] = 1e-12
        clipped, stats = clip(weights, gradients, AGC(clip_factor=clip_factor))
        exact = reference.agc(arrays(gradients), arrays(weights), clip_factor=clip_factor)
        assert_clipped(clipped, exact.gradients)
        assert stats.sizes.tolist() == pytest.approx(list(exact.sizes.values()), rel=1e-6)
        assert stats.coef.item() == pytest.approx(min(exact.coefs.values()), rel=1e-6)
        assert (stats.coef.item() < 1) == (entry > 1e18)

    @pytest.mark.parametrize("shape", [(2,), (2, 1), (2, 3)])
    def test_a_tiny_limit_keeps_its_digits(self, shape: tuple[int, ...]) -> None:
        # Limit by size is below what float32 holds, their norms are not.
        weights, gradients = {"w": torch.zeros(shape)}, {"w": torch.full(shape, 5e18)}
        clipped, stats = clip(weights, gradients, AGC(clip_factor=1e-10, eps=1e-12))
        exact = reference.agc(arrays(gradients), arrays(weights), clip_factor=1e-10, eps=1e-12)
        assert_clipped(clipped, exact.gradients)
        assert stats.coef.item() == pytest.approx(min(exact.coefs.values()), rel=1e-6)

    @pytest.mark.parametrize("columns", [8193, 100_000])
    def test_long_rows_are_exact_to_1e6(self, columns: int) -> None:
        weights = {"w": torch.rand(3, columns, generator=torch.Generator().manual_seed(0))}
        gradients = {"w": torch.rand(3, columns, generator=torch.Generator().manual_seed(1))}
        gradients["w"][1] *= 1e-3
        clipped, stats = clip(weights, gradients, AGC())
        exact = reference.agc(arrays(gradients), arrays(weights))
        assert_clipped(clipped, exact.gradients)
        assert stats.limits.tolist() == pytest.approx(list(exact.limits.values()), rel=1e-6)
        assert stats.clipped.item() == pytest.approx(2 / 3, rel=1e-15)

    @pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128], ids=str)
    @pytest.mark.parametrize("per", AGC.scopes)
    def test_complex_weights_count_by_their_magnitudes(self, dtype: torch.dtype, per: str) -> None:
        weights = {"w": random(5, 3, dtype=dtype), "b": random(5, seed=1, dtype=dtype)}
        gradients = {"w": random(5, 3, seed=2, dtype=dtype), "b": random(5, seed=3, dtype=dtype)}
        gradients["w"][3] *= 1e-3
        clipped, stats = clip(weights, gradients, AGC(clip_factor=0.1, per=per))
        exact = reference.agc(arrays(gradients), arrays(weights), clip_factor=0.1, per=per)
        assert clipped["w"].dtype == dtype
        assert_clipped(clipped, exact.gradients)
        assert stats.sizes.tolist() == pytest.approx(list(exact.sizes.values()), rel=1e-6)
        assert stats.limits.tolist() == pytest.approx(list(exact.limits.values()), rel=1e-6)

    def test_mixed_dtypes_keep_theirs(self) -> None:
        dtypes = [*DTYPES, torch.complex64]
        weights = {f"w{i}": random(4, 3, seed=i, dtype=torch.float64).to(dtype) for i, dtype in enumerate(dtypes)}
        gradients = {f"w{i}": random(4, 3, seed=9 + i).to(dtype) for i, dtype in enumerate(dtypes)}
        clipped, _ = clip(weights, gradients, AGC(clip_factor=0.3))
        exact = reference.agc(arrays(gradients), arrays(weights), clip_factor=0.3)
        assert [one.dtype for one in clipped.values()] == dtypes
        assert_clipped(clipped, exact.gradients)


LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(3, 4), (2, 3)),
    "conv1d": (lambda: nn.Conv1d(3, 4, 2), (2, 3, 5)),
    "conv2d": (lambda: nn.Conv2d(3, 4, 2), (2, 3, 5, 5)),
    "conv3d": (lambda: nn.Conv3d(3, 4, 2), (2, 3, 3, 3, 3)),
    "grouped": (lambda: nn.Conv2d(4, 4, 2, groups=2), (2, 4, 5, 5)),
}


class TestUnits:
    @pytest.mark.parametrize("layer", LAYERS)
    def test_a_unit_is_an_output_of_its_layer(self, layer: str) -> None:
        make, shape = LAYERS[layer]
        torch.manual_seed(0)
        module = make()
        # Outputs on dim 1; only the third of four is off.
        factors = torch.tensor([1e-5, 1e-5, 1.0, 1e-5]).view(1, 4, *[1] * (len(shape) - 2))
        (module(random(*shape)) * factors).sum().backward()
        before = module.weight.grad.clone()
        stats = Clipper([("layer.weight", module.weight)], AGC(clip_factor=0.1)).step()
        assert stats.scopes == tuple(f"layer.weight[{i}]" for i in range(4))
        assert (stats.sizes > stats.limits).tolist() == [False, False, True, False]
        assert module.weight.grad[2].norm().item() == pytest.approx(0.1 * module.weight[2].norm().item(), rel=1e-6)
        assert same_bits(module.weight.grad[[0, 1, 3]], before[[0, 1, 3]])

    @pytest.mark.parametrize("sparse", [True, False])
    def test_a_unit_of_an_embedding_is_a_token(self, sparse: bool) -> None:
        torch.manual_seed(0)
        module = nn.Embedding(4, 3, sparse=sparse)
        (module(torch.tensor([2, 0])) * torch.tensor([[1.0], [1e-5]])).sum().backward()
        stats = Clipper([("tokens", module.weight)], AGC(clip_factor=0.1)).step()
        assert stats.scopes == ("tokens[0]", "tokens[1]", "tokens[2]", "tokens[3]")
        assert stats.sizes.tolist() == pytest.approx([1e-5 * math.sqrt(3), 0, math.sqrt(3), 0], rel=1e-6)
        after_ = module.weight.grad.to_dense()
        assert after_[2].tolist() == pytest.approx([0.1 * module.weight[2].norm().item() / math.sqrt(3)] * 3, rel=1e-6)
        assert after_[0].tolist() == pytest.approx([1e-5] * 3, rel=1e-6)

    def test_the_units_of_a_transposed_convolution_are_its_inputs(self) -> None:
        torch.manual_seed(0)
        module = nn.ConvTranspose2d(3, 5, 2)
        # Only the second of three inputs is on.
        (module(random(2, 3, 4, 4) * torch.tensor([0.0, 1.0, 0.0]).view(1, 3, 1, 1))).sum().backward()
        weights, gradients = {"up": module.weight.detach()}, {"up": module.weight.grad}
        clipped, stats = clip(weights, gradients, AGC())
        assert stats.scopes == ("up[0]", "up[1]", "up[2]")
        assert (stats.sizes > stats.limits).tolist() == [False, True, False]
        assert_same_bits(clipped, clip_as_timm(weights, gradients))
        clipped, _ = clip(weights, gradients, AGC(per="parameter"))
        assert_clipped(clipped, reference.agc(arrays(gradients), arrays(weights), per="parameter").gradients)

    def test_biases_and_scalars_are_clipped_as_a_whole(self) -> None:
        weights = {"bias": torch.tensor([3.0, 4.0]), "scale": torch.tensor(-2.0)}
        gradients = {"bias": torch.tensor([0.6, -0.8]), "scale": torch.tensor(-5.0)}
        clipped, stats = clip(weights, gradients, AGC(clip_factor=0.1))
        assert stats.scopes == ("bias", "scale")
        assert clipped["bias"].tolist() == pytest.approx([0.3, -0.4], rel=1e-6)
        assert clipped["scale"].item() == pytest.approx(-0.2, rel=1e-6)

    def test_what_is_excluded_keeps_its_bits_and_is_not_counted(self) -> None:
        weights = {"body.weight": random(3, 4), "head.weight": random(2, 3), "head.bias": random(2)}
        gradients = {name: 100 * random(*one.shape, seed=7) for name, one in weights.items()}
        pairs = parameters(weights, gradients)
        witness = Witness(pairs)
        stats = Clipper(pairs, AGC(), exclude=["head.*"]).step()
        assert stats.scopes == ("body.weight[0]", "body.weight[1]", "body.weight[2]")
        assert stats.clipped.item() == 1
        assert witness.written() == {"body.weight"}
        assert_same_bits({"body.weight": after(pairs)["body.weight"]}, clip_as_timm(pick(weights), pick(gradients)))


def pick(tensors: Mapping[str, Tensor], name: str = "body.weight") -> Tensors:
    return {name: tensors[name]}


class TestEps:
    def losses(self, eps: float) -> tuple[float, float]:
        """The loss before and after 100 steps of SGD from weights of zero."""
        weight, bias = Parameter(torch.zeros(2, 3)), Parameter(torch.zeros(2))
        optimizer = torch.optim.SGD([weight, bias], lr=1.0)
        clipper = Clipper([("weight", weight), ("bias", bias)], AGC(clip_factor=0.1, eps=eps), optimizer=optimizer)
        inputs = random(50, 1, 3)
        targets = (inputs * torch.tensor([[1.0, 0.5, -1.5], [-1.0, 2.0, 0.3]])).sum(2) + torch.tensor([0.7, -0.4])
        losses = []
        for _ in range(101):
            optimizer.zero_grad()
            loss = ((inputs * weight).sum(2) + bias - targets).square().mean()
            loss.backward()
            losses.append(loss.item())
            clipper.step()
            optimizer.step()
        return losses[0], losses[-1]

    def test_units_initialised_with_zeros_learn(self) -> None:
        first, last = self.losses(eps=1e-3)
        assert last < 0.02 * first

    def test_without_a_floor_they_would_not(self) -> None:
        first, last = self.losses(eps=1e-12)
        assert last == pytest.approx(first, rel=1e-6)

    @pytest.mark.parametrize("eps", [1e-3, 0.5])
    def test_it_floors_the_norm_of_the_weights_and_nothing_else(self, eps: float) -> None:
        weights = {"w": torch.tensor([[0.0], [0.9 * eps], [1.1 * eps], [-7.0]])}
        _, stats = clip(weights, {"w": torch.ones(4, 1)}, AGC(clip_factor=0.1, eps=eps))
        assert stats.limits.tolist() == pytest.approx([0.1 * eps, 0.1 * eps, 0.11 * eps, 0.7], rel=1e-6)


class TestWriting:
    def test_a_size_equal_to_the_limit_is_within_it(self) -> None:
        weights = {"w": torch.tensor([[3.0, 4.0], [6.0, 8.0]]), "b": torch.tensor([0.5])}
        gradients = {"w": torch.tensor([[-2.0, 1.5], [4.0, 3.0]]), "b": torch.tensor([-0.25])}
        pairs = parameters(weights, gradients)
        witness = Witness(pairs)
        stats = Clipper(pairs, AGC(clip_factor=0.5)).step()
        assert torch.equal(stats.sizes, stats.limits)
        assert witness.written() == set()
        assert (stats.clipped.item(), stats.coef.item()) == (0, 1)

    @pytest.mark.parametrize("dtype", [*DTYPES, torch.complex64, torch.complex128], ids=str)
    @pytest.mark.parametrize("sparse", [False, True])
    def test_units_within_their_limit_keep_their_bits_beside_one_that_is_scaled(
        self, dtype: torch.dtype, sparse: bool
    ) -> None:
        gradient = 1e-3 * random(5, 3, seed=1, dtype=torch.float64).to(dtype)
        gradient[0] = -0.0
        gradient[3] = complex(-0.0, -1e-3) if dtype.is_complex else 6e-8
        gradient[2] = 100
        pairs = parameters({"w": torch.ones(5, 3, dtype=dtype)}, {"w": gradient.to_sparse(1) if sparse else gradient})
        stats = Clipper(pairs, AGC(clip_factor=0.01)).step()
        written = pairs[0][1].grad
        # The first row is not stored.
        rows = [1, 3, 4] if sparse else [0, 1, 3, 4]
        stored = written.values()[[0, 2, 3]] if sparse else written[rows]
        assert same_bits(stored, gradient[rows])
        assert stats.clipped.item() == 1 / 5
        np.testing.assert_allclose(reference.array(written)[2], 0.01, rtol=1e-2)

    def test_only_tensors_with_a_unit_over_its_limit_are_written(self) -> None:
        weights = weights_of_the_model()
        gradients = gradients_over(0.0, weights, 0.01)
        gradients["conv2d.weight"][3] *= 1000
        gradients["zero.bias"] *= 1000
        pairs = parameters(weights, gradients)
        witness = Witness(pairs)
        stats = Clipper(pairs, AGC()).step()
        assert stats.clipped.item() == 2 / COUNT
        assert witness.written() == {"conv2d.weight", "zero.bias"}

    def test_gradients_are_written_in_place(self) -> None:
        pairs = parameters({"w": torch.ones(2, 3), "b": torch.ones(2)}, {"w": torch.ones(2, 3), "b": torch.ones(2)})
        given_ = after(pairs)
        Clipper(pairs, AGC()).step()
        assert all(parameter.grad is given_[name] for name, parameter in pairs)
        assert given_["w"].tolist() == [[pytest.approx(0.01 / 1, rel=1e-6)] * 3] * 2

    def test_weights_are_never_written(self) -> None:
        weights = weights_of_the_model()
        pairs = parameters(weights, gradients_over(1.0, weights, 0.01))
        versions = [parameter._version for _, parameter in pairs]
        Clipper(pairs, AGC()).step()
        assert_same_bits({name: parameter.data for name, parameter in pairs}, weights)
        assert [parameter._version for _, parameter in pairs] == versions

    @pytest.mark.parametrize("per", AGC.scopes)
    def test_observing_writes_nothing_and_reports_the_same(self, per: str) -> None:
        weights = weights_of_the_model()
        gradients = gradients_over(0.5, weights, 0.01)
        pairs = parameters(weights, gradients)
        witness = Witness(pairs)
        observed = Clipper(pairs, AGC(per=per), action="observe").step()
        assert witness.written() == set()
        _, stats = clip(weights, gradients, AGC(per=per))
        assert tuple(observed.row) == pytest.approx(tuple(stats.row), rel=0, abs=0, nan_ok=True)
        assert observed.coef.item() < 1
        assert torch.equal(observed.sizes, stats.sizes)

    def test_clipping_twice_changes_nothing_more(self) -> None:
        weights = weights_of_the_model()
        pairs = parameters(weights, gradients_over(1.0, weights, 0.01))
        clipper = Clipper(pairs, AGC())
        clipper.step()
        once = arrays(after(pairs))
        clipper.step()
        assert_clipped(after(pairs), once)


LAYOUTS: dict[str, Callable[[], Tensor]] = {
    "channels-last": lambda: random(4, 3, 5, 5).contiguous(memory_format=torch.channels_last),
    "channels-last 3d": lambda: random(4, 3, 2, 5, 5).contiguous(memory_format=torch.channels_last_3d),
    "transposed": lambda: random(6, 4).t(),
    "permuted": lambda: random(4, 5, 6).permute(1, 2, 0),
    "every other column": lambda: random(4, 6)[:, ::2],
    "every other row": lambda: random(8, 3)[::2],
    "every other entry": lambda: random(8)[::2],
    "expanded": lambda: torch.tensor(2.0).expand(5, 3),
    "expanded rows": lambda: torch.tensor([1.0, 2.0, 3.0]).expand(5, 3),
    "expanded columns": lambda: torch.tensor([[1.0], [2e-4], [3.0]]).expand(3, 4),
    "expanded bias": lambda: torch.tensor(2.0).expand(5),
    "conjugated": lambda: random(4, 3, dtype=torch.complex64).conj(),
}


class TestLayouts:
    @pytest.mark.parametrize("per", AGC.scopes)
    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_the_layout_does_not_matter(self, layout: str, per: str) -> None:
        gradient = LAYOUTS[layout]()
        weight = Parameter(random(*gradient.shape, seed=3, dtype=gradient.dtype))
        weight.grad = gradient
        before = arrays({"w": gradient})
        exact = reference.agc(before, arrays({"w": weight}), clip_factor=0.1, per=per)
        stats = Clipper([("w", weight)], AGC(clip_factor=0.1, per=per)).step()
        assert stats.sizes.tolist() == pytest.approx(list(exact.sizes.values()), rel=1e-6)
        assert stats.coef.item() < 1
        assert_clipped({"w": weight.grad}, exact.gradients)
        if not layout.startswith("expanded"):
            assert weight.grad.stride() == gradient.stride()

    @pytest.mark.parametrize("layout", [name for name in LAYOUTS if "channels" in name or name == "transposed"])
    def test_the_layout_of_the_weights_does_not_matter(self, layout: str) -> None:
        weight = Parameter(LAYOUTS[layout]())
        weight.grad = random(*weight.shape, seed=4)
        exact = reference.agc(arrays({"w": weight.grad}), arrays({"w": weight}))
        stats = Clipper([("w", weight)], AGC()).step()
        assert stats.limits.tolist() == pytest.approx(list(exact.limits.values()), rel=1e-6)
        assert_clipped({"w": weight.grad}, exact.gradients)

    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_within_the_limit_no_layout_is_written(self, layout: str) -> None:
        weight = Parameter(torch.ones_like(LAYOUTS[layout]()))
        weight.grad = LAYOUTS[layout]()
        witness = Witness([("w", weight)])
        Clipper([("w", weight)], AGC(clip_factor=1e3)).step()
        assert witness.written() == set()

    def test_absent_gradients_stay_absent(self) -> None:
        weights = {"a": random(2, 3), "b": random(3), "c": random(3, 2), "d": random(2, 2), "e": random(1)}
        gradients = {**dict.fromkeys(weights), "c": random(3, 2, seed=5), "d": 1e-9 * random(2, 2, seed=6)}
        clipped, stats = clip(weights, gradients, AGC())
        there = {name: gradients[name] for name in "cd"}
        exact = reference.agc(arrays(there), arrays(weights))
        assert_clipped(clipped, exact.gradients)
        # Limits are those of the weights, whether they have a gradient or not.
        every = reference.agc({name: 0 * one for name, one in arrays(weights).items()}, arrays(weights))
        assert stats.scopes == tuple(every.limits)
        assert stats.limits.tolist() == pytest.approx(list(every.limits.values()), rel=1e-6)
        assert stats.sizes.tolist() == pytest.approx(list({**every.sizes, **exact.sizes}.values()), rel=1e-6)
        # Of the units that have one.
        assert stats.clipped.item() == pytest.approx(3 / 5, rel=1e-15)

    @pytest.mark.parametrize(("shape", "units"), [((0, 3), 0), ((3, 0), 3), ((0,), 1), ((2, 0, 3), 2)])
    @pytest.mark.parametrize("alone", [True, False])
    def test_empty_tensors_are_left_alone(self, shape: tuple[int, ...], units: int, alone: bool) -> None:
        weights, gradients = {"empty": torch.zeros(shape)}, {"empty": torch.zeros(shape)}
        if not alone:
            weights["w"], gradients["w"] = random(2, 3), random(2, 3, seed=1)
        clipped, stats = clip(weights, gradients, AGC())
        assert clipped["empty"].shape == shape
        assert len(stats.scopes) == len(stats.sizes) == units + (0 if alone else 2)
        assert stats.sizes[:units].tolist() == [0] * units
        assert bool(stats.finite)
        assert_clipped(clipped, reference.agc(arrays(gradients), arrays(weights)).gradients)


def spoilt(bad: float, dtype: torch.dtype = torch.float32) -> tuple[Tensors, Tensors]:
    """A model with one bad entry, in a unit beside one over its limit and one within."""
    weights = weights_of_the_model(dtype)
    gradients = gradients_over(1.0, weights, 0.01)
    gradients["conv2d.weight"][1:3] = 1e-5
    gradients["conv2d.weight"][1, 2, 0, 1] = bad
    return weights, gradients


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
class TestNonFinite:
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_ignored_only_the_bad_unit_is_let_through(self, bad: float, dtype: torch.dtype) -> None:
        weights, gradients = spoilt(bad, dtype)
        clipped, stats = clip(weights, gradients, AGC(), nonfinite="ignore")
        exact = reference.agc(arrays(gradients), arrays(weights))
        assert bool(stats.finite) is False
        assert stats.clipped.item() == (COUNT - 2) / COUNT
        assert stats.coef.item() == pytest.approx(min(exact.coefs.values()), rel=1e-6)
        assert torch.isfinite(stats.sizes).tolist() == [name != "conv2d.weight[1]" for name in stats.scopes]
        written, expected = clipped.pop("conv2d.weight"), exact.gradients.pop("conv2d.weight")
        np.testing.assert_array_equal(reference.array(written[1:3]), reference.array(gradients["conv2d.weight"][1:3]))
        assert_clipped({**clipped, "rest": written[[0, 3]]}, {**exact.gradients, "rest": expected[[0, 3]]})

    def test_ignored_a_bad_complex_unit_is_let_through(self, bad: float) -> None:
        weights = {"w": torch.ones(3, 2, dtype=torch.complex64)}
        gradients = {"w": random(3, 2, dtype=torch.complex64)}
        gradients["w"][1, 0] = complex(bad, 1.0)
        clipped, _ = clip(weights, gradients, AGC(), nonfinite="ignore")
        np.testing.assert_array_equal(clipped["w"][1].numpy(), gradients["w"][1].numpy())
        exact = reference.agc(arrays(gradients), arrays(weights))
        assert_clipped({"w": clipped["w"][[0, 2]]}, {"w": exact.gradients["w"][[0, 2]]})

    def test_ignored_a_bad_token_of_a_sparse_gradient_is_let_through(self, bad: float) -> None:
        values = torch.tensor([[1.0, 2.0], [3.0, bad], [-5.0, 6.0]])
        gradients = {"w": torch.sparse_coo_tensor(torch.tensor([[1, 4, 2]]), values, (6, 2), check_invariants=True)}
        weights = {"w": torch.ones(6, 2)}
        clipped, stats = clip(weights, gradients, AGC(), nonfinite="ignore")
        exact = reference.agc(arrays({"w": gradients["w"].coalesce()}), arrays(weights))
        assert_clipped(clipped, exact.gradients)
        assert torch.isfinite(stats.sizes).tolist() == [True] * 4 + [False, True]
        assert stats.clipped.item() == 2 / 6

    def test_skipped_everything_is_dropped(self, bad: float) -> None:
        weights, gradients = spoilt(bad)
        with pytest.warns(RuntimeWarning, match=r"^dropped optimizer step 0: non-finite gradients in conv2d\.weight\."):
            clipped, stats = clip(weights, gradients, AGC())
        assert clipped == {}
        assert (bool(stats.skipped), bool(stats.finite), stats.coef.item()) == (True, False, 0)

    def test_zeroed_the_rest_is_clipped_by_the_rule(self, bad: float) -> None:
        weights, gradients = spoilt(bad)
        clipped, stats = clip(weights, gradients, AGC(), nonfinite="zero")
        gradients["conv2d.weight"][1, 2, 0, 1] = 0
        exact = reference.agc(arrays(gradients), arrays(weights))
        assert_clipped(clipped, exact.gradients)
        assert stats.sizes.tolist() == pytest.approx(list(exact.sizes.values()), rel=1e-6)
        assert stats.coef.item() == pytest.approx(min(exact.coefs.values()), rel=1e-6)
        assert bool(stats.finite) is False

    def test_raised_nothing_is_written(self, bad: float) -> None:
        pairs = parameters(*spoilt(bad))
        witness = Witness(pairs)
        with pytest.raises(FloatingPointError, match=r"^non-finite gradients at optimizer step 0 in conv2d\.weight;"):
            Clipper(pairs, AGC(), nonfinite="raise").step()
        assert witness.written() == set()

    def test_bad_weights_limit_nothing(self, bad: float) -> None:
        weights = {"w": torch.ones(3, 2)}
        weights["w"][1, 0] = bad
        gradients = {"w": torch.ones(3, 2)}
        clipped, stats = clip(weights, gradients, AGC(clip_factor=0.5))
        assert clipped["w"].tolist() == [pytest.approx([0.5, 0.5]), [1, 1], pytest.approx([0.5, 0.5])]
        assert stats.clipped.item() == 2 / 3
        assert bool(stats.finite)


class TestStats:
    def small(self) -> tuple[Tensors, Tensors]:
        """Sizes 5, 0.05, 13 and 0.6 against weight norms of 1, 2, 0 and 3."""
        weights = {"conv.weight": torch.tensor([[[1.0, 0.0]], [[0.0, 2.0]], [[0.0, 0.0]]]), "conv.bias": torch.ones(9)}
        rows = [[[3.0, 4.0]], [[0.03, -0.04]], [[-5.0, 12.0]]]
        return weights, {"conv.weight": torch.tensor(rows), "conv.bias": torch.full((9,), 0.2)}

    def test_a_step_in_numbers(self) -> None:
        _, stats = clip(*self.small(), AGC(clip_factor=0.1))
        assert stats.scopes == ("conv.weight[0]", "conv.weight[1]", "conv.weight[2]", "conv.bias")
        assert stats.sizes.tolist() == pytest.approx([5, 0.05, 13, 0.6], rel=1e-6)
        assert stats.limits.tolist() == pytest.approx([0.1, 0.2, 1e-4, 0.3], rel=1e-6)
        assert stats.coef.item() == pytest.approx(1e-4 / 13, rel=1e-6)
        assert stats.clipped.item() == 3 / 4
        assert math.isnan(stats.limit.item())
        assert stats.norm.item() == pytest.approx(math.sqrt(25 + 0.0025 + 169 + 0.36), rel=1e-6)
        assert stats.norm_clipped.item() == pytest.approx(math.sqrt(0.01 + 0.0025 + 1e-8 + 0.09), rel=1e-6)
        assert (bool(stats.finite), bool(stats.skipped)) == (True, False)

    def test_within_the_limits(self) -> None:
        _, stats = clip(*self.small(), AGC(clip_factor=1e6))
        assert (stats.clipped.item(), stats.coef.item()) == (0, 1)
        assert stats.norm.item() == stats.norm_clipped.item() == pytest.approx(math.sqrt(194.3625), rel=1e-6)

    def test_of_one_unit_the_limit_is_known(self) -> None:
        _, stats = clip({"b": torch.tensor([3.0, 4.0])}, {"b": torch.tensor([8.0, 6.0])}, AGC(clip_factor=0.5))
        assert stats.limit.item() == 2.5
        assert stats.coef.item() == 0.25
        assert (stats.norm.item(), stats.norm_clipped.item(), stats.clipped.item()) == (10, 2.5, 1)

    @pytest.mark.parametrize("per", AGC.scopes)
    @pytest.mark.parametrize(("measure_per", "depth"), [("layer", "."), ("parameter", None)])
    def test_norms_of_other_scopes_are_those_of_their_gradients(
        self, per: str, measure_per: str, depth: str | None
    ) -> None:
        weights = weights_of_the_model()
        gradients: dict[str, Tensor | None] = {**gradients_over(0.5, weights, 0.01)}
        gradients["embedding.weight"] = gradients["embedding.weight"].to_sparse(1)
        gradients["conv3d.weight"] = None
        pairs = parameters(weights, gradients)
        clipper = Clipper(pairs, AGC(per=per), measure_per=measure_per)
        clipper.step()
        members: dict[str, list[np.ndarray]] = {}
        for name, gradient in gradients.items():
            if gradient is not None:
                layer = name.rpartition(".")[0] or "root"
                members.setdefault(layer if depth else name, []).append(reference.array(gradient))
        exact = {f"norm/{scope}": reference.joint_norm(ones, 2.0) for scope, ones in members.items()}
        found = {name: value for name, value in clipper.metrics().items() if name.startswith("norm/")}
        assert found == pytest.approx(exact, rel=1e-6)

    def test_a_dropped_step_names_the_unit_that_is_furthest_over_its_limit(self) -> None:
        weights = {"conv.weight": torch.ones(5, 4), "conv.bias": torch.ones(1)}
        gradients = {"conv.weight": torch.full((5, 4), 0.05), "conv.bias": torch.tensor([0.5])}
        gradients["conv.weight"][3] = 2.5
        gradients["conv.weight"][1] = 20
        weights["conv.weight"][1] = 100
        pairs = parameters(weights, gradients)
        # Units 1 and 3 and the bias are 2, 25 and 5 times as large as they may be.
        said = r"^dropped optimizer step 0: the size 5 of scope 'conv\.weight\[3\]' is over its limit 0\.2\. Parameters"
        with pytest.warns(RuntimeWarning, match=said):
            stats = Clipper(pairs, AGC(clip_factor=0.1), action="skip").step()
        assert after(pairs) == {}
        assert (bool(stats.skipped), bool(stats.finite), stats.coef.item()) == (True, True, 0)
        assert stats.clipped.item() == 3 / 6

    def test_within_the_limits_no_step_is_dropped(self) -> None:
        weights = weights_of_the_model()
        pairs = parameters(weights, gradients_over(0.0, weights, 0.01))
        witness = Witness(pairs)
        assert not Clipper(pairs, AGC(), action="skip").step().skipped
        assert witness.written() == set()


class TestClipFactor:
    def limits(self, clip_factor: Any, count: int) -> list[float]:
        """Limits of a bias whose weights have the norm 5."""
        pairs = parameters({"b": torch.tensor([3.0, 4.0])}, {"b": None})
        clipper = Clipper(pairs, AGC(clip_factor=clip_factor))
        result = []
        for _ in range(count):
            pairs[0][1].grad = torch.tensor([60.0, 80.0])
            stats = clipper.step()
            assert pairs[0][1].grad.norm().item() == pytest.approx(stats.limit.item(), rel=1e-6)
            result.append(stats.limit.item())
        return result

    def test_a_schedule_counts_the_steps_of_the_clipper(self) -> None:
        limits = self.limits({1: 2.0, 5: 0.4}, 8)
        assert limits == pytest.approx([10, 10, 8, 6, 4, 2, 2, 2], rel=1e-6)

    def test_an_infinite_factor_never_clips(self) -> None:
        weights = weights_of_the_model()
        pairs = parameters(weights, gradients_over(1.0, weights, 1e9))
        witness = Witness(pairs)
        stats = Clipper(pairs, AGC(clip_factor=math.inf)).step()
        assert witness.written() == set()
        assert stats.limits.tolist() == [math.inf] * COUNT
        assert (stats.clipped.item(), stats.coef.item()) == (0, 1)

    def test_the_limit_follows_the_weights(self) -> None:
        ((_, parameter),) = pairs = parameters({"w": torch.ones(1, 4)}, {"w": torch.ones(1, 4)})
        clipper = Clipper(pairs, AGC(clip_factor=0.25))
        assert clipper.step().limits.tolist() == [0.5]
        with torch.no_grad():
            parameter *= 3
        assert clipper.step().limits.tolist() == [1.5]


NUMBER = "clip_factor must be a number or a schedule such as {0: 10.0, 1000: 1.0}"
UNLIMITED = "to measure without clipping use method=None"
FLOOR = "without it a unit of zero weights could never learn; the paper has 1e-3"


class TestArguments:
    def test_defaults_are_the_papers(self) -> None:
        assert dataclasses.asdict(AGC()) == {"clip_factor": 0.01, "eps": 1e-3, "per": "unit"}
        assert AGC().may_grow is False
        assert AGC.needs_weight is True

    def test_numbers_and_schedules_become_plain(self) -> None:
        method = AGC(clip_factor=OmegaConf.create({1000: 1, 0: 0.5}), eps=np.float32(0.5))
        assert type(method.clip_factor) is dict
        assert type(method.eps) is float
        assert repr(method) == "AGC(clip_factor={0: 0.5, 1000: 1.0}, eps=0.5, per='unit')"

    @pytest.mark.parametrize(
        ("arguments", "error", "said"),
        [
            ({"clip_factor": 0}, ValueError, f"clip_factor must be > 0, got 0; {UNLIMITED}"),
            ({"clip_factor": -0.01}, ValueError, f"clip_factor must be > 0, got -0.01; {UNLIMITED}"),
            ({"clip_factor": math.nan}, ValueError, f"clip_factor must be > 0, got nan; {UNLIMITED}"),
            ({"clip_factor": "one"}, TypeError, f"{NUMBER}, got 'one' (str)"),
            ({"clip_factor": True}, TypeError, f"{NUMBER}, got True (bool)"),
            ({"clip_factor": None}, TypeError, f"{NUMBER}, got None (NoneType)"),
            ({"clip_factor": [0.1]}, TypeError, f"{NUMBER}, got [0.1] (list)"),
            ({"clip_factor": {0: 1.0, 5: 0}}, ValueError, f"clip_factor[5] must be > 0, got 0; {UNLIMITED}"),
            (
                {"clip_factor": {}},
                ValueError,
                "clip_factor is an empty schedule; give at least one point, clip_factor={0: 1.0}",
            ),
            (
                {"clip_factor": {-1: 0.1}},
                ValueError,
                "clip_factor's step must be >= 0, got -1; write clip_factor={0: 10.0, 1000: 1.0}",
            ),
            (
                {"clip_factor": {0: "one"}},
                TypeError,
                f"clip_factor[0] must be a number, got 'one' (str); {UNLIMITED}",
            ),
            ({"eps": 0}, ValueError, f"eps must be > 0, got 0; {FLOOR}"),
            ({"eps": -1e-3}, ValueError, f"eps must be > 0, got -0.001; {FLOOR}"),
            ({"eps": math.nan}, ValueError, f"eps must be > 0, got nan; {FLOOR}"),
            ({"eps": "one"}, TypeError, f"eps must be a number, got 'one' (str); {FLOOR}"),
            ({"eps": True}, TypeError, f"eps must be a number, got True (bool); {FLOOR}"),
            ({"eps": None}, TypeError, f"eps must be a number, got None (NoneType); {FLOOR}"),
            ({"eps": {0: 1e-3}}, TypeError, f"eps must be a number, got {{0: 0.001}} (dict); {FLOOR}"),
            ({"per": "model"}, ValueError, "per must be one of 'unit', 'parameter', got 'model'"),
            ({"per": "row"}, ValueError, "per must be one of 'unit', 'parameter', got 'row'; did you mean 'unit'?"),
            ({"per": None}, ValueError, "per must be one of 'unit', 'parameter', got None"),
        ],
        ids=str,
    )
    def test_what_is_wrong_is_said_with_value_and_remedy(
        self, arguments: dict[str, Any], error: type[Exception], said: str
    ) -> None:
        with pytest.raises(error) as failure:
            AGC(**arguments)
        assert str(failure.value) == said

    def test_without_weights_there_is_no_limit(self) -> None:
        with pytest.raises(ValueError, match=r"^AGC needs the norms of the weights; pass weight$"):
            AGC().limit(torch.ones(2), None, 0)


def test_the_row_of_a_single_unit_is_wide() -> None:
    parameter = torch.nn.Parameter(torch.tensor(0.2))
    parameter.grad = torch.tensor(7.0)
    row = Clipper([("b", parameter)], AGC()).step().row
    # 0.2 is a float32 number here; its product and ratio are float64.
    assert row.coef == pytest.approx(0.01 * parameter.item() / 7.0, rel=1e-7)
    assert row.norm_clipped == 7.0 * row.coef
