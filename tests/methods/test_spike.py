"""SpikeClip against the published SPAM and a float64 reference."""

import numpy as np
import pytest
import torch
from torch.nn import Parameter
from torch.optim import SGD, Adam

from kit import boring, peers
from lightning_gradclip import Clipper, GradientClipping, SpikeClip


def heavy(seed: int, step: int) -> torch.Tensor:
    """Entries of which one in a hundred is a spike; the last column has none before step 30, and then one."""
    generator = torch.Generator().manual_seed(1000 * seed + step)
    values = torch.randn(6, 5, generator=generator)
    spikes = torch.rand(6, 5, generator=generator) < 0.01
    return torch.where(spikes, values * 1e4, values)


def test_weights_are_those_of_the_published_optimizer_for_500_steps() -> None:
    """Between its resets, with an eps that does not matter and without its warm-up of the rate.

    In float64, since after so many steps float32 weights differ by 2e-6 in any two orders of the arithmetic.
    """
    spam = peers.module("pytorch_optimizer").SPAM
    ours, theirs = (Parameter(torch.zeros(6, 5, dtype=torch.float64)) for _ in range(2))
    adam = Adam([ours], lr=1e-3, eps=1e-30)
    published = spam([theirs], lr=1e-3, eps=1e-30, threshold=50, warmup_epoch=0, update_proj_gap=10_000, density=1.0)
    clipper = Clipper([("w", ours)], SpikeClip(theta=50.0, warmup=19), optimizer=adam)
    clipped = 0
    for step in range(500):
        ours.grad, theirs.grad = heavy(1, step).double(), heavy(1, step).double()
        clipped += clipper.step().clipped.item() > 0
        adam.step()
        published.step()
        np.testing.assert_allclose(ours.detach(), theirs.detach(), rtol=1e-6)
    assert clipped > 50


def test_each_entry_is_kept_within_the_root_of_theta_times_its_mean_square() -> None:
    weight = Parameter(torch.zeros(6, 5, dtype=torch.float64))
    adam = Adam([weight], lr=1e-3)
    clipper = Clipper([("w", weight)], SpikeClip(theta=9.0, warmup=2), optimizer=adam)
    square = np.zeros((6, 5))
    for step in range(40):
        given = heavy(2, step).double()
        given[:, -1] *= step >= 30
        weight.grad = given.clone()
        stats = clipper.step()
        bound = np.where((square > 0) & (step >= 2), np.sqrt(9.0 * square), np.inf)
        expected = np.clip(given.numpy(), -bound, bound)
        np.testing.assert_allclose(weight.grad, expected, rtol=1e-6)
        np.testing.assert_allclose(stats.norm_clipped, np.linalg.norm(expected), rtol=1e-6)
        np.testing.assert_allclose(stats.clipped, (expected != given.numpy()).mean())
        # What was never seen is let through, and then has a mean square.
        assert step != 30 or np.array_equal(expected[:, -1], given[:, -1])
        square = 0.999 * square + 0.001 * expected**2
        adam.step()


def test_an_optimizer_without_squares_is_refused_before_the_first_step() -> None:
    with pytest.raises(ValueError, match="and SGD keeps none; limit by what the clipper"):
        boring.fit(boring.Prescribed(lambda params: SGD(params, lr=0.1)), [], GradientClipping(SpikeClip()))
    with pytest.raises(ValueError, match="this clipper has none; write optimizer="):
        Clipper([("w", Parameter(torch.zeros(2)))], SpikeClip())
