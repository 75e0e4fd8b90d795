"""Whoever monitors a metric of ours reads what it is when it asks, and nobody else pays for that."""

import copy
import math
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from torch.optim import SGD
from torch.optim.lr_scheduler import ReduceLROnPlateau

from kit.boring import Adversaries, Manual, Prescribed, fit, gradients, norm
from lightning_gradclip import GradientClipping, NormClip, ValueClip
from lightning_gradclip.record.history import read_steps

pytestmark = pytest.mark.filterwarnings("ignore:The number of training batches:UserWarning")

LIMIT = 4.0


def clipping(**options: Any) -> GradientClipping:
    return GradientClipping(NormClip(max_norm=LIMIT), **options)


def mean(norms: list[float]) -> float:
    return sum(norms) / len(norms)


class Asking(Callback):
    """Reads metrics after every batch, in some way."""

    def __init__(self, ask: Any = dict) -> None:
        self.ask = ask
        self.told: list[Any] = []

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        self.told.append(self.ask(trainer.callback_metrics))


def test_a_checkpoint_every_few_steps_compares_what_the_metric_is_then(tmp_path: Path) -> None:
    given = gradients(9)
    norms = [norm(gradient) for gradient in given]
    saving = ModelCheckpoint(
        tmp_path, monitor="gradclip/norm", every_n_train_steps=3, save_top_k=-1, filename="{step}-{gradclip/norm:.6f}"
    )
    fit(Prescribed(), given, clipping(), saving, log_every_n_steps=50, enable_checkpointing=True)
    scores = [float(score) for score in saving.best_k_models.values()]
    assert scores == pytest.approx([mean(norms[:3]), mean(norms[:6]), mean(norms)], rel=1e-6)
    assert f"{mean(norms[:3]):.6f}"[:7] in next(iter(saving.best_k_models))


def test_a_scheduler_that_steps_in_mid_epoch_reads_the_latest_steps() -> None:
    class Plateau(Prescribed):
        def configure_optimizers(self) -> Any:
            optimizer = SGD(self.parameters(), lr=1.0)
            scheduler = ReduceLROnPlateau(optimizer, mode="max", factor=0.5, patience=0)
            when = {"interval": "step", "frequency": 2, "monitor": "gradclip/norm_max"}
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, **when}}

    # The maximum since the start grows between two looks, then no more.
    given = [{name: one * (step if step < 5 else 1) for name, one in gradients(1)[0].items()} for step in range(1, 9)]
    trainer = fit(Plateau(), given, clipping(), log_every_n_steps=50)
    assert trainer.optimizers[0].param_groups[0]["lr"] == 0.25
    best = trainer.lr_scheduler_configs[0].scheduler.best
    assert float(best) == pytest.approx(4 * norm(gradients(1)[0]), rel=1e-6)


@pytest.mark.parametrize(
    ("key", "options", "every"),
    [
        *((key, {"max_consecutive_skips": None}, 50) for key in ("norm", "norm_clipped", "norm_max", "clip_rate")),
        ("norm", {"nonfinite": "ignore"}, 50),
        ("norm", {"action": "observe"}, 1),
        ("norm", {"max_consecutive_skips": None}, 1),
    ],
)
@pytest.mark.filterwarnings("ignore:dropped optimizer step:RuntimeWarning")
def test_early_stopping_ends_a_run_whose_gradients_are_all_nan(key: str, options: dict[str, Any], every: int) -> None:
    given = [{name: torch.full_like(one, math.nan) for name, one in gradients(1)[0].items()}] * 3
    stopping = EarlyStopping(f"gradclip/{key}", check_finite=True, patience=9)
    trainer = fit(Prescribed(), given, clipping(**options), stopping, max_epochs=3, log_every_n_steps=every)
    assert trainer.current_epoch == 1


@pytest.mark.filterwarnings("ignore:dropped optimizer step:RuntimeWarning")
def test_what_was_finite_is_not_what_is_read_when_gradients_are_no_more() -> None:
    given = gradients(6)
    for bad in given[3:]:
        bad["head.bias"][0] = math.nan
    asking = Asking()
    trainer = fit(Prescribed(), given, clipping(measure_per="layer", prog_bar=True), asking, log_every_n_steps=3)
    before, after = asking.told[2], asking.told[3]
    assert before.keys() == after.keys()
    counts = {"gradclip/skipped", "gradclip/nonfinite"}
    assert {key for key in after if key.startswith("gradclip") and not math.isnan(after[key])} == counts
    assert math.isnan(trainer.callback_metrics["gradclip_norm/head"])
    assert math.isnan(trainer.progress_bar_metrics["gradclip/norm"])


def test_what_a_window_cannot_tell_is_gone() -> None:
    # The first step is within the bounds, which shows at once, of the others nobody knows what was left.
    asking = Asking()
    given = gradients(4)
    given[0] = {name: one.clamp(-0.1, 0.1) for name, one in given[0].items()}
    fit(Prescribed(), given, GradientClipping(ValueClip(max_value=0.1)), asking, log_every_n_steps=50)
    assert ["gradclip/norm_clipped" in told for told in asking.told] == [True, False, False, False]
    assert all("gradclip/norm" in told for told in asking.told)


@pytest.mark.parametrize(
    "ask",
    [
        lambda metrics: metrics["gradclip/norm"],
        lambda metrics: metrics.get("gradclip/norm"),
        lambda metrics: {**metrics}["gradclip/norm"],
        lambda metrics: (metrics | {"a": 0.0})["gradclip/norm"],
        lambda metrics: dict(metrics)["gradclip/norm"],
        lambda metrics: metrics.copy()["gradclip/norm"],
        lambda metrics: copy.copy(metrics)["gradclip/norm"],
        lambda metrics: copy.deepcopy(metrics)["gradclip/norm"],
        lambda metrics: pickle.loads(pickle.dumps(metrics))["gradclip/norm"],
        lambda metrics: next(value for key, value in metrics.items() if key == "gradclip/norm"),
        lambda metrics: list(metrics.values())[list(metrics).index("gradclip/norm")],
        lambda metrics: "gradclip/norm" in metrics and dict.__getitem__(metrics, "gradclip/norm"),
        lambda metrics: eval(repr(metrics), {"tensor": float, "device": str})["gradclip/norm"],
    ],
)
def test_however_it_is_asked(ask: Any) -> None:
    given = gradients(3)
    asking = Asking(ask)
    fit(Prescribed(), given, clipping(), asking, log_every_n_steps=50)
    norms = [norm(gradient) for gradient in given]
    assert list(map(float, asking.told)) == pytest.approx([mean(norms[:i]) for i in (1, 2, 3)], rel=1e-4)


def test_nobody_pays_who_does_not_ask(tmp_path: Path) -> None:
    """The history tells: it is written whenever somebody looks."""

    def rows(key: str) -> list[int]:
        folder = tmp_path / key.replace("/", "-")

        def ask(metrics: dict[str, Any]) -> int:
            assert metrics.get(key) is not None
            assert "val_loss" not in metrics
            return len(read_steps(folder)[0])

        asking = Asking(ask)
        fit(Prescribed(), gradients(6), clipping(history=folder), asking, log_every_n_steps=3)
        return asking.told

    assert rows("x") == [0, 0, 3, 3, 3, 6]
    assert rows("gradclip/norm") == [1, 2, 3, 4, 5, 6]


def test_after_the_fit_it_is_a_plain_dictionary_of_the_last_values() -> None:
    given = gradients(4)
    norms = [norm(gradient) for gradient in given]
    trainer = fit(Prescribed(), given, clipping(name="second", action="observe"), clipping(), log_every_n_steps=3)
    assert type(trainer.callback_metrics) is dict
    for name in ("gradclip", "second"):
        assert float(trainer.callback_metrics[f"{name}/norm"]) == pytest.approx(norms[3], rel=1e-6)


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError, FloatingPointError, RuntimeError])
def test_after_an_interruption_too(error: type[BaseException]) -> None:
    class Ending(Callback):
        def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
            if trainer.global_step == 2:
                self.trainer = trainer
                raise error

    ending = Ending()
    given = gradients(4)
    norms = [norm(gradient) for gradient in given]
    with pytest.raises((error, SystemExit)):
        fit(Prescribed(), given, clipping(), ending, log_every_n_steps=50)
    assert type(ending.trainer.callback_metrics) is dict
    # After a fault of the device nobody looks at it any more.
    if error is not RuntimeError:
        assert float(ending.trainer.callback_metrics["gradclip/norm"]) == pytest.approx(mean(norms[:2]), rel=1e-6)


def test_several_optimizers_of_which_one_has_not_stepped_since_the_last_log_event() -> None:
    class Seldom(Adversaries):
        def training_step(self, batch: Any, batch_idx: int) -> None:
            first, second = self.optimizers()
            for optimizer, gradient in zip([first, second][: 1 + (batch_idx < 2)], batch, strict=False):
                optimizer.zero_grad()
                self.manual_backward(self.loss(gradient))
                optimizer.step()

    given = list(zip(gradients(4), gradients(4, seed=1), strict=True))
    asking = Asking()
    fit(Seldom(), given, clipping(), asking, log_every_n_steps=2)
    assert ["gradclip/0/norm" in told for told in asking.told] == [True] * 4
    # Of the window in which it took no step nothing is known; until that ends, what the one before has logged.
    assert ["gradclip/1/norm" in told for told in asking.told] == [True, True, True, False]


def test_every_step_of_a_batch_counts_and_keys_of_the_module_stay() -> None:
    class Logging(Manual):
        def training_step(self, batch: Any, batch_idx: int) -> None:
            super().training_step(batch, batch_idx)
            self.log("gradclip/mine", 7.0, batch_size=1)

    given = gradients(6)
    asking = Asking()
    fit(Logging(), [given[:3], given[3:]], clipping(), asking, log_every_n_steps=1)
    assert [float(told["gradclip/mine"]) for told in asking.told] == [7.0, 7.0]
    expected = [mean([norm(one) for one in some]) for some in (given[:3], given[3:])]
    assert [float(told["gradclip/norm"]) for told in asking.told] == pytest.approx(expected, rel=1e-6)


def test_a_second_fit_begins_anew() -> None:
    callback, asking = clipping(), Asking()
    given = gradients(4)
    for part in (given[:2], given[2:]):
        fit(Prescribed(), part, callback, asking, log_every_n_steps=50)
    norms = [norm(gradient) for gradient in given]
    expected = [norms[0], mean(norms[:2]), norms[2], mean(norms[2:])]
    assert [float(told["gradclip/norm"]) for told in asking.told] == pytest.approx(expected, rel=1e-6)


def test_the_callback_pickles_while_somebody_can_ask() -> None:
    class Copying(Callback):
        def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
            copy.deepcopy(trainer.callback_metrics)
            copy.deepcopy(self.callback)

    copying = Copying()
    copying.callback = clipping()
    fit(Prescribed(), gradients(2), copying.callback, copying, log_every_n_steps=50)
