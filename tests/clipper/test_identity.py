"""Who is clipped is asked when it is done: of the model and the optimizer as they are then, not as they once were."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD

from kit.running_max import RunningMax
from lightning_gradclip import AGC, Clipper, NormClip, QuantileClip

LIMIT = 1e-3


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


def backward(model: nn.Module, scale: float = 1.0) -> float:
    """Make new gradients, and return their joint norm."""
    model.zero_grad()
    (model(torch.ones(5, 3)).square().sum() * scale).backward()
    return joint(model)


def joint(model: nn.Module) -> float:
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    return math.sqrt(sum(gradient.double().square().sum().item() for gradient in gradients))


def assign(model: nn.Sequential) -> None:
    model.load_state_dict({name: value.clone() for name, value in model.state_dict().items()}, assign=True)


def rebuild_a_layer(model: nn.Sequential) -> None:
    model[2] = nn.Linear(4, 2)


def grow(model: nn.Sequential) -> None:
    model.append(nn.Linear(2, 2))


def register(model: nn.Sequential) -> None:
    """A layer that had no bias gets one."""
    model[0].bias = None
    model[2].register_parameter("scale", nn.Parameter(torch.ones(2)))


CHANGES: list[Callable[[nn.Sequential], None]] = [assign, rebuild_a_layer, grow, register]
GIVEN: dict[str, Callable[[nn.Module], Any]] = {
    "model": lambda model: model,
    "named_parameters": lambda model: model.named_parameters(),
}


class TestTheModelIsFollowed:
    @pytest.mark.parametrize("given", GIVEN)
    @pytest.mark.parametrize("change", CHANGES)
    @pytest.mark.parametrize("steps", [0, 2])
    def test_before_and_in_mid_training(self, change: Callable[[nn.Sequential], None], given: str, steps: int) -> None:
        model = net()
        clipper = Clipper(GIVEN[given](model), NormClip(max_norm=LIMIT))
        for _ in range(steps):
            backward(model)
            clipper.step()
        change(model)
        norm = backward(model)
        assert clipper.step().norm.item() == pytest.approx(norm, rel=1e-6)
        assert joint(model) == pytest.approx(LIMIT, rel=1e-2)

    def test_learned_values_go_on_by_their_names(self) -> None:
        model = net()
        clipper = Clipper(model, RunningMax(per="parameter"))
        backward(model)
        clipper.step()
        before = clipper.state_dict()["learned"]
        assign(model)
        backward(model, scale=1e-3)
        clipper.step()
        after = clipper.state_dict()["learned"]
        assert after["scopes"] == before["scopes"]
        assert torch.equal(after["values"]["largest"], before["values"]["largest"])

    def test_an_optimizer_with_what_the_model_got_later_is_served_by_name(self) -> None:
        model = net()
        optimizer = SGD(model.parameters(), lr=0.1)
        clipper = Clipper(model.named_parameters(), NormClip(per="parameter"), optimizer=optimizer)
        grow(model)
        optimizer.add_param_group({"params": model[3].parameters()})
        backward(model)
        assert clipper.step().scopes[-2:] == ("3.weight", "3.bias")


class TestRefused:
    @pytest.mark.parametrize(
        "given",
        [
            lambda model: [],
            lambda model: iter([*model.named_parameters()][:0]),
            lambda model: zip([], [], strict=True),
            lambda model: nn.Tanh(),
        ],
        ids=["list", "iterator", "zip", "module"],
    )
    @pytest.mark.parametrize("has_optimizer", [False, True])
    def test_no_parameters_at_all(self, given: Callable[[nn.Module], Any], has_optimizer: bool) -> None:
        model = net()
        optimizer = SGD(model.parameters(), lr=0.1) if has_optimizer else None
        with pytest.raises(ValueError, match=r"so that there is nothing to clip .*; write Clipper\(model, \.\.\.\)$"):
            Clipper(given(model), NormClip(), optimizer=optimizer)

    @pytest.mark.parametrize("used", [next, list], ids=["begun", "used up"])
    def test_an_iterator_that_was_used(self, used: Callable[[Any], Any]) -> None:
        named = net().named_parameters()
        used(named)
        with pytest.raises(ValueError, match=r"iterator that was used before, .*; write Clipper\(model, \.\.\.\)"):
            Clipper(named, NormClip())

    @pytest.mark.parametrize("given", [*GIVEN.values(), lambda model: [*model.named_parameters()]])
    def test_an_optimizer_of_another_model(self, given: Callable[[nn.Module], Any]) -> None:
        other = net()
        with pytest.raises(ValueError, match=r"^none of the parameters of SGD is among .* first is '0.weight'; give"):
            Clipper(given(net()), NormClip(), optimizer=SGD(other.parameters(), lr=0.1))

    @pytest.mark.parametrize(
        ("method", "options", "need"),
        [
            (NormClip(), {"exclude": "2.*"}, "include and exclude need"),
            (NormClip(), {"include": ["0.*", "2.*"]}, "include and exclude need"),
            (NormClip(per="layer"), {}, "per='layer' needs"),
            (NormClip(), {"measure_per": "parameter"}, "per='parameter' needs"),
            (AGC(), {}, "per='unit' needs"),
        ],
        ids=str,
    )
    def test_parameters_without_a_name_where_names_are_needed(
        self, method: Any, options: dict[str, Any], need: str
    ) -> None:
        model, extra = net(), nn.Parameter(torch.zeros(3))
        optimizer = SGD([*model.parameters(), extra], lr=0.1)
        with pytest.raises(ValueError, match=rf"^{need} the names of all .*: group0\.4 of shape \(3,\); name"):
            Clipper(model, method, optimizer=optimizer, **options)
        assert Clipper(model, NormClip(), optimizer=optimizer).serves_any
        Clipper([*model.named_parameters(), ("extra", extra)], method, optimizer=optimizer, **options)

    def test_a_group_that_only_its_place_would_tell_from_others(self) -> None:
        model, extra = net(), nn.Parameter(torch.zeros(3))
        groups = [{"params": model.parameters()}, {"params": [extra]}]
        with pytest.raises(ValueError, match=r"^parameter group 'group1' has no name, .*'name': 'extra'\}$"):
            Clipper(model, QuantileClip(per="group"), optimizer=SGD(groups, lr=0.1))

    def test_two_parameters_of_one_name(self) -> None:
        pairs = [*net().named_parameters(), *net().named_parameters()]
        assert Clipper(pairs, NormClip()).serves_any
        with pytest.raises(ValueError, match=r"^two parameters are both called '0\.weight'.*; give each a name"):
            Clipper(pairs, NormClip(per="layer"))

    @pytest.mark.parametrize("steps", [0, 2])
    @pytest.mark.parametrize("zero", [True, False], ids=["model.zero_grad", "optimizer.zero_grad"])
    def test_an_optimizer_whose_parameters_the_model_has_replaced(self, steps: int, zero: bool) -> None:
        model = net()
        optimizer = SGD(model.parameters(), lr=0.1)
        clipper = Clipper(model, NormClip(), optimizer=optimizer)
        for _ in range(steps):
            backward(model)
            clipper.step()
        assign(model)
        if not zero:
            optimizer.zero_grad()
        backward(model)
        # Gradients that stay on the old ones are noticed when somebody looks.
        clipper.metrics()
        for _ in range(2):
            with pytest.raises(RuntimeError, match=r"^the model has replaced 0\.weight of shape \(4, 3\).*; make the"):
                clipper.step()

    def test_an_optimizer_that_keeps_a_layer_which_was_replaced(self) -> None:
        model = net()
        optimizer = SGD(model.parameters(), lr=0.1)
        clipper = Clipper(model, NormClip(max_norm=LIMIT), optimizer=optimizer)
        backward(model)
        old = model[2].weight
        rebuild_a_layer(model)
        optimizer.add_param_group({"params": model[2].parameters()})
        assert old.grad is not None
        norm = backward(model)
        with pytest.warns(RuntimeWarning, match=r"^SGD still holds 2\.weight of shape \(2, 4\), 2\.bias .*; give the"):
            stats = clipper.step()
        assert stats.norm.item() == pytest.approx(norm, rel=1e-6)
        backward(model)
        clipper.step()
        assert joint(model) == pytest.approx(LIMIT, rel=1e-2)

    def test_pairs_whose_parameters_have_no_gradient(self) -> None:
        model = net()
        clipper = Clipper([*model.named_parameters()], NormClip())
        assign(model)
        backward(model)
        with pytest.warns(RuntimeWarning, match=r"none of the 4 parameters has a gradient.* give it the model"):
            clipper.step()
