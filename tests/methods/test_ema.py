"""EmaClip against the published AdaGC and a float64 reference."""

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch

from kit import peers, reference
from kit.streams import NOISES, Fed, noisy, shifted
from lightning_gradclip import EmaClip

# Of the parameters' gradients: AdaGC's warm-up clips their joint norm, its limits are relative.
SCALES = np.array([1.0, 0.1, 10.0, 0.5])


class Published:
    """AdaGC of pytorch_optimizer; without momentum its first moment is the clipped gradient."""

    def __init__(self, count: int, *, warmup: int, dtype: torch.dtype = torch.float32, **arguments: Any) -> None:
        self.fed = Fed(None, count, dtype=dtype, size=7)
        self.parameters = [parameter for _, parameter in self.fed.pairs]
        settings = {"betas": (0.0, 0.999), "weight_decay": 0.0, "lambda_rel": 1.04, "beta": 0.99, **arguments}
        kind = peers.module("pytorch_optimizer").AdaGC
        # The first step of theirs counts as its second.
        self.optimizer = kind(self.parameters, warmup_steps=warmup + 1, **settings)

    def step(self, norms: Any) -> tuple[list[float], list[float]]:
        """The norms after clipping, and gamma."""
        self.fed.give(norms)
        self.optimizer.step()
        states = [self.optimizer.state[parameter] for parameter in self.parameters]
        return [one["exp_avg"].double().norm().item() for one in states], [one["gamma"].item() for one in states]


def run(method: EmaClip, rows: np.ndarray, **options: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Norms after clipping, limits, and gamma after each step, `(steps, scopes)` each; 0: no gradient."""
    fed = Fed(method, rows.shape[1], **options)
    after, limits, gammas = [], [], []
    for row in rows:
        limits.append(fed.step(row).limits.tolist())
        after.append(fed.norms())
        gammas.append(fed.memory["gamma"].tolist())
    return np.array(after), np.array(limits), np.array(gammas)


class TestAgainstThePublishedCode:
    @pytest.mark.parametrize(
        ("warmup", "most", "foreach"), [(100, 1.0, False), (100, 1.0, True), (20, 50.0, False), (1, 1.0, True)]
    )
    def test_gammas_and_clipped_norms_are_those_of_adagc(self, warmup: int, most: float, foreach: bool) -> None:
        rows = noisy(500, 4) * SCALES
        theirs = Published(4, warmup=warmup, lambda_abs=most, foreach=foreach)
        expected = [theirs.step(row) for row in rows]
        method = EmaClip(per="parameter", warmup=warmup, warmup_max_norm=most)
        after, _, gammas = run(method, rows, dtype=torch.float32, size=7)
        np.testing.assert_allclose(after, [one for one, _ in expected], rtol=1e-5, atol=0)
        np.testing.assert_allclose(gammas, [one for _, one in expected], rtol=1e-5, atol=0)
        assert ((after < 0.999 * rows)[warmup:].mean(axis=0) > 0.3).all()
        assert (after[:warmup] < 0.999 * rows[:warmup]).any()

    def test_a_gradient_that_is_zero_once_in_the_warm_up_freezes_theirs_and_not_ours(self) -> None:
        rows = noisy(300, 2, spikes=0.0)
        rows[7, 1] = 0.0
        theirs = Published(2, warmup=100)
        published = np.array([theirs.step(row)[0] for row in rows])
        after, _, _ = run(EmaClip(per="parameter"), rows)
        assert (published[101:, 1] < 1e-6).all()
        assert (after[101:, 1] > 0.05).all()
        # Over the limit all three of them.
        assert 0.05 < after[101:, 1].mean() / after[101:, 0].mean() < 20


class TestAgainstTheReference:
    @pytest.mark.parametrize(
        "arguments",
        [
            {},
            {"ratio": 2.0, "beta": 0.9, "warmup": 1, "warmup_max_norm": 20.0},
            {"ratio": 0.9, "beta": 0.0, "warmup": 5, "warmup_max_norm": math.inf},
            {"ratio": 1.5, "beta": 0.5, "warmup": 60, "warmup_max_norm": 30.0},
        ],
        ids=str,
    )
    def test_limits_and_memory(self, arguments: dict[str, float]) -> None:
        rows = noisy(300, 4) * SCALES
        # Absent at the start, now and then, and for good.
        rows[:130, 1] = rows[::3, 2] = rows[150:, 3] = 0.0
        after, limits, gammas = run(EmaClip(per="parameter", **arguments), rows)
        expected = reference.ema(rows, **arguments)
        np.testing.assert_allclose(limits, np.where(expected.limits > 0, expected.limits, math.inf), rtol=1e-12, atol=0)
        np.testing.assert_allclose(gammas, expected.gammas, rtol=1e-12, atol=0)
        np.testing.assert_allclose(after, np.minimum(rows, expected.limits), rtol=1e-12, atol=0)
        assert (after < rows).sum(axis=0).min() > 5

    def test_one_scope(self) -> None:
        rows = noisy(300)
        after, limits, gammas = run(EmaClip(), rows)
        expected = reference.ema(rows)
        np.testing.assert_allclose(limits, expected.limits, rtol=1e-12, atol=0)
        np.testing.assert_allclose(gammas, expected.gammas, rtol=1e-12, atol=0)
        assert (after[:, 0] < rows[:, 0]).mean() > 0.5


class TestLimits:
    def test_all_scopes_share_one_coefficient_during_the_warm_up(self) -> None:
        after, _, _ = run(
            EmaClip(per="parameter", warmup=3, warmup_max_norm=1.0), np.array([[3.0, 4.0], [0.3, 0.4], [30.0, 40.0]])
        )
        np.testing.assert_allclose(after, [[0.6, 0.8], [0.3, 0.4], [0.6, 0.8]], rtol=1e-6)
        # Their joint norm is exactly that of clipping it with the 1e-6 of torch.
        assert math.hypot(*after[0]) == pytest.approx(5 / (5 + 1e-6), rel=1e-12)

    def test_a_joint_norm_within_the_limit_is_untouched(self) -> None:
        fed = Fed(EmaClip(per="parameter", warmup_max_norm=1.0), 2)
        assert fed.limits([[0.6, 0.8]]).tolist() == [[math.inf, math.inf]]
        assert fed.norms() == [0.6, 0.8]

    def test_the_smallest_clipped_norm_starts_the_mean(self) -> None:
        _, limits, gammas = run(EmaClip(warmup=3, warmup_max_norm=2.0), np.array([[9.0], [1.5], [1.75], [8.0], [8.0]]))
        assert gammas[:3, 0] == pytest.approx([18 / (9 + 1e-6), 1.5, 1.5], rel=1e-14)
        assert limits[3:, 0] == pytest.approx([1.04 * 1.5, 1.04 * 1.5 * (0.99 + 0.01 * 1.04)], rel=1e-14)

    def test_an_infinite_ratio_never_clips_after_the_warm_up(self) -> None:
        _, limits, _ = run(EmaClip(ratio=math.inf, warmup=1), np.array([[1.0], [5.0], [1e9], [2.0]]))
        assert (limits == math.inf).all()

    @pytest.mark.parametrize("norm", [0.1, 1 / 3, 7e-5])
    def test_a_constant_norm_is_within_its_limit(self, norm: float) -> None:
        after, _, _ = run(EmaClip(warmup=5), np.full((100, 1), norm))
        assert (after == norm).all()

    def test_no_epsilon_is_added_to_the_size_after_the_warm_up(self) -> None:
        after, _, _ = run(EmaClip(warmup=1, ratio=1.0), np.array([[1e-9], [4e-9]]))
        assert after[1].tolist() == pytest.approx([1e-9], rel=1e-14)


class TestLevelShifts:
    def test_the_level_is_followed_as_fast_as_the_card_says(self) -> None:
        rows, factors = shifted(300, 3700, (2.0, 4.0))
        method = EmaClip(per="parameter", warmup_max_norm=math.inf)
        levels = Fed(method, len(factors)).limits(rows) / 1.04
        before, after = levels[299], levels[300:]
        for scope, (factor, steps) in enumerate(
            zip(factors, [1800, 1800, 1800, 1800, 3600, 3600, 3600, 3600], strict=True)
        ):
            assert after[steps, scope] >= 0.98 * factor * before[scope]
        # Without noise the rise is at its fastest from the first step on, and not faster than said.
        for scope in (0, len(NOISES)):
            rise = after[1:1000, scope] / after[:999, scope]
            assert rise == pytest.approx([1 + 0.01 * 0.04] * 999, rel=1e-9)

    def test_a_higher_ratio_and_a_lower_beta_are_faster(self) -> None:
        rows, factors = shifted(50, 60, (4.0,))
        method = EmaClip(per="parameter", warmup=20, warmup_max_norm=math.inf, ratio=1.5, beta=0.9)
        levels = Fed(method, len(factors)).limits(rows)[50:, 0] / 1.5
        # While the level is over the limit it rises by (1 - beta) * (ratio - 1) a step.
        assert levels[20] == pytest.approx(1.05**20, rel=1e-12)
        assert 0.95 * 4.0 < levels[50] < 4.0


class TestArguments:
    def test_defaults(self) -> None:
        assert dataclasses.asdict(EmaClip()) == {
            "ratio": 1.04,
            "beta": 0.99,
            "warmup": 100,
            "warmup_max_norm": math.inf,
            "per": "model",
        }
        assert EmaClip().norm_type == 2.0

    def test_numbers_become_plain(self) -> None:
        method = EmaClip(ratio=2, beta=0, warmup=np.int64(5), warmup_max_norm=3)
        assert repr(method) == "EmaClip(ratio=2.0, beta=0.0, warmup=5, warmup_max_norm=3.0, per='model')"

    @pytest.mark.parametrize(
        ("arguments", "error", "said"),
        [
            ({"ratio": 0}, ValueError, "ratio must be > 0, got 0"),
            ({"ratio": "one"}, TypeError, "ratio must be a number, got 'one' (str)"),
            ({"beta": 1.0}, ValueError, "beta must be < 1, got 1.0; with 1 nothing would be learned after the warm-up"),
            ({"beta": -1}, ValueError, "beta must be >= 0, got -1; with 1 nothing would be learned after the warm-up"),
            ({"warmup": 0}, ValueError, "warmup must be >= 1, got 0; the mean must start from something"),
            (
                {"warmup": None},
                TypeError,
                "warmup must be a whole number, got None (NoneType); the mean must start from something",
            ),
            (
                {"warmup_max_norm": 0.0},
                ValueError,
                "warmup_max_norm must be > 0, got 0.0; inf does not clip during the warm-up",
            ),
            (
                {"warmup_max_norm": None},
                TypeError,
                "warmup_max_norm must be a number, got None (NoneType); inf does not clip during the warm-up",
            ),
            ({"per": "unit"}, ValueError, "per must be one of 'model', 'group', 'layer', 'parameter', got 'unit'"),
        ],
        ids=str,
    )
    def test_what_is_wrong_is_said_with_value_and_remedy(
        self, arguments: dict[str, object], error: type[Exception], said: str
    ) -> None:
        with pytest.raises(error) as failure:
            EmaClip(**arguments)
        assert str(failure.value) == said
