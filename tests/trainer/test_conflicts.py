"""What a trainer is refused with: the fact with its value, and a way out."""

import os
import pickle
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch
import pytest
import pytorch_lightning
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import LearningRateFinder
from lightning.pytorch.strategies import SingleDeviceStrategy
from lightning.pytorch.tuner import Tuner
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.optim import SGD

from kit import workers
from kit.boring import Adversaries, Batches, Manual, Prescribed, fit, gradients, make_trainer, norm, weights
from lightning_gradclip import ClipMethod, GradientClipping, NormClip, ZClip

QUIET = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")


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


class Overriding(Prescribed):
    def configure_gradient_clipping(self, optimizer: Any, **_: Any) -> None:
        self.clip_gradients(optimizer, 0.05, "norm")


class OnObject(Prescribed):
    def __init__(self) -> None:
        super().__init__()
        self.configure_gradient_clipping = lambda optimizer, **_: self.clip_gradients(optimizer, 0.05, "norm")


class ManualOverriding(Manual):
    configure_gradient_clipping = Overriding.configure_gradient_clipping


class SetLater(Callback):
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        trainer.gradient_clip_val = 0.25


@pytest.mark.parametrize("module", [Overriding, OnObject, type("Inheriting", (Overriding,), {})])
def test_the_module_clips_too(module: type[Prescribed]) -> None:
    with pytest.raises(
        MisconfigurationException,
        match=rf"both {module.__name__}\.configure_gradient_clipping and GradientClipping\(NormClip\(.*clip; remove "
        r"the method from .* write configure_gradient_clipping = LightningModule\.configure_gradient_clipping in a",
    ):
        fit(module(), gradients(1), clipping())
    assert fit(module(), gradients(1), clipping(action="observe")).global_step == 1


def test_what_a_module_overrides_in_vain_or_gives_back_is_no_conflict() -> None:
    class GivenBack(Overriding):
        configure_gradient_clipping = LightningModule.configure_gradient_clipping

    assert fit(GivenBack(), gradients(1), clipping()).global_step == 1
    assert fit(ManualOverriding(), [gradients(1)], clipping()).global_step == 1


def test_a_limit_that_the_trainer_is_given_before_training_begins() -> None:
    with pytest.raises(MisconfigurationException, match=r"both Trainer\(gradient_clip_val=0\.25\) and"):
        fit(Prescribed(), gradients(1), clipping(), SetLater())


class Reached(Prescribed):
    """Notes how far a fit came."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []

    def train_dataloader(self) -> Any:
        self.calls.append("data")
        return Batches(gradients(1))

    def val_dataloader(self) -> Any:
        return self.train_dataloader()

    def validation_step(self, *_: Any) -> None:
        self.calls.append("forward")


class Late(Reached):
    """Has its parameters from `setup` or `configure_model` on only."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = self.encoder, self.head
        del self.encoder, self.head

    def setup(self, stage: str) -> None:
        self.encoder = self.parts[0]

    def configure_model(self) -> None:
        self.head = self.parts[1]


EARLY = {
    "include": ({"include": "encodr.*"}, r"include='encodr\.\*' matches no parameter"),
    "exclude": ({"exclude": "encoder"}, r"exclude='encoder' matches no parameter.*; did you mean 'encoder\.\*'\?"),
    "all left out": ({"exclude": ["encoder.*", "head.*"]}, "leave no parameter to clip"),
    "not fused": ({"fold": True}, "fold=True hands the coefficient to a fused optimizer, but SGD would ignore it"),
    "no such optimizer": ({"optimizer": 1}, "optimizer=1 does not exist"),
}


@pytest.mark.parametrize("module", [Reached, Late])
@pytest.mark.parametrize("mistake", EARLY)
def test_what_cannot_work_is_refused_before_data_are_asked_for(module: type[Reached], mistake: str) -> None:
    options, message = EARLY[mistake]
    model = module()
    with pytest.raises(ValueError, match=message):
        make_trainer(clipping(**options)).fit(model)
    assert model.calls == []
    assert make_trainer(clipping(include="encoder.*", exclude="*.bias")).fit(model) is None
    assert model.calls


@pytest.mark.parametrize("package", [lightning.pytorch, pytorch_lightning])
def test_what_stands_where_a_callback_belongs(package: Any) -> None:
    method = NormClip(max_norm=0.5)
    with pytest.raises(
        TypeError, match=r"holds NormClip\(max_norm=0\.5.*write callbacks=\[GradientClipping\(NormClip\(max"
    ):
        package.Trainer(callbacks=[method])
    with pytest.raises(TypeError, match=r"the class ZClip, which.*; write callbacks=\[GradientClipping\(ZClip\(\)\)\]"):
        package.Trainer(callbacks=[ZClip])
    # In all other respects it has no such thing.
    assert not hasattr(method, "setup")

    class Model(package.LightningModule):
        def __init__(self, *given: Any) -> None:
            super().__init__()
            self.layer, self.given = torch.nn.Linear(2, 1), given

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return self.layer(batch).sum()

        def configure_optimizers(self) -> SGD:
            return SGD(self.parameters(), lr=0.1)

        def configure_callbacks(self) -> Any:
            return list(self.given)

    data, quiet = [torch.ones(1, 2)], {**dict.fromkeys(QUIET, False), "accelerator": "cpu", "max_epochs": 1}
    for trainer, module in (
        (package.Trainer(callbacks=[GradientClipping], **quiet), Model()),
        (package.Trainer(**quiet), Model(GradientClipping)),
    ):
        with pytest.raises(
            TypeError, match=r"holds the class GradientClipping.*write callbacks=\[GradientClipping\(Norm"
        ):
            trainer.fit(module, data)
    with pytest.raises(TypeError, match=r"holds NormClip\(max_norm=0\.5"):
        package.Trainer(**quiet).fit(Model(method), data)
    twins = [clipping(), GradientClipping(None)]
    with pytest.raises(
        Exception, match=r"2 GradientClipping callbacks are named 'gradclip'; .*name='gradclip_2'"
    ) as caught:
        package.Trainer(callbacks=twins, **quiet).fit(Model(), data)
    assert type(caught.value).__name__ == "MisconfigurationException"


@pytest.mark.parametrize("way", ["a tuner", "a callback"])
def test_a_search_for_a_learning_rate_runs_without_callbacks(tmp_path: Path, way: str) -> None:
    class Searched(Prescribed):
        lr = 0.1

        def configure_optimizers(self) -> SGD:
            return SGD(self.parameters(), lr=self.lr)

    finder = LearningRateFinder(num_training_steps=3, update_attr=False)
    for options, says in (({}, True), ({"action": "observe"}, False)):
        trainer = make_trainer(
            clipping(**options), *([finder] if way == "a callback" else []), default_root_dir=tmp_path
        )
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            if way == "a callback":
                trainer.fit(Searched(), Batches(gradients(6)))
            else:
                Tuner(trainer).lr_find(Searched(), Batches(gradients(6)), num_training=3, update_attr=False)
        said = [str(one.message) for one in caught if "clip" in str(one.message)]
        assert len(said) == says
        assert (
            not says
            or "searches without GradientClipping and suggests a learning rate for gradients that are" in said[0]
        )
        assert not says or said[0].endswith("Tuner(Trainer(gradient_clip_val=1.0)).lr_find(model)")


def test_the_way_out_of_the_search_clips(tmp_path: Path) -> None:
    received: list[float] = []

    class Searched(Prescribed):
        def configure_optimizers(self) -> SGD:
            optimizer = SGD(self.parameters(), lr=0.1)
            optimizer.register_step_post_hook(self.note)
            return optimizer

        def note(self, *_: Any) -> None:
            received.append(norm({name: one.grad for name, one in self.named_parameters()}))

    given = [gradient for gradient in gradients(20) if norm(gradient) > 1.0][:6]
    trainer = make_trainer(gradient_clip_val=1.0, default_root_dir=tmp_path)
    Tuner(trainer).lr_find(Searched(), Batches(given), num_training=3, update_attr=False)
    assert received
    assert received == pytest.approx([1.0] * len(received), rel=1e-5)


def test_what_the_module_configures_replaces_what_the_trainer_has() -> None:
    class Configuring(Prescribed):
        def configure_callbacks(self) -> Any:
            return [clipping(name="mine")]

    trainer = fit(Configuring(), gradients(1), clipping(name="a"), clipping(name="b"), log_every_n_steps=1)
    assert {key.partition("/")[0] for key in trainer.callback_metrics} == {"x", "mine"}


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
        ({"optimizer": "first"}, TypeError, "optimizer must be a whole number, got 'first'"),
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


@pytest.mark.filterwarnings("ignore:.* is text, :UserWarning")
def test_whole_numbers_in_text_are_numbers_from_then_on() -> None:
    callback = GradientClipping(NormClip(), optimizer="0", log_every_n_steps="5", max_consecutive_skips="3")  # type: ignore[arg-type]
    assert (callback.optimizer, callback._options.policy.max_consecutive_skips) == (0, 3)
    assert [key for key, value in vars(callback).items() if value in ("0", "5", "3")] == []
