"""A rule that is fixed once it is made, and that another may take the place of while a run goes on."""

import copy
import math
import pickle
from collections.abc import Callable
from dataclasses import FrozenInstanceError, fields
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from torch import nn

from kit.boring import Prescribed, csv_rows, fit
from kit.gradients import named
from kit.methods import FOUND
from lightning_gradclip import (
    AGC,
    ClipMethod,
    Clipper,
    GradientClipping,
    History,
    NormClip,
    QuantileClip,
    SigmaClip,
    SpikeClip,
    ValueClip,
    ZClip,
)


@pytest.mark.parametrize("kind", FOUND)
def test_the_limit_may_be_said_first_and_the_rest_by_name(kind: type[ClipMethod]) -> None:
    first, second = [one for one in fields(kind) if one.init][:2]
    assert kind(first.default) == kind()
    with pytest.raises(TypeError, match=rf"takes only {first.name} without a name.*such as {kind.__name__}\(.*=3"):
        kind(first.default, 3)
    assert second.kw_only


@pytest.mark.parametrize("passed", [lambda one: one, copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))])
@pytest.mark.parametrize("kind", FOUND)
def test_a_method_is_fixed(kind: type[ClipMethod], passed: Callable[[ClipMethod], ClipMethod]) -> None:
    method = passed(kind())
    for one in fields(kind):
        with pytest.raises(FrozenInstanceError, match=rf"callback\.method = {kind.__name__}\({one.name}=-1\)"):
            setattr(method, one.name, -1)
    assert method == kind()


def constant(norm: float) -> list[tuple[str, nn.Parameter]]:
    return named({"a": torch.tensor([norm])})


def set_norm(pairs: list[tuple[str, nn.Parameter]], norm: float) -> None:
    pairs[0][1].grad = torch.tensor([norm])


def test_another_limit_holds_from_the_next_step_on(tmp_path: Path) -> None:
    pairs = constant(8.0)
    clipper = Clipper(pairs, NormClip(4.0), history=tmp_path / "history")
    found = []
    for method in (None, NormClip(2.0), None, ValueClip(1.0)):
        if method is not None:
            clipper.method = method
            assert clipper.method == method
        set_norm(pairs, 8.0)
        clipper.step()
        found.append(pairs[0][1].grad.item())
    assert found == pytest.approx([4.0, 2.0, 2.0, 1.0], rel=1e-6)
    assert clipper.steps == 4
    clipper.close()
    history = History(tmp_path / "history")
    assert history.steps["limit"].tolist() == [4.0, 2.0, 2.0, 1.0]
    segments = [(one["from_step"], one["method"]["class"]) for one in history.meta["segments"]]
    assert segments == [(0, "NormClip"), (1, "NormClip"), (3, "ValueClip")]


def test_metrics_of_a_window_with_two_rules_say_what_holds_of_both() -> None:
    pairs = constant(8.0)
    clipper = Clipper(pairs, NormClip(4.0))
    clipper.step()
    clipper.method = ValueClip(1.0)
    set_norm(pairs, 8.0)
    clipper.step()
    metrics = clipper.metrics()
    assert (metrics["norm"], metrics["limit"], metrics["clip_rate"]) == (8.0, 2.5, 1.0)
    assert metrics["norm_clipped"] == pytest.approx(2.5)
    assert not {"coef_min", "clipped"} & metrics.keys()
    set_norm(pairs, 8.0)
    clipper.step()
    assert clipper.metrics()["clipped"] == 1.0


@pytest.mark.parametrize(
    ("before", "after", "kept"),
    [
        (QuantileClip(0.9, window=8), QuantileClip(0.5, window=8), True),
        (QuantileClip(0.9, window=8), QuantileClip(0.9, window=9), False),
        (SigmaClip(3.0, window=8, warmup=2), SigmaClip(1.0, window=8, warmup=2), True),
        (ZClip(warmup=2), ZClip(2.0, warmup=2), True),
        (ZClip(warmup=2), SigmaClip(window=8, warmup=2), False),
    ],
)
def test_what_was_learned_goes_on_where_it_means_the_same(before: ClipMethod, after: ClipMethod, kept: bool) -> None:
    pairs = constant(1.0)
    clipper = Clipper(pairs, before)
    for norm in (1.0, 2.0, 3.0, 4.0):
        set_norm(pairs, norm)
        clipper.step()
    clipper.method = after
    set_norm(pairs, 4.0)
    stats = clipper.step()
    other = Clipper(constant(1.0), after)
    if kept:
        other.load_state_dict({**clipper.state_dict(), "learned": learned(before)})
    pairs = other.selection.params
    pairs[0].grad = torch.tensor([4.0])
    assert stats.limits.tolist() == other.step().limits.tolist()


def learned(method: ClipMethod) -> dict[str, Any]:
    pairs = constant(1.0)
    clipper = Clipper(pairs, method)
    for norm in (1.0, 2.0, 3.0, 4.0):
        set_norm(pairs, norm)
        clipper.step()
    return clipper.state_dict()["learned"]


@pytest.mark.parametrize(
    ("method", "error", "said"),
    [
        (NormClip, TypeError, "write NormClip()"),
        (0.5, TypeError, "must be a clipping method"),
        (NormClip(norm_type=math.inf), ValueError, "norm_type=inf in place of 2"),
        (NormClip(min_norm=0.1), ValueError, "also scales gradients up"),
    ],
)
def test_what_cannot_take_its_place_is_refused_and_changes_nothing(method: Any, error: Any, said: str) -> None:
    pairs = constant(3.0)
    clipper = Clipper(pairs, NormClip(4.0), action="skip")
    with pytest.raises(error, match=said.replace("(", r"\(").replace(")", r"\)")):
        clipper.method = method
    assert clipper.method == NormClip(4.0)
    assert clipper.step().limit.item() == 4.0


@pytest.mark.parametrize("per", ["layer", "parameter"])
def test_what_it_cannot_measure_is_refused_and_changes_nothing(per: str) -> None:
    parameter = nn.Parameter(torch.ones(1))
    twins = [("a", parameter), ("a", nn.Parameter(torch.ones(1)))]
    clipper = Clipper(twins, NormClip(4.0))
    with pytest.raises(ValueError, match="two parameters are both called 'a'"):
        clipper.method = ZClip(per=per)
    with pytest.raises(ValueError, match="limits by what the optimizer remembers, and this clipper has none"):
        clipper.method = SpikeClip()
    parameter.grad = torch.tensor([8.0])
    assert clipper.step().limit.item() == 4.0
    assert parameter.grad.item() == pytest.approx(4.0)
    assert clipper.method == NormClip(4.0)


def test_a_resumed_clipper_goes_on_with_the_rule_it_is_given() -> None:
    clipper = Clipper(constant(8.0), QuantileClip(0.9, window=4))
    clipper.step()
    clipper.method = AGC(0.1)
    resumed = Clipper(constant(8.0), AGC(0.1))
    resumed.load_state_dict(clipper.state_dict())
    assert resumed.steps == 1


STEPS = [{"head.bias": torch.tensor([3.0, 4.0])}] * 6


class Turning(Callback):
    """Gives the callback another method after three batches."""

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        clipping = next(one for one in trainer.callbacks if isinstance(one, GradientClipping))
        if trainer.global_step == 3:
            clipping.method = NormClip(0.5)
        self.clippers, self.stats = dict(clipping.clippers), dict(clipping.stats)


def test_a_callback_takes_another_in_mid_training(tmp_path: Path) -> None:
    clipping, turning = GradientClipping(NormClip(2.0), history=True, log_every_n_steps=1), Turning()
    logger = CSVLogger(tmp_path)
    fit(Prescribed(), STEPS, clipping, turning, logger=logger, log_every_n_steps=1)
    assert [row["gradclip/limit"] for _, row in csv_rows(logger)] == [2.0] * 3 + [0.5] * 3
    history = History(Path(logger.log_dir) / "gradclip")
    assert history.steps["limit"].tolist() == [2.0] * 3 + [0.5] * 3
    assert [one["from_step"] for one in history.meta["segments"]] == [0, 3]
    assert clipping.method == NormClip(0.5)
    assert turning.clippers[0].steps == 6
    assert turning.stats[0].as_dict()["norm"] == 5.0
    assert turning.stats[0].as_dict()["limits"] == {"model": 0.5}


def test_a_method_that_the_trainer_forbids_is_refused_in_mid_training(tmp_path: Path) -> None:
    clipping = GradientClipping(None)
    with pytest.raises(Exception, match="gradient_clip_val"):
        fit(Prescribed(), STEPS, clipping, Turning(), gradient_clip_val=1.0, log_every_n_steps=1)
    assert clipping.method is None


def test_objects_say_what_they_are() -> None:
    clipper = Clipper(constant(1.0), NormClip(2.0))
    assert repr(clipper) == f"Clipper({NormClip(2.0)!r}, action='clip'; 1 parameters in 1 scopes, 0 steps)"
    callback = GradientClipping(NormClip(2.0), exclude="*.bias")
    shown = f"GradientClipping({NormClip(2.0)!r}, action='clip', name='gradclip', include=['*'], exclude=['*.bias'])"
    assert repr(callback) == shown


def test_old_names_work_and_say_the_new_ones() -> None:
    clipper = Clipper(constant(8.0), NormClip(4.0))
    stats = clipper.step()
    with pytest.warns(FutureWarning, match=r"peek\(\) is now metrics\(reset=False\); .* 0\.4\.0"):
        assert clipper.peek() == clipper.metrics(reset=False)
    for old, new, value in (("size", "sizes", 8.0), ("allowed", "limits", 4.0)):
        with pytest.warns(FutureWarning, match=f"StepStats.{old} is now StepStats.{new}"):
            assert getattr(stats, old) == value
    with pytest.warns(FutureWarning, match="StepStats.places is now StepStats.scopes"):
        assert stats.places.names == stats.scopes
    with pytest.warns(FutureWarning, match="StepStats.measured_places is now StepStats.measured_scopes"):
        assert stats.measured_places is None
