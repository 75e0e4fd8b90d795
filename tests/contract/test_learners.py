"""What all methods that learn have in common: what enters their memory, how it is kept, and that watching is free."""

import functools
import io
import math
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.amp import GradScaler
from torch.nn import Parameter
from torch.optim import SGD, AdamW
from torch.utils._python_dispatch import TorchDispatchMode

from kit import reference
from kit.boring import (
    ENCODER,
    HEAD,
    Adversaries,
    Prescribed,
    Regression,
    equal,
    fit,
    gradients,
    norm,
    regression_data,
    weights,
)
from kit.gradients import SCOPES, named, normal, two_groups
from kit.streams import LEARNERS, Fed, noisy
from lightning_gradclip import ClipMethod, Clipper, EmaClip, GradientClipping, QuantileClip, SigmaClip, ZClip
from lightning_gradclip.limit import learned

KEY = "GradientClipping{'name': 'gradclip'}"

every_learner = pytest.mark.parametrize("make", LEARNERS.values(), ids=LEARNERS)


def expected_limits(name: str, sizes: np.ndarray) -> np.ndarray:
    """The reference's limits for the sizes of one scope."""
    rules: dict[str, Callable[[], Any]] = {
        "quantile": lambda: reference.quantile_limits(sizes, q=0.8, window=12),
        "quantile of all": lambda: reference.quantile_limits(sizes, q=0.8, window=None),
        "quantile with current": lambda: reference.quantile_limits(sizes, q=0.6, window=12, include_current=True),
        "sigma": lambda: reference.sigma_limits(sizes, k=1.0, window=12, warmup=8),
        "zclip": lambda: reference.zclip(sizes, warmup=8, z_threshold=0.5).limits,
        "zclip faithful": lambda: reference.zclip(sizes, warmup=8, z_threshold=0.5, memory="faithful").limits,
        "zclip to the mean": lambda: reference.zclip(sizes, warmup=8, z_threshold=0.5, mode="mean").limits,
        "zclip to the largest": lambda: reference.zclip(sizes, warmup=8, z_threshold=0.5, mode="max").limits,
        "ema": lambda: reference.ema(sizes[:, None], warmup=8, warmup_max_norm=math.inf, beta=0.9).limits[:, 0],
    }
    return rules[name]()


@pytest.mark.parametrize("name", LEARNERS)
@pytest.mark.parametrize("per", SCOPES)
def test_every_scope_learns_from_its_own_norms(name: str, per: str) -> None:
    scales = noisy(40, seed=3, spikes=0.1)[:, 0]
    given = [normal(i, scale) for i, scale in enumerate(scales)]
    pairs = named(given[0])
    clipper = Clipper(pairs, LEARNERS[name](per=per), optimizer=two_groups(pairs))
    limits, after, scopes = [], [], ()
    for one in given:
        for key, parameter in pairs:
            parameter.grad = one[key].clone()
        stats = clipper.step()
        limits.append(stats.limits.tolist())
        after.append({key: parameter.grad for key, parameter in pairs})
        scopes = stats.scopes
    assert scopes == tuple(dict.fromkeys(SCOPES[per].values()))
    for i, scope in enumerate(scopes):
        members = [key for key, owner in SCOPES[per].items() if owner == scope]
        sizes = np.array([reference.joint_norm([reference.array(one[key]) for key in members], 2.0) for one in given])
        expected = expected_limits(name, sizes)
        np.testing.assert_allclose([row[i] for row in limits], expected, rtol=1e-6, atol=0, err_msg=scope)
        assert 3 < (sizes > expected).sum() < 35
        for size, limit, one, got in zip(sizes, expected, given, after, strict=True):
            for key in members:
                exact = reference.array(one[key]) * min(1.0, limit / size)
                np.testing.assert_allclose(reference.array(got[key]), exact, rtol=2e-6, atol=0)


class TestMemory:
    @every_learner
    @pytest.mark.parametrize("nonfinite", ["skip", "zero", "raise", "ignore"])
    @pytest.mark.parametrize("per", ["model", "parameter"])
    @pytest.mark.filterwarnings("ignore:dropped optimizer step:RuntimeWarning")
    def test_a_step_that_is_not_finite_leaves_no_trace(
        self, make: Callable[..., ClipMethod], nonfinite: str, per: str
    ) -> None:
        clean, hit = (Fed(make(per=per), 2, nonfinite=nonfinite) for _ in range(2))
        # At the very start, during the warm-up, at its end, and later in a row.
        places = {0: [math.inf], 3: [math.nan, -math.inf], 8: [math.inf], 15: [math.nan, math.inf, -math.inf]}
        for i, row in enumerate(noisy(20, 2)):
            for bad in places.get(i, []):
                before = hit.memory
                with pytest.raises(FloatingPointError) if nonfinite == "raise" else nullcontext():
                    hit.step([row[0], bad])
                assert equal(hit.memory, before) or i == 0
            one, other = clean.step(row), hit.step(row)
            assert equal(one.limits, other.limits)
            assert clean.norms() == hit.norms()
        assert equal(clean.memory, hit.memory)
        assert np.isfinite(hit.limits([10 * row])).all()

    @every_learner
    def test_observing_learns_no_more_of_it(self, make: Callable[..., ClipMethod]) -> None:
        clean, hit = (Fed(make(), action="observe") for _ in range(2))
        for i, row in enumerate(noisy(20)):
            if i % 4 == 1:
                hit.step([math.nan])
            assert equal(clean.step(row).limits, hit.step(row).limits)
        assert equal(clean.memory, hit.memory)

    @every_learner
    @pytest.mark.parametrize("action", ["clip", "skip", "observe"])
    @pytest.mark.filterwarnings("ignore:dropped optimizer step:RuntimeWarning")
    def test_overflows_under_a_grad_scaler_leave_no_trace(self, make: Callable[..., ClipMethod], action: str) -> None:
        parameter = Parameter(torch.zeros(1))
        optimizer = SGD([parameter], lr=1e-3)
        # The first steps overflow by design, and later those at which the scale is tried out.
        scaler = GradScaler("cpu", init_scale=2.0**127, growth_interval=5)
        options = {"action": action, "max_consecutive_skips": None}
        clipper = Clipper([("layer0.weight", parameter)], make(), optimizer=optimizer, **options)
        plain = Fed(make(), dtype=torch.float32, **options)
        overflows = []
        for (size,) in noisy(60):
            optimizer.zero_grad()
            scaler.scale(size * parameter.sum()).backward()
            before = clipper.state_dict()["learned"]["values"]
            stats = clipper.step(scaler)
            overflows.append(not stats.finite.item())
            if overflows[-1]:
                assert not before or equal(clipper.state_dict()["learned"]["values"], before)
            else:
                assert equal(stats.limits, plain.step([size]).limits)
            scaler.step(optimizer)
            scaler.update()
        assert overflows[0]
        assert 4 < sum(overflows) < 20
        assert sum(overflows[12:]) > 1
        assert equal(clipper.state_dict()["learned"]["values"], plain.memory)

    @every_learner
    @pytest.mark.parametrize("nothing", [0.0, -0.0, None])
    def test_a_scope_without_a_gradient_keeps_its_memory(
        self, make: Callable[..., ClipMethod], nothing: float | None
    ) -> None:
        rows = noisy(60, 3)
        active = np.random.default_rng(4).random(60) < 0.5
        active[:2] = [False, True]
        fed, alone = Fed(make(per="parameter"), 3), Fed(make(per="parameter"))
        for row, is_active in zip(rows, active, strict=True):
            before = fed.memory
            stats = fed.step([row[0], row[1] if is_active else nothing, row[2]])
            if is_active:
                # To the bit, however many sizes the other scopes have.
                expected = alone.step(row[1:2]).limits
                torch.testing.assert_close(stats.limits[1:2], expected, rtol=0, atol=0)
            elif before:
                assert all(equal(_kept(one[1]), _kept(before[name][1])) for name, one in fed.memory.items())
        assert fed.memory["count"].tolist() == [60, active.sum(), 60] if "count" in fed.memory else False

    @every_learner
    def test_an_expert_that_is_seldom_active_learns_and_is_not_frozen(self, make: Callable[..., ClipMethod]) -> None:
        # In 5 % of the steps, with spikes among them.
        rows = noisy(800, 2, spikes=0.1)
        fed, alone = Fed(make(per="parameter"), 2), Fed(make(per="parameter"))
        shares = []
        for i, row in enumerate(rows):
            if i % 20 != 7:
                fed.step([row[0], 0.0 if i % 2 else None])
                continue
            stats = fed.step(row)
            torch.testing.assert_close(stats.limits[1:], alone.step(row[1:]).limits, rtol=0, atol=0)
            shares.append(fed.norms()[1] / row[1])
        assert len(shares) == 40
        assert fed.memory["count"].tolist() == [800, 40]
        assert sum(share < 0.9 for share in shares) > 1
        assert np.quantile(shares, 0.2) > 0.5

    @every_learner
    def test_a_scope_that_begins_with_zeros_has_no_limit(self, make: Callable[..., ClipMethod]) -> None:
        fed = Fed(make(per="parameter"), 2)
        for _ in range(20):
            assert fed.step([1.0, 0.0]).limits[1].item() == math.inf
        fed.step([1.0, 7.0])
        assert fed.norms()[1] == 7.0
        assert fed.memory["count"].tolist() == [21, 1]

    @every_learner
    @pytest.mark.parametrize("exponent", [-100, 100])
    def test_the_unit_of_the_norms_does_not_matter(self, make: Callable[..., ClipMethod], exponent: int) -> None:
        # From 1e-30 to 1e30. ZClip's published 1e-6 is absolute: only the largest is without it.
        method = make()
        if isinstance(method, ZClip) and method.mode != "max":
            method = make(mode="max")
        rows = noisy(60)
        one, other = Fed(method, dtype=torch.float32), Fed(method, dtype=torch.float32)
        limits, scaled = one.limits(rows), other.limits(rows * 2.0**exponent)
        assert np.isfinite(limits).sum() > 10
        assert (scaled == limits * 2.0**exponent).all()

    @every_learner
    @pytest.mark.parametrize("value", [0.1, 1 / 3, 7e-5, 3e20])
    def test_constant_norms_are_within_their_limit(self, make: Callable[..., ClipMethod], value: float) -> None:
        fed = Fed(make())
        for _ in range(40):
            stats = fed.step([value])
            assert stats.norm.item() == value
            assert stats.clipped.item() == 0.0
            assert fed.norms() == [value]
        # Any more is too much, but for those that allow a few per cent.
        fed.step([2 * value])
        assert fed.norms()[0] < 1.5 * value

    @every_learner
    def test_a_dropped_step_is_remembered(self, make: Callable[..., ClipMethod]) -> None:
        rows = noisy(60)
        clipped, skipped = Fed(make()), Fed(make(), action="skip", max_consecutive_skips=None)
        with pytest.warns(RuntimeWarning, match="over its limit"):
            assert equal(clipped.limits(rows).tolist(), skipped.limits(rows).tolist())


def _kept(values: Tensor) -> Tensor:
    """Without the places that hold no size."""
    return values[torch.isfinite(values)] if values.is_floating_point() else values


def through_a_file(state: Any) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@functools.cache
def drawn(seed: int) -> dict[str, Tensor]:
    """Gradients of the four parameters."""
    scales = noisy(1, len(STRAIGHT), seed=seed)[0]
    generator = torch.Generator().manual_seed(seed)
    return {name: scale * torch.randn(3, generator=generator) for name, scale in zip(STRAIGHT, scales, strict=True)}


class Layers:
    """A clipper over two layers of two parameters, each layer a group, in one order or another."""

    def __init__(self, method: ClipMethod, order: list[str]) -> None:
        self.pairs = [(name, Parameter(torch.zeros(3))) for name in order]
        groups = [
            {"params": [parameter for name, parameter in self.pairs if name.startswith(layer)], "name": layer}
            for layer in dict.fromkeys(name.split(".")[0] for name in order)
        ]
        self.clipper = Clipper(self.pairs, method, optimizer=SGD(groups, lr=0.1))

    def limits(self, seeds: range) -> list[dict[str, float]]:
        """Limits by the name of the scope at each of these steps."""
        result = []
        for seed in seeds:
            for name, parameter in self.pairs:
                parameter.grad = drawn(seed)[name].clone()
            stats = self.clipper.step()
            result.append(dict(zip(stats.scopes, stats.limits.tolist(), strict=True)))
        return result


STRAIGHT = ["encoder.weight", "encoder.bias", "head.weight", "head.bias"]
# A joint norm depends, in its last bit, on the order in which it is summed: within a scope it must be the same.
ORDERS = {
    "model": STRAIGHT,
    "group": [*STRAIGHT[2:], *STRAIGHT[:2]],
    "layer": [*STRAIGHT[2:], *STRAIGHT[:2]],
    "parameter": STRAIGHT[::-1],
}


class TestState:
    @every_learner
    @pytest.mark.parametrize(("per", "cut"), [*((per, 30) for per in ORDERS), ("parameter", 3)])
    def test_the_next_limits_are_bit_equal_in_another_order_of_the_scopes(
        self, make: Callable[..., ClipMethod], per: str, cut: int
    ) -> None:
        straight = Layers(make(per=per), STRAIGHT)
        straight.limits(range(cut))
        resumed = Layers(make(per=per), ORDERS[per])
        resumed.clipper.load_state_dict(through_a_file(straight.clipper.state_dict()))
        after = range(cut, cut + 100)
        one, other = straight.limits(after), resumed.limits(after)
        assert one == other
        assert per == "model" or list(one[0]) != list(other[0])
        assert math.isfinite(sum(one[-1].values())) or isinstance(make(), ZClip)
        # The memories too, name by name.
        mine, theirs = (fed.clipper.state_dict()["learned"] for fed in (straight, resumed))
        for name, values in mine["values"].items():
            by_name = dict(zip(mine["scopes"], values, strict=True))
            assert all(
                equal(by_name[scope], row) for scope, row in zip(theirs["scopes"], theirs["values"][name], strict=True)
            )

    def test_a_joint_warm_up_goes_on_where_it_was(self) -> None:
        method = EmaClip(per="parameter", warmup=20)
        straight = Layers(method, STRAIGHT)
        straight.limits(range(7))
        resumed = Layers(method, STRAIGHT)
        resumed.clipper.load_state_dict(through_a_file(straight.clipper.state_dict()))
        assert straight.limits(range(7, 40)) == resumed.limits(range(7, 40))

    @every_learner
    def test_scopes_that_appear_go_through_their_own_warm_up(self, make: Callable[..., ClipMethod]) -> None:
        rows = noisy(60, 3)
        small, alone = Fed(make(per="parameter"), ["a", "b"]), Fed(make(per="parameter"), ["new"])
        small.limits(rows[:30, :2])
        large = Fed(make(per="parameter"), ["new", "b", "a"])
        large.clipper.load_state_dict(through_a_file(small.clipper.state_dict()))
        # No warning is due.
        limits = large.limits(rows[30:, [2, 1, 0]])
        np.testing.assert_allclose(limits[:, 2:0:-1], small.limits(rows[30:, :2]), rtol=0)
        np.testing.assert_allclose(limits[:, :1], alone.limits(rows[30:, 2:]), rtol=0)
        assert large.memory["count"].tolist() == [30, 60, 60]

    @every_learner
    def test_lost_scopes_are_dropped_with_one_warning(self, make: Callable[..., ClipMethod]) -> None:
        rows = noisy(40, 3)
        large = Fed(make(per="parameter"), ["a", "b", "c"])
        large.limits(rows[:20])
        small = Fed(make(per="parameter"), ["b"])
        small.clipper.load_state_dict(through_a_file(large.clipper.state_dict()))
        with pytest.warns(RuntimeWarning) as record:
            limits = small.limits(rows[20:, 1:2])
        assert [str(one.message) for one in record] == [
            "dropped the learned clipping state of a.weight, c.weight: not in this run"
        ]
        np.testing.assert_allclose(limits, large.limits(rows[20:])[:, 1:2], rtol=0)

    @every_learner
    def test_no_scope_in_common_is_an_error(self, make: Callable[..., ClipMethod]) -> None:
        fed = Fed(make(per="parameter"), ["a", "b"])
        fed.limits(noisy(3, 2))
        other = Fed(make(per="parameter"), ["x"])
        other.clipper.load_state_dict(through_a_file(fed.clipper.state_dict()))
        with pytest.raises(
            ValueError, match=r"is about a\.weight, b\.weight, none of which is in this run \(x\.weight\)"
        ):
            other.step([1.0])

    @pytest.mark.parametrize(
        ("saved", "loaded"),
        [
            (QuantileClip(window=1000), QuantileClip(window=500)),
            (QuantileClip(window=1000), QuantileClip(window=None)),
            (QuantileClip(window=None), QuantileClip(window=1000)),
            (QuantileClip(), QuantileClip(norm_type=1.0)),
            (SigmaClip(window=128), SigmaClip(window=64)),
            (QuantileClip(window=128), SigmaClip(window=128)),
            (SigmaClip(), SigmaClip(per="layer")),
            (ZClip(), ZClip(per="parameter")),
            (EmaClip(per="layer"), EmaClip(per="parameter")),
            (ZClip(), EmaClip()),
        ],
        ids=str,
    )
    def test_what_another_configuration_learned_is_refused_and_both_are_named(
        self, saved: ClipMethod, loaded: ClipMethod
    ) -> None:
        def named_as(method: ClipMethod) -> str:
            window = f", window={method.window}" if hasattr(method, "window") else ""
            kind, p = type(method).__name__, method.norm_type
            return f"{kind}(per={method.per!r}, norm_type={p}, statistic='norm'{window})"

        fed = Fed(saved)
        fed.step([1.0])
        other = Fed(loaded)
        with pytest.raises(ValueError, match="use the same settings, or relearn=True, which learns afresh") as failure:
            other.clipper.load_state_dict(through_a_file(fed.clipper.state_dict()))
        assert f"learned by {named_as(saved)}, but this run clips by {named_as(loaded)};" in str(failure.value)

    @pytest.mark.parametrize(
        ("saved", "loaded"),
        [
            (QuantileClip(q=0.5), QuantileClip(q=0.9, include_current=True)),
            (SigmaClip(k=3.0), SigmaClip(k=6.0, warmup=63)),
            (ZClip(), ZClip(mode="mean", alpha=0.9, memory="faithful", max_norm=1.0)),
            (EmaClip(), EmaClip(ratio=2.0, beta=0.5, warmup=7)),
        ],
        ids=str,
    )
    def test_settings_that_the_memory_does_not_depend_on_may_change(
        self, saved: ClipMethod, loaded: ClipMethod
    ) -> None:
        fed, other = Fed(saved), Fed(loaded)
        fed.limits(noisy(5))
        other.clipper.load_state_dict(fed.clipper.state_dict())
        other.limits(noisy(5))
        assert other.memory["count"].tolist() == [10]

    @every_learner
    def test_what_was_loaded_stays_as_it_is(self, make: Callable[..., ClipMethod]) -> None:
        rows = noisy(60)
        fed = Fed(make())
        fed.limits(rows[:20])
        state = fed.clipper.state_dict()
        copy = through_a_file(state)
        runs = []
        for _ in range(2):
            resumed = Fed(make())
            resumed.clipper.load_state_dict(state)
            runs.append(resumed.limits(rows[20:]))
            assert equal(state, copy)
        assert (runs[0] == runs[1]).all()

    @every_learner
    def test_what_was_saved_does_not_change_with_later_steps(self, make: Callable[..., ClipMethod]) -> None:
        fed = Fed(make())
        fed.limits(noisy(20))
        state = fed.clipper.state_dict()
        copy = through_a_file(state)
        fed.limits(noisy(20, seed=1))
        assert equal(state, copy)
        assert not equal(fed.clipper.state_dict(), copy)

    def test_a_method_that_writes_in_place_reaches_no_checkpoint(self) -> None:
        class InPlace(EmaClip):
            def update(self, *arguments: Tensor) -> None:
                values = dict(self.state)
                super().update(*arguments)
                self.state = {name: values[name].copy_(value) for name, value in self.state.items()}

        rows = noisy(20)
        fed = Fed(InPlace(warmup=2))
        fed.limits(rows)
        state = fed.clipper.state_dict()
        copy = through_a_file(state)
        resumed = Fed(InPlace(warmup=2))
        resumed.clipper.load_state_dict(state)
        assert (fed.limits(rows) == resumed.limits(rows)).all()
        assert equal(state, copy)


# Runs of a trainer are short: so are these warm-ups.
SHORT: dict[str, Callable[..., ClipMethod]] = {
    "quantile": lambda **options: QuantileClip(q=0.5, window=3, **options),
    "quantile of all": lambda **options: QuantileClip(q=0.5, window=None, include_current=True, **options),
    "sigma": lambda **options: SigmaClip(k=0.5, window=3, warmup=2, **options),
    "zclip": lambda **options: ZClip(warmup=2, z_threshold=0.5, **options),
    "zclip faithful": lambda **options: ZClip(warmup=2, z_threshold=0.5, memory="faithful", **options),
    "ema": lambda **options: EmaClip(warmup=3, beta=0.8, warmup_max_norm=0.5, **options),
}
every_method = pytest.mark.parametrize("make", SHORT.values(), ids=SHORT)


def adamw(params: Any) -> AdamW:
    return AdamW(params, lr=0.05, weight_decay=0.1)


class TestInATrainer:
    @every_method
    @pytest.mark.parametrize("per", ["model", "parameter"])
    @pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`:UserWarning")
    def test_resuming_in_mid_epoch_is_bit_equal(
        self, tmp_path: Path, make: Callable[..., ClipMethod], per: str
    ) -> None:
        data = regression_data(10)

        def run(*callbacks: Callback, **options: Any) -> tuple[Any, ...]:
            module, clipping = Regression(adamw), GradientClipping(make(per=per))
            trainer = fit(
                module,
                data,
                clipping,
                *callbacks,
                enable_checkpointing=bool(callbacks),
                log_every_n_steps=10,
                **options,
            )
            rate = float(trainer.callback_metrics["gradclip/clip_rate"])
            return weights(module), trainer.optimizers[0].state_dict(), clipping.state_dict(), rate

        # In the warm-up and after it.
        saving = ModelCheckpoint(tmp_path, every_n_train_steps=1, save_top_k=-1, filename="{step}")
        straight = run(saving)
        assert 0 < straight[-1] < 1 or make is SHORT["ema"]
        for step in (1, 6):
            saved = tmp_path / f"step={step}.ckpt"
            state = torch.load(saved, weights_only=True)["callbacks"][KEY]["clippers"][0]
            assert state["learned"]["values"]["count"].tolist() == [step] * (4 if per == "parameter" else 1)
            assert equal(straight, run(ckpt_path=saved, weights_only=True))

    @every_method
    def test_each_of_two_adversaries_remembers_its_own_norms(self, make: Callable[..., ClipMethod]) -> None:
        # Manual optimization; each backward pass leaves gradients in the other's parameters.
        given = list(zip(gradients(9, seed=1), gradients(9, seed=2, scale=5.0), strict=True))
        clipping = GradientClipping(make())
        fit(Adversaries(), given, clipping)
        clippers = clipping.state_dict()["clippers"]
        assert set(clippers) == {0, 1}
        for index, names in ((0, ENCODER), (1, HEAD)):
            alone = Fed(make())
            alone.limits([[norm(pair[index], names)] for pair in given])
            values = clippers[index]["learned"]["values"]
            assert values.keys() == alone.memory.keys()
            for name, expected in alone.memory.items():
                torch.testing.assert_close(values[name], expected, rtol=1e-6, atol=0)
            assert values["count"].tolist() == [9]

    @every_method
    def test_observing_changes_nothing(self, make: Callable[..., ClipMethod]) -> None:
        data = regression_data(10)
        runs = []
        for callbacks in ([], [GradientClipping(make(), action="observe")], [GradientClipping(make())]):
            module = Regression(adamw)
            trainer = fit(module, data, *callbacks, log_every_n_steps=10)
            runs.append((weights(module), trainer.optimizers[0].state_dict()))
        assert equal(runs[0], runs[1])
        assert not equal(runs[0], runs[2])

    @every_method
    @pytest.mark.parametrize("per", ["model", "layer"])
    def test_observing_reports_what_clipping_would_do(self, make: Callable[..., ClipMethod], per: str) -> None:
        # Of gradients that do not depend on the weights, so that both see the same norms.
        given = gradients(20)
        metrics, memories = {}, {}
        for action in ("clip", "observe"):
            callback = GradientClipping(make(per=per), action=action)
            trainer = fit(Prescribed(), given, callback, log_every_n_steps=20)
            metrics[action] = {key: value for key, value in trainer.callback_metrics.items() if "gradclip" in key}
            memories[action] = callback.state_dict()["clippers"][0]["learned"]
        assert metrics["observe"].keys() == metrics["clip"].keys()
        for key in ("clip_rate", "coef_min", "norm", "norm_max", "norm_clipped"):
            assert float(metrics["observe"][f"gradclip/{key}"]) == float(metrics["clip"][f"gradclip/{key}"])
        assert float(metrics["clip"]["gradclip/clip_rate"]) > 0
        assert equal(memories["clip"], memories["observe"])


class Work(TorchDispatchMode):
    """Counts operations and the entries of their results."""

    def __init__(self) -> None:
        super().__init__()
        self.done: list[tuple[str, int]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = function(*args, **(kwargs or {}))
        tensors = [one for one in (result if isinstance(result, tuple) else (result,)) if isinstance(one, Tensor)]
        self.done.append((str(function), sum(one.numel() for one in tensors)))
        return result


@pytest.mark.parametrize("method", [QuantileClip(), SigmaClip(), ZClip(), EmaClip()], ids=str)
def test_a_step_costs_the_same_at_10000_as_at_1500(method: ClipMethod) -> None:
    sizes = torch.from_numpy(noisy(10_001, 2))
    learned.arrange(method, (), ("a", "b"), sizes[0])
    active = torch.ones(2, dtype=torch.bool)
    done = {}
    for step, size in enumerate(sizes):
        if step not in (1500, 10_000):
            method.update(size, size, active)
            continue
        with Work() as work:
            method.update(size, method.limit(size, None, step), active)
        done[step] = work.done
    assert done[1500] == done[10_000]
    assert len(done[1500]) > 5
    assert sum(value.numel() for value in method.state.values()) <= 2 * (getattr(method, "window", 2) + 1)
