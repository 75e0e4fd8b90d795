"""The pipeline without a framework: what a step does, what it says, and what it leaves alone."""

import io
import math
from dataclasses import FrozenInstanceError, dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD

from kit import reference
from kit.gradients import SCOPES, SHAPES, Witness, named, normal, same_bits, two_groups
from kit.running_max import RunningMax
from lightning_gradclip import (
    AGC,
    ClipMethod,
    Clipper,
    EmaClip,
    Normalize,
    NormClip,
    QuantileClip,
    StepStats,
    ValueClip,
)


def arrays(gradients: dict[str, Tensor]) -> dict[str, np.ndarray]:
    return {name: reference.array(gradient) for name, gradient in gradients.items()}


def step_with(clipper: Clipper, pairs: list[tuple[str, nn.Parameter]], *values: float | None) -> StepStats:
    """Give the parameters one-entry gradients and clip."""
    for (_, parameter), value in zip(pairs, values, strict=True):
        parameter.grad = None if value is None else torch.full_like(parameter, value)
    return clipper.step()


def scalars(*names: str) -> list[tuple[str, nn.Parameter]]:
    return [(name, nn.Parameter(torch.zeros(1))) for name in names]


class TestStepStats:
    def test_one_scope(self) -> None:
        pairs = named({"a": torch.tensor([6.0, 0.0]), "b": torch.tensor([8.0])})
        stats = Clipper(pairs, NormClip(max_norm=2.5)).step()
        assert stats.norm.item() == 10.0
        assert stats.norm_clipped.item() == pytest.approx(2.5, rel=1e-6)
        assert stats.limit.item() == 2.5
        assert stats.coef.item() == pytest.approx(0.25, rel=1e-6)
        assert stats.clipped.item() == 1.0
        assert stats.finite.item() is True
        assert stats.skipped.item() is False
        assert (stats.scopes, stats.sizes.tolist(), stats.limits.tolist()) == (("model",), [10.0], [2.5])
        after = reference.joint_norm([reference.array(parameter.grad) for _, parameter in pairs], 2.0)
        assert stats.norm_clipped.item() == pytest.approx(after, rel=1e-6)

    def test_several_scopes(self) -> None:
        pairs = named({"a": torch.tensor([4.0]), "b": torch.tensor([3.0]), "c": torch.tensor([1.0]), "d": None})
        stats = Clipper(pairs, NormClip(max_norm=2.0, per="parameter")).step()
        assert stats.norm.item() == pytest.approx(math.sqrt(26), rel=1e-15)
        assert stats.norm_clipped.item() == pytest.approx(3.0, rel=1e-6)
        assert math.isnan(stats.limit.item())
        assert stats.coef.item() == pytest.approx(0.5, rel=1e-6)
        # Of those that have a gradient.
        assert stats.clipped.item() == pytest.approx(2 / 3, rel=1e-15)
        assert stats.scopes == ("a", "b", "c", "d")
        assert stats.sizes.tolist() == [4, 3, 1, 0]
        assert stats.limits.tolist() == [2, 2, 2, 2]

    @pytest.mark.parametrize("per", NormClip.scopes)
    def test_within_the_limit_nothing_is_clipped(self, per: str) -> None:
        pairs = named({"a.w": torch.tensor([3.0]), "b.w": torch.tensor([4.0])})
        stats = Clipper(pairs, NormClip(max_norm=5.0, per=per)).step()
        assert stats.norm.item() == stats.norm_clipped.item() == 5.0
        assert (stats.coef.item(), stats.clipped.item(), stats.skipped.item()) == (1.0, 0.0, False)

    def test_the_norm_is_joint_and_of_the_methods_kind(self) -> None:
        pairs = named({"a": torch.tensor([1.0, -2.0]), "b": torch.tensor([3.0])})
        assert Clipper(pairs, NormClip(norm_type=1.0, per="parameter"), action="observe").step().norm.item() == 6.0
        assert Clipper(pairs, None).step().norm.item() == pytest.approx(math.sqrt(14), rel=1e-7)

    def test_rms_has_sizes_of_its_own_and_the_same_norm(self) -> None:
        pairs = named({"a": torch.tensor([3.0, 4.0]), "b": torch.tensor([[12.0, 0.0], [0.0, 0.0]])})
        stats = Clipper(pairs, NormClip(statistic="rms", per="parameter", max_norm=5.0)).step()
        assert stats.norm.item() == 13.0
        assert stats.sizes.tolist() == pytest.approx([5 / math.sqrt(2), 6.0], rel=1e-7)
        assert stats.clipped.item() == 0.5
        assert stats.norm_clipped.item() == pytest.approx(math.hypot(5.0, 10.0), rel=1e-6)

    def test_without_a_method_there_is_no_limit(self) -> None:
        stats = Clipper(named({"a": torch.tensor([3.0, 4.0])}), None).step()
        assert (stats.norm.item(), stats.norm_clipped.item(), stats.limit.item()) == (5.0, 5.0, math.inf)
        assert (stats.coef.item(), stats.clipped.item()) == (1.0, 0.0)

    def test_fields_are_0d_float64_or_bool_and_read_only(self) -> None:
        stats = Clipper(named({"a": torch.tensor([3.0])}), NormClip()).step()
        for name in ("norm", "norm_clipped", "limit", "coef", "clipped"):
            field = getattr(stats, name)
            assert (field.shape, field.dtype) == (torch.Size([]), torch.float64)
        for name in ("finite", "skipped"):
            assert getattr(stats, name).dtype == torch.bool
        for name in ("row", "norm", "sizes", "limits", "scopes"):
            with pytest.raises(AttributeError):
                setattr(stats, name, getattr(stats, name))

    def test_a_row_on_a_device_gives_the_same_fields(self) -> None:
        stats = Clipper(named({"a": torch.tensor([3.0])}), NormClip()).step()
        packed = StepStats(torch.tensor(stats.row, dtype=torch.float64), stats.sizes, stats.limits, stats._scopes)
        for name in ("norm", "norm_clipped", "limit", "coef", "clipped", "finite", "skipped"):
            assert torch.equal(getattr(packed, name), getattr(stats, name))

    def test_a_step_without_gradients_changes_and_records_nothing(self) -> None:
        pairs = named({"a": None, "b": None})
        clipper = Clipper(pairs, NormClip(max_norm={0: 8.0, 2: 4.0}))
        with pytest.warns(RuntimeWarning, match=r"^none of the 2 parameters has a gradient, .* Clipper\(model, "):
            stats = clipper.step()
        clipper.step()
        assert (stats.norm.item(), stats.norm_clipped.item(), stats.coef.item()) == (0.0, 0.0, 1.0)
        assert (stats.finite.item(), stats.skipped.item(), stats.clipped.item()) == (True, False, 0.0)
        assert not clipper.has_news
        assert clipper.metrics() == {"skipped": 0.0, "nonfinite": 0.0}
        pairs[0][1].grad = torch.ones(2)
        assert clipper.step().limit.item() == 8.0


class TestSelection:
    def test_only_the_included_count_and_are_written(self) -> None:
        gradients = normal(0)
        pairs = named(gradients)
        witness, before = Witness(pairs), {name: one.clone() for name, one in gradients.items()}
        stats = Clipper(pairs, NormClip(max_norm=0.1), include=["encoder.*", "head.*"], exclude="*.bias").step()
        assert witness.written() == {"encoder.weight", "head.weight"}
        selected = {name: reference.array(before[name]) for name in ("encoder.weight", "head.weight")}
        exact, sizes, _ = reference.norm_clip(selected, dict.fromkeys(selected, "model"), max_norm=0.1)
        assert stats.norm.item() == pytest.approx(sizes["model"], rel=1e-6)
        for name, expected in exact.items():
            np.testing.assert_allclose(reference.array(dict(pairs)[name].grad), expected, rtol=1e-6, atol=0)

    def test_non_finite_gradients_of_others_are_not_looked_at(self) -> None:
        pairs = named({"a": torch.tensor([3.0]), "b": torch.tensor([math.nan])})
        assert Clipper(pairs, NormClip(), exclude="b").step().finite.item() is True

    def test_an_optimizer_without_selected_parameters_is_left_alone(self) -> None:
        pairs = named({"g": torch.tensor([9.0]), "d": torch.tensor([9.0])})
        witness = Witness(pairs)
        clipper = Clipper(pairs, NormClip(), optimizer=SGD([pairs[1][1]], lr=0.1), include="g")
        stats = clipper.step()
        assert witness.written() == set()
        assert (stats.norm.item(), clipper.has_news) == (0.0, False)

    def test_each_optimizer_has_its_own_norm_and_its_own_copy_of_the_method(self) -> None:
        pairs = named({"g": torch.tensor([3.0]), "d": torch.tensor([4.0])})
        method = NormClip(max_norm=1.0)
        clippers = [Clipper(pairs, method, optimizer=SGD([parameter], lr=0.1)) for _, parameter in pairs]
        with pytest.raises(FrozenInstanceError, match=r"callback\.method = NormClip\(max_norm=99\.0\)"):
            method.max_norm = 99.0
        clippers[0].method = NormClip(max_norm=1.0)
        stats = [clipper.step() for clipper in clippers]
        assert [one.norm.item() for one in stats] == [3.0, 4.0]
        assert [one.limit.item() for one in stats] == [1.0, 1.0]

    def test_scopes_are_in_the_optimizers_order_and_named(self) -> None:
        pairs = named(normal(0))
        turned = SGD(
            [{"params": [pairs[4][1], pairs[2][1]], "name": "late"}, {"params": [pairs[0][1]], "name": "early"}]
        )
        assert Clipper(pairs, NormClip(per="group"), optimizer=turned).step().scopes == ("late", "early")
        assert Clipper(pairs, NormClip(per="layer"), optimizer=turned).step().scopes == ("root", "head", "encoder")
        by_parameter = Clipper(pairs, NormClip(per="parameter"), optimizer=turned).step()
        assert by_parameter.scopes == ("scale", "head.weight", "encoder.weight")

    def test_without_an_optimizer_all_parameters_are_one_group(self) -> None:
        assert Clipper(named(normal(0)), NormClip(per="group")).step().scopes == ("group0",)

    def test_a_group_added_later_is_served(self) -> None:
        pairs = named({"a": torch.tensor([3.0]), "b": torch.tensor([4.0])})
        optimizer = SGD([pairs[0][1]], lr=0.1)
        clipper = Clipper(pairs, NormClip(max_norm=1e9, per="group"), optimizer=optimizer)
        assert clipper.step().scopes == ("group0",)
        optimizer.add_param_group({"params": [pairs[1][1]]})
        stats = clipper.step()
        assert (stats.scopes, stats.sizes.tolist(), stats.norm.item()) == (("group0", "group1"), [3.0, 4.0], 5.0)

    def test_a_parameter_added_to_a_group_is_served(self) -> None:
        pairs = named({"a": torch.tensor([3.0]), "b": torch.tensor([4.0])})
        optimizer = SGD([pairs[0][1]], lr=0.1)
        clipper = Clipper(pairs, NormClip(max_norm=1e9), optimizer=optimizer)
        clipper.step()
        optimizer.param_groups[0]["params"].append(pairs[1][1])
        assert clipper.step().norm.item() == 5.0

    def test_a_group_removed_is_served_no_more(self) -> None:
        pairs = named({"a": torch.tensor([3.0]), "b": torch.tensor([4.0])})
        optimizer = SGD([{"params": [parameter]} for _, parameter in pairs], lr=0.1)
        clipper = Clipper(pairs, NormClip(max_norm=1e9), optimizer=optimizer)
        assert clipper.step().norm.item() == 5.0
        del optimizer.param_groups[0]
        assert clipper.step().norm.item() == 4.0

    def test_loading_the_optimizers_state_changes_nothing(self) -> None:
        pairs = named({"a": torch.tensor([3.0]), "b": torch.tensor([4.0])})
        optimizer = SGD([parameter for _, parameter in pairs], lr=0.1, momentum=0.9)
        clipper = Clipper(pairs, NormClip(max_norm=1.0), optimizer=optimizer)
        clipper.step()
        optimizer.step()
        optimizer.load_state_dict(optimizer.state_dict())
        assert step_with(clipper, pairs, 6.0, 8.0).norm.item() == 10.0
        assert pairs[0][1].grad.item() == pytest.approx(0.6, rel=1e-6)

    def test_a_compiled_module_keeps_the_names_of_its_parameters(self) -> None:
        net = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 1))
        compiled = torch.compile(net, backend="eager")
        compiled(torch.ones(2, 3)).sum().backward()
        assert all(name.startswith("_orig_mod.") for name, _ in compiled.named_parameters())
        clipper = Clipper(compiled.named_parameters(), NormClip(max_norm=1e-3, per="layer"), include="0.*")
        untouched = net[1].weight.grad.clone()
        stats = clipper.step()
        assert stats.scopes == ("0",)
        assert stats.clipped.item() == 1.0
        assert net[0].weight.grad.square().sum().add(net[0].bias.grad.square().sum()).sqrt().item() == pytest.approx(
            1e-3 * stats.norm.item() / (stats.norm.item() + 1e-6), rel=1e-6
        )
        assert torch.equal(net[1].weight.grad, untouched)
        net[0].weight.grad[0, 0] = math.nan
        strict = Clipper(compiled.named_parameters(), NormClip(), nonfinite="raise")
        with pytest.raises(FloatingPointError, match=r"in 0\.weight;"):
            strict.step()


class ByWeight(ClipMethod):
    """Limits each scope to a tenth of its weights, as AGC does in principle."""

    needs_weight = True

    def __init__(self, per: str, norm_type: float = 2.0) -> None:
        self.per, self.norm_type = per, norm_type

    def limit(self, size: Tensor, weight: Tensor | None, step: int) -> Tensor:
        assert weight is not None
        return 0.1 * weight


class TestMethod:
    """What a method is told."""

    @pytest.mark.parametrize("per", ClipMethod.scopes)
    @pytest.mark.parametrize("p", [1.0, 2.0, math.inf])
    def test_the_sizes_of_the_weights_of_the_same_scopes(self, per: str, p: float) -> None:
        pairs = named(normal(0))
        for (_, parameter), weight in zip(pairs, normal(1).values(), strict=True):
            parameter.data.copy_(weight)
        pairs[1][1].grad = None
        stats = Clipper(pairs, ByWeight(per, p), optimizer=two_groups(pairs)).step()
        members: dict[str, list[np.ndarray]] = {}
        for name, parameter in pairs:
            members.setdefault(SCOPES[per][name], []).append(reference.array(parameter))
        expected = [0.1 * reference.joint_norm(ones, p) for ones in members.values()]
        assert stats.limits.tolist() == pytest.approx(expected, rel=1e-6)

    def test_a_method_without_a_limit_says_so(self) -> None:
        class Incomplete(ClipMethod):
            pass

        with pytest.raises(NotImplementedError, match=r"^Incomplete does not define limit\(size, weight, step\)$"):
            Clipper(named(normal(0)), Incomplete()).step()

    def test_the_step_is_counted_from_zero_and_bad_steps_count(self) -> None:
        pairs = scalars("a")
        clipper = Clipper(pairs, NormClip(max_norm={0: 10.0, 10: 20.0}), nonfinite="zero")
        limits = [step_with(clipper, pairs, value).limit.item() for value in (1.0, math.nan, 30.0, math.inf, 1.0)]
        assert limits == [10, 11, 12, 13, 14]


class TestWriting:
    """No write without need: on the CPU an unclipped step costs one read of each gradient."""

    @pytest.mark.parametrize("per", NormClip.scopes)
    @pytest.mark.parametrize("action", ["clip", "skip", "observe"])
    @pytest.mark.parametrize("nonfinite", ["ignore", "raise", None])
    def test_within_the_limit_nothing_is_written(self, per: str, action: str, nonfinite: str | None) -> None:
        pairs = named(normal(0))
        witness = Witness(pairs)
        method = NormClip(max_norm=1e3, per=per)
        clipper = Clipper(pairs, method, optimizer=two_groups(pairs), action=action, nonfinite=nonfinite)
        for _ in range(3):
            clipper.step()
        assert witness.written() == set()
        assert clipper.metrics()["clip_rate"] == 0.0

    @pytest.mark.parametrize("per", ["group", "layer", "parameter"])
    def test_scopes_within_their_limit_are_not_written(self, per: str) -> None:
        gradients = normal(0, scale=1e-3)
        gradients["encoder.weight"] *= 1e6
        pairs = named(gradients)
        witness = Witness(pairs)
        Clipper(pairs, NormClip(per=per), optimizer=two_groups(pairs)).step()
        large = SCOPES[per]["encoder.weight"]
        assert witness.written() == {name for name, scope in SCOPES[per].items() if scope == large}

    def test_gradients_are_written_in_place(self) -> None:
        pairs = named(normal(0))
        gradients = {name: parameter.grad for name, parameter in pairs}
        Clipper(pairs, NormClip(max_norm=1e-3)).step()
        for name, parameter in pairs:
            assert parameter.grad is gradients[name]
            assert parameter.grad._version == 1

    def test_parameters_are_never_written(self) -> None:
        pairs = named(normal(0))
        before = {name: (parameter.detach().clone(), parameter._version) for name, parameter in pairs}
        Clipper(pairs, NormClip(max_norm=1e-3, min_norm=1e-4, per="parameter")).step()
        for name, parameter in pairs:
            assert same_bits(parameter, before[name][0])
            assert parameter._version == before[name][1]

    def test_gradients_with_a_graph_are_clipped_outside_of_it(self) -> None:
        weight = nn.Parameter(torch.tensor([3.0, 4.0]))
        (weight.grad,) = torch.autograd.grad(weight.pow(3).sum(), weight, create_graph=True)
        assert weight.grad.requires_grad
        Clipper([("weight", weight)], NormClip()).step()
        assert weight.grad.norm().item() == pytest.approx(1.0, rel=1e-6)


class TestMetrics:
    def test_a_window_covers_every_step_once(self) -> None:
        pairs = scalars("a")
        clipper = Clipper(pairs, NormClip(max_norm={0: 4.0, 2: 2.0}))
        for value in (1.0, 6.0, 8.0, 2.0):
            step_with(clipper, pairs, value)
        assert clipper.has_news
        peeked = clipper.metrics(reset=False)
        assert clipper.metrics(reset=False) == peeked
        result = clipper.metrics()
        assert result == peeked
        coefs = [1.0, 3.0 / (6.0 + 1e-6), 2.0 / (8.0 + 1e-6), 1.0]
        expected = {
            "norm": 17 / 4,
            "norm_clipped": np.dot([1.0, 6.0, 8.0, 2.0], coefs) / 4,
            "norm_max": 8.0,
            "limit": (4 + 3 + 2 + 2) / 4,
            "coef_min": coefs[2],
            "clip_rate": 0.5,
            "skipped": 0.0,
            "nonfinite": 0.0,
        }
        assert result.keys() == expected.keys()
        assert list(result.values()) == pytest.approx(list(expected.values()), rel=1e-12)
        assert not clipper.has_news
        assert clipper.metrics() == {"skipped": 0.0, "nonfinite": 0.0}
        step_with(clipper, pairs, 0.5)
        assert clipper.metrics()["norm"] == 0.5

    def test_counts_are_since_the_start_and_norms_of_finite_steps(self) -> None:
        pairs = scalars("a")
        clipper = Clipper(pairs, NormClip(max_norm=1e3), nonfinite="ignore")
        for value in (math.nan, 3.0, math.inf):
            step_with(clipper, pairs, value)
        first = clipper.metrics()
        assert (first["norm"], first["norm_max"], first["nonfinite"]) == (3.0, 3.0, 2.0)
        step_with(clipper, pairs, math.nan)
        assert clipper.metrics() == {"skipped": 0.0, "nonfinite": 3.0}

    def test_dropped_steps_enter_the_rates(self) -> None:
        pairs = scalars("a")
        clipper = Clipper(pairs, NormClip(max_norm=1.0), action="skip")
        step_with(clipper, pairs, 0.5)
        with pytest.warns(RuntimeWarning, match="dropped optimizer step 1"):
            step_with(clipper, pairs, 3.0)
        result = clipper.metrics()
        assert result["skipped"] == 1
        assert (result["norm"], result["norm_clipped"], result["norm_max"]) == (1.75, 0.25, 3.0)
        assert (result["coef_min"], result["clip_rate"]) == (0.0, 0.5)

    def test_scaling_up_is_a_change(self) -> None:
        pairs = scalars("a")
        clipper = Clipper(pairs, NormClip(min_norm=0.5))
        step_with(clipper, pairs, 0.25)
        step_with(clipper, pairs, 0.75)
        assert clipper.metrics()["clip_rate"] == 0.5

    @pytest.mark.parametrize("per", ["group", "layer", "parameter"])
    @pytest.mark.parametrize(
        "method", [None, NormClip(norm_type=1.0), NormClip(max_norm=0.1, per="parameter")], ids=str
    )
    def test_measure_per_records_the_norms_of_other_scopes(self, per: str, method: ClipMethod | None) -> None:
        pairs = named(normal(0))
        clipper = Clipper(pairs, method, optimizer=two_groups(pairs), measure_per=per)
        p = 2.0 if method is None else method.norm_type
        seen: dict[str, list[float]] = {}
        for seed in range(3):
            gradients = normal(seed)
            for name, parameter in pairs:
                parameter.grad = gradients[name]
            for scope in dict.fromkeys(SCOPES[per].values()):
                members = [reference.array(gradients[name]).copy() for name in SHAPES if SCOPES[per][name] == scope]
                seen.setdefault(f"norm/{scope}", []).append(reference.joint_norm(members, p))
            clipper.step()
        result = {name: value for name, value in clipper.metrics().items() if name.startswith("norm/")}
        assert list(result) == list(seen)
        assert list(result.values()) == pytest.approx([np.mean(values) for values in seen.values()], rel=1e-6)

    def test_absent_scopes_do_not_enter_their_mean(self) -> None:
        pairs = scalars("a", "b", "c")
        clipper = Clipper(pairs, NormClip(), measure_per="parameter")
        step_with(clipper, pairs, 1.0, 2.0, None)
        step_with(clipper, pairs, 3.0, None, None)
        step_with(clipper, pairs, 5.0, 0.0, None)
        result = clipper.metrics()
        assert (result["norm/a"], result["norm/b"]) == (3.0, 1.0)
        assert "norm/c" not in result

    def test_a_step_that_is_not_finite_does_not_enter_the_mean_of_any_scope(self) -> None:
        pairs = scalars("a", "b")
        clipper = Clipper(pairs, NormClip(), measure_per="parameter", nonfinite="ignore")
        step_with(clipper, pairs, math.nan, 2.0)
        step_with(clipper, pairs, 1.0, 4.0)
        result = clipper.metrics()
        assert (result["norm/a"], result["norm/b"]) == (1.0, 4.0)

    def test_two_thousand_steps_are_two_thousand_steps(self) -> None:
        pairs = scalars("a")
        clipper = Clipper(pairs, NormClip(max_norm=1e9), measure_per="parameter")
        values = np.random.default_rng(0).uniform(1, 2, 2000).astype(np.float32).astype(np.float64)
        for value in values:
            step_with(clipper, pairs, float(value))
        result = clipper.metrics()
        assert result["norm"] == pytest.approx(values.mean(), rel=1e-12)
        assert result["norm/a"] == pytest.approx(values.mean(), rel=1e-12)
        assert result["norm_max"] == values.max()


class TestState:
    def saved_and_loaded(self, state: dict[str, Any]) -> dict[str, Any]:
        file = io.BytesIO()
        torch.save(state, file)
        file.seek(0)
        return torch.load(file, weights_only=True)

    @pytest.mark.parametrize("cut", [0, 1, 3, 1030])
    def test_step_window_and_counts_go_on(self, cut: int) -> None:
        pairs = scalars("a")

        def fresh() -> Clipper:
            method = NormClip(max_norm={0: 2.0, 1100: 0.5})
            return Clipper(pairs, method, nonfinite="ignore", measure_per="layer")

        random = np.random.default_rng(0)
        values = [math.nan if i % 7 == 2 else float(value) for i, value in enumerate(random.uniform(0, 3, cut + 40))]
        straight = fresh()
        for value in values[:cut]:
            step_with(straight, pairs, value)
        resumed = fresh()
        resumed.load_state_dict(self.saved_and_loaded(straight.state_dict()))
        assert resumed.has_news == straight.has_news == (cut > 0)
        for value in values[cut:]:
            one = step_with(straight, pairs, value)
            other = step_with(resumed, pairs, value)
            np.testing.assert_array_equal(one.row, other.row)
        assert straight.metrics() == resumed.metrics()
        assert straight.state_dict()["step"] == resumed.state_dict()["step"] == cut + 40

    def test_only_tensors_and_plain_types_are_saved(self) -> None:
        pairs = named(normal(0))
        clipper = Clipper(pairs, NormClip(max_norm={0: 1.0}), measure_per="parameter")
        clipper.step()
        clipper.metrics(reset=False)
        clipper.step()

        def kinds(value: object) -> set[type]:
            if type(value) is dict:
                return set().union(*(kinds(one) for one in (*value, *value.values())))
            if type(value) is list:
                return set().union(*(kinds(one) for one in value))
            return {type(value)}

        assert kinds(clipper.state_dict()) <= {Tensor, str, int, float, bool, set}

    def test_configuration_is_not_saved(self) -> None:
        pairs = scalars("a")
        clipper = Clipper(pairs, NormClip(max_norm=3.0), max_consecutive_skips=7)
        step_with(clipper, pairs, 9.0)
        resumed = Clipper(pairs, NormClip(max_norm=5.0, norm_type=1.0))
        resumed.load_state_dict(clipper.state_dict())
        assert step_with(resumed, pairs, 9.0).limit.item() == 5.0


def test_the_optimizer_it_serves_can_be_asked_for() -> None:
    pairs = scalars("a")
    optimizer = SGD([pairs[0][1]], lr=0.1)
    assert Clipper(pairs, None, optimizer=optimizer).optimizer is optimizer
    assert Clipper(pairs, None).optimizer is None


class TestSelectionInMidRun:
    def test_a_parameter_that_takes_anothers_place_in_its_group_is_served(self) -> None:
        layer = torch.nn.Linear(3, 3, bias=False)
        optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
        clipper = Clipper(layer.named_parameters(), NormClip(), optimizer=optimizer)
        layer.weight.grad = torch.ones(3, 3)
        clipper.step()
        new = torch.nn.Parameter(torch.zeros(3, 3))
        new.grad = torch.full((3, 3), 100.0)
        optimizer.param_groups[0]["params"][0] = new
        assert clipper.step().norm.item() == pytest.approx(300.0, rel=1e-6)
        assert new.grad.norm().item() == pytest.approx(1.0, rel=1e-5)

    @pytest.mark.parametrize(
        "options", [{"include": []}, {"exclude": "*"}, {"include": "weight", "exclude": "weight"}], ids=str
    )
    def test_patterns_that_leave_nothing_are_refused(self, options: dict[str, Any]) -> None:
        layer = torch.nn.Linear(3, 3, bias=False)
        with pytest.raises(ValueError, match="leave no parameter to clip"):
            Clipper(layer.named_parameters(), NormClip(), **options)

    def test_parameters_without_names_are_refused_with_the_way_out(self) -> None:
        layer = torch.nn.Linear(3, 3)
        with pytest.raises(TypeError, match=r"model\.named_parameters\(\)"):
            Clipper(layer.parameters(), NormClip())

    def test_a_module_stands_for_its_named_parameters(self) -> None:
        layer = torch.nn.Linear(3, 3)
        layer(torch.ones(2, 3)).sum().backward()
        by_module, by_names = (Clipper(one, None).step() for one in (layer, layer.named_parameters()))
        assert by_module.norm.item() == by_names.norm.item() > 0

    def test_a_clipper_that_takes_anothers_place_starts_fresh_where_nothing_is_known(self) -> None:
        first, second = (torch.nn.Linear(2, 1, bias=False) for _ in range(2))
        old = Clipper([("first", first.weight)], RunningMax(per="parameter"))
        first.weight.grad = torch.full((1, 2), 3.0)
        old.step()
        new = Clipper([("second", second.weight)], RunningMax(per="parameter"))
        new.load_state_dict(old.state_dict(), strict=False)
        second.weight.grad = torch.ones(1, 2)
        with pytest.warns(RuntimeWarning, match="dropped the learned clipping state of first"):
            assert new.step().limit.item() == math.inf
        assert new.state_dict()["step"] == 2


DEFAULTS = [(torch.bfloat16, "cpu"), (torch.float64, "cpu"), (torch.float32, "meta")]


@pytest.mark.parametrize(("dtype", "device"), DEFAULTS, ids=["bfloat16", "float64", "meta"])
@pytest.mark.parametrize(
    "method",
    [
        NormClip(max_norm=0.5),
        NormClip(max_norm=0.5, per="parameter"),
        AGC(),
        ValueClip(max_value=0.1),
        Normalize(per="layer"),
        QuantileClip(window=None),
        EmaClip(per="layer"),
        None,
    ],
    ids=str,
)
def test_the_defaults_of_torch_do_not_matter(method: ClipMethod | None, dtype: torch.dtype, device: str) -> None:
    def run(pairs: list[tuple[str, nn.Parameter]]) -> list[float]:
        clipper = Clipper(pairs, method)
        stats = clipper.step()
        clipper.load_state_dict(clipper.state_dict())
        left = [one.to_dense().flatten() for _, parameter in pairs if (one := parameter.grad) is not None]
        for _, parameter in pairs:
            parameter.grad = None
        nothing = clipper.step()
        tensors = [stats.norm, *stats.sizes, *stats.limits, *torch.cat(left), nothing.norm, *nothing.sizes]
        return [*clipper.metrics().values(), *(one.item() for one in tensors)]

    gradients = {**normal(1), "absent": None, "tiny": torch.full((3,), 1e-30), "sparse": torch.eye(3).to_sparse()}
    pairs = [named({key: None if one is None else one.clone() for key, one in gradients.items()}) for _ in range(2)]
    expected = run(pairs[0])
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            found = run(pairs[1])
    finally:
        torch.set_default_dtype(before)
    assert found == expected


class TestRulesOfOthers:
    """What a rule of one's own may do, beside what ours do."""

    def test_one_limit_may_be_0_d(self) -> None:
        class Constant(ClipMethod):
            def limit(self, size: Tensor, weight: Tensor | None, step: int) -> Tensor:
                return torch.tensor(0.5, dtype=size.dtype)

        pairs = named({"w": torch.tensor([3.0, 4.0])})
        stats = Clipper(pairs, Constant()).step()
        assert (stats.limit.item(), stats.norm.item()) == (0.5, 5.0)
        assert pairs[0][1].grad is not None
        assert pairs[0][1].grad.norm().item() == pytest.approx(0.5, rel=1e-6)

    def test_an_argument_may_be_called_floor_where_gradients_may_grow(self) -> None:
        @dataclass(kw_only=True)
        class Grown(ClipMethod):
            may_grow = True
            floor: float = 10.0

            def limit(self, size: Tensor, weight: Tensor | None, step: int) -> Tensor:
                return torch.full_like(size, self.floor)

            def coef(self, size: Tensor, limit: Tensor) -> Tensor:
                return limit / size

        pairs = named({"w": torch.tensor([3.0, 4.0])})
        Clipper(pairs, Grown()).step()
        assert pairs[0][1].grad is not None
        assert pairs[0][1].grad.tolist() == [6.0, 8.0]


LAID_OUT = {
    "expanded": torch.full((1,), 0.7698).expand(8, 512),
    "rows expanded": torch.full((8, 1), 0.7698).expand(8, 512),
    "transposed": torch.full((512, 8), 0.7698).t(),
    "sliced": torch.full((8, 1500), 0.7698)[:, ::3],
    "one column": torch.full((600, 2), 0.7698)[:, 0],
    "half, transposed": torch.full((512, 8), 0.7698, dtype=torch.bfloat16).t(),
    "complex": torch.full((8, 512), 0.7698 + 0.3j),
    "long and transposed": torch.full((1500, 8), 0.7698).t(),
}


@pytest.mark.parametrize("layout", LAID_OUT)
@pytest.mark.parametrize("method", [NormClip(), NormClip(per="parameter"), ValueClip(), AGC()], ids=repr)
def test_norms_are_right_whatever_lies_beside_what_in_memory(method: ClipMethod, layout: str) -> None:
    gradient = LAID_OUT[layout]
    parameter = torch.nn.Parameter(torch.ones(gradient.shape, dtype=gradient.dtype))
    # Real units of so few entries are torch's, bit for bit.
    close = 4e-6 if isinstance(method, AGC) and rows_are_short(gradient) else 1e-6
    if gradient.is_complex() and isinstance(method, ValueClip):
        pytest.skip("complex numbers are not clamped")
    parameter.grad = gradient
    stats = Clipper([("w", parameter)], method, action="observe").step()
    rows = np.atleast_2d(np.abs(gradient.to(torch.complex128).numpy()))
    assert stats.norm.item() == pytest.approx(np.linalg.norm(rows), rel=close)
    if stats.sizes.numel() > 1:
        np.testing.assert_allclose(stats.sizes.double().numpy(), np.linalg.norm(rows, axis=1), rtol=close)


def rows_are_short(gradient: torch.Tensor) -> bool:
    return not gradient.is_complex() and gradient.shape[-1] <= 600


def with_bits(gradient: torch.Tensor, bits: str) -> torch.Tensor:
    """The same numbers, some of them still to be computed."""
    if "conj" in bits:
        gradient = gradient.conj().resolve_conj().conj()
    return torch._neg_view(-gradient) if "neg" in bits else gradient


@pytest.mark.parametrize("bits", ["neg", "conj", "neg and conj"])
@pytest.mark.parametrize("shape", [(), (7,), (4, 5), (200, 200)], ids=str)
def test_gradients_with_torchs_negative_and_conjugate_bits(shape: tuple[int, ...], bits: str) -> None:
    random = torch.Generator().manual_seed(0)
    plain = torch.randn(shape, generator=random, dtype=torch.complex64 if "conj" in bits else torch.float32)
    methods = [NormClip(max_norm=0.1), NormClip(max_norm=0.1, per="parameter"), NormClip(max_norm=0.1, norm_type=3.0)]
    methods += [AGC(clip_factor=1e-3), Normalize()] + ([] if plain.is_complex() else [ValueClip(max_value=0.1)])
    for method in methods:
        found = []
        for gradient in (plain.clone(), with_bits(plain, bits)):
            parameter = torch.nn.Parameter(torch.ones(shape, dtype=plain.dtype))
            parameter.grad = gradient
            row = Clipper([("w", parameter)], method, measure_per="parameter").step().row
            found.append((parameter.grad.resolve_conj().resolve_neg(), row))
        torch.testing.assert_close(found[1][0], found[0][0], rtol=1e-6, atol=0)
        assert found[1][1] == pytest.approx(found[0][1], rel=1e-6, nan_ok=True)


@pytest.mark.parametrize("method", [NormClip(max_norm=1.0, per="layer"), AGC(), ValueClip(max_value=0.1)], ids=repr)
def test_of_ten_experts_one_is_active_and_clipped(method: ClipMethod) -> None:
    experts = torch.nn.ModuleList(torch.nn.Linear(2, 1) for _ in range(10))
    experts[3].weight.grad, experts[3].bias.grad = torch.full((1, 2), 30.0), torch.full((1,), 40.0)
    clipper = Clipper(experts.named_parameters(), method)
    assert clipper.step().clipped.item() == 1.0
    assert clipper.metrics()["clipped"] == 1.0
