"""SigmaClip against OLMo-core's rule and a float64 reference."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from hydra import compose, initialize
from hydra.utils import instantiate
from omegaconf import DictConfig
from torch.optim import AdamW

from kit import reference
from kit.boring import Prescribed, fit, gradients, weights
from kit.streams import Fed, noisy, shifted
from lightning_gradclip import Clipper, GradientClipping, SigmaClip


def skip_spikes() -> DictConfig:
    """The preset as a user's application composes it."""
    with initialize(config_path=None, version_base="1.3"):
        return compose(overrides=["+callbacks/gradclip=skip_spikes"]).callbacks.gradclip


class TestAgainstOlmo:
    @pytest.mark.filterwarnings("ignore:dropped optimizer step:RuntimeWarning")
    def test_skip_spikes_drops_the_same_steps(self) -> None:
        method, action = instantiate(skip_spikes().method), skip_spikes().action
        dropped, expected = [], []
        for seed in (0, 1):
            rows = noisy(2000, seed=seed, spikes=0.015)
            fed = Fed(method, action=action, max_consecutive_skips=None)
            for row in rows:
                dropped.append(fed.step(row).skipped.item())
                assert all(parameter.grad is None for _, parameter in fed.pairs) == dropped[-1]
            expected += reference.olmo_drops(rows[:, 0])
        assert sum(one != other for one, other in zip(dropped, expected, strict=True)) == 0
        # Some of the spikes of each kind: the others stand among too many of their kind.
        assert 20 < sum(expected) < 60

    @pytest.mark.filterwarnings("ignore:dropped optimizer step:RuntimeWarning")
    def test_the_64th_norm_is_the_first_that_can_be_dropped(self) -> None:
        quiet = [[1.0 + 0.01 * (i % 3)] for i in range(63)]
        for before, drops in ((62, False), (63, True)):
            fed = Fed(instantiate(skip_spikes().method), action="skip")
            for row in quiet[:before]:
                assert not fed.step(row).skipped.item()
            assert fed.step([5.0]).skipped.item() is drops
            assert reference.olmo_drops([norm for (norm,) in quiet[:before]] + [5.0])[-1] is drops

    @pytest.mark.filterwarnings("ignore:dropped optimizer step:RuntimeWarning")
    def test_weights_and_optimizer_do_not_notice_a_dropped_step(self) -> None:
        given = gradients(72, scale=0.01)
        bad = {name: 1e4 * value for name, value in given[0].items()}

        def run(batches: list) -> tuple:
            module = Prescribed(lambda params: AdamW(params, lr=0.01, weight_decay=0.1))
            trainer = fit(module, batches, callback := instantiate(skip_spikes()))
            state = trainer.optimizers[0].state_dict()["state"]
            return weights(module), state, float(trainer.callback_metrics["gradclip/skipped"]), callback

        one, other = run(given), run([*given[:70], bad, *given[70:]])
        assert (one[2], other[2]) == (0.0, 1.0)
        torch.testing.assert_close(one[:2], other[:2], rtol=0, atol=0)
        # The norm is remembered as it was measured.
        ring = other[3].state_dict()["clippers"][0]["learned"]["values"]["ring"]
        assert ring[torch.isfinite(ring)].max().item() > 100


class TestAgainstTheReference:
    @pytest.mark.parametrize(
        "arguments",
        [
            {"k": 3.0, "window": 128, "warmup": 64},
            {"k": 0.0, "window": 20, "warmup": 20},
            {"k": 0.5, "window": 2, "warmup": 2},
            {"k": 2.0, "window": 31, "warmup": 3},
        ],
        ids=str,
    )
    def test_the_limit_is_mean_and_k_sample_deviations_of_the_window(self, arguments: dict) -> None:
        rows = noisy(500, 2)
        method = SigmaClip(**arguments, per="parameter")
        fed = Fed(method, 2)
        limits, after = [], []
        for row in rows:
            limits.append(fed.step(row).limits.tolist())
            after.append(fed.norms())
        expected = np.stack([reference.sigma_limits(column, **arguments) for column in rows.T], axis=1)
        assert np.isinf(expected).sum() == 2 * arguments["warmup"]
        np.testing.assert_allclose(limits, expected, rtol=1e-12, atol=0)
        np.testing.assert_allclose(after, np.minimum(rows, expected), rtol=1e-12, atol=0)
        assert (after < rows).any(axis=0).all()

    def test_the_defaults_are_those_of_the_first_case(self) -> None:
        rows = noisy(200)
        limits = Fed(SigmaClip()).limits(rows)[:, 0]
        expected = reference.sigma_limits(rows[:, 0], k=3.0, window=128, warmup=64)
        np.testing.assert_allclose(limits, expected, rtol=1e-12, atol=0)

    def test_the_norms_are_of_the_given_p(self) -> None:
        rows = noisy(20, 2)
        limits = Fed(SigmaClip(norm_type=math.inf, window=5, warmup=3), 2).limits(rows)[:, 0]
        expected = reference.sigma_limits(rows.max(axis=1), k=3.0, window=5, warmup=3)
        np.testing.assert_allclose(limits, expected, rtol=1e-12, atol=0)


class TestLimits:
    @pytest.mark.parametrize("norm", [0.1, 1 / 3, 7e-5, 12345.678])
    @pytest.mark.parametrize("k", [1.0, 6.0])
    def test_a_constant_norm_is_never_over_its_limit(self, norm: float, k: float) -> None:
        fed = Fed(SigmaClip(k=k, window=40, warmup=10), action="skip")
        for _ in range(100):
            assert not fed.step([norm]).skipped.item()
        with pytest.warns(RuntimeWarning, match="dropped optimizer step 100"):
            assert fed.step([1.001 * norm]).skipped.item()

    def test_an_infinite_k_never_clips(self) -> None:
        limits = Fed(SigmaClip(k=math.inf, window=4, warmup=2)).limits([[1.0], [1.0], [1.0], [50.0], [1e9], [1.0]])
        assert (limits == math.inf).all()

    def test_no_epsilon_is_added_to_the_size(self) -> None:
        fed = Fed(SigmaClip(window=2, warmup=2))
        for norm in (1e-9, 1e-9, 4e-9):
            fed.step([norm])
        assert fed.norms() == pytest.approx([1e-9], rel=1e-14)

    def test_a_spike_in_the_window_hides_others(self) -> None:
        # As the card says: with more than one in 1 + k**2 the rule stops seeing them.
        def seen(every: int) -> bool:
            rows = [[100.0 if i % every == 0 else 1.0] for i in range(1, 130)]
            limits = Fed(SigmaClip(k=3.0, window=60, warmup=60)).limits(rows)[:, 0]
            return limits[-1] < 100.0

        assert not seen(every=9)
        assert seen(every=12)


class TestLevelShifts:
    WINDOW = 60

    @pytest.mark.parametrize("k", [3.0, 6.0])
    def test_a_shift_is_followed_once_it_fills_the_window(self, k: float) -> None:
        rows, factors = shifted(100, 2 * self.WINDOW, (2.0, 4.0))
        limits = Fed(SigmaClip(k=k, window=self.WINDOW, warmup=30, per="parameter"), len(factors)).limits(rows)
        after, new = limits[100:], rows[100:]
        for scope in range(len(factors)):
            expected = reference.sigma_limits(new[:, scope], k=k, window=self.WINDOW, warmup=30)
            np.testing.assert_allclose(after[self.WINDOW :, scope], expected[self.WINDOW :], rtol=1e-12)
        # At first it was over the limit.
        assert (new[0, :3] > after[0, :3]).all()
        assert (new[self.WINDOW :] > after[self.WINDOW :]).mean() <= 0.02

    def test_norms_of_dropped_steps_count_so_that_dropping_ends(self) -> None:
        fed = Fed(SigmaClip(k=6.0, window=60, warmup=30), action="skip", max_consecutive_skips=None)
        rows, _ = shifted(100, 60, (4.0,))
        with pytest.warns(RuntimeWarning, match=r"over its limit"):
            skipped = [fed.step([row[1]]).skipped.item() for row in rows]
        assert skipped[100]
        assert not any(skipped[:100])
        assert not any(skipped[110:])

    def test_steps_dropped_one_after_another_end_in_an_error_that_says_what_to_do(self) -> None:
        fed = Fed(SigmaClip(k=0.0, window=60, warmup=2), action="skip", max_consecutive_skips=3)
        fed.limits([[1.0], [1.0]])
        with pytest.warns(RuntimeWarning, match="dropped optimizer step 2"):
            fed.limits([[2.0], [4.0], [8.0]])
        with pytest.raises(FloatingPointError) as failure:
            fed.step([16.0])
        assert str(failure.value) == (
            "4 optimizer steps in a row were dropped, the last at optimizer step 5: the size 16 of scope 'model' is "
            "over its limit 3.2; training makes no progress. Lower the learning rate, check the data, raise the "
            "limit, or raise max_consecutive_skips (now 3)"
        )


class TestArguments:
    def test_defaults(self) -> None:
        assert dataclasses.asdict(SigmaClip()) == {
            "k": 3.0,
            "window": 128,
            "warmup": 64,
            "per": "model",
            "norm_type": 2.0,
            "loss": False,
        }

    def test_numbers_become_plain(self) -> None:
        method = SigmaClip(k=3, window=np.int64(5), warmup=np.int32(2), norm_type=1)
        assert repr(method) == "SigmaClip(k=3.0, window=5, warmup=2, per='model', norm_type=1.0, loss=False)"

    @pytest.mark.parametrize(
        ("arguments", "error", "said"),
        [
            ({"k": -1}, ValueError, "k must be >= 0, got -1; k counts standard deviations above the mean"),
            (
                {"k": "one"},
                TypeError,
                "k must be a number, got 'one' (str); k counts standard deviations above the mean",
            ),
            ({"window": 1}, ValueError, "window must be >= 2, got 1"),
            ({"window": None}, TypeError, "window must be a whole number, got None (NoneType)"),
            ({"warmup": 1}, ValueError, "warmup must be >= 2, got 1; one norm has no standard deviation"),
            (
                {"warmup": 64.0},
                TypeError,
                "warmup must be a whole number, got 64.0 (float); one norm has no standard deviation",
            ),
            (
                {"window": 50},
                ValueError,
                "warmup=64 exceeds window=50, so that nothing would ever be limited; "
                "use a warmup of at most the window",
            ),
            ({"per": "unit"}, ValueError, "per must be one of 'model', 'group', 'layer', 'parameter', got 'unit'"),
            ({"norm_type": -2}, ValueError, "norm_type must be > 0, got -2; the usual norm is norm_type=2"),
        ],
        ids=str,
    )
    def test_what_is_wrong_is_said_with_value_and_remedy(
        self, arguments: dict[str, object], error: type[Exception], said: str
    ) -> None:
        with pytest.raises(error) as failure:
            SigmaClip(**arguments)
        assert str(failure.value) == said


class TestLosses:
    """loss=True: OLMo's rule on the norm and the loss."""

    @pytest.mark.filterwarnings("ignore:dropped optimizer step:RuntimeWarning")
    def test_the_steps_of_olmos_rule_on_both_are_dropped_also_after_a_restart(self) -> None:
        rows, losses = noisy(800, seed=3, spikes=0.01), noisy(800, seed=4, spikes=0.01)[:, 0]
        method = dataclasses.replace(instantiate(skip_spikes().method), loss=True)
        fed, dropped = Fed(method, action="skip", max_consecutive_skips=None), []
        for step, (row, loss) in enumerate(zip(rows, losses, strict=True)):
            if step == 400:
                state, fed = fed.clipper.state_dict(), Fed(method, action="skip", max_consecutive_skips=None)
                fed.clipper.load_state_dict(state)
            fed.give(row)
            dropped.append(fed.clipper.step(loss=torch.tensor(loss)).skipped.item())
        by_norm, by_loss = reference.olmo_drops(rows[:, 0]), reference.olmo_drops(losses)
        assert dropped == [one or other for one, other in zip(by_norm, by_loss, strict=True)]
        assert sum(by_norm) > 2
        assert sum(one and not other for one, other in zip(by_loss, by_norm, strict=True)) > 3

    def test_a_trainer_tells_it_the_loss_and_the_reason_is_named(self) -> None:
        class Jumps(Prescribed):
            def training_step(self, batch, batch_idx):
                return self.loss(batch) + (100.0 if batch_idx == 9 else 0.1 * (batch_idx % 3))

        module = Jumps(lambda params: torch.optim.SGD(params, lr=0.0))
        callback = GradientClipping(SigmaClip(k=5.0, window=8, warmup=4, loss=True), action="skip")
        with pytest.warns(RuntimeWarning, match=r"dropped optimizer step 9: the loss 98.* is over its limit"):
            trainer = fit(module, gradients(1) * 12, callback)
        assert trainer.callback_metrics["gradclip/skipped"] == 1

    def test_what_it_cannot_do_is_refused(self) -> None:
        method = SigmaClip(loss=True)
        with pytest.raises(ValueError, match=r"action='clip' does not; use action='skip'"):
            GradientClipping(method)
        weight = torch.nn.Parameter(torch.zeros(2))
        weight.grad = torch.ones(2)
        with pytest.raises(ValueError, match=r"was given none; write clipper.step\(loss=loss\)"):
            Clipper([("w", weight)], method, action="skip").step()
