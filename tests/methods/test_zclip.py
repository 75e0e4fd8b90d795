"""ZClip against its published implementation and a float64 reference."""

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from kit import peers, reference
from kit.streams import NOISES, Fed, noisy, shifted
from lightning_gradclip import ZClip

# Our modes and theirs.
PUBLISHED = {
    "reciprocal": {"mode": "zscore", "clip_option": "adaptive_scaling"},
    "mean": {"mode": "zscore", "clip_option": "mean"},
    "max": {"mode": "percentile"},
}


def published(rows: np.ndarray, **arguments: object) -> tuple[np.ndarray, Any]:
    """Norms after clipping by the published code, and its object."""
    peer = peers.module("zclip").ZClip(**arguments)
    fed = Fed(None, dtype=torch.float32, size=7)
    model = nn.ParameterList([parameter for _, parameter in fed.pairs])
    after = []
    for row in rows:
        fed.give(row)
        peer.step(model)
        after.append(fed.norms()[0])
    return np.array(after), peer


class TestAgainstThePublishedCode:
    @pytest.mark.parametrize("mode", PUBLISHED)
    @pytest.mark.parametrize("max_norm", [None, 6.0])
    @pytest.mark.parametrize("clip_factor", [1.0, 0.7])
    def test_faithful_memory_gives_the_same_gradients(
        self, mode: str, max_norm: float | None, clip_factor: float
    ) -> None:
        rows = noisy(520, spikes=0.02)
        after, peer = published(rows, **PUBLISHED[mode], max_grad_norm=max_norm, clip_factor=clip_factor)
        # There the factor has no effect on the other modes.
        ours = clip_factor if mode == "reciprocal" else 1.0
        method = ZClip(mode=mode, max_norm=max_norm, clip_factor=ours, memory="faithful")
        fed = Fed(method, dtype=torch.float32, size=7)
        limits, got = [], []
        for row in rows:
            limits.append(fed.step(row).limit.item())
            got.append(fed.norms()[0])
        np.testing.assert_allclose(got, after, rtol=1e-5, atol=0)
        assert fed.memory["mean"].item() == pytest.approx(peer.mean, rel=1e-5)
        assert fed.memory["var"].item() == pytest.approx(peer.var, rel=1e-5)
        over, spikes = after < 0.999 * rows[:, 0], np.array(limits) != max_norm
        assert (over & spikes).sum() > (15 if max_norm is None else 1)
        # max_norm limits during the warm-up too, and later where it is the smaller of two limits.
        assert (over & ~spikes)[:25].any() == (over & ~spikes)[25:].any() == (max_norm is not None)


def with_memory(method: ZClip, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Norms after clipping, limits, means and variances, `(steps, scopes)` each."""
    fed = Fed(method, rows.shape[1])
    results = []
    for row in rows:
        limits, memory = fed.step(row).limits.tolist(), fed.memory
        results.append((fed.norms(), limits, memory["mean"].tolist(), memory["var"].tolist()))
    return tuple(map(np.array, zip(*results, strict=True)))


class TestAgainstTheReference:
    @pytest.mark.parametrize("mode", PUBLISHED)
    @pytest.mark.parametrize("memory", ["winsorized", "faithful"])
    @pytest.mark.parametrize(
        "arguments",
        [
            {},
            {"max_norm": 4.0, "clip_factor": 0.7},
            {"z_threshold": 1.0, "alpha": 0.8, "warmup": 2, "clip_factor": 1.3},
            {"alpha": 0.0, "warmup": 7},
        ],
        ids=str,
    )
    def test_limits_and_memory(self, mode: str, memory: str, arguments: dict[str, float]) -> None:
        rows = noisy(160, 2, spikes=0.06)
        after, limits, means, variances = with_memory(
            ZClip(mode=mode, memory=memory, per="parameter", **arguments), rows
        )
        for scope, sizes in enumerate(rows.T):
            expected = reference.zclip(sizes, mode=mode, memory=memory, **arguments)
            np.testing.assert_allclose(limits[:, scope], expected.limits, rtol=1e-12, atol=0)
            np.testing.assert_allclose(means[:, scope], expected.means, rtol=1e-12, atol=0)
            np.testing.assert_allclose(variances[:, scope], expected.variances, rtol=1e-9, atol=1e-24)
            np.testing.assert_allclose(after[:, scope], np.minimum(sizes, expected.limits), rtol=1e-12, atol=0)
            assert (after[:, scope] < sizes).sum() > 3

    def test_the_defaults(self) -> None:
        rows = noisy(300)
        expected = reference.zclip(rows[:, 0], memory="winsorized", mode="reciprocal")
        np.testing.assert_allclose(Fed(ZClip()).limits(rows)[:, 0], expected.limits, rtol=1e-12, atol=0)
        assert (rows[:, 0] > expected.limits).sum() > 5

    @pytest.mark.parametrize("mode", PUBLISHED)
    def test_after_the_warm_up_every_step_has_a_limit(self, mode: str) -> None:
        # Of a norm that is no spike it is the largest one that would have been none either.
        rows = noisy(60, spikes=0.0)
        limits = Fed(ZClip(mode=mode)).limits(rows)[:, 0]
        assert np.isinf(limits[:25]).all()
        assert np.isfinite(limits[25:]).all()
        fed = Fed(ZClip(mode=mode))
        for row in rows[:-1]:
            fed.step(row)
        state = fed.memory["mean"].item(), fed.memory["var"].item() ** 0.5
        assert limits[-1] == pytest.approx(state[0] + 2.5 * state[1], abs=1e-5)


class TestLimits:
    @pytest.mark.parametrize("warmup", [2, 25])
    def test_nothing_but_max_norm_limits_the_warm_up(self, warmup: int) -> None:
        rows = [*np.linspace(1.0, 1.1, warmup)[:, None], [50.0]]
        limits = Fed(ZClip(warmup=warmup)).limits(rows)[:, 0]
        assert limits[:-1].tolist() == [math.inf] * warmup
        assert limits[-1] < 1.2
        limits = Fed(ZClip(warmup=warmup, max_norm=1.5)).limits([[50.0], *rows])[:, 0]
        assert limits[:warmup].tolist() == [1.5] * warmup

    @pytest.mark.parametrize("mode", PUBLISHED)
    def test_max_norm_holds_for_spikes_too_and_is_not_what_is_remembered(self, mode: str) -> None:
        rows = noisy(120)
        free, bound = (with_memory(ZClip(mode=mode, max_norm=bound), rows) for bound in (None, 1e-2))
        assert (bound[1] == 1e-2).all()
        assert np.isfinite(free[1]).any()
        for i in (2, 3):
            assert (free[i] == bound[i]).all()

    def test_max_norm_follows_its_schedule(self) -> None:
        limits = Fed(ZClip(max_norm={2: 10.0, 6: 2.0})).limits([[100.0]] * 8)[:, 0]
        assert limits.tolist() == [10, 10, 10, 8, 6, 4, 2, 2]

    def test_the_further_out_the_lower(self) -> None:
        base = noisy(40, spikes=0.0)
        limits = {}
        for norm in (20.0, 40.0, 400.0):
            for mode in PUBLISHED:
                limits[mode, norm] = Fed(ZClip(mode=mode)).limits([*base, [norm]])[-1, 0]
        assert limits["reciprocal", 20.0] > limits["reciprocal", 40.0] > limits["reciprocal", 400.0]
        assert limits["reciprocal", 400.0] > limits["mean", 400.0] == limits["mean", 20.0]
        assert limits["max", 20.0] == limits["max", 400.0] > limits["reciprocal", 20.0]

    def test_an_infinite_threshold_never_clips(self) -> None:
        for mode in PUBLISHED:
            limits = Fed(ZClip(z_threshold=math.inf, warmup=2, mode=mode)).limits([[1.0], [1.0], [1.0], [1e9], [1.0]])
            assert (limits == math.inf).all()

    @pytest.mark.parametrize("norm", [0.1, 1 / 3, 7e-5, 12345.678])
    @pytest.mark.parametrize("mode", PUBLISHED)
    def test_a_constant_norm_is_no_spike_and_what_exceeds_it_is(self, norm: float, mode: str) -> None:
        fed = Fed(ZClip(mode=mode))
        assert (fed.limits([[norm]] * 60) >= norm).all()
        assert (fed.memory["mean"].item(), fed.memory["var"].item()) == (norm, 0.0)
        assert fed.limits([[2 * norm]]).item() == pytest.approx(norm, rel=1e-12)

    def test_norms_far_below_a_millionth_are_no_spikes_except_in_mode_max(self) -> None:
        # The published 1e-6 beside the standard deviation is absolute.
        rows = noisy(200)
        for mode in PUBLISHED:
            spikes = rows > Fed(ZClip(mode=mode)).limits(rows)
            tiny = rows * 2.0**-100 > Fed(ZClip(mode=mode)).limits(rows * 2.0**-100)
            assert spikes.any()
            assert (tiny == (spikes if mode == "max" else False)).all()

    def test_no_epsilon_is_added_to_the_size(self) -> None:
        fed = Fed(ZClip(mode="max", warmup=2))
        for norm in (1e-9, 1e-9, 4e-9):
            fed.step([norm])
        assert fed.norms() == pytest.approx([1e-9], rel=1e-14)


class TestLevelShifts:
    BEFORE = 150

    def over(self, method: ZClip, factors: tuple[float, ...]) -> np.ndarray:
        """Whether each norm after the shift is over its limit, `(300, factors * noises)`."""
        rows, columns = shifted(self.BEFORE, 300, factors)
        limits = Fed(method, len(columns)).limits(rows)
        return (rows > limits)[self.BEFORE :]

    @pytest.mark.parametrize("mode", PUBLISHED)
    def test_winsorized_memory_follows_within_100_steps(self, mode: str) -> None:
        over = self.over(ZClip(mode=mode, per="parameter"), (2.0, 4.0, 10.0))
        assert (over[0].reshape(3, len(NOISES))[:, :3]).all()
        # Later a norm is as rarely a spike as before.
        assert over[100:].mean(axis=0).max() <= 0.06

    def test_faithful_memory_locks(self) -> None:
        for mode in ("reciprocal", "mean"):
            over = self.over(ZClip(mode=mode, memory="faithful", per="parameter"), (4.0,))
            assert over[:, :3].all()
        # What the published code does.
        rows, _ = shifted(self.BEFORE, 300, (4.0,))
        for column in range(3):
            after, _ = published(rows[:, [column]], max_grad_norm=None)
            assert (after < 0.5 * rows[:, column])[self.BEFORE :].all()

    def test_downward_nothing_is_clipped(self) -> None:
        over = self.over(ZClip(per="parameter"), (0.25, 0.1))
        assert over[:100].mean(axis=0).max() <= 0.02


class TestArguments:
    def test_defaults(self) -> None:
        assert dataclasses.asdict(ZClip()) == {
            "z_threshold": 2.5,
            "alpha": 0.97,
            "warmup": 25,
            "mode": "reciprocal",
            "clip_factor": 1.0,
            "max_norm": None,
            "memory": "winsorized",
            "per": "model",
        }
        assert ZClip().norm_type == 2.0

    def test_numbers_become_plain(self) -> None:
        method = ZClip(z_threshold=3, alpha=0, warmup=np.int64(5), clip_factor=2, max_norm={5: 1, 0: 3})
        assert repr(method) == (
            "ZClip(z_threshold=3.0, alpha=0.0, warmup=5, mode='reciprocal', clip_factor=2.0, "
            "max_norm={0: 3.0, 5: 1.0}, memory='winsorized', per='model')"
        )

    @pytest.mark.parametrize(
        ("arguments", "error", "said"),
        [
            ({"z_threshold": 0}, ValueError, "z_threshold must be > 0, got 0"),
            ({"z_threshold": "one"}, TypeError, "z_threshold must be a number, got 'one' (str)"),
            (
                {"alpha": 1},
                ValueError,
                "alpha must be < 1, got 1; with 1 nothing would be learned after the warm-up",
            ),
            (
                {"alpha": -0.1},
                ValueError,
                "alpha must be >= 0, got -0.1; with 1 nothing would be learned after the warm-up",
            ),
            ({"warmup": 1}, ValueError, "warmup must be >= 2, got 1; one norm has no variance"),
            ({"warmup": 25.0}, TypeError, "warmup must be a whole number, got 25.0 (float); one norm has no variance"),
            ({"mode": "zscore"}, ValueError, "mode must be one of 'reciprocal', 'mean', 'max', got 'zscore'"),
            ({"clip_factor": 0.0}, ValueError, "clip_factor must be > 0, got 0.0"),
            ({"clip_factor": math.inf}, ValueError, "clip_factor must be finite, got inf"),
            ({"max_norm": 0}, ValueError, "max_norm must be > 0, got 0; None sets no limit of this kind"),
            (
                {"max_norm": {0: 1.0, 5: -2.0}},
                ValueError,
                "max_norm[5] must be > 0, got -2.0; None sets no limit of this kind",
            ),
            (
                {"max_norm": "one"},
                TypeError,
                "max_norm must be a number or a schedule such as {0: 10.0, 1000: 1.0}, got 'one' (str)",
            ),
            ({"memory": "raw"}, ValueError, "memory must be one of 'winsorized', 'faithful', got 'raw'"),
            ({"per": "unit"}, ValueError, "per must be one of 'model', 'group', 'layer', 'parameter', got 'unit'"),
        ],
        ids=str,
    )
    def test_what_is_wrong_is_said_with_value_and_remedy(
        self, arguments: dict[str, object], error: type[Exception], said: str
    ) -> None:
        with pytest.raises(error) as failure:
            ZClip(**arguments)
        assert str(failure.value) == said
