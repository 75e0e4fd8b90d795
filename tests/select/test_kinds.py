"""Optimizers that do not know how large a gradient is: known by what they do, left out or warned about."""

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.optim import SGD, Adafactor, AdamW, Optimizer

from kit import boring, peers
from lightning_gradclip import Clipper, EmaClip, GradientClipping, NormClip
from lightning_gradclip.select.kinds import scale_free

WARNING = "by the direction of their gradient alone"
Muon = getattr(torch.optim, "Muon", None)
needs_muon = pytest.mark.skipif(Muon is None, reason="this torch has no Muon")


def timm(name: str) -> Any:
    return getattr(peers.inside("timm", "timm/optim", name.lower()), name)


def published() -> Iterator[Any]:
    """Optimizers of torch, timm and pytorch_optimizer that step one matrix by its gradient."""
    yield from (("torch", name, getattr(torch.optim, name)) for name in ("Muon", "AdamW", "SGD", "RMSprop", "Adagrad"))
    for name in ("Lion", "SignSGD", "Tiger", "Fromage", "SPlus", "AdamP", "Adan", "StableAdamW"):
        yield "pytorch_optimizer", name, getattr(peers.module("pytorch_optimizer"), name)
    for name in ("Lion", "Muon", "AdamP"):
        yield "timm", name, timm(name)


def lengthening(kind: Callable[..., Optimizer]) -> float:
    """By how much a step grows where its gradient is a thousand times as large as those before it."""
    generator = torch.Generator().manual_seed(0)
    parameter = Parameter(torch.randn(8, 8, generator=generator))
    optimizer = kind([parameter], lr=1e-3)
    way = torch.randn(8, 8, generator=generator)
    lengths = []
    for factor in (*[1.0] * 20, 1e3):
        before = parameter.detach().clone()
        parameter.grad = factor * (way + 0.1 * torch.randn(8, 8, generator=generator))
        optimizer.step()
        lengths.append((parameter.detach() - before).norm().item())
    return lengths[-1] / lengths[-2]


def test_those_known_are_those_whose_steps_do_not_grow() -> None:
    known = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for package, name, kind in published():
            optimizer = kind([parameter := Parameter(torch.ones(8, 8))], lr=1e-3)
            found = scale_free(optimizer)
            assert found in ({}, {id(parameter): name})
            known[package, name] = bool(found)
            grows = lengthening(kind)
            assert bool(found) == (0.9 < grows < 1.1), (package, name, grows)
    assert 7 <= sum(known.values()) <= len(known) - 7


def test_one_class_may_step_some_groups_as_adam_does() -> None:
    kind = peers.module("pytorch_optimizer").Muon
    matrix, bias, embedding = Parameter(torch.ones(4, 4)), Parameter(torch.ones(4)), Parameter(torch.ones(4, 4))
    groups = [{"params": [matrix], "use_muon": True}, {"params": [bias, embedding], "use_muon": False}]
    assert scale_free(kind(groups)) == {id(matrix): "Muon"}
    groups = [{"params": [matrix, bias]}, {"params": [embedding], "use_fallback": True}]
    mixed = timm("Muon")(groups)
    assert scale_free(mixed) == {id(matrix): "Muon"}


class Half(Optimizer):
    """Of the kind of Keller Jordan's: some groups by Muon, some by Adam."""

    def __init__(self, groups: list[dict[str, Any]]) -> None:
        super().__init__(groups, {})


class MuonWithAuxAdam(Half): ...


def clipper(method: Any = NormClip(max_norm=1.0), **options: Any) -> Clipper:  # noqa: B008
    params: dict[str, Tensor] = {"hidden.weight": torch.ones(2, 2), "head.bias": torch.ones(2)}
    named = {name: Parameter(value) for name, value in params.items()}
    for parameter in named.values():
        parameter.grad = torch.ones_like(parameter)
    hidden, head = named.values()
    optimizer = MuonWithAuxAdam([{"params": [hidden], "use_muon": True}, {"params": [head], "use_muon": False}])
    return Clipper(named.items(), method, optimizer=optimizer, **options)


def test_a_fixed_limit_is_warned_about() -> None:
    with pytest.warns(RuntimeWarning, match=WARNING) as said:
        made = clipper()
    for part in ("1 of 2 parameters, such as 'hidden.weight', that MuonWithAuxAdam", "scale_free='exclude'"):
        assert part in str(said[0].message)
    # And is kept.
    assert made.step().norm.item() == pytest.approx(6**0.5)


@pytest.mark.parametrize(
    ("method", "options"),
    [
        (NormClip(), {"scale_free": "clip"}),
        (NormClip(), {"action": "observe"}),
        (NormClip(), {"action": "skip"}),
        (NormClip(), {"include": "head.*"}),
        (EmaClip(), {}),
        (None, {}),
    ],
)
def test_what_is_not_warned_about(method: Any, options: dict[str, str]) -> None:
    clipper(method, **options)


def test_they_are_left_out_on_demand() -> None:
    made = clipper(scale_free="exclude")
    assert made.step().norm.item() == pytest.approx(2**0.5)
    hidden, head = (group["params"][0].grad for group in made.optimizer.param_groups)
    assert hidden.tolist() == [[1.0, 1.0], [1.0, 1.0]]
    assert head.norm().item() == pytest.approx(1.0)
    assert not clipper(include="hidden.*", scale_free="exclude").serves_any


def test_another_word_is_refused() -> None:
    with pytest.raises(ValueError, match="scale_free must be one of 'warn', 'clip', 'exclude', got 'skip'"):
        GradientClipping(NormClip(), scale_free="skip")


@needs_muon
def test_two_optimizers_of_a_trainer() -> None:
    class Both(boring.Adversaries):
        def configure_optimizers(self) -> list[Optimizer]:
            return [Muon([self.encoder.weight], lr=0.1), AdamW([self.encoder.bias, *self.head.parameters()])]

    batch = {name: torch.ones(shape) for name, shape in boring.SHAPES.items()}
    with pytest.warns(RuntimeWarning, match="1 of 1 parameters, such as 'encoder.weight', that Muon"):
        boring.fit(Both(), [(batch, batch)], GradientClipping(NormClip(max_norm=1e3)))
    trainer = boring.fit(Both(), [(batch, batch)], GradientClipping(NormClip(max_norm=1e3), scale_free="exclude"))
    assert "gradclip/1/norm" in trainer.callback_metrics
    assert "gradclip/0/norm" not in trainer.callback_metrics


def test_what_knows_sizes() -> None:
    params = list(nn.Linear(2, 2).parameters())
    assert scale_free(SGD(params)) == scale_free(AdamW(params)) == scale_free(Adafactor(params)) == {}
