"""What a trainer is refused with: the fact with its value, and a way out."""

import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.strategies import SingleDeviceStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.optim import SGD

from kit import workers
from kit.boring import Adversaries, Prescribed, fit, gradients, weights
from lightning_gradclip import ClipMethod, GradientClipping, NormClip


def clipping(**options: Any) -> GradientClipping:
    return GradientClipping(NormClip(max_norm=1.0), **options)


@pytest.mark.parametrize("options", [{}, {"action": "skip"}, {"optimizer": 0}, {"log": False}])
def test_the_trainer_clips_too(options: dict[str, Any]) -> None:
    module = Prescribed()
    before = weights(module)
    with pytest.raises(
        MisconfigurationException,
        match=r"Trainer\(gradient_clip_val=0\.5\) and GradientClipping\(NormClip\(.*remove gradient_clip_val.*observe",
    ):
        fit(module, gradients(1), clipping(**options), gradient_clip_val=0.5)
    assert all(torch.equal(value, before[name]) for name, value in weights(module).items())


def test_the_trainers_clipping_may_be_switched_off_by_zero() -> None:
    # Lightning takes 0 for "no clipping", and so do we.
    trainer = fit(Prescribed(), gradients(1), clipping(), gradient_clip_val=0.0)
    assert trainer.global_step == 1


@pytest.mark.parametrize(
    ("module", "index", "known"),
    [(Adversaries, 3, "optimizers 0 to 1"), (Adversaries, 2, "optimizers 0 to 1"), (Prescribed, 1, "optimizer 0 only")],
)
def test_an_optimizer_that_does_not_exist(module: type[Prescribed], index: int, known: str) -> None:
    with pytest.raises(ValueError, match=f"optimizer={index} does not exist.*{known}.*optimizer=None"):
        fit(module(), gradients(1), clipping(optimizer=index))


def test_an_optimizer_that_the_trainer_does_not_know() -> None:
    class Private(Prescribed):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:
            self.loss(batch).backward()
            own = SGD(self.parameters(), lr=0.1)
            self.trainer.strategy.optimizer_step(own, lambda: None)

    with pytest.raises(
        MisconfigurationException, match=r"SGD is stepped but is none of the trainer's optimizers.*return it"
    ):
        fit(Private(), gradients(1), clipping())


@pytest.mark.parametrize("option", ["include", "exclude"])
@pytest.mark.parametrize("module", [Prescribed, Adversaries])
def test_a_pattern_that_matches_nothing(option: str, module: type[Prescribed]) -> None:
    given: Any = [gradients(2)] if module is Adversaries else gradients(1)
    with pytest.raises(
        ValueError, match=rf"{option}='encodr\.\*' matches no parameter; the closest names are: encoder\.(weight|bias)"
    ):
        fit(module(), given, clipping(**{option: ["head.*", "encodr.*"]}))


def test_a_pattern_without_wildcards_says_what_patterns_are() -> None:
    with pytest.raises(ValueError, match=r"include='encoder' matches no parameter.*whole names, such as 'encoder\.\*'"):
        fit(Prescribed(), gradients(1), clipping(include="encoder"))


def test_a_method_is_required_and_an_instance() -> None:
    with pytest.raises(TypeError, match=r"GradientClipping needs a method; write method=NormClip\(max_norm=1\.0\)"):
        GradientClipping()
    with pytest.raises(TypeError, match=r"got the class NormClip; write NormClip\(\)"):
        GradientClipping(NormClip)
    with pytest.raises(TypeError, match=r"must be a clipping method, got 1\.0 \(float\).*method=None"):
        GradientClipping(1.0)


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"action": "clamp"}, ValueError, "action must be one of 'clip', 'skip', 'observe', got 'clamp'"),
        ({"nonfinite": "nan"}, ValueError, "nonfinite must be one of 'skip', 'zero', 'raise', 'ignore', got 'nan'"),
        ({"action": "observe", "nonfinite": "skip"}, ValueError, "observe.*nonfinite='skip' cannot be kept"),
        ({"action": "observe", "nonfinite": "zero"}, ValueError, "observe.*nonfinite='zero' cannot be kept"),
        ({"method": None, "nonfinite": "skip"}, ValueError, "method=None writes nothing"),
        ({"method": NormClip(min_norm=0.1), "action": "skip"}, ValueError, "also scales gradients up"),
        ({"max_consecutive_skips": -1}, ValueError, "max_consecutive_skips must be >= 0, got -1; None sets no bound"),
        ({"max_consecutive_skips": 1.5}, TypeError, "max_consecutive_skips must be a whole number, got 1.5"),
        ({"optimizer": -1}, ValueError, "optimizer must be >= 0, got -1; None serves every optimizer"),
        ({"optimizer": "0"}, TypeError, "optimizer must be a whole number, got '0'"),
        ({"optimizer": True}, TypeError, "optimizer must be a whole number, got True"),
        ({"log_every_n_steps": 0}, ValueError, "log_every_n_steps must be >= 1, got 0; None takes the trainer's"),
        ({"log_every_n_steps": 2.0}, TypeError, "log_every_n_steps must be a whole number, got 2.0"),
        ({"name": ""}, TypeError, "name must be a non-empty string, got ''"),
        ({"name": None}, TypeError, "name must be a non-empty string, got None"),
        ({"log": "false"}, TypeError, "log must be True or False, got 'false'"),
        ({"prog_bar": 1}, TypeError, "prog_bar must be True or False, got 1"),
        ({"history": None}, TypeError, r"history must be True, False or a folder, got None \(NoneType\)"),
        ({"history": 1}, TypeError, "history must be True, False or a folder, got 1"),
        ({"history": ""}, ValueError, "history must name a folder on a file system of this machine, got ''"),
        ({"history": "s3://bucket/run"}, ValueError, "on a file system of this machine, got 's3://bucket/run'"),
        ({"histograms": "yes"}, TypeError, "histograms must be True or False, got 'yes'"),
        ({"histograms": True, "log": False}, ValueError, "histograms=True with log=False logs nothing; use log=True"),
        ({"fold": "yes"}, TypeError, "fold must be True or False, got 'yes'"),
        ({"measure_per": "unit"}, ValueError, "measure_per must be one of 'group', 'layer', 'parameter', got 'unit'"),
        ({"include": 3}, TypeError, "include must be a pattern or a list of patterns, got 3"),
        ({"include": {"encoder": 1}}, TypeError, "include must be a pattern or a list of patterns"),
        ({"exclude": [None]}, TypeError, "exclude holds None, which is no pattern"),
        ({"exclude": ""}, TypeError, "exclude holds '', which is no pattern"),
    ],
)
def test_arguments_are_checked_where_they_are_given(
    options: dict[str, Any], kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message):
        GradientClipping(**{"method": NormClip(), **options})


def test_a_method_without_a_limit_says_so() -> None:
    class Empty(ClipMethod): ...

    with pytest.raises(NotImplementedError, match="Empty does not define limit"):
        fit(Prescribed(), gradients(1), GradientClipping(Empty()))


@pytest.mark.processes
def test_a_callback_can_be_sent_to_other_processes() -> None:
    """As `ddp_spawn` sends it: pickled, before the fit."""
    sent = pickle.dumps(clipping(include="head.*", measure_per="layer"))

    def work(rank: int) -> tuple[int, list[str]]:
        trainer = fit(Prescribed(), gradients(2), pickle.loads(sent), log_every_n_steps=1)
        return os.getpid(), sorted(key for key in trainer.callback_metrics if key.startswith("gradclip_norm/"))

    ((process, keys),) = workers.run_fresh(work, world=1)
    assert process != os.getpid()
    assert keys == ["gradclip_norm/head"]


def test_a_refused_fit_writes_nothing(tmp_path: Path) -> None:
    with pytest.raises(MisconfigurationException):
        fit(Prescribed(), gradients(1), clipping(), gradient_clip_val=1.0, default_root_dir=tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["XLAStrategy", "XLAFSDPStrategy"])
def test_gradients_that_are_averaged_only_later_are_refused(name: str) -> None:
    """A strategy of that name stands for them, since torch_xla cannot be installed beside every torch."""
    strategy = type(name, (SingleDeviceStrategy,), {})(device="cpu")
    with pytest.raises(MisconfigurationException, match=f"does not support {name}, .* use Trainer\\(gradient_clip_val"):
        fit(Prescribed(), gradients(1), clipping(), strategy=strategy)
