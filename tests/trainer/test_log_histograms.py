"""Histograms of the norms of a window, read back from TensorBoard's files; those of W&B are in test_log_loggers.py."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from kit.boring import (
    ENCODER,
    HEAD,
    Adversaries,
    CountingLogger,
    Prescribed,
    fit,
    gradients,
    norm,
    tensorboard,
    tensorboard_events,
    windows,
)
from kit.extras import needs_tensorboard
from lightning_gradclip import GradientClipping, NormClip

pytestmark = [
    pytest.mark.filterwarnings("ignore:The number of training batches:UserWarning"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`:UserWarning"),
]


def clipping(**options: Any) -> GradientClipping:
    return GradientClipping(NormClip(max_norm=4.0), **{"histograms": True, **options})


def read(logger: TensorBoardLogger) -> dict[str, dict[int, Any]]:
    """By name and step the histograms in the logger's files."""
    events = tensorboard_events(logger)
    return {
        tag: {one.step: one.histogram_value for one in events.Histograms(tag)} for tag in events.Tags()["histograms"]
    }


def assert_holds(found: dict[int, Any], expected: dict[int, list[float]]) -> None:
    """At these steps, and of no other norms than these."""
    assert list(found) == list(expected)
    for step, norms in expected.items():
        one, wanted = found[step], np.array(norms)
        assert (one.num, one.min, one.max) == pytest.approx((len(wanted), wanted.min(), wanted.max()), rel=1e-6)
        assert (one.sum, one.sum_squares) == pytest.approx((wanted.sum(), np.square(wanted).sum()), rel=1e-6)
        # TensorBoard leaves out empty buckets at both ends, the first excepted.
        edges = [-np.inf, *one.bucket_limit]
        assert list(one.bucket) == np.histogram(wanted, edges)[0].tolist()


@pytest.mark.parametrize("every", [1, 7, 50])
@pytest.mark.parametrize("history", [True, False])
def test_each_window_has_one(tmp_path: Path, every: int, history: bool) -> None:
    given, board = gradients(20), tensorboard(tmp_path)
    fit(Prescribed(), given, clipping(history=history), logger=[CSVLogger(tmp_path), board], log_every_n_steps=every)
    found = read(board)
    assert list(found) == ["gradclip/norms"]
    assert_holds(found["gradclip/norms"], windows([[norm(gradient)] for gradient in given], every))


def test_each_optimizer_has_its_own(tmp_path: Path) -> None:
    given, board = list(zip(gradients(9), gradients(9, seed=1), strict=True)), tensorboard(tmp_path)
    fit(Adversaries(), given, clipping(name="mine"), logger=board, log_every_n_steps=4)
    found = read(board)
    for index, names in enumerate((ENCODER, HEAD)):
        sizes = [[norm(pair[index], names)] for pair in given]
        assert_holds(found[f"mine/{index}/norms"], windows(sizes, 4))


@needs_tensorboard
def test_none_without_being_asked(tmp_path: Path) -> None:
    board = tensorboard(tmp_path)
    fit(Prescribed(), gradients(4), GradientClipping(NormClip()), logger=board, log_every_n_steps=1)
    assert read(board) == {}


def test_a_logger_without_histograms_receives_what_it_did() -> None:
    given, loggers = gradients(6), [CountingLogger(), CountingLogger()]
    for logger, wanted in zip(loggers, (True, False), strict=True):
        fit(Prescribed(), given, clipping(histograms=wanted), logger=logger, log_every_n_steps=2)
    assert loggers[0].calls == loggers[1].calls


def test_a_window_is_whole_after_a_resume(tmp_path: Path) -> None:
    class Crash(Callback):
        class Error(Exception): ...

        def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
            if trainer.global_step == 5:
                raise self.Error

    given = gradients(9)
    saving = ModelCheckpoint(tmp_path / "saves", every_n_train_steps=5, save_top_k=-1, filename="saved")
    with pytest.raises(Crash.Error):
        fit(Prescribed(), given, clipping(), Crash(), saving, enable_checkpointing=True, log_every_n_steps=7)
    board = tensorboard(tmp_path)
    saved = tmp_path / "saves" / "saved.ckpt"
    fit(Prescribed(), given, clipping(), logger=board, log_every_n_steps=7, ckpt_path=saved, weights_only=True)
    assert_holds(read(board)["gradclip/norms"], windows([[norm(gradient)] for gradient in given], 7))
    # The state does without where nobody wants them.
    plain = GradientClipping(NormClip(max_norm=4.0))
    fit(Prescribed(), given, plain, log_every_n_steps=7, ckpt_path=saved, weights_only=True)
    assert set(plain.state_dict()) == {"clippers"}


def test_norms_that_are_not_finite_are_left_out(tmp_path: Path) -> None:
    given, board = gradients(6), tensorboard(tmp_path)
    for bad in (1, 2, 3):
        given[bad]["head.bias"][0] = torch.nan
    with pytest.warns(RuntimeWarning, match="dropped optimizer step 1"):
        fit(Prescribed(), given, clipping(), logger=board, log_every_n_steps=2)
    expected = {1: [norm(given[0])], 5: [norm(given[4]), norm(given[5])]}
    assert_holds(read(board)["gradclip/norms"], expected)
