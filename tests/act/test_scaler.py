"""Plain loops with a GradScaler on the CPU."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import SGD, AdamW, Optimizer

from kit.gradients import Witness, named, same_bits
from kit.running_max import RunningMax
from lightning_gradclip import ClipMethod, Clipper, NormClip, ValueClip
from lightning_gradclip.act import scaler as amp

# A power of two: scaling and unscaling are exact, so that runs with and without can be compared to the bit.
SCALE = 1024.0
# Gradients larger than 2 overflow.
OVERFLOWS = 2.0**127


class Loop:
    """A small network trained with a scaler."""

    def __init__(
        self,
        method: ClipMethod | None = None,
        *,
        kind: type[Optimizer] = AdamW,
        scale: float = SCALE,
        fused: bool = False,
        scaler: GradScaler | None = None,
        **options: Any,
    ) -> None:
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
        self.optimizer = kind(self.net.parameters(), lr=0.05, **({"fused": True} if fused else {}))
        self.scaler = scaler or GradScaler("cpu", init_scale=scale, growth_interval=10**6)
        self.clipper = Clipper(self.net.named_parameters(), method, optimizer=self.optimizer, **options)
        self._seed = 0

    def backward(self) -> None:
        self.optimizer.zero_grad()
        self._seed += 1
        inputs = torch.randn(16, 4, generator=torch.Generator().manual_seed(self._seed))
        self.scaler.scale(self.net(inputs).square().sum()).backward()

    def finish(self) -> None:
        self.scaler.step(self.optimizer)
        self.scaler.update()

    def step(self) -> Any:
        self.backward()
        stats = self.clipper.step(self.scaler)
        self.finish()
        return stats

    def gradients(self) -> list[Tensor]:
        return [parameter.grad.clone() for parameter in self.net.parameters()]

    def everything(self) -> list[Tensor]:
        state = self.optimizer.state_dict()["state"]
        tensors = [value for entry in state.values() for value in entry.values() if isinstance(value, Tensor)]
        return [tensor.detach().clone() for tensor in (*self.net.parameters(), *tensors)]


def assert_same(one: list[Tensor], other: list[Tensor]) -> None:
    assert len(one) == len(other) >= 4
    assert all(same_bits(a, b) for a, b in zip(one, other, strict=True))


def assert_close(one: list[Tensor], other: list[Tensor], rtol: float) -> None:
    assert len(one) == len(other) >= 4
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=0)


class TestScaledGradients:
    @pytest.mark.parametrize("kind", [AdamW, SGD])
    @pytest.mark.parametrize("fused", [False, True])
    def test_clipping_is_that_of_unscale_and_clip_grad_norm_(self, kind: type[Optimizer], fused: bool) -> None:
        ours, theirs = (Loop(NormClip(max_norm=0.5), kind=kind, fused=fused) for _ in range(2))
        for loop in (ours, theirs):
            loop.backward()
        stats = ours.clipper.step(ours.scaler)
        theirs.scaler.unscale_(theirs.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(theirs.net.parameters(), 0.5)
        assert norm > 0.5
        assert stats.norm.item() == pytest.approx(norm.item(), rel=1e-6)
        assert_close(ours.gradients(), theirs.gradients(), rtol=1e-6)
        before = ours.everything()
        for loop in (ours, theirs):
            loop.finish()
        assert not same_bits(ours.net[0].weight, before[0])
        assert_close(ours.everything(), theirs.everything(), rtol=1e-5)

    @pytest.mark.parametrize("fused", [False, True])
    def test_training_within_the_limit_is_bit_identical_to_training_without_a_scaler(self, fused: bool) -> None:
        scaled = Loop(NormClip(max_norm=1e6), fused=fused)
        plain = Loop(NormClip(max_norm=1e6), fused=fused, scaler=GradScaler("cpu", enabled=False))
        for _ in range(4):
            one, other = scaled.step(), plain.step()
            assert one.norm.item() == other.norm.item()
        assert_same(scaled.everything(), plain.everything())

    def test_gradients_that_are_unscaled_already_are_taken_as_they_are(self) -> None:
        loop, other = Loop(NormClip(max_norm=0.5)), Loop(NormClip(max_norm=0.5))
        loop.backward()
        loop.scaler.unscale_(loop.optimizer)
        stats = loop.clipper.step(loop.scaler)
        assert stats.norm.item() == other.step().norm.item()
        loop.finish()
        assert_same(loop.everything(), other.everything())

    def test_the_scaler_knows_that_they_are_unscaled(self) -> None:
        loop = Loop(NormClip())
        loop.backward()
        loop.clipper.step(loop.scaler)
        with pytest.raises(RuntimeError, match=r"unscale_\(\) has already been called"):
            loop.scaler.unscale_(loop.optimizer)

    @pytest.mark.parametrize("fused", [False, True])
    @pytest.mark.parametrize("method", [None, NormClip(max_norm=1e-3), NormClip(statistic="rms", per="layer")], ids=str)
    def test_observing_writes_nothing_and_reports_unscaled_norms(self, method: ClipMethod | None, fused: bool) -> None:
        watched, bare = Loop(method, action="observe", fused=fused), Loop(fused=fused)
        plain = Loop(method, action="observe", fused=fused, scaler=GradScaler("cpu", enabled=False))
        for _ in range(3):
            watched.backward()
            witness = Witness(list(watched.net.named_parameters()))
            stats = watched.clipper.step(watched.scaler)
            assert witness.written() == set()
            watched.finish()
            bare.backward()
            bare.finish()
            expected = plain.step()
            assert stats.norm.item() == expected.norm.item()
            assert stats.sizes.tolist() == expected.sizes.tolist()
        assert_same(watched.everything(), bare.everything())

    def test_a_clipper_without_an_optimizer_refuses_gradients_it_cannot_unscale(self) -> None:
        loop = Loop()
        clipper = Clipper(loop.net.named_parameters(), NormClip(max_norm=0.5))
        loop.backward()
        with pytest.raises(ValueError, match="optimizer="):
            clipper.step(loop.scaler)

    def test_two_optimizers_share_a_scaler(self) -> None:
        pairs = named({"a": torch.tensor([3.0 * SCALE]), "b": torch.tensor([4.0 * SCALE])})
        scaler = GradScaler("cpu", init_scale=SCALE)
        scaler.scale(torch.ones(()))
        optimizers = [SGD([parameter], lr=0.1) for _, parameter in pairs]
        clippers = [Clipper(pairs, NormClip(max_norm=1.0), optimizer=optimizer) for optimizer in optimizers]
        norms = []
        for clipper, optimizer in zip(clippers, optimizers, strict=True):
            norms.append(clipper.step(scaler).norm.item())
            scaler.step(optimizer)
        scaler.update()
        assert norms == [3.0, 4.0]
        assert [p.item() for _, p in pairs] == pytest.approx([0.4, 0.4], rel=1e-6)

    def test_an_optimizer_without_gradients_is_left_to_the_scaler(self) -> None:
        loop = Loop(NormClip())
        loop.backward()
        loop.optimizer.zero_grad()
        assert loop.clipper.step(loop.scaler).norm.item() == 0.0
        assert not amp.is_unscaled(loop.scaler, loop.optimizer)
        assert not loop.clipper.has_news


class TestOverflow:
    @pytest.mark.parametrize("fused", [False, True])
    @pytest.mark.parametrize("nonfinite", ["skip", "zero", "raise", "ignore"])
    def test_the_scaler_drops_the_step_and_nobody_raises(self, nonfinite: str, fused: bool) -> None:
        loop = Loop(NormClip(), scale=OVERFLOWS, fused=fused, nonfinite=nonfinite, max_consecutive_skips=0)
        bare = Loop(scale=OVERFLOWS, fused=fused)
        before = loop.everything()
        for i in range(3):
            stats = loop.step()
            assert (stats.finite.item(), stats.skipped.item()) == (False, True)
            assert loop.scaler.get_scale() == OVERFLOWS / 2 ** (i + 1)
            bare.backward()
            bare.finish()
        assert_same([parameter.detach() for parameter in loop.net.parameters()], before)
        # A fused optimizer makes its state and leaves it at step 0.
        assert_same(loop.everything(), bare.everything())
        result = loop.clipper.metrics()
        assert result == {"skipped": 0.0, "nonfinite": 0.0, "overflows": 3.0}

    def test_training_goes_on_when_the_scale_has_come_down(self) -> None:
        loop = Loop(NormClip(max_norm=0.5), scale=OVERFLOWS, nonfinite="raise")
        finite = [loop.step().finite.item() for _ in range(20)]
        overflows = finite.index(True)
        assert 0 < overflows < 10
        assert all(finite[overflows:])
        result = loop.clipper.metrics()
        assert (result["overflows"], result["nonfinite"], result["skipped"]) == (overflows, 0.0, 0.0)
        assert math.isfinite(result["norm_max"])

    def test_nothing_is_learned_from_an_overflow(self) -> None:
        loop = Loop(RunningMax(per="parameter"))
        loop.step()
        before = loop.clipper.state_dict()["learned"]["values"]
        loop.scaler.update(OVERFLOWS)
        assert loop.step().skipped.item() is True
        after = loop.clipper.state_dict()["learned"]["values"]
        assert all(torch.equal(before[name], after[name]) for name in ("largest", "recent"))
        loop.scaler.update(SCALE)
        assert loop.step().finite.item() is True
        assert not torch.equal(loop.clipper.state_dict()["learned"]["values"]["recent"], before["recent"])

    def test_an_overflow_neither_counts_as_a_dropped_step_nor_as_a_good_one(self) -> None:
        pairs = named({"a": torch.tensor([0.0])})
        optimizer = SGD([pairs[0][1]], lr=0.1)
        clipper = Clipper(pairs, NormClip(), optimizer=optimizer, max_consecutive_skips=1)
        scaler = GradScaler("cpu", init_scale=SCALE)
        scaler.scale(torch.ones(()))

        def bad_step(by: GradScaler | None) -> None:
            pairs[0][1].grad = torch.tensor([math.inf])
            clipper.step(by)
            if by is not None:
                by.step(optimizer)
                by.update()

        bad_step(scaler)
        with pytest.warns(RuntimeWarning, match="dropped optimizer step 1"):
            bad_step(None)
        bad_step(scaler)
        with pytest.raises(FloatingPointError, match=r"^2 optimizer steps in a row"):
            bad_step(None)

    @pytest.mark.parametrize("action", ["clip", "skip"])
    def test_an_overflow_of_one_parameter_leaves_the_others_to_the_scaler(self, action: str) -> None:
        pairs = named({"a": torch.tensor([math.inf]), "b": torch.tensor([5.0 * SCALE])})
        optimizer = SGD([parameter for _, parameter in pairs], lr=0.1)
        scaler = GradScaler("cpu", init_scale=SCALE)
        scaler.scale(torch.ones(()))
        Clipper(pairs, NormClip(per="parameter"), optimizer=optimizer, action=action).step(scaler)
        # Unscaled, not clipped, not dropped: the scaler will not step.
        assert pairs[1][1].grad.item() == 5.0
        scaler.step(optimizer)
        scaler.update()
        assert [parameter.item() for _, parameter in pairs] == [0.5, 0.5]
        assert scaler.get_scale() == SCALE / 2

    def test_a_disabled_scaler_is_none(self) -> None:
        loop = Loop(NormClip(), scaler=GradScaler("cpu", enabled=False), nonfinite="raise")
        loop.backward()
        loop.net[0].weight.grad[0, 0] = math.nan
        with pytest.raises(FloatingPointError, match=r"0\.weight"):
            loop.clipper.step(loop.scaler)


class TestSkipping:
    @pytest.mark.parametrize("fused", [False, True])
    def test_a_step_over_the_limit_leaves_everything_bit_identical(self, fused: bool) -> None:
        loop = Loop(NormClip(max_norm=1e3), fused=fused, action="skip")
        loop.step()
        before, scale = loop.everything(), loop.scaler.get_scale()
        loop.backward()
        loop.net[0].weight.grad[0, 0] = 2e3 * SCALE
        with pytest.warns(RuntimeWarning, match="dropped optimizer step 1"):
            assert loop.clipper.step(loop.scaler).skipped.item() is True
        loop.finish()
        assert_same(loop.everything(), before)
        # Not an overflow: the scale stays.
        assert loop.scaler.get_scale() == scale
        result = loop.clipper.metrics()
        assert (result["skipped"], "overflows" in result) == (1.0, False)


def test_whether_a_scaler_scales() -> None:
    assert not amp.is_enabled(None)
    assert not amp.is_enabled(GradScaler("cpu", enabled=False))
    assert amp.is_enabled(GradScaler("cpu"))


def test_what_the_gradients_still_carry() -> None:
    loop = Loop()
    loop.backward()
    assert amp.pending_scale(loop.scaler, loop.optimizer) == SCALE
    amp.unscale_(loop.scaler, loop.optimizer)
    assert amp.is_unscaled(loop.scaler, loop.optimizer)
    assert amp.pending_scale(loop.scaler, loop.optimizer) == 1.0
    # Once only.
    before = loop.gradients()
    amp.unscale_(loop.scaler, loop.optimizer)
    assert_same(loop.gradients(), before)
    loop.finish()
    assert not amp.is_unscaled(loop.scaler, loop.optimizer)


def test_over_limit_skips_end_a_run_under_a_scaler_too() -> None:
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    scaler = torch.amp.GradScaler("cpu")
    options = {"action": "skip", "max_consecutive_skips": 3, "optimizer": optimizer}
    clipper = Clipper([("p", parameter)], NormClip(), **options)

    def step() -> bool:
        scaler.scale(1e6 * parameter.sum()).backward()
        skipped = clipper.step(scaler).skipped.item()
        scaler.step(optimizer)
        scaler.update()
        return skipped

    with pytest.warns(RuntimeWarning, match="over its limit"):
        assert step()
    assert all(step() for _ in range(2))
    # What the scaler drops to find its scale is none of them.
    scaler.scale(math.inf * parameter.sum()).backward()
    assert clipper.step(scaler).overflow.item()
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()
    with pytest.raises(FloatingPointError, match=r"4 optimizer steps in a row were dropped.*over its limit"):
        step()
    assert parameter.item() == 0.0
    assert clipper.metrics()["skipped"] == 4.0


class TestFirstStepOfFusedSGD:
    """torch's takes memory for its momentum and leaves it as it is where the scaler drops the step."""

    @pytest.mark.parametrize(
        "options",
        [{}, {"fold": True}, {"nonfinite": "ignore"}, {"nonfinite": "ignore", "fold": True}, {"exclude": "large"}],
        ids=str,
    )
    def test_an_overflow_leaves_no_momentum(self, options: dict[str, Any]) -> None:
        large, small = nn.Parameter(torch.zeros(1000)), nn.Parameter(torch.zeros(1000))
        pairs, scaler = [("large", large), ("small", small)], GradScaler("cpu", init_scale=SCALE)
        optimizer = SGD([large, small], lr=0.1, momentum=0.9, fused=True)
        clipper = Clipper(pairs, NormClip(max_norm=1.0), optimizer=optimizer, **options)
        for overflows in (True, True, False, False):
            optimizer.zero_grad()
            scaler.scale((large * (1e38 if overflows else 1.0)).sum() + small.sum()).backward()
            stats = clipper.step(scaler)
            if "exclude" not in options:
                assert stats.skipped.item() == overflows
            # What lies in memory that is free.
            del [torch.full((1000,), 7e30) for _ in range(20)][:]
            scaler.step(optimizer)
            scaler.update()
            assert bool(optimizer.state) is not overflows
        # Two steps with momentum: 1 + 1.9 times the learning rate.
        each = 0.29 / math.sqrt(1000 if "exclude" in options else 2000)
        torch.testing.assert_close(small.detach(), torch.full((1000,), -each), rtol=1e-5, atol=0)
        assert scaler.get_scale() == SCALE / 4


@pytest.mark.parametrize("shape", [(), (7,), (200, 200)])
def test_a_gradient_with_the_negative_bit_is_unscaled(shape: tuple[int, ...]) -> None:
    parameter = nn.Parameter(torch.ones(shape))
    parameter.grad = torch._neg_view(torch.full(shape, -SCALE))
    optimizer, scaler = SGD([parameter], lr=1.0), GradScaler("cpu", init_scale=SCALE)
    scaler.scale(torch.ones(()))
    stats = Clipper([("w", parameter)], NormClip(max_norm=0.5), optimizer=optimizer).step(scaler)
    assert stats.norm.item() == pytest.approx(math.sqrt(parameter.numel()), rel=1e-6)
    assert parameter.grad.double().norm().item() == pytest.approx(0.5, rel=1e-5)


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_the_row_of_an_overflow_says_that_nothing_is_left(bad: float) -> None:
    parameter = nn.Parameter(torch.ones(2))
    parameter.grad = torch.tensor([bad, 1.0])
    optimizer, scaler = SGD([parameter], lr=1.0), GradScaler("cpu", init_scale=SCALE)
    scaler.scale(torch.ones(()))
    for method in (NormClip(), NormClip(per="parameter"), ValueClip()):
        stats = Clipper([("w", parameter)], method, optimizer=optimizer, nonfinite="ignore").step(scaler)
        assert (stats.norm_clipped.item(), stats.coef.item(), stats.skipped.item()) == (0.0, 0.0, True)
