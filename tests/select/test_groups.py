"""Groups are known by their parameters, wherever they stand: live, and through a checkpoint."""

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD

from kit.running_max import RunningMax
from lightning_gradclip import Clipper, NormClip, QuantileClip
from lightning_gradclip.select.groups import Groups, recognised


@pytest.mark.parametrize(
    ("known", "now", "found"),
    [
        ({}, ["ab", "c"], [None, None]),
        ({"x": "ab", "y": "c"}, ["c", "ab"], ["y", "x"]),
        ({"x": "abc"}, ["a", "bc"], [None, "x"]),
        ({"x": "ab", "y": "c"}, ["abc"], ["x"]),
        ({"x": "ab", "y": "cd"}, ["a", "bcd", "e"], ["x", "y", None]),
        # Of two that share the same number, the first.
        ({"x": "ab"}, ["b", "a"], ["x", None]),
        ({"x": "a"}, ["", "a"], [None, "x"]),
    ],
)
def test_sets_are_recognised_by_what_they_share(known: dict[str, str], now: list[str], found: list[str | None]) -> None:
    assert recognised(known, now) == found


def test_labels_stay_with_their_parameters() -> None:
    groups = Groups()
    assert groups.labels([None, None], [["a"], ["b"]]) == ["group0", "group1"]
    assert groups.labels([None, None], [["b"], ["a"]]) == ["group1", "group0"]
    # One that is new gets a label that no other has, whatever its place; one that is gone keeps its own.
    assert groups.labels([None, None], [["c"], ["b"]]) == ["group2", "group1"]
    assert groups.labels(["head", None, None], [["b"], ["a"], ["c"]]) == ["head", "group0", "group2"]
    # Names that do not tell the groups apart are none.
    assert groups.labels(["x", "x"], [["c"], ["a"]]) == ["group2", "group0"]


SIZES = {"small": 1.0, "middle": 30.0, "large": 900.0}


class Training:
    """Three parameters in groups of their own, whose gradients differ by orders of magnitude."""

    def __init__(self, order: tuple[str, ...] = tuple(SIZES), method: Any = None, **options: Any) -> None:
        self.model = nn.ParameterDict({name: nn.Parameter(torch.zeros(1)) for name in SIZES})
        self.optimizer = SGD([{"params": [self.model[name]]} for name in order], lr=0.1)
        self.clipper = Clipper(self.model, method or RunningMax(per="group"), optimizer=self.optimizer, **options)

    def step(self) -> dict[str, float]:
        """The largest norm so far that each parameter's limit is made of."""
        for name, parameter in self.model.items():
            parameter.grad = torch.tensor([SIZES[name]])
        stats = self.clipper.step()
        held = {group["params"][0]: i for i, group in enumerate(self.optimizer.param_groups)}
        return {name: stats.limits[held[self.model[name]]].item() for name in SIZES}


def reverse(groups: list[dict[str, Any]]) -> None:
    groups.reverse()


def insert(groups: list[dict[str, Any]]) -> None:
    groups.insert(0, groups.pop())


def leave_and_come_back(groups: list[dict[str, Any]]) -> None:
    groups.append(groups.pop(0))


@pytest.mark.parametrize("change", [reverse, insert, leave_and_come_back])
def test_live_in_another_order(change: Callable[[list[dict[str, Any]]], None]) -> None:
    training = Training()
    training.step()
    change(training.optimizer.param_groups)
    assert training.step() == SIZES


def test_a_group_that_was_away_is_known_again() -> None:
    training = Training()
    training.step()
    gone = training.optimizer.param_groups.pop(0)
    training.model["small"].grad = None
    with pytest.warns(RuntimeWarning, match="dropped the learned clipping state of group0"):
        training.clipper.step()
    training.optimizer.param_groups.insert(1, gone)
    training.step()
    assert training.step() == SIZES


@pytest.mark.parametrize("order", [("large", "middle", "small"), ("middle", "large", "small")])
def test_through_a_checkpoint_in_another_order(order: tuple[str, ...]) -> None:
    before = Training(measure_per="group")
    before.step()
    file = io.BytesIO()
    torch.save(before.clipper.state_dict(), file)
    file.seek(0)
    after = Training(order, measure_per="group")
    after.clipper.load_state_dict(torch.load(file, weights_only=True))
    assert after.step() == SIZES
    # Their metrics keep their names too.
    norms = {key.rpartition("/")[2]: value for key, value in after.clipper.metrics().items()}
    assert [norms[f"group{i}"] for i in range(3)] == [*SIZES.values()]


def test_a_group_with_more_parameters_than_before_is_the_same() -> None:
    training = Training()
    training.step()
    small, middle, _ = training.optimizer.param_groups
    small["params"].append(middle["params"].pop())
    training.optimizer.param_groups.remove(middle)
    for name, parameter in training.model.items():
        parameter.grad = torch.tensor([SIZES[name]])
    with pytest.warns(RuntimeWarning, match="dropped the learned clipping state of group1"):
        stats = training.clipper.step()
    assert stats.scopes == ("group0", "group2")
    assert stats.limits.tolist() == [1.0, 900.0]


def test_a_state_of_an_earlier_release_knows_places_only() -> None:
    before, after = Training(), Training()
    before.step()
    state = before.clipper.state_dict()
    del state["groups"], state["parameters"]
    after.clipper.load_state_dict(state)
    assert after.step() == SIZES


@pytest.mark.parametrize("method", [NormClip(), QuantileClip(per="layer")], ids=str)
def test_nothing_is_saved_where_nothing_is_told_by_groups(method: Any) -> None:
    training = Training(method=method)
    assert "groups" not in training.clipper.state_dict()
    assert training.clipper.state_dict()["parameters"] == [*SIZES]
