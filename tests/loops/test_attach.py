"""Clipping from inside the optimizer's step."""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.optim import LBFGS, SGD, Adam, Optimizer

from lightning_gradclip import Clipper, NormClip, ZClip, attach


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))


def batches(count: int) -> list[Tensor]:
    return list(torch.randn(count, 16, 4, generator=torch.Generator().manual_seed(1)))


def loss_of(net: nn.Module, batch: Tensor) -> Tensor:
    return (net(batch) - 10 * batch.sum(1, keepdim=True)).square().mean()


def train(net: nn.Module, optimizer: Optimizer, before_step: Callable[[], object] = lambda: None) -> list[Tensor]:
    """Train as loops do, and return the weights."""
    for batch in batches(20):
        optimizer.zero_grad()
        loss_of(net, batch).backward()
        before_step()
        optimizer.step()
    return [parameter.detach() for parameter in net.parameters()]


class Twice(SGD):
    """Steps by way of its base class, so that torch calls hooks for each of the two."""

    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


class TestStep:
    @pytest.mark.parametrize("kind", [SGD, Adam, Twice])
    @pytest.mark.parametrize("method", [NormClip(max_norm=0.5), ZClip(warmup=5, z_threshold=0.5)])
    def test_training_is_that_of_a_clipper_called_before_the_step(
        self, kind: type[Optimizer], method: NormClip | ZClip
    ) -> None:
        SGD(model().parameters(), lr=0.1)  # torch wraps the step of a class when it is first used
        one, other = model(), model()
        ours, theirs = kind(one.parameters(), lr=0.01), kind(other.parameters(), lr=0.01)
        clipper, attached = Clipper(other, method, optimizer=theirs), attach(ours, one, method)
        clipped, expected = train(one, ours), train(other, theirs, clipper.step)
        assert all(map(torch.equal, clipped, expected))
        assert attached.metrics() == clipper.metrics()
        assert clipper.state_dict()["step"] == attached.state_dict()["step"] == 20

    def test_gradients_that_a_closure_makes_are_clipped(self) -> None:
        net = model()
        optimizer = LBFGS(net.parameters(), lr=0.1, max_iter=3)
        attached = attach(optimizer, net, NormClip(max_norm=0.5))
        received: list[float] = []

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = loss_of(net, batches(1)[0])
            loss.backward()
            return loss

        optimizer.step(closure)
        optimizer.register_step_post_hook(
            lambda *_: received.append(torch.cat([one.grad.flatten() for one in net.parameters()]).norm().item())
        )
        optimizer.step(closure=closure)
        assert received == [pytest.approx(0.5, rel=1e-5)]
        assert attached.state_dict()["step"] >= 4

    def test_a_second_step_over_the_same_gradients_clips_again(self) -> None:
        net = model()
        optimizer = SGD(net.parameters(), lr=0.01)
        attached = attach(optimizer, net, NormClip(max_norm=0.5))
        loss_of(net, batches(1)[0]).backward()
        optimizer.step()
        optimizer.step()
        assert attached.state_dict()["step"] == 2


class TestScaler:
    @pytest.mark.parametrize("fused", [False, True])
    def test_gradients_are_unscaled_before_they_are_clipped(self, fused: bool) -> None:
        one, other = model(), model()
        ours = SGD(one.parameters(), lr=0.01, fused=fused)
        theirs = SGD(other.parameters(), lr=0.01, fused=fused)
        attached = attach(ours, one, NormClip(max_norm=0.5))
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        for number, batch in enumerate(batches(6)):
            ours.zero_grad()
            # The second overflows, and is left out.
            scaler.scale(loss_of(one, batch) * (float("inf") if number == 1 else 1.0)).backward()
            scaler.step(ours)
            scaler.update()
            if number != 1:
                theirs.zero_grad()
                loss_of(other, batch).backward()
                nn.utils.clip_grad_norm_(other.parameters(), 0.5)
                theirs.step()
        for weight, expected in zip(one.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(weight, expected, rtol=1e-5, atol=1e-7)
        metrics = attached.metrics()
        assert attached.state_dict()["step"] == 5
        assert metrics["nonfinite"] == 0
        assert metrics["norm_max"] < 1024


class TestCompiled:
    """What torch counts, with the backend that compiles nothing: graphs and breaks are those of any other."""

    @pytest.fixture(autouse=True)
    def _afresh(self) -> Iterator[None]:
        torch.compiler.reset()
        counters.clear()
        yield
        torch.compiler.reset()

    def graphs(self, attached: bool) -> tuple[list[Tensor], list[tuple[int, int]]]:
        """The weights, and after three and after 20 steps how many graphs there are and how often one was left."""
        net = model()
        # Numbers that change become a part of the graph; torch says so of learning rates.
        optimizer = Adam(net.parameters(), lr=torch.tensor(0.01))
        method = ZClip(warmup=5, z_threshold=0.5)
        clipper = (attach if attached else before)(optimizer, net, method)
        compiled, step = torch.compile(net, backend="eager"), torch.compile(optimizer.step, backend="eager")
        found = []
        for number, batch in enumerate(batches(20), 1):
            optimizer.zero_grad()
            loss_of(compiled, batch).backward()
            if not attached:
                clipper.step()
            step()
            if number in (3, 20):
                found.append((counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())))
        assert clipper.steps == 20
        assert not counters["recompiles"]
        return [one.detach() for one in net.parameters()], found

    def test_a_clipper_before_a_compiled_step_adds_no_break_and_no_graph(self) -> None:
        _, found = self.graphs(attached=False)
        # One graph each for the model and the optimizer, whose own hooks torch leaves out by a break.
        assert found == [(2, 1), (2, 1)]

    def test_the_hook_stays_outside(self) -> None:
        weights, found = self.graphs(attached=True)
        torch.compiler.reset()
        counters.clear()
        expected, _ = self.graphs(attached=False)
        assert all(map(torch.equal, weights, expected))
        # The graph is left for the hook, and nothing is compiled from step to step.
        assert found[0] == found[1]
        assert found[0][0] == 2


def before(optimizer: Optimizer, net: nn.Module, method: ZClip) -> Clipper:
    return Clipper(net, method, optimizer=optimizer)


class TestEnds:
    def test_detached_it_leaves_the_optimizer_alone(self) -> None:
        one, other = model(), model()
        ours, theirs = SGD(one.parameters(), lr=0.001), SGD(other.parameters(), lr=0.001)
        attached = attach(ours, one, NormClip(max_norm=0.5))
        attached.detach()
        assert all(map(torch.equal, train(one, ours), train(other, theirs)))
        assert not attached.has_news
        attach(ours, one, NormClip(max_norm=0.5))

    def test_it_resumes(self) -> None:
        net = model()
        optimizer = SGD(net.parameters(), lr=0.01)
        attached = attach(optimizer, net, ZClip(warmup=5))
        train(net, optimizer)
        saved = attached.state_dict()
        twin = copy.deepcopy(net)
        resumed = attach(SGD(twin.parameters(), lr=0.01), twin, ZClip(warmup=5))
        resumed.load_state_dict(saved)
        assert resumed.state_dict()["step"] == 20


class TestRefusals:
    def test_what_is_no_optimizer_of_torch(self) -> None:
        with pytest.raises(TypeError, match=r"hooks into the step of a torch\.optim\.Optimizer, got 3 \(int\); pass"):
            attach(3, model(), NormClip())  # type: ignore[arg-type]

    def test_an_optimizer_whose_steps_call_no_hooks(self) -> None:
        class Bare(Optimizer):
            def __init__(self, params: Any) -> None:
                self.param_groups = [{"params": list(params)}]

            def step(self, closure: Any = None) -> None: ...

        net = model()
        with pytest.raises(TypeError, match="the steps of Bare call no hooks, so that nothing would be clipped; call"):
            attach(Bare(net.parameters()), net, NormClip())

    def test_a_second_one_on_the_same_optimizer(self) -> None:
        net = model()
        optimizer = SGD(net.parameters(), lr=0.1)
        attach(optimizer, net, NormClip())
        with pytest.raises(ValueError, match=r"this SGD has a clipper attached already.*detach"):
            attach(optimizer, net, NormClip())

    def test_folding(self) -> None:
        net = model()
        with pytest.raises(ValueError, match=r"fold hands a coefficient to the optimizer.*leave it out"):
            attach(SGD(net.parameters(), lr=0.1, fused=True), net, NormClip(), fold=True)

    def test_a_wrapper_is_looked_into(self) -> None:
        class Wrapper:
            def __init__(self, optimizer: Optimizer) -> None:
                self.optimizer = optimizer

        net = model()
        optimizer = SGD(net.parameters(), lr=0.01)
        attached = attach(Wrapper(optimizer), net, NormClip(max_norm=0.5))  # type: ignore[arg-type]
        train(net, optimizer)
        assert attached.state_dict()["step"] == 20
