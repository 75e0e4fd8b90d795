"""What holds for every clipping method: found by walking the package, not by keeping a list."""

import ast
import dataclasses
import importlib
import inspect
import io
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

import lightning_gradclip
from kit.drawn import given, settings, st
from kit.gradients import REMEMBERED, SHAPES, Witness, named, normal, remembering, same_bits, two_groups
from kit.methods import (
    CLASSES,
    EVERY_MODULE,
    FOUND,
    LIMITERS,
    MODULES,
    SCOPE_OF,
    SUBJECTS,
    WARM_UP,
    WITH_ACTIONS,
    chooses_its_scope,
    every_action,
    every_case,
    every_learner,
    every_method,
    mixed,
    optimizer_of,
    policies,
    public_methods,
    subject,
)
from kit.root import ROOT
from kit.running_max import RunningMax
from lightning_gradclip import ClipMethod, Clipper, StepStats, methods
from lightning_gradclip.act.policy import ACTIONS, NONFINITE


class TestFiles:
    """A method is five things in five places."""

    def test_the_walk_finds_something(self) -> None:
        assert {"norm"} <= set(MODULES)
        assert {"NormClip"} <= {cls.__name__ for cls in FOUND}

    @pytest.mark.parametrize("module", MODULES)
    def test_a_module_holds_one_public_method(self, module: str) -> None:
        assert len(public_methods(module)) == 1

    @pytest.mark.parametrize("module", [module for module in EVERY_MODULE if module not in MODULES])
    def test_a_module_without_one_serves_some_rule(self, module: str) -> None:
        rules = [
            inspect.getsource(importlib.import_module(f"{methods.__name__}.{name}")) for name in (*MODULES, "method")
        ]
        assert any(f"methods.{module} import" in rule or f"methods import {module}" in rule for rule in rules)

    @pytest.mark.parametrize("cls", FOUND)
    def test_it_has_an_option_for_hydra(self, cls: type[ClipMethod]) -> None:
        module = cls.__module__.rpartition(".")[2]
        text = (ROOT / "conf" / "callbacks" / "gradclip" / f"{module}.yaml").read_text()
        assert f"_target_: lightning_gradclip.{cls.__name__}\n" in text

    @pytest.mark.parametrize("module", MODULES)
    def test_it_has_tests(self, module: str) -> None:
        tree = ast.parse((ROOT / "tests" / "methods" / f"test_{module}.py").read_text())
        functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
        assert any(function.name.startswith("test_") for function in functions)

    @pytest.mark.parametrize("cls", FOUND)
    def test_it_has_a_row_in_the_readme(self, cls: type[ClipMethod]) -> None:
        lines = (ROOT / "README.md").read_text().splitlines()
        rows = [line for line in lines if line.startswith("|") and f"`{cls.__name__}`" in line]
        assert rows, f"README.md's table of methods has no row for {cls.__name__}"

    @pytest.mark.parametrize("module", MODULES)
    def test_its_docstring_is_its_card(self, module: str) -> None:
        card = inspect.getdoc(importlib.import_module(f"{methods.__name__}.{module}"))
        assert card is not None
        starts = [line.partition(":")[0] for line in card.splitlines()]
        assert {"Rule", "Source"} <= set(starts)

    @pytest.mark.parametrize("cls", FOUND)
    def test_it_is_one_line_of_the_package(self, cls: type[ClipMethod]) -> None:
        lines = [line.strip() for line in Path(lightning_gradclip.__file__).read_text().splitlines()]
        expected = f"from {cls.__module__} import {cls.__name__} as {cls.__name__}"
        assert [line for line in lines if cls.__name__ in line.split()] == [expected]
        assert getattr(lightning_gradclip, cls.__name__) is cls


class TestClass:
    @pytest.mark.parametrize("cls", CLASSES)
    def test_it_is_a_dataclass_of_defaults_whose_limit_may_be_said_first(self, cls: type[ClipMethod]) -> None:
        assert dataclasses.is_dataclass(cls)
        assert cls.__dataclass_fields__ == {field.name: field for field in dataclasses.fields(cls)}
        first, *others = inspect.signature(cls).parameters.values()
        # Methods of users may be of keywords only.
        assert cls is RunningMax or first.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
        assert {parameter.kind for parameter in others} <= {inspect.Parameter.KEYWORD_ONLY}
        for parameter in (first, *others):
            assert parameter.default is not inspect.Parameter.empty
        assert cls() == cls()

    @pytest.mark.parametrize("cls", CLASSES)
    def test_its_scopes_are_known_words_and_hold_its_own(self, cls: type[ClipMethod]) -> None:
        assert set(cls.scopes) <= set(SCOPE_OF)
        assert cls().per in cls.scopes

    @pytest.mark.parametrize("cls", FOUND)
    @pytest.mark.parametrize("per", ["modl", "", None, 1])
    def test_another_scope_is_refused(self, cls: type[ClipMethod], per: object) -> None:
        if not chooses_its_scope(cls):
            with pytest.raises(TypeError, match="per"):
                cls(per=per)
            return
        with pytest.raises(ValueError, match=r"^per must be one of") as failure:
            cls(per=per)
        assert f"got {per!r}" in str(failure.value)

    @pytest.mark.parametrize("cls", FOUND)
    def test_numbers_written_as_words_are_refused(self, cls: type[ClipMethod]) -> None:
        numbers = [field.name for field in dataclasses.fields(cls) if type(field.default) in (int, float)]
        assert numbers
        for name in numbers:
            for wrong in ("one", True):
                with pytest.raises(TypeError, match=f"^{name} must be"):
                    cls(**{name: wrong})

    @pytest.mark.parametrize("cls", FOUND)
    def test_a_combination_of_words_is_tested_below_or_refused_by_naming_them(self, cls: type[ClipMethod]) -> None:
        allowed, refused, pairs = set(), {}, [("layer.weight", Parameter(torch.zeros(2)))]
        scopes = SCOPE_OF if chooses_its_scope(cls) else cls.scopes
        for per, action, nonfinite in product(scopes, ACTIONS, NONFINITE):
            try:
                method = subject(cls, per)
                optimizer = remembering(pairs) if method.needs_moments else None
                Clipper(pairs, method, optimizer=optimizer, action=action, nonfinite=nonfinite)
            except ValueError as error:
                refused[per, action, nonfinite] = str(error)
            else:
                allowed.add((per, action, nonfinite))
        assert allowed == {(per, *policy) for per in cls.scopes for policy in policies(cls)}
        for (per, action, nonfinite), said in refused.items():
            words = [f"action={action!r}"]
            if per not in cls.scopes:
                words = ["per must be", repr(per)]
            elif action == "observe":
                words += [f"nonfinite={nonfinite!r}"]
            assert all(word in said for word in words), (per, action, nonfinite, said)

    @every_method
    def test_it_is_told_from_its_repr(self, cls: type[ClipMethod], per: str) -> None:
        method = subject(cls, per)
        assert eval(repr(method), {cls.__name__: cls, "inf": math.inf}) == method


class Stepper:
    """A clipper of one method over the model in small, whose only warning may be that a step was dropped."""

    def __init__(self, cls: type[ClipMethod], per: str, action: str = "clip", nonfinite: str | None = None) -> None:
        self.method = subject(cls, per)
        self.pairs = named({name: torch.zeros(shape) for name, shape in SHAPES.items()})
        self.clipper = Clipper(
            self.pairs, self.method, optimizer=optimizer_of(self.method, self.pairs), action=action, nonfinite=nonfinite
        )

    def give(self, gradients: dict[str, Tensor | None]) -> Witness:
        for name, parameter in self.pairs:
            parameter.grad = gradients[name]
        return Witness(self.pairs)

    def step(self, gradients: dict[str, Tensor | None] | None = None) -> StepStats:
        if gradients is not None:
            self.give(gradients)
        with only_dropped_steps() as dropped:
            stats = self.clipper.step()
        assert not dropped or stats.skipped
        return stats

    def gradients(self) -> dict[str, Tensor | None]:
        return {name: parameter.grad for name, parameter in self.pairs}

    def learned(self) -> dict[str, Tensor]:
        return self.clipper.state_dict()["learned"]["values"]


@contextmanager
def only_dropped_steps() -> Iterator[list[str]]:
    """Collect the announcements of dropped steps; any other warning is an error."""
    messages: list[str] = []
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("error")
        warnings.filterwarnings("always", "dropped optimizer step", RuntimeWarning)
        yield messages
    messages += [str(one.message) for one in record]


def assert_same_values(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name in one:
        assert same_bits(one[name], other[name]), name


def pieces(per: str, gradients: dict[str, Tensor | None]) -> Iterator[tuple[str, str, Tensor]]:
    """Scope, name and values of each gradient, or of each row of it where rows are scopes."""
    for name, gradient in gradients.items():
        if gradient is None:
            continue
        if per == "unit" and gradient.ndim > 1:
            yield from ((f"{name}[{i}]", name, row) for i, row in enumerate(gradient))
        else:
            yield SCOPE_OF[per][name], name, gradient


def vectors(per: str, gradients: dict[str, Tensor | None]) -> dict[str, Tensor]:
    """All entries of each scope in float64."""
    parts: dict[str, list[Tensor]] = {}
    for scope, _, values in pieces(per, gradients):
        parts.setdefault(scope, []).append(values.double().flatten())
    return {scope: torch.cat(part) for scope, part in parts.items()}


def assert_untouched_within(stepper: Stepper, witness: Witness, stats: StepStats) -> None:
    """What is within its limit has the bits it had; a gradient of which nothing is over was not even written."""
    per = stepper.method.per
    low, high = stepper.method.bounds(0) if per == "element" else (-math.inf, math.inf)
    if stepper.method.needs_moments:
        low, high = low * REMEMBERED, high * REMEMBERED
    over = {scope for scope, one in zip(stats.scopes, (stats.sizes > stats.limits).tolist(), strict=True) if one}
    may_be_written = set()
    pairs = zip(pieces(per, witness.copies()), pieces(per, stepper.gradients()), strict=True)
    for (scope, name, before), (_, _, after) in pairs:
        inside = (before >= low) & (before <= high) & (per == "element" or scope not in over)
        assert same_bits(after[inside], before[inside]), scope
        if not inside.all():
            may_be_written.add(name)
    assert witness.written() <= may_be_written


def assert_harmless(stepper: Stepper, witness: Witness, stats: StepStats) -> None:
    """No gradient grew or flipped, and what was within its limit is as it was."""
    before = witness.copies()
    if stats.skipped:
        assert all(gradient is None for gradient in stepper.gradients().values())
        return
    for name, gradient in stepper.gradients().items():
        assert (gradient is None) == (name not in before)
        if gradient is None:
            continue
        assert torch.isfinite(gradient).all()
        assert torch.equal(gradient.sign() * before[name].sign(), gradient.sign().abs())
        if not stepper.method.may_grow:
            assert (gradient.abs() <= before[name].abs()).all()
    if not stepper.method.may_grow:
        assert_untouched_within(stepper, witness, stats)


class TestGradients:
    @every_action
    def test_none_grows_flips_or_is_written_within_its_limit(
        self, cls: type[ClipMethod], per: str, action: str
    ) -> None:
        stepper = Stepper(cls, per, action)
        for seed in range(3):
            witness = stepper.give(mixed(seed))
            stats = stepper.step()
            assert_harmless(stepper, witness, stats)
            if action == "observe":
                assert witness.written() == set()

    @every_method
    @settings(derandomize=True, deadline=None, max_examples=12)
    @given(data=st.data())
    def test_the_same_for_gradients_of_any_scale(self, cls: type[ClipMethod], per: str, data: st.DataObject) -> None:
        scale = st.one_of(st.none(), st.just(0.0), st.floats(-30, 30).map(lambda exponent: 10.0**exponent))
        stepper = Stepper(cls, per, *data.draw(st.sampled_from(policies(cls))))
        for seed in range(data.draw(st.integers(1, 3))):
            drawn = data.draw(st.lists(scale, min_size=len(SHAPES), max_size=len(SHAPES)))
            gradients = {
                name: None if one is None else gradient * one
                for (name, gradient), one in zip(normal(seed).items(), drawn, strict=True)
            }
            witness = stepper.give(gradients)
            stats = stepper.step()
            assert stats.finite.item() is True
            assert_harmless(stepper, witness, stats)

    @pytest.mark.parametrize(("cls", "per", "action"), [one for one in WITH_ACTIONS if not one[0]().may_grow])
    def test_far_within_the_limit_none_is_written(self, cls: type[ClipMethod], per: str, action: str) -> None:
        stepper = Stepper(cls, per, action)
        # Twice the same, so that a limit that is learned is met exactly, or lies below what it was learned from.
        for learned in (False, True):
            witness = stepper.give(normal(0, scale=1e-10))
            stats = stepper.step()
            if learned and stepper.method.adaptive and (stats.sizes > stats.limits).any():
                break
            assert witness.written() == set()
            assert (stats.clipped.item(), stats.skipped.item()) == (0.0, False)

    @every_action
    def test_zeros_stay_zeros_and_teach_nothing(self, cls: type[ClipMethod], per: str, action: str) -> None:
        stepper = Stepper(cls, per, action)
        stepper.step(mixed(0))
        before = stepper.learned()
        witness = stepper.give({name: torch.zeros(shape) for name, shape in SHAPES.items()})
        stats = stepper.step()
        for name, gradient in stepper.gradients().items():
            assert same_bits(gradient, witness.copies()[name])
        assert (stats.norm.item(), stats.norm_clipped.item()) == (0.0, 0.0)
        assert (stats.finite.item(), stats.skipped.item(), stats.clipped.item()) == (True, False, 0.0)
        assert_same_values(stepper.learned(), before)

    @every_method
    def test_zeros_at_the_start_freeze_nothing(self, cls: type[ClipMethod], per: str) -> None:
        stepper = Stepper(cls, per)
        for _ in range(3):
            stepper.step({name: torch.zeros(shape) for name, shape in SHAPES.items()})
        stats = stepper.step(normal(0))
        assert (stats.limits > 0).all()
        assert all(gradient.any() for gradient in stepper.gradients().values())

    @every_action
    def test_absent_gradients_stay_absent(self, cls: type[ClipMethod], per: str, action: str) -> None:
        stepper = Stepper(cls, per, action)
        for absent in (("head.weight",), ("head.weight", "head.bias", "scale"), ("encoder.bias",)):
            gradients = {name: None if name in absent else gradient for name, gradient in mixed(0).items()}
            witness = stepper.give(gradients)
            stats = stepper.step()
            assert_harmless(stepper, witness, stats)
            assert all(stepper.gradients()[name] is None for name in absent)
        news, before = stepper.clipper.metrics(), stepper.learned()
        assert news["norm"] > 0
        stepper.step(dict.fromkeys(SHAPES))
        assert not stepper.clipper.has_news
        assert_same_values(stepper.learned(), before)

    @every_action
    def test_there_may_be_nothing_to_clip(self, cls: type[ClipMethod], per: str, action: str) -> None:
        method = subject(cls, per)
        empty = Parameter(torch.zeros(0, 3))
        empty.grad = torch.zeros(0, 3)
        pairs = [("layer.empty", empty)]
        optimizer = remembering(pairs) if method.needs_moments else None
        clipper = Clipper(pairs, method, optimizer=optimizer, action=action)
        stats = clipper.step()
        assert (stats.norm.item(), stats.finite.item(), stats.skipped.item()) == (0.0, True, False)
        assert empty.grad.shape == (0, 3)

    @pytest.mark.parametrize(("cls", "per"), [one for one in SUBJECTS if one[1] != "element"])
    def test_scaling_keeps_the_direction_of_a_scope(self, cls: type[ClipMethod], per: str) -> None:
        stepper = Stepper(cls, per)
        # A limit that is learned is exceeded by the last step.
        for _ in range(WARM_UP if stepper.method.adaptive else 0):
            stepper.step(mixed(0))
        witness = stepper.give({name: 100.0 * gradient for name, gradient in mixed(0).items()})
        stepper.step()
        assert witness.written()
        before, after = vectors(per, witness.copies()), vectors(per, stepper.gradients())
        for scope, values in before.items():
            cosine = (values @ after[scope]) / (values.norm() * after[scope].norm())
            assert cosine.item() == pytest.approx(1.0, abs=1e-12), scope

    @pytest.mark.parametrize(("cls", "per"), LIMITERS)
    def test_clipping_twice_is_clipping_once(self, cls: type[ClipMethod], per: str) -> None:
        stepper = Stepper(cls, per)
        stepper.step(mixed(0))
        once = {name: gradient.clone() for name, gradient in stepper.gradients().items()}
        stepper.step()
        for name, gradient in stepper.gradients().items():
            torch.testing.assert_close(gradient, once[name], rtol=1e-6, atol=0)

    @every_method
    def test_what_is_reported_is_what_was_done(self, cls: type[ClipMethod], per: str) -> None:
        stepper = Stepper(cls, per)
        for seed in range(3):
            gradients = mixed(seed)
            before = torch.cat([gradient.double().flatten() for gradient in gradients.values()])
            stats = stepper.step(gradients)
            after = torch.cat([gradient.double().flatten() for gradient in stepper.gradients().values()])
            for norm, values in ((stats.norm, before), (stats.norm_clipped, after)):
                exact = torch.linalg.vector_norm(values, stepper.method.norm_type)
                torch.testing.assert_close(norm, exact, rtol=1e-6, atol=0)


class TestNonfinite:
    @every_case
    def test_a_bad_step_teaches_nothing_and_spoils_nothing(
        self, cls: type[ClipMethod], per: str, action: str, nonfinite: str
    ) -> None:
        stepper, other = (Stepper(cls, per, action, nonfinite) for _ in range(2))
        for seed in range(2):
            stepper.step(mixed(seed))
            other.step(mixed(seed))
        for seed, bad in enumerate((math.nan, math.inf, -math.inf), 2):
            before = stepper.learned()
            self.take_bad_step(stepper, action, nonfinite, bad)
            assert_same_values(stepper.learned(), before)
            assert stepper.clipper.metrics(reset=False)["nonfinite"] == seed - 1
            # The next step is clipped as if the bad one had never been.
            one, two = stepper.step(mixed(seed)), other.step(mixed(seed))
            assert same_bits(one.limits, two.limits)
            for name, gradient in stepper.gradients().items():
                expected = other.gradients()[name]
                assert gradient is expected is None or same_bits(gradient, expected)

    def take_bad_step(self, stepper: Stepper, action: str, nonfinite: str, bad: float) -> None:
        gradients = mixed(9)
        gradients["head.weight"][1, 2] = bad
        witness = stepper.give(gradients)
        if nonfinite == "raise":
            step = stepper.clipper.state_dict()["step"]
            with pytest.raises(FloatingPointError, match=rf"optimizer step {step} in head\.weight;"):
                stepper.clipper.step()
            assert witness.written() == set()
            return
        stats = stepper.step()
        assert stats.finite.item() is False
        after = stepper.gradients()
        if nonfinite == "skip":
            assert set(after.values()) == {None}
        if nonfinite == "zero" and not stats.skipped:
            assert after["head.weight"][1, 2] == 0
            assert all(torch.isfinite(gradient).all() for gradient in after.values())
        if nonfinite == "ignore" and not stats.skipped:
            # What is not finite must not spread: entries are bounded, scopes are let through.
            spoiled = {name for name, gradient in after.items() if not torch.isfinite(gradient).all()}
            assert spoiled <= {"head.weight"}
            assert torch.isfinite(after["head.weight"]).sum() >= 9
            per = stepper.method.per
            kept = {scope for scope, size in zip(stats.scopes, stats.sizes, strict=True) if not size.isfinite()}
            pairs = zip(pieces(per, witness.copies()), pieces(per, after), strict=True)
            assert kept
            assert per == "element" or all(same_bits(one[2], other[2]) for one, other in pairs if one[0] in kept)
        if action == "observe":
            assert witness.written() == set()


def saved_and_loaded(state: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


class TestState:
    @every_method
    @pytest.mark.parametrize("cut", [0, 1, 5])
    def test_resuming_is_bit_equal_to_going_on(self, cls: type[ClipMethod], per: str, cut: int) -> None:
        straight, resumed = Stepper(cls, per), Stepper(cls, per)
        for seed in range(cut):
            straight.step(mixed(seed))
        resumed.clipper.load_state_dict(saved_and_loaded(straight.clipper.state_dict()))
        assert_same_values(resumed.learned(), straight.learned())
        for seed in range(cut, cut + 5):
            one, other = straight.step(mixed(seed)), resumed.step(mixed(seed))
            assert same_bits(one.sizes, other.sizes)
            assert same_bits(one.limits, other.limits)
            assert_same_values(resumed.gradients(), straight.gradients())
        assert_same_values(resumed.learned(), straight.learned())
        assert straight.clipper.metrics() == resumed.clipper.metrics()

    @every_learner
    def test_it_learns_what_it_says(self, cls: type[ClipMethod], per: str) -> None:
        stepper = Stepper(cls, per)
        stepper.step(mixed(0))
        first = stepper.learned()
        assert first
        scopes = stepper.clipper.state_dict()["learned"]["scopes"]
        assert all(value.shape[0] == len(scopes) for value in first.values())
        # Larger, so that a record is one too.
        stepper.step({name: None if one is None else 100 * one for name, one in mixed(1).items()})
        second = stepper.learned()
        assert any(not same_bits(first[name], second[name]) for name in first)

    @every_learner
    def test_two_clippers_learn_apart(self, cls: type[ClipMethod], per: str) -> None:
        method = subject(cls, per)
        one, other = named(mixed(0)), named(mixed(1))
        clippers = [Clipper(pairs, method, optimizer=two_groups(pairs)) for pairs in (one, other)]
        for clipper in clippers:
            clipper.step()
        first, second = (clipper.state_dict()["learned"]["values"] for clipper in clippers)
        assert any(not same_bits(first[name], second[name]) for name in first)
        assert method.state_dict() == {}

    @every_learner
    def test_observing_learns_as_clipping_does(self, cls: type[ClipMethod], per: str) -> None:
        clipping, observing = Stepper(cls, per), Stepper(cls, per, "observe")
        for seed in range(5):
            one, other = clipping.step(mixed(seed)), observing.step(mixed(seed))
            assert same_bits(one.limits, other.limits)
        assert_same_values(clipping.learned(), observing.learned())
