"""What a callback knows outlives its run, and what it only needs for the run does not."""

import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from torch.optim import Optimizer

from kit.boring import Adversaries, Batches, Prescribed, Validated, csv_rows, equal, fit, gradients, norm
from kit.running_max import RunningMax
from lightning_gradclip import GradientClipping, NormClip, QuantileClip
from lightning_gradclip.history import History

pytestmark = [
    pytest.mark.filterwarnings("ignore:The number of training batches:UserWarning"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`:UserWarning"),
]

GIVEN = gradients(6)


def clipping(method: Any = None, **options: Any) -> GradientClipping:
    return GradientClipping(method or RunningMax(ratio=0.7), **options)


def steps(callback: GradientClipping) -> dict[int, int]:
    return {index: state["step"] for index, state in callback.state_dict()["clippers"].items()}


def largest(callback: GradientClipping) -> dict[int, list[float]]:
    clippers = callback.state_dict()["clippers"]
    return {index: state["learned"]["values"]["largest"].tolist() for index, state in clippers.items()}


class TestHandedOn:
    def test_what_is_loaded_before_a_fit_is_taken_up_once(self) -> None:
        first, second = clipping(), clipping()
        fit(Prescribed(), GIVEN, first)
        second.load_state_dict(first.state_dict())
        assert equal(second.state_dict(), first.state_dict())
        fit(Prescribed(), GIVEN[:2], second)
        assert steps(second) == {0: 8}
        assert largest(second) == largest(first)
        # Another fit begins afresh: its optimizers do too.
        fit(Prescribed(), GIVEN[:2], second)
        assert steps(second) == {0: 2}
        assert largest(second)[0] == pytest.approx([max(map(norm, GIVEN[:2]))], rel=1e-6)

    def test_a_schedule_goes_on(self) -> None:
        first, second = (clipping(NormClip(max_norm={0: 9.0, 6: 8.0, 12: 2.0})) for _ in range(2))
        fit(Prescribed(), GIVEN, first)
        second.load_state_dict(first.state_dict())
        trainer = fit(Prescribed(), GIVEN[:1], second, log_every_n_steps=1)
        assert trainer.callback_metrics["gradclip/limit"].item() == 8.0

    def test_of_the_same_callback_for_another_fit(self) -> None:
        callback = clipping()
        for count in (6, 12):
            fit(Prescribed(), GIVEN, callback)
            assert steps(callback) == {0: count}
            callback.load_state_dict(callback.state_dict())

    def test_after_a_fit_that_failed(self) -> None:
        class Failing(Callback):
            def on_train_batch_start(self, *_: Any) -> None:
                raise ZeroDivisionError

        first, second = clipping(), clipping()
        fit(Prescribed(), GIVEN, first)
        with pytest.raises(ZeroDivisionError):
            fit(Prescribed(), GIVEN, second, Failing())
        second.load_state_dict(first.state_dict())
        fit(Prescribed(), GIVEN, second)
        assert steps(second) == {0: 12}

    def test_a_checkpoint_is_preferred(self, tmp_path: Path) -> None:
        saving = ModelCheckpoint(tmp_path, every_n_train_steps=2, save_top_k=-1, filename="{step}")
        fit(Prescribed(), GIVEN, clipping(), saving, enable_checkpointing=True)
        first, second = clipping(), clipping()
        fit(Prescribed(), GIVEN, first, max_epochs=3)
        second.load_state_dict(first.state_dict())
        fit(Prescribed(), GIVEN, second, ckpt_path=tmp_path / "step=4.ckpt")
        assert steps(second) == {0: 6}

    def test_what_a_trainer_loads_to_validate_is_not_for_the_next_fit(self, tmp_path: Path) -> None:
        callback = clipping()
        trainer = fit(Validated(), GIVEN, callback, val_dataloaders=Batches(GIVEN))
        trainer.save_checkpoint(tmp_path / "end.ckpt")
        trainer.validate(Validated(), Batches(GIVEN), ckpt_path=tmp_path / "end.ckpt", verbose=False)
        fit(Prescribed(), GIVEN, callback)
        assert steps(callback) == {0: 6}


class Turned(Adversaries):
    """Its optimizers come in the other order."""

    def training_step(self, batch: Any, batch_idx: int) -> None:
        super().training_step(batch[::-1], batch_idx)

    def configure_optimizers(self) -> list[Optimizer]:
        return super().configure_optimizers()[::-1]


PAIRS = [*zip(gradients(6, seed=1), gradients(6, seed=2, scale=30.0), strict=True)]


class TestOptimizersInAnotherOrder:
    def saved(self, tmp_path: Path, **options: Any) -> tuple[GradientClipping, Path]:
        callback = clipping(**options)
        trainer = fit(Adversaries(), PAIRS, callback)
        trainer.save_checkpoint(tmp_path / "end.ckpt")
        return callback, tmp_path / "end.ckpt"

    @pytest.mark.parametrize("way", ["checkpoint", "handed on"])
    def test_the_state_follows_the_parameters(self, way: str, tmp_path: Path) -> None:
        before, saved = self.saved(tmp_path)
        callback = clipping()
        options: dict[str, Any] = {"max_epochs": 2, "ckpt_path": saved}
        if way == "handed on":
            callback.load_state_dict(before.state_dict())
            options = {}
        with pytest.warns(UserWarning, match=r"in another order than before: 1 is now 0, 0 is now 1\. The clipping"):
            fit(Turned(), PAIRS, callback, **options)
        assert steps(callback) == {0: 12, 1: 12}
        assert largest(callback) == {0: largest(before)[1], 1: largest(before)[0]}

    def test_one_that_is_gone_is_dropped_and_the_other_found(self, tmp_path: Path) -> None:
        class Half(Adversaries):
            def training_step(self, batch: Any, batch_idx: int) -> None:
                optimizer = self.optimizers()
                optimizer.zero_grad()
                self.manual_backward(self.loss(batch[1]))
                optimizer.step()

            def configure_optimizers(self) -> list[Optimizer]:
                return super().configure_optimizers()[1:]

        before, _ = self.saved(tmp_path)
        callback = clipping()
        callback.load_state_dict(before.state_dict())
        lost, moved = r"^dropped the clipping state of optimizers \[0\]: the module", "order than before: 1 is now 0"
        with pytest.warns(UserWarning, match=lost), pytest.warns(UserWarning, match=moved):
            fit(Half(), PAIRS, callback)
        assert largest(callback) == {0: largest(before)[1]}

    def test_histograms_go_along(self, tmp_path: Path) -> None:
        before, _ = self.saved(tmp_path)
        state = {**before.state_dict(), "norms": {0: torch.zeros(1), 1: torch.ones(2)}}
        callback = clipping(histograms=True)
        callback.load_state_dict(state)

        class Looking(Callback):
            def on_train_start(self, *_: Any) -> None:
                self.norms = callback.state_dict()["norms"]

        looking = Looking()
        with pytest.warns(UserWarning, match="in another order"):
            fit(Turned(), PAIRS, callback, looking)
        assert {index: len(norms) for index, norms in looking.norms.items()} == {0: 2, 1: 1}

    def test_live(self) -> None:
        class Turning(Adversaries):
            def training_step(self, batch: Any, batch_idx: int) -> None:
                if batch_idx == 3:
                    self.trainer.strategy.optimizers = self.trainer.strategy.optimizers[::-1]
                if batch_idx >= 3:
                    batch = batch[::-1]
                super().training_step(batch, batch_idx)

        straight, turned = clipping(), clipping()
        fit(Adversaries(), PAIRS, straight)
        with pytest.warns(UserWarning, match="in another order"):
            fit(Turning(), PAIRS, turned)
        assert largest(turned) == {0: largest(straight)[1], 1: largest(straight)[0]}
        assert steps(turned) == {0: 6, 1: 6}


class TestAnotherMethod:
    def saved(self, tmp_path: Path) -> Path:
        trainer = fit(Prescribed(), GIVEN, clipping(history=str(tmp_path / "history"), nonfinite="ignore"))
        trainer.save_checkpoint(tmp_path / "end.ckpt")
        return tmp_path / "end.ckpt"

    def test_it_is_refused_before_the_first_batch_with_the_way_out(self, tmp_path: Path) -> None:
        class Eager(Prescribed):
            def training_step(self, batch: Any, batch_idx: int) -> None:
                raise AssertionError

        saved = self.saved(tmp_path)
        with pytest.raises(ValueError, match=r"by RunningMax.* clips by QuantileClip.*, or relearn=True, which"):
            fit(Eager(), GIVEN, clipping(QuantileClip()), max_epochs=2, ckpt_path=saved)

    @pytest.mark.parametrize("method", [QuantileClip(), RunningMax(per="layer")])
    def test_it_learns_afresh_and_all_else_goes_on(self, method: Any, tmp_path: Path) -> None:
        saved, csv = self.saved(tmp_path), CSVLogger(tmp_path)
        callback = clipping(method, history=str(tmp_path / "history"), relearn=True)
        fit(Prescribed(), GIVEN, callback, max_epochs=2, ckpt_path=saved, logger=csv, log_every_n_steps=1)
        assert steps(callback) == {0: 12}
        assert History(tmp_path / "history").steps["step"].tolist() == [*range(12)]
        # Nothing is known at the first step, so that nothing is limited.
        first = csv_rows(csv)[0]
        assert first[0] == 6
        assert first[1]["gradclip/norm_clipped"] == first[1]["gradclip/norm"]
        # Once: what the resumed run has learned its copies know.
        assert callback.state_dict()["clippers"][0]["learned"]["values"]


def everything(tmp_path: Path) -> GradientClipping:
    return clipping(history=str(tmp_path / "history"), histograms=True, measure_per="layer", prog_bar=True)


COPIES: dict[str, Callable[[GradientClipping], GradientClipping]] = {
    "pickle": lambda callback: pickle.loads(pickle.dumps(callback)),
    "deepcopy": copy.deepcopy,
    "copy": copy.copy,
}


class Copying(Callback):
    """Copies another callback in the middle of everything."""

    def __init__(self, callback: GradientClipping, way: str) -> None:
        self.callback, self.way = callback, way
        self.copies: list[tuple[GradientClipping, dict[str, Any]]] = []

    def copy(self, *_: Any, **__: Any) -> None:
        self.copies.append((COPIES[self.way](self.callback), self.callback.state_dict()))

    on_train_start = on_before_zero_grad = on_train_batch_end = on_validation_start = on_train_end = teardown = copy


class TestCopies:
    @pytest.mark.parametrize("way", COPIES)
    def test_during_and_after_a_fit(self, way: str, tmp_path: Path) -> None:
        callback = everything(tmp_path)
        copying = Copying(callback, way)
        fit(Prescribed(), GIVEN, callback, copying, logger=TensorBoardLogger(tmp_path), log_every_n_steps=4)
        copying.copy()
        assert len(copying.copies) > 12
        for made, state in copying.copies:
            assert type(made) is GradientClipping
            assert (made.method, made.name, made.history) == (callback.method, callback.name, callback.history)
            assert equal(made.state_dict(), state)
        # The run of the original went on as if nothing had been.
        assert History(tmp_path / "history").steps["step"].tolist() == [*range(6)]
        made, state = copying.copies[-1]
        assert state["clippers"][0]["step"] == 6
        # A copy trains as the original would: afresh, unless it is told otherwise.
        made.history = False
        fit(Prescribed(), GIVEN[:2], made)
        assert steps(made) == {0: 2}
        made.load_state_dict(state)
        fit(Prescribed(), GIVEN[:2], made)
        assert steps(made) == {0: 8}

    def test_what_was_handed_on_is_copied_too(self) -> None:
        first, second = clipping(), clipping()
        fit(Prescribed(), GIVEN, first)
        second.load_state_dict(first.state_dict())
        third = pickle.loads(pickle.dumps(second))
        fit(Prescribed(), GIVEN, third)
        assert steps(third) == {0: 12}

    def test_attributes_of_users_stay(self) -> None:
        callback = clipping()
        callback.note = "mine"
        fit(Prescribed(), GIVEN, callback)
        assert pickle.loads(pickle.dumps(callback)).note == "mine"

    def test_nothing_of_the_run_is_held_after_it(self, tmp_path: Path) -> None:
        callback, module = everything(tmp_path), Prescribed()
        trainer = fit(module, GIVEN, callback)
        held = [weakref.ref(one) for one in (trainer.optimizers[0], module.head.weight)]
        # Lightning's own.
        del callback.log, callback.log_dict
        del trainer, module
        gc.collect()
        assert [one() for one in held] == [None, None]
        assert steps(callback) == {0: 6}


@pytest.mark.parametrize("options", [{}, {"action": "observe"}], ids=["clip", "observe"])
def test_a_step_that_is_refused_does_not_count(options: dict[str, Any]) -> None:
    given = gradients(6)
    given[4]["head.bias"][0] = torch.nan
    callback = clipping(nonfinite="raise", **options)
    with pytest.raises(FloatingPointError, match="optimizer step 4"):
        fit(Prescribed(), given, callback)
    assert steps(callback) == {0: 4}
