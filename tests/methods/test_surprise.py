"""SurpriseClip against the published StableAdamW and a float64 reference, and what becomes of lasting changes."""

import numpy as np
import pytest
import torch
from torch.nn import Parameter
from torch.optim import SGD, Adagrad, Adam, AdamW, RMSprop

from kit import peers
from lightning_gradclip import Clipper, SurpriseClip

SHAPES = {"large": (40, 30), "single": ()}


class Run:
    """Two parameters under an optimizer, and a clipper."""

    def __init__(self, method: SurpriseClip, make=AdamW, dtype=torch.float32, **options) -> None:
        self.pairs = [(name, Parameter(torch.zeros(shape, dtype=dtype))) for name, shape in SHAPES.items()]
        self.optimizer = make([one for _, one in self.pairs], lr=1e-3)
        self.clipper = Clipper(self.pairs, method, optimizer=self.optimizer, **options)

    def give(self, step: int, factor: float = 1.0):
        generator = torch.Generator().manual_seed(step)
        for name, parameter in self.pairs:
            values = torch.randn(SHAPES[name], generator=generator, dtype=torch.float64)
            parameter.grad = (values * factor).to(parameter.dtype)

    def step(self, step: int, factor: float = 1.0):
        self.give(step, factor)
        stats = self.clipper.step()
        self.optimizer.step()
        return stats


def test_the_size_is_that_of_the_published_optimizer_for_500_steps() -> None:
    """Given the v that it has: it divides its rate by the size, where we multiply the gradient by its inverse."""
    stable = peers.module("pytorch_optimizer").StableAdamW
    run = Run(SurpriseClip(k=1.001, warmup=3), stable, action="observe")
    acted = 0
    for step in range(500):
        run.give(step, 30.0 if step % 50 == 40 else 1.0)
        run.optimizer.step()
        found = run.clipper.step().sizes
        for (_, parameter), size in zip(run.pairs, found.tolist(), strict=True):
            square = run.optimizer.state[parameter]["exp_avg_sq"]
            published = run.optimizer.get_stable_adamw_rms(parameter.grad, square, eps=1e-16).item()
            assert max(size, 1.0) == pytest.approx(published, rel=1e-6) or step < 2
            acted += published > 1
    assert acted > 30


@pytest.mark.parametrize(("make", "beta"), [(Adam, 0.999), (RMSprop, 0.99)])
def test_the_limit_against_float64(make, beta: float) -> None:
    run = Run(SurpriseClip(k=1.5, warmup=5), make, torch.float64)
    squares = {name: np.zeros(shape) for name, shape in SHAPES.items()}
    cut = 0
    for step in range(80):
        run.give(step, 100.0 if step in (40, 60) else 1.0)
        given = {name: parameter.grad.numpy().copy() for name, parameter in run.pairs}
        sizes = run.clipper.step().sizes
        run.optimizer.step()
        for place, (name, parameter) in enumerate(run.pairs):
            mean = squares[name] / (1 - beta**step) if step else squares[name]
            rms = np.sqrt(np.mean(given[name] ** 2 / np.maximum(mean, 1e-16))) if step >= 5 else 0.0
            assert sizes[place].item() == pytest.approx(rms, rel=1e-6)
            expected = given[name] * (1.5 / rms if rms > 1.5 else 1.0)
            np.testing.assert_allclose(parameter.grad, expected, rtol=1e-6)
            squares[name] = beta * squares[name] + (1 - beta) * expected**2
            cut += rms > 1.5
    assert cut > 4


def test_a_lasting_rise_is_followed_and_usual_gradients_pass() -> None:
    """A hundredfold rise of v takes ln(1e4) / ln(1 + (1 - beta2) (k**2 - 1)) steps: 66 at 0.95."""
    run = Run(SurpriseClip(per="model"), lambda params, lr: AdamW(params, lr=lr, betas=(0.9, 0.95)))
    clipped = [bool(run.step(step, 100.0 if step >= 200 else 1.0).clipped) for step in range(400)]
    assert sum(clipped[:200]) == 0
    assert clipped[200:250] == [True] * 50
    assert sum(clipped[300:]) == 0


def test_rows_without_a_gradient_so_far_do_not_surprise() -> None:
    run = Run(SurpriseClip(k=2.0, warmup=3))
    for step in range(20):
        run.give(step)
        run.pairs[0][1].grad[20:] = 0.0
        run.clipper.step()
        run.optimizer.step()
    assert run.step(20).sizes[0].item() < 1.0


def test_what_the_optimizer_does_not_know_is_said_once() -> None:
    run = Run(SurpriseClip(), Adagrad)
    with pytest.warns(RuntimeWarning, match="leaves 2 of 2 parameters, such as 'large', as they are, since Adagrad"):
        run.step(0)
    run.step(1)


def test_what_cannot_work_is_refused() -> None:
    for k in (1.0, 0.5):
        with pytest.raises(ValueError, match=r"^k must be > 1.*could never grow again"):
            SurpriseClip(k=k)
    with pytest.raises(ValueError, match="SGD keeps none"):
        Run(SurpriseClip(), SGD)
