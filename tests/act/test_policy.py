"""What may be done to the gradients, and what happens to training when some are not finite."""

import copy
import math
import warnings
from collections.abc import Callable, Iterable
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from kit import reference
from kit.gradients import Witness, named, same_bits
from lightning_gradclip import AGC, ClipMethod, Clipper, GradientClipping, NormClip
from lightning_gradclip.act.policy import ACTIONS, NONFINITE, Policy

OPTIMIZERS: dict[str, Callable[[Iterable[nn.Parameter]], Optimizer]] = {
    "AdamW": lambda parameters: AdamW(parameters, lr=0.05, weight_decay=0.1),
    "fused AdamW": lambda parameters: AdamW(parameters, lr=0.05, weight_decay=0.1, fused=True),
    "foreach AdamW": lambda parameters: AdamW(parameters, lr=0.05, weight_decay=0.1, foreach=True),
    "SGD momentum": lambda parameters: SGD(parameters, lr=0.05, momentum=0.9, weight_decay=0.1),
}
BAD = [math.nan, math.inf, -math.inf]


class Training:
    """A small network that trains, and can be asked for gradients with a hole."""

    def __init__(self, optimizer: str = "AdamW", method: ClipMethod | None = None, **options: Any) -> None:
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
        self.optimizer = OPTIMIZERS[optimizer](self.net.parameters())
        self.clipper = Clipper(self.net.named_parameters(), method, optimizer=self.optimizer, **options)
        self._seed = 0

    def backward(self, bad: float | None = None) -> None:
        self.optimizer.zero_grad()
        self._seed += 1
        inputs = torch.randn(16, 4, generator=torch.Generator().manual_seed(self._seed))
        self.net(inputs).square().sum().backward()
        if bad is not None:
            self.net[0].weight.grad[1, 2] = bad

    def step(self, bad: float | None = None) -> Any:
        self.backward(bad)
        stats = self.clipper.step()
        self.optimizer.step()
        return stats

    def everything(self) -> list[Tensor]:
        """Copies of all parameters and of the whole optimizer state, step counts included."""
        state = self.optimizer.state_dict()["state"]
        tensors = [value for entry in state.values() for value in entry.values() if isinstance(value, Tensor)]
        return [tensor.detach().clone() for tensor in (*self.net.parameters(), *tensors)]


def assert_same(one: list[Tensor], other: list[Tensor]) -> None:
    assert len(one) == len(other) > 4
    assert all(same_bits(a, b) for a, b in zip(one, other, strict=True))


def moved(one: list[Tensor], other: list[Tensor]) -> bool:
    return len(one) == len(other) and all(not same_bits(a, b) for a, b in zip(one, other, strict=True))


class TestNonfinite:
    @pytest.mark.parametrize("optimizer", OPTIMIZERS)
    @pytest.mark.parametrize("bad", BAD)
    @pytest.mark.parametrize("options", [{}, {"nonfinite": "skip"}, {"nonfinite": "skip", "action": "skip"}], ids=str)
    def test_skip_leaves_parameters_and_optimizer_state_bit_identical(
        self, optimizer: str, bad: float, options: dict[str, str]
    ) -> None:
        training = Training(optimizer, NormClip(max_norm=1e3), **options)
        for _ in range(3):
            training.step()
        before = training.everything()
        with pytest.warns(RuntimeWarning, match=r"^dropped optimizer step 3: non-finite gradients in 0\.weight\."):
            stats = training.step(bad)
        assert_same(training.everything(), before)
        assert all(parameter.grad is None for parameter in training.net.parameters())
        assert (stats.finite.item(), stats.skipped.item()) == (False, True)
        assert (stats.coef.item(), stats.norm_clipped.item()) == (0.0, 0.0)
        assert not math.isfinite(stats.norm.item())
        stats = training.step()
        assert (stats.finite.item(), stats.skipped.item()) == (True, False)
        assert moved(training.everything(), before)

    def test_skip_on_the_first_step_leaves_an_optimizer_without_state(self) -> None:
        training = Training("AdamW", NormClip())
        with pytest.warns(RuntimeWarning, match="dropped optimizer step 0"):
            training.step(math.nan)
        assert training.optimizer.state_dict()["state"] == {}

    def test_skip_drops_what_the_patterns_leave_out_too(self) -> None:
        training = Training("AdamW", NormClip(max_norm=1e3), include="0.*")
        training.step()
        before = training.everything()
        with pytest.warns(RuntimeWarning, match="dropped optimizer step 1"):
            training.step(math.inf)
        assert_same(training.everything(), before)

    def test_skip_leaves_the_other_optimizers_gradients(self) -> None:
        pairs = named({"a": torch.tensor([math.nan]), "b": torch.ones(2)})
        other = Witness(pairs[1:])
        clipper = Clipper(pairs, NormClip(), optimizer=SGD([pairs[0][1]], lr=0.1))
        with pytest.warns(RuntimeWarning, match="non-finite gradients in a"):
            clipper.step()
        assert pairs[0][1].grad is None
        assert other.written() == set()

    @pytest.mark.parametrize("optimizer", OPTIMIZERS)
    @pytest.mark.parametrize("bad", BAD)
    @pytest.mark.parametrize("max_norm", [0.5, 1e3])
    def test_zero_clears_the_entries_clips_the_rest_and_steps(
        self, optimizer: str, bad: float, max_norm: float
    ) -> None:
        training = Training(optimizer, NormClip(max_norm=max_norm), nonfinite="zero")
        training.step()
        before = training.everything()
        training.backward(bad)
        gradients = {name: reference.array(p.grad).copy() for name, p in training.net.named_parameters()}
        gradients["0.weight"][1, 2] = 0.0
        exact, sizes, coefs = reference.norm_clip(gradients, dict.fromkeys(gradients, "model"), max_norm=max_norm)
        assert (coefs["model"] < 1) == (max_norm < 1)
        stats = training.clipper.step()
        for name, parameter in training.net.named_parameters():
            np.testing.assert_allclose(reference.array(parameter.grad), exact[name], rtol=1e-6, atol=0)
        assert (stats.finite.item(), stats.skipped.item()) == (False, False)
        assert stats.norm.item() == pytest.approx(sizes["model"], rel=1e-6)
        training.optimizer.step()
        assert moved(training.everything(), before)
        assert training.clipper.metrics()["nonfinite"] == 1

    def test_zero_with_action_skip_drops_a_step_that_is_over_its_limit_without_the_bad_entries(self) -> None:
        pairs = named({"a": torch.tensor([math.nan, 3.0]), "b": torch.tensor([4.0])})
        clipper = Clipper(pairs, NormClip(max_norm=1.0), action="skip", nonfinite="zero")
        with pytest.warns(RuntimeWarning, match=r"the size 5 of scope 'model' is over its limit 1\."):
            stats = clipper.step()
        assert (stats.skipped.item(), stats.norm.item()) == (True, 5.0)
        assert [parameter.grad for _, parameter in pairs] == [None, None]
        # What was measured after the repair is known of the step.
        metrics = clipper.metrics()
        assert (metrics["norm"], metrics["norm_clipped"], metrics["coef_min"]) == (5.0, 0.0, 0.0)
        assert (metrics["clip_rate"], metrics["skipped"], metrics["nonfinite"]) == (1.0, 1.0, 1.0)

    def test_zero_counts_no_skip(self) -> None:
        training = Training(method=NormClip(), nonfinite="zero", max_consecutive_skips=0)
        for _ in range(3):
            training.step(math.nan)
        assert training.clipper.metrics()["skipped"] == 0

    @pytest.mark.parametrize("bad", BAD)
    @pytest.mark.parametrize("action", ACTIONS)
    def test_raise_names_step_and_parameters_and_leaves_the_gradients(self, bad: float, action: str) -> None:
        training = Training(
            method=NormClip(max_norm=1e-3 if action == "clip" else 1e3), action=action, nonfinite="raise"
        )
        training.step()
        training.step()
        training.backward(bad)
        witness = Witness(list(training.net.named_parameters()))
        with pytest.raises(FloatingPointError) as failure:
            training.clipper.step()
        assert str(failure.value) == (
            "non-finite gradients at optimizer step 2 in 0.weight; "
            "lower the learning rate, check the data of this batch, or use nonfinite='skip'"
        )
        assert witness.written() == set()
        assert training.clipper.metrics()["nonfinite"] == 1

    @pytest.mark.parametrize("bad", BAD)
    def test_ignore_clips_what_is_finite_and_leaves_the_rest(self, bad: float) -> None:
        pairs = named({"a": torch.tensor([bad, 1.0]), "b": torch.tensor([3.0, 4.0]), "c": torch.tensor([0.1])})
        witness = Witness(pairs)
        clipper = Clipper(pairs, NormClip(max_norm=1.0, per="parameter"), nonfinite="ignore")
        stats = clipper.step()
        assert witness.written() == {"b"}
        assert pairs[1][1].grad.tolist() == pytest.approx([0.6, 0.8], rel=1e-6)
        assert (stats.finite.item(), stats.skipped.item()) == (False, False)
        assert (stats.coef.item(), stats.clipped.item()) == (pytest.approx(0.2, rel=1e-6), pytest.approx(1 / 3))
        assert clipper.metrics() == {"skipped": 0.0, "nonfinite": 1.0}

    @pytest.mark.parametrize("optimizer", OPTIMIZERS)
    def test_ignore_lets_the_optimizer_step(self, optimizer: str) -> None:
        training = Training(optimizer, NormClip(), nonfinite="ignore")
        training.step()
        training.step(math.nan)
        assert training.net[0].weight.isnan().any()

    @pytest.mark.parametrize(
        ("count", "listed"),
        [(1, "p0"), (5, "p0, p1, p2, p3, p4"), (7, "p0, p1, p2, p3, p4 and 2 more")],
    )
    def test_the_first_offenders_are_named(self, count: int, listed: str) -> None:
        pairs = named({f"p{i}": torch.tensor([math.nan if i < count else 1.0]) for i in range(9)})
        with pytest.raises(FloatingPointError, match=f"step 0 in {listed};"):
            Clipper(pairs, NormClip(), nonfinite="raise").step()


class TestObserve:
    @pytest.mark.parametrize("optimizer", OPTIMIZERS)
    @pytest.mark.parametrize(
        ("method", "options"),
        [
            (None, {}),
            (NormClip(max_norm=1e-3), {"action": "observe"}),
            (NormClip(max_norm=1e-3, per="parameter"), {"action": "observe", "measure_per": "layer"}),
            (NormClip(min_norm=1e3, max_norm=1e4), {"action": "observe"}),
            (None, {"nonfinite": "raise"}),
        ],
        ids=["none", "model", "parameter", "growing", "raise"],
    )
    def test_training_is_bit_identical_to_training_without(
        self, optimizer: str, method: ClipMethod | None, options: dict[str, str]
    ) -> None:
        watched, bare = Training(optimizer, method, **options), Training(optimizer)
        for _ in range(5):
            watched.step()
            bare.backward()
            bare.optimizer.step()
        assert_same(watched.everything(), bare.everything())

    def test_a_bad_step_is_let_through_and_counted(self) -> None:
        watched, bare = Training(method=NormClip(max_norm=1e-3), action="observe"), Training()
        for bad in (None, math.inf, None):
            watched.step(bad)
            bare.backward(bad)
            bare.optimizer.step()
        assert_same(watched.everything(), bare.everything())
        assert watched.clipper.metrics()["nonfinite"] == 2

    def test_it_reports_what_clipping_would_do(self) -> None:
        gradients = {"a": torch.tensor([3.0, 4.0]), "b": torch.tensor([0.1])}
        observed, clipped = (
            Clipper(named({n: g.clone() for n, g in gradients.items()}), NormClip(per="parameter"), action=action)
            for action in ("observe", "clip")
        )
        one, other = observed.step(), clipped.step()
        np.testing.assert_array_equal(one.row, other.row)
        assert one.coef.item() < 1
        assert observed.metrics() == clipped.metrics()


class TestActionSkip:
    @pytest.mark.parametrize("optimizer", OPTIMIZERS)
    def test_a_step_over_the_limit_leaves_everything_bit_identical(self, optimizer: str) -> None:
        training = Training(optimizer, NormClip(max_norm=1e3), action="skip")
        for _ in range(2):
            assert not training.step().skipped
        before = training.everything()
        training.backward()
        training.net[2].bias.grad[0] = 2e3
        with pytest.warns(RuntimeWarning, match=r"step 2: the size 2000.* of scope 'model' is over its limit 1000\."):
            stats = training.clipper.step()
        training.optimizer.step()
        assert_same(training.everything(), before)
        assert (stats.finite.item(), stats.skipped.item(), stats.clipped.item()) == (True, True, 1.0)
        assert (stats.coef.item(), stats.norm_clipped.item()) == (0.0, 0.0)
        assert stats.norm.item() > 2e3

    def test_one_scope_over_its_limit_is_enough(self) -> None:
        pairs = named({"a": torch.tensor([2.0]), "b": torch.tensor([0.5]), "c": torch.tensor([0.5])})
        clipper = Clipper(pairs, NormClip(per="parameter"), action="skip")
        with pytest.warns(RuntimeWarning, match="step 0: the size 2 of scope 'a' is over its limit 1"):
            stats = clipper.step()
        assert stats.clipped.item() == pytest.approx(1 / 3, rel=1e-15)
        assert all(parameter.grad is None for _, parameter in pairs)

    def test_steps_within_the_limit_are_not_written(self) -> None:
        pairs = named({"a": torch.tensor([3.0, 4.0])})
        witness = Witness(pairs)
        stats = Clipper(pairs, NormClip(max_norm=5.0), action="skip").step()
        assert not stats.skipped
        assert witness.written() == set()


GOOD, OVER, SPOILT = 0.5, 2.0, math.nan


def run(values: Iterable[float], **options: Any) -> Clipper:
    """A clipper that drops steps over 1 and non-finite ones, after a step with each of these gradients."""
    pairs = named({"a": torch.tensor([0.0])})
    clipper = Clipper(pairs, NormClip(), action="skip", **options)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "dropped optimizer step", RuntimeWarning)
        for value in values:
            pairs[0][1].grad = torch.tensor([value])
            clipper.step()
    return clipper


class TestConsecutiveSkips:
    @pytest.mark.parametrize("most", [0, 1, 3])
    @pytest.mark.parametrize("bad", [OVER, SPOILT])
    def test_that_many_are_allowed_and_the_next_raises(self, most: int, bad: float) -> None:
        clipper = run([GOOD] + [bad] * most, max_consecutive_skips=most)
        assert clipper.metrics()["skipped"] == most
        with pytest.raises(FloatingPointError) as failure:
            run([GOOD] + [bad] * (most + 1), max_consecutive_skips=most)
        message = str(failure.value)
        assert message.startswith(
            f"{most + 1} optimizer steps in a row were dropped, the last at optimizer step {most + 1}: "
        )
        assert (
            "non-finite gradients in a" if bad is SPOILT else "the size 2 of scope 'model' is over its limit 1"
        ) in message
        assert message.endswith(f"or raise max_consecutive_skips (now {most})")

    def test_the_default_is_twenty(self) -> None:
        run([SPOILT] * 20)
        with pytest.raises(FloatingPointError, match=r"^21 optimizer steps"):
            run([SPOILT] * 21)

    def test_none_sets_no_bound(self) -> None:
        assert run([SPOILT] * 100, max_consecutive_skips=None).metrics()["skipped"] == 100

    def test_a_good_step_begins_anew(self) -> None:
        run([SPOILT, SPOILT, GOOD] * 5, max_consecutive_skips=2)

    def test_both_kinds_count_alike(self) -> None:
        run([SPOILT, OVER], max_consecutive_skips=2)
        with pytest.raises(FloatingPointError, match=r"^3 optimizer steps"):
            run([SPOILT, OVER, SPOILT], max_consecutive_skips=2)

    def test_a_step_that_raises_is_dropped_and_recorded_as_well(self) -> None:
        pairs = named({"a": torch.tensor([math.nan])})
        clipper = Clipper(pairs, NormClip(), max_consecutive_skips=0)
        with pytest.raises(FloatingPointError, match=r"^1 optimizer steps in a row"):
            clipper.step()
        assert pairs[0][1].grad is None
        assert clipper.metrics() == {"skipped": 1.0, "nonfinite": 1.0}

    def test_the_count_goes_on_after_a_resume(self) -> None:
        state = run([SPOILT, SPOILT], max_consecutive_skips=2).state_dict()
        pairs = named({"a": torch.tensor([math.nan])})
        resumed = Clipper(pairs, NormClip(), max_consecutive_skips=2)
        resumed.load_state_dict(state)
        with pytest.raises(FloatingPointError, match=r"^3 optimizer steps in a row were dropped.* step 2:"):
            resumed.step()

    def test_a_step_without_gradients_is_no_good_step(self) -> None:
        pairs = named({"a": None})
        clipper = Clipper(pairs, NormClip(), max_consecutive_skips=1)
        pairs[0][1].grad = torch.full((2,), math.nan)
        with pytest.warns(RuntimeWarning, match="dropped optimizer step 0"):
            clipper.step()
        clipper.step()
        pairs[0][1].grad = torch.full((2,), math.nan)
        with pytest.raises(FloatingPointError, match=r"^2 optimizer steps in a row"):
            clipper.step()

    def test_only_the_first_dropped_step_is_announced(self) -> None:
        pairs = named({"a": torch.tensor([0.0])})
        clipper = Clipper(pairs, NormClip(), max_consecutive_skips=None)
        with warnings.catch_warnings(record=True) as record:
            warnings.simplefilter("always")
            for value in (GOOD, SPOILT, SPOILT, GOOD, SPOILT):
                pairs[0][1].grad = torch.tensor([value])
                clipper.step()
        assert [(one.category, str(one.message)) for one in record] == [
            (
                RuntimeWarning,
                "dropped optimizer step 1: non-finite gradients in a. Parameters and optimizer state stay as they "
                "are; further dropped steps are counted, not announced",
            )
        ]


def clipper_for(**arguments: Any) -> Clipper:
    pairs = named({"encoder.weight": torch.ones(2), "encoder.bias": torch.ones(2), "head.weight": torch.ones(2)})
    return Clipper(pairs, arguments.pop("method", NormClip()), **arguments)


def callback_for(**arguments: Any) -> GradientClipping:
    return GradientClipping(arguments.pop("method", NormClip()), **arguments)


class TestArguments:
    @pytest.mark.parametrize(("action", "nonfinite"), list(product(ACTIONS, (*NONFINITE, None))))
    @pytest.mark.parametrize("method", [None, NormClip()], ids=["none", "norm"])
    def test_words_combine_unless_they_contradict(
        self, method: ClipMethod | None, action: str, nonfinite: str | None
    ) -> None:
        observes = method is None or action == "observe"
        if observes and nonfinite in ("skip", "zero"):
            watched = "method=None" if method is None else "action='observe'"
            with pytest.raises(ValueError, match="writes nothing") as failure:
                Policy.of(method, action, nonfinite, 20)
            assert str(failure.value) == (
                f"{watched} writes nothing, so nonfinite='{nonfinite}' cannot be kept; "
                "use nonfinite='ignore' or 'raise', or action='clip'"
            )
            return
        if method is None and action == "skip":
            with pytest.raises(ValueError, match="method=None writes nothing, so action='skip' cannot be kept"):
                Policy.of(method, action, nonfinite, 20)
            return
        policy = Policy.of(method, action, nonfinite, 20)
        assert policy.nonfinite == nonfinite or (nonfinite is None and policy.nonfinite != "raise")
        if nonfinite is None:
            assert policy.nonfinite == ("ignore" if observes else "skip")
        assert policy.writes is not observes
        looks = policy.decides_on_host(folds=False, scaled=False)
        assert looks == (policy.nonfinite != "ignore" or (action == "skip" and not observes))

    @pytest.mark.parametrize("build", [clipper_for, callback_for])
    @pytest.mark.parametrize(
        ("arguments", "error", "said"),
        [
            (
                {"action": "clp"},
                ValueError,
                "action must be one of 'clip', 'skip', 'observe', got 'clp'; did you mean 'clip'?",
            ),
            (
                {"nonfinite": "drop"},
                ValueError,
                "nonfinite must be one of 'skip', 'zero', 'raise', 'ignore', got 'drop'; did you mean 'skip'?",
            ),
            (
                {"action": "observe", "nonfinite": "skip"},
                ValueError,
                "action='observe' writes nothing, so nonfinite='skip' cannot be kept; "
                "use nonfinite='ignore' or 'raise', or action='clip'",
            ),
            (
                {"method": None, "nonfinite": "zero"},
                ValueError,
                "method=None writes nothing, so nonfinite='zero' cannot be kept; "
                "use nonfinite='ignore' or 'raise', or action='clip'",
            ),
            (
                {"method": NormClip(min_norm=0.1), "action": "skip"},
                ValueError,
                "action='skip' drops steps over a limit, but NormClip(max_norm=1.0, norm_type=2.0, min_norm=0.1, "
                "per='model', statistic='norm') also scales gradients up; "
                "use action='clip', or a method that only limits",
            ),
            (
                {"max_consecutive_skips": -1},
                ValueError,
                "max_consecutive_skips must be >= 0, got -1; None sets no bound",
            ),
            (
                {"max_consecutive_skips": 2.5},
                TypeError,
                "max_consecutive_skips must be a whole number, got 2.5 (float); None sets no bound",
            ),
            (
                {"max_consecutive_skips": True},
                TypeError,
                "max_consecutive_skips must be a whole number, got True (bool); None sets no bound",
            ),
            (
                {"measure_per": "units"},
                ValueError,
                "measure_per must be one of 'group', 'layer', 'parameter', got 'units'; "
                "None measures the method's own scope only",
            ),
            (
                {"include": 3},
                TypeError,
                "include must be a pattern or a list of patterns, got 3; write include=['encoder.*']",
            ),
            ({"exclude": [""]}, TypeError, "exclude holds '', which is no pattern; write exclude=['encoder.*']"),
            ({"fold": "yes"}, TypeError, "fold must be True or False, got 'yes' (str)"),
            (
                {"fold": True, "method": None},
                ValueError,
                "fold=True hands over a coefficient, but nothing is to be clipped; use fold=False",
            ),
            (
                {"fold": True, "method": AGC()},
                ValueError,
                "fold=True hands the optimizer one coefficient, but AGC(clip_factor=0.01, eps=0.001, per='unit') has "
                "one for each unit; use fold=False, or a method with per='model'",
            ),
            (
                {"method": NormClip},
                TypeError,
                "method must be an instance, got the class NormClip; write NormClip()",
            ),
            (
                {"method": 1.0},
                TypeError,
                "method must be a clipping method, got 1.0 (float); "
                "write method=NormClip(max_norm=1.0), or method=None to measure without clipping",
            ),
        ],
        ids=str,
    )
    def test_what_is_wrong_is_said_with_value_and_remedy(
        self,
        build: Callable[..., object],
        arguments: dict[str, Any],
        error: type[Exception],
        said: str,
    ) -> None:
        with pytest.raises(error) as failure:
            build(**copy.deepcopy(arguments))
        assert str(failure.value) == said

    def test_a_missing_method_is_answered_with_one(self) -> None:
        with pytest.raises(TypeError) as failure:
            GradientClipping()
        assert str(failure.value) == (
            "GradientClipping needs a method; "
            "write method=NormClip(max_norm=1.0), or method=None to measure without clipping"
        )

    @pytest.mark.parametrize("build", [clipper_for, callback_for])
    def test_arguments_are_not_written(self, build: Callable[..., object]) -> None:
        include, exclude, method = ["encoder.*"], ["*.bias"], NormClip()
        build(method=method, include=include, exclude=exclude)
        assert (include, exclude, method) == (["encoder.*"], ["*.bias"], NormClip())

    @pytest.mark.parametrize("option", ["include", "exclude"])
    def test_a_pattern_without_match_shows_the_closest_names(self, option: str) -> None:
        with pytest.raises(ValueError, match=rf"^{option}='encodr\.\*' matches no parameter") as failure:
            clipper_for(**{option: "encodr.*"})
        assert "encoder.weight" in str(failure.value)
        assert "'encoder.*'" in str(failure.value)


def test_centralizing_is_done_before_measuring_and_refused_where_nothing_is_written() -> None:
    weight = nn.Parameter(torch.zeros(2, 2))
    weight.grad = torch.tensor([[1.0, 3.0], [5.0, 5.0]])
    stats = Clipper([("w", weight)], NormClip(max_norm=1.0), centralize=True).step()
    assert stats.norm.item() == pytest.approx(math.sqrt(2))
    torch.testing.assert_close(weight.grad, torch.tensor([[-1.0, 1.0], [0.0, 0.0]]) / math.sqrt(2), rtol=1e-5, atol=0)
    for method, options in ((None, {}), (NormClip(), {"action": "observe"})):
        with pytest.raises(ValueError, match="writes nothing, so centralize=True cannot be kept; use"):
            GradientClipping(method, centralize=True, **options)
