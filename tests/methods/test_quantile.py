"""QuantileClip against autoclip, NumPy and a float64 reference."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from kit import peers, reference
from kit.streams import Fed, noisy, shifted
from lightning_gradclip import QuantileClip

Shift = tuple[np.ndarray, np.ndarray, list[float]]

QUANTILES = [0.0, 0.1, 0.5, 0.9, 1.0]


def by_scope(sizes: np.ndarray, **arguments: object) -> np.ndarray:
    """The reference's limits for each column."""
    return np.stack([reference.quantile_limits(column, **arguments) for column in sizes.T], axis=1)


class TestAgainstAutoclip:
    @pytest.mark.parametrize(("q", "window"), [(0.9, 1000), (0.9, 100), (0.25, 64)])
    @pytest.mark.parametrize("per", ["model", "parameter"])
    def test_gradients_are_those_of_its_quantile_clip(self, q: float, window: int, per: str) -> None:
        autoclip = peers.module("autoclip.torch")
        rows = noisy(500, 3)
        method = QuantileClip(q=q, window=window, per=per)
        ours, theirs = (Fed(one, 3, dtype=torch.float32, size=7) for one in (method, None))
        parameters = [parameter for _, parameter in theirs.pairs]
        peer = autoclip.QuantileClip(parameters, quantile=q, history_length=window, global_threshold=per == "model")
        gradients = []
        for row in rows:
            ours.step(row)
            theirs.give(row)
            peer.step()
            gradients.append([torch.stack([parameter.grad for _, parameter in fed.pairs]) for fed in (ours, theirs)])
        one, other = map(torch.stack, zip(*gradients, strict=True))
        torch.testing.assert_close(one, other, rtol=1e-5, atol=0)
        # The level sinks, so that fewer than 1 - q are over their limit.
        assert ((other.norm(dim=2).numpy() < 0.999 * rows).mean(axis=0) > 0.3 * (1 - q)).all()


class TestAgainstNumPy:
    def test_autoclip_is_the_percentile_of_all_norms_including_this_one(self) -> None:
        # More than twice as many as are kept unsorted.
        rows = noisy(2200)
        fed = Fed(QuantileClip(q=0.1, window=None, include_current=True))
        limits, after = [], []
        for row in rows:
            limits.append(fed.step(row).limit.item())
            after += fed.norms()
        expected = [np.percentile(rows[: i + 1], 10) for i in range(len(rows))]
        np.testing.assert_allclose(limits, expected, rtol=1e-13, atol=0)
        np.testing.assert_allclose(after, np.minimum(rows[:, 0], expected), rtol=1e-13, atol=0)
        # On a level that stays it would be nine of ten.
        assert np.mean(after < rows[:, 0]) > 0.5

    @pytest.mark.parametrize("q", QUANTILES)
    @pytest.mark.parametrize("window", [1, 2, 7, 100, None])
    @pytest.mark.parametrize("include_current", [False, True])
    def test_the_limit_is_the_quantile_of_the_norms_in_the_window(
        self, q: float, window: int | None, include_current: bool
    ) -> None:
        rows = noisy(110, 3)
        arguments = {"q": q, "window": window, "include_current": include_current}
        limits = Fed(QuantileClip(**arguments, per="parameter"), 3).limits(rows)
        np.testing.assert_allclose(limits, by_scope(rows, **arguments), rtol=1e-13, atol=0)

    def test_the_defaults_over_a_whole_run(self) -> None:
        rows = noisy(1200)
        fed = Fed(QuantileClip())
        expected = reference.quantile_limits(rows[:, 0], q=0.9, window=1000)
        after = []
        for row, limit in zip(rows, expected, strict=True):
            assert fed.step(row).limit.item() == pytest.approx(limit, rel=1e-13)
            after += fed.norms()
        np.testing.assert_allclose(after, np.minimum(rows[:, 0], expected), rtol=1e-13, atol=0)
        assert 0.02 < np.mean(after < rows[:, 0]) < 0.2

    def test_the_norms_are_of_the_given_p(self) -> None:
        rows = noisy(20, 2)
        joint = rows.sum(axis=1)
        limits = Fed(QuantileClip(norm_type=1.0), 2).limits(rows)
        np.testing.assert_allclose(limits[:, 0], reference.quantile_limits(joint, q=0.9, window=1000), rtol=1e-13)


class TestLimits:
    @pytest.mark.parametrize("window", [1000, None])
    def test_nothing_limits_the_first_step(self, window: int | None) -> None:
        fed = Fed(QuantileClip(window=window))
        assert fed.step([1e30]).limit.item() == math.inf
        assert fed.norms() == [1e30]
        # The only norm there is, for every quantile.
        assert fed.step([2.0]).limit.item() == 1e30

    def test_with_the_current_norm_even_the_first_step_has_a_limit(self) -> None:
        fed = Fed(QuantileClip(include_current=True))
        assert fed.step([3.0]).limit.item() == 3.0
        assert fed.norms() == [3.0]

    @pytest.mark.parametrize("window", [10, None])
    def test_a_norm_that_is_not_remembered_is_no_current_norm_either(self, window: int | None) -> None:
        fed = Fed(QuantileClip(q=0.5, window=window, include_current=True, per="parameter"), 2, action="observe")
        fed.limits([[1.0, 3.0], [1.0, 5.0]])
        for nothing in (0.0, None, math.inf, math.nan):
            assert fed.step([1.0, nothing]).limits[1].item() == 4.0

    @pytest.mark.parametrize("norm", [0.1, 1 / 3, 7e-5])
    @pytest.mark.parametrize("q", QUANTILES)
    @pytest.mark.parametrize("window", [11, None])
    def test_a_constant_norm_is_its_own_quantile(self, norm: float, q: float, window: int | None) -> None:
        limits = Fed(QuantileClip(q=q, window=window, per="parameter"), 2).limits([[norm, 2 * norm]] * 30)
        assert limits[1:].tolist() == [[norm, 2 * norm]] * 29

    def test_no_epsilon_is_added_to_the_size(self) -> None:
        fed = Fed(QuantileClip())
        fed.step([1e-9])
        fed.step([4e-9])
        assert fed.norms() == pytest.approx([1e-9], rel=1e-14)


@pytest.fixture(scope="module")
def shift() -> Shift:
    """Norms, limits and factors from where on the level is another; the window holds 100."""
    rows, factors = shifted(150, 101, (2.0, 4.0, 0.25))
    limits = Fed(QuantileClip(q=0.9, window=100, per="parameter"), len(factors)).limits(rows)
    return rows[150:], limits[150:], factors


class TestLevelShifts:
    def test_after_a_window_the_limit_is_the_quantile_of_the_new_level(self, shift: Shift) -> None:
        rows, limits, _ = shift
        np.testing.assert_allclose(limits[-1], np.quantile(rows[:-1], 0.9, axis=0), rtol=1e-13)

    def test_upward_it_is_a_norm_of_the_new_level_after_a_tenth(self, shift: Shift) -> None:
        rows, limits, factors = shift
        for scope in range(8):
            # With one more than (1 - q) * window.
            assert limits[11, scope] >= rows[:11, scope].min()
        # Without noise it is the old one until then.
        assert limits[9, [0, 4]].tolist() == [1.0, 1.0]
        assert limits[11, [0, 4]].tolist() == [factors[0], factors[4]]

    def test_downward_after_nine_tenths(self, shift: Shift) -> None:
        rows, limits, factors = shift
        for scope in range(8, 12):
            assert limits[91, scope] <= rows[:91, scope].max()
        assert (limits[89, 8], limits[91, 8]) == (1.0, factors[8])


class TestScopesThatJoin:
    @pytest.mark.parametrize("before", [10, 1023, 1024, 1030])
    def test_they_begin_empty_beside_long_rows(self, before: int) -> None:
        rows = noisy(before, 2)
        fed = Fed(QuantileClip(q=0.5, window=None, per="parameter"), ["a", "b"])
        for row in rows:
            fed.step(row)
        grown = Fed(QuantileClip(q=0.5, window=None, per="parameter"), ["new", "b", "a"])
        grown.clipper.load_state_dict(fed.clipper.state_dict())
        later = noisy(20, 3, seed=1)
        limits = grown.limits(later)
        for i in range(20):
            expected = [np.median([*rows[:, 1 - k], *later[:i, 1 + k]]) for k in (0, 1)]
            np.testing.assert_allclose(limits[i, 1:], expected, rtol=1e-13)
            assert limits[i, 0] == (pytest.approx(np.median(later[:i, 0]), rel=1e-13) if i else math.inf)
        assert grown.memory["count"].tolist() == [20, before + 20, before + 20]


class TestArguments:
    def test_defaults(self) -> None:
        assert dataclasses.asdict(QuantileClip()) == {
            "q": 0.9,
            "window": 1000,
            "include_current": False,
            "per": "model",
            "norm_type": 2.0,
        }

    def test_numbers_become_plain(self) -> None:
        method = QuantileClip(q=1, window=np.int64(5), norm_type=OmegaConf.create([1])[0])
        assert repr(method) == ("QuantileClip(q=1.0, window=5, include_current=False, per='model', norm_type=1.0)")
        assert (type(method.q), type(method.window), type(method.norm_type)) == (float, int, float)

    @pytest.mark.parametrize(
        ("arguments", "error", "said"),
        [
            ({"q": 90}, ValueError, "q must be <= 1, got 90; 0.9 stands for the 90th percentile"),
            ({"q": -0.1}, ValueError, "q must be >= 0, got -0.1; 0.9 stands for the 90th percentile"),
            ({"q": math.nan}, ValueError, "q must be >= 0 and <= 1, got nan; 0.9 stands for the 90th percentile"),
            ({"q": "one"}, TypeError, "q must be a number, got 'one' (str); 0.9 stands for the 90th percentile"),
            ({"q": True}, TypeError, "q must be a number, got True (bool); 0.9 stands for the 90th percentile"),
            ({"window": 0}, ValueError, "window must be >= 1, got 0; None remembers all norms"),
            ({"window": 10.0}, TypeError, "window must be a whole number, got 10.0 (float); None remembers all norms"),
            ({"include_current": "false"}, TypeError, "include_current must be True or False, got 'false' (str)"),
            ({"include_current": 1}, TypeError, "include_current must be True or False, got 1 (int)"),
            ({"per": "unit"}, ValueError, "per must be one of 'model', 'group', 'layer', 'parameter', got 'unit'"),
            ({"norm_type": 0}, ValueError, "norm_type must be > 0, got 0; the usual norm is norm_type=2"),
            (
                {"norm_type": "one"},
                TypeError,
                "norm_type must be a number, got 'one' (str); the usual norm is norm_type=2",
            ),
        ],
        ids=str,
    )
    def test_what_is_wrong_is_said_with_value_and_remedy(
        self, arguments: dict[str, object], error: type[Exception], said: str
    ) -> None:
        with pytest.raises(error) as failure:
            QuantileClip(**arguments)
        assert str(failure.value) == said
