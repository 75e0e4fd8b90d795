"""What the loggers receive: every optimizer step counted once, on Lightning's own step axis."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint, TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from torch import nn
from torch.optim import SGD
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.utils.data import DataLoader, IterableDataset

from kit.boring import (
    Adversaries,
    Batches,
    CountingLogger,
    Manual,
    Prescribed,
    Validated,
    aggregate,
    csv_rows,
    fit,
    gradients,
    mean_gradient,
    norm,
    tensorboard,
    tensorboard_rows,
    windows,
)
from lightning_gradclip import GradientClipping, NormClip, ValueClip

LIMIT = 4.0
# Intervals longer than an epoch are the subject of some tests.
long_interval = pytest.mark.filterwarnings("ignore:The number of training batches:UserWarning")


def clipping(**options: Any) -> GradientClipping:
    return GradientClipping(NormClip(max_norm=LIMIT), **options)


class Seen(Callback):
    """Notes a metric of `trainer.callback_metrics` at chosen hooks."""

    def __init__(self, key: str = "gradclip/norm") -> None:
        self.key = key
        self.on_batch: list[float | None] = []
        self.on_validation: list[float | None] = []
        self.on_epoch: list[float | None] = []
        self.in_bar: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        self.on_batch.append(self._value(trainer))
        self.in_bar.append({k: float(v) for k, v in trainer.progress_bar_metrics.items() if k.startswith("gradclip")})

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.on_validation.append(self._value(trainer))

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.on_epoch.append(self._value(trainer))

    def _value(self, trainer: Trainer) -> float | None:
        value = trainer.callback_metrics.get(self.key)
        return None if value is None else float(value)


def loggers(folder: Path) -> tuple[CSVLogger, TensorBoardLogger]:
    return CSVLogger(folder, name="csv"), tensorboard(folder, name="tensorboard")


def check_logged(expected: dict[int, list[float]], csv: CSVLogger, board: TensorBoardLogger) -> None:
    """Both loggers hold exactly the expected windows."""
    for rows, tolerance in ((csv_rows(csv), 1e-9), (tensorboard_rows(board), 1e-6)):
        assert [step for step, _ in rows] == list(expected)
        for step, values in rows:
            assert values == pytest.approx(aggregate(expected[step], LIMIT), rel=max(tolerance, 1e-6))


def check_axis(expected: dict[int, list[float]], batches: int, every: int, csv: CSVLogger, board: Any) -> None:
    """Lightning's own metric lies at the same steps; what is left at the end has no step of its own there."""
    for rows in (csv_rows(csv, "x"), tensorboard_rows(board, "x")):
        steps = [step for step, _ in rows]
        assert steps == list(range(every - 1, batches, every))
        assert list(expected) == (steps if batches % every == 0 else [*steps, batches - 1])


@long_interval
@pytest.mark.parametrize("every", [1, 3, 7, 20, 50])
def test_windows_of_one_step_a_batch(tmp_path: Path, every: int) -> None:
    given = gradients(10)
    csv, board = loggers(tmp_path)
    fit(Prescribed(), given, clipping(), logger=[csv, board], max_epochs=2, log_every_n_steps=every)
    expected = windows([[norm(gradient)] for gradient in given * 2], every)
    assert sum(map(len, expected.values())) == 20
    check_logged(expected, csv, board)
    check_axis(expected, 20, every, csv, board)


@long_interval
@pytest.mark.parametrize("every", [1, 3, 7, 50])
def test_windows_under_gradient_accumulation(tmp_path: Path, every: int) -> None:
    given = gradients(10)
    csv, board = loggers(tmp_path)
    options = {"max_epochs": 2, "log_every_n_steps": every, "accumulate_grad_batches": 3}
    fit(Prescribed(), given, clipping(), logger=[csv, board], **options)
    # The last batch of an epoch steps too, with what is there.
    steps = [norm(mean_gradient(given[i : i + 3], 3)) for i in range(0, 10, 3)]
    expected = windows([[size] for size in steps * 2], every)
    check_logged(expected, csv, board)
    check_axis(expected, 8, every, csv, board)


@long_interval
@pytest.mark.parametrize("every", [1, 3, 7, 50])
def test_windows_of_five_steps_a_batch(tmp_path: Path, every: int) -> None:
    given = gradients(50)
    csv, board = loggers(tmp_path)
    batches = [given[i : i + 5] for i in range(0, 50, 5)]
    trainer = fit(Manual(), batches, clipping(), logger=[csv, board], max_epochs=2, log_every_n_steps=every)
    assert trainer.global_step == 100
    expected = windows([[norm(gradient) for gradient in batch] for batch in batches * 2], every)
    check_logged(expected, csv, board)
    check_axis(expected, 20, every, csv, board)


@pytest.mark.parametrize(("every", "max_steps"), [(1, 7), (2, 7), (3, 6), (3, 13), (4, 3)])
def test_windows_when_max_steps_ends_in_mid_epoch(tmp_path: Path, every: int, max_steps: int) -> None:
    given = gradients(10)
    csv, board = loggers(tmp_path)
    options = {"max_epochs": -1, "max_steps": max_steps, "log_every_n_steps": every}
    fit(Prescribed(), given, clipping(), logger=[csv, board], **options)
    expected = windows([[norm(gradient)] for gradient in (given * 2)[:max_steps]], every)
    assert sum(map(len, expected.values())) == max_steps
    check_logged(expected, csv, board)
    check_axis(expected, max_steps, every, csv, board)


def test_max_steps_within_a_batch_of_manual_steps(tmp_path: Path) -> None:
    given = gradients(50)
    csv, board = loggers(tmp_path)
    batches = [given[i : i + 5] for i in range(0, 50, 5)]
    fit(Manual(), batches, clipping(), logger=[csv, board], max_epochs=-1, max_steps=23, log_every_n_steps=2)
    expected = windows([[norm(gradient) for gradient in batch] for batch in batches[:5]], 2)
    check_logged(expected, csv, board)


@pytest.mark.parametrize(("own", "trainers"), [(2, 5), (5, 2), (3, 1), (7, 10)])
def test_the_callbacks_own_interval(tmp_path: Path, own: int, trainers: int) -> None:
    given = gradients(10)
    csv, board = loggers(tmp_path)
    callback = clipping(log_every_n_steps=own)
    fit(Prescribed(), given, callback, logger=[csv, board], max_epochs=2, log_every_n_steps=trainers)
    check_logged(windows([[norm(gradient)] for gradient in given * 2], own), csv, board)
    assert [step for step, _ in csv_rows(csv, "x")] == list(range(trainers - 1, 20, trainers))


def test_the_callbacks_own_interval_under_accumulation(tmp_path: Path) -> None:
    given = gradients(12)
    csv, board = loggers(tmp_path)
    options = {"max_epochs": 2, "log_every_n_steps": 1, "accumulate_grad_batches": 2}
    fit(Prescribed(), given, clipping(log_every_n_steps=5), logger=[csv, board], **options)
    steps = [norm(mean_gradient(given[i : i + 2], 2)) for i in range(0, 12, 2)]
    check_logged(windows([[size] for size in steps * 2], 5), csv, board)


def test_validation_in_mid_epoch_neither_logs_nor_clears(tmp_path: Path) -> None:
    given = gradients(10)
    csv, board = loggers(tmp_path)
    options = {"max_epochs": 2, "log_every_n_steps": 7, "val_check_interval": 0.5}
    fit(Validated(), given, clipping(), logger=[csv, board], val_dataloaders=Batches(given[:2]), **options)
    check_logged(windows([[norm(gradient)] for gradient in given * 2], 7), csv, board)


def test_an_early_stop_logs_what_is_left_once(tmp_path: Path) -> None:
    given = gradients(5)
    csv, board = loggers(tmp_path)
    # Stops when the metric exceeds the bound, which it does at the end of the first epoch.
    stop = EarlyStopping("gradclip/norm", divergence_threshold=0.0, patience=9)
    trainer = fit(Prescribed(), given, clipping(), stop, logger=[csv, board], max_epochs=9, log_every_n_steps=3)
    assert trainer.current_epoch == 1
    check_logged(windows([[norm(gradient)] for gradient in given], 3), csv, board)


@pytest.mark.parametrize("own", [None, 3])
def test_a_stop_in_mid_epoch_logs_at_the_batch_that_asked_for_it(tmp_path: Path, own: int | None) -> None:
    class Stopping(Prescribed):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.trainer.should_stop = batch_idx == 4
            return super().training_step(batch, batch_idx)

    given = gradients(10)
    csv, board = loggers(tmp_path)
    callback = clipping(log_every_n_steps=own)
    fit(Stopping(), given, callback, logger=[csv, board], log_every_n_steps=3, min_epochs=0)
    check_logged(windows([[norm(gradient)] for gradient in given[:5]], 3), csv, board)
    assert [step for step, _ in csv_rows(csv, "x")] == [2, 4]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_loader_of_unknown_length(tmp_path: Path, accumulate: int) -> None:
    class Stream(IterableDataset[Any]):
        def __iter__(self) -> Iterator[Any]:
            return iter(given)

    given = gradients(7)
    csv, board = loggers(tmp_path)
    options = {"max_epochs": 2, "log_every_n_steps": 3, "accumulate_grad_batches": accumulate}
    fit(Prescribed(), DataLoader(Stream(), batch_size=None), clipping(), logger=[csv, board], **options)
    steps = [norm(mean_gradient(given[i : i + accumulate], accumulate)) for i in range(0, 7, accumulate)]
    check_logged(windows([[size] for size in steps * 2], 3), csv, board)


def test_metrics_are_plain_floats_and_come_only_with_log_events() -> None:
    given = gradients(10)
    logger = CountingLogger()
    fit(Prescribed(), given, clipping(), logger=logger, max_epochs=2, log_every_n_steps=4)
    ours = [(step, metrics) for step, metrics in logger.calls if any(key.startswith("gradclip/") for key in metrics)]
    assert Counter(step for step, _ in ours) == dict.fromkeys([3, 7, 11, 15, 19], 1)
    assert {type(value) for _, metrics in ours for value in metrics.values()} == {float}
    assert all("x" not in metrics for _, metrics in ours)


def test_every_logger_of_a_trainer_receives_the_same() -> None:
    both = [CountingLogger(), CountingLogger()]
    fit(Prescribed(), gradients(5), clipping(), logger=both, log_every_n_steps=2)
    assert len(both[0].calls) == 2 + 3
    assert both[0].calls == both[1].calls


def test_without_logging_nobody_is_told() -> None:
    logger, seen = CountingLogger(), Seen()
    trainer = fit(Prescribed(), gradients(4), clipping(log=False), seen, logger=logger, log_every_n_steps=1)
    assert [step for step, _ in logger.calls] == [0, 1, 2, 3]
    assert all(set(metrics) == {"x", "epoch"} for _, metrics in logger.calls)
    assert not [key for key in trainer.callback_metrics if key.startswith("gradclip")]
    assert seen.in_bar == [{}] * 4


def test_a_trainer_that_never_logs_gives_its_loggers_nothing() -> None:
    logger = CountingLogger()
    fit(Prescribed(), gradients(4), clipping(), logger=logger, log_every_n_steps=0)
    assert logger.calls == []


def test_a_fast_dev_run_shows_metrics() -> None:
    given = gradients(4)
    trainer = fit(Prescribed(), given, clipping(), fast_dev_run=2)
    assert float(trainer.callback_metrics["gradclip/norm"]) == pytest.approx(norm(given[1]), rel=1e-6)


@pytest.mark.parametrize("later", [True, False], ids=["listed later", "listed before"])
def test_callback_metrics_are_those_of_the_steps_since_the_last_log_event_up_to_this_one(later: bool) -> None:
    given = gradients(8)
    norms = [norm(gradient) for gradient in given]
    seen = Seen()
    callbacks = [clipping(), seen] if later else [seen, clipping()]
    trainer = fit(Prescribed(), given, *callbacks, log_every_n_steps=3)
    expected = [sum(norms[i - i % 3 : i + 1]) / (i % 3 + 1) for i in range(8)]
    assert seen.on_batch == pytest.approx(expected, rel=1e-6)
    value = trainer.callback_metrics["gradclip/norm"]
    assert isinstance(value, torch.Tensor)
    assert float(value) == pytest.approx(sum(norms[6:]) / 2, rel=1e-6)


def test_the_progress_bar_shows_norm_and_rate(capfd: pytest.CaptureFixture[str]) -> None:
    given = gradients(4)
    norms = [norm(gradient) for gradient in given]
    seen = Seen()
    callbacks = [clipping(prog_bar=True), seen, TQDMProgressBar()]
    fit(Prescribed(), given, *callbacks, log_every_n_steps=2, enable_progress_bar=True)
    assert seen.in_bar[0] == {}
    rate = sum(size > LIMIT for size in norms[2:]) / 2
    expected = {"gradclip/norm": sum(norms[2:]) / 2, "gradclip/clip_rate": rate}
    assert seen.in_bar[3] == pytest.approx(expected, rel=1e-6)
    printed = "".join(capfd.readouterr())
    assert "gradclip/norm=" in printed
    assert "gradclip/clip_rate=" in printed


def test_the_progress_bar_shows_them_without_a_log_too(tmp_path: Path) -> None:
    given, seen = gradients(4), Seen()
    csv, board = loggers(tmp_path)
    options = {"logger": [csv, board], "log_every_n_steps": 2}
    trainer = fit(Prescribed(), given, clipping(prog_bar=True, log=False), seen, **options)
    assert seen.in_bar[3]["gradclip/norm"] == pytest.approx(sum(map(norm, given[2:])) / 2, rel=1e-6)
    assert csv_rows(csv) == []
    assert not any(key.startswith("gradclip") for key in trainer.callback_metrics)


def test_the_progress_bar_is_left_alone_by_default() -> None:
    seen = Seen()
    fit(Prescribed(), gradients(4), clipping(), seen, log_every_n_steps=1)
    assert seen.in_bar == [{}] * 4


@pytest.mark.parametrize("per", ["layer", "parameter", "group"])
def test_norms_of_measured_scopes(tmp_path: Path, per: str) -> None:
    given = gradients(6)
    csv, board = loggers(tmp_path)
    fit(Prescribed(), given, clipping(measure_per=per), logger=[csv, board], log_every_n_steps=3)
    names = list(given[0])
    scopes = {
        "layer": {"encoder": names[:2], "head": names[2:]},
        "parameter": {name: [name] for name in names},
        "group": {"group0": names},
    }[per]
    for rows in (csv_rows(csv, "gradclip_norm/"), tensorboard_rows(board, "gradclip_norm/")):
        assert [step for step, _ in rows] == [2, 5]
        for step, values in rows:
            window = given[step - 2 : step + 1]
            assert values == pytest.approx(
                {f"gradclip_norm/{scope}": sum(norm(g, of) for g in window) / 3 for scope, of in scopes.items()},
                rel=1e-6,
            )


@long_interval
@pytest.mark.parametrize("logs", [True, False])
def test_a_checkpoint_can_monitor_the_norm_of_a_run_shorter_than_the_interval(tmp_path: Path, logs: bool) -> None:
    given = gradients(4)
    norms = [norm(gradient) for gradient in given]
    checkpoint = ModelCheckpoint(tmp_path / "saved", monitor="gradclip/norm", save_top_k=-1, filename="{epoch}")
    logger = CSVLogger(tmp_path / "logs") if logs else False
    fit(Prescribed(), given, clipping(), checkpoint, logger=logger, max_epochs=2, enable_checkpointing=True)
    scores = {Path(path).stem: float(score) for path, score in checkpoint.best_k_models.items()}
    # Over all steps since the last log event, which is the start.
    mean = sum(norms) / 4
    assert scores == pytest.approx({"epoch=0": mean, "epoch=1": mean}, rel=1e-6)
    assert {path.stem for path in tmp_path.glob("saved/*.ckpt")} == set(scores)


@pytest.mark.parametrize("first", [True, False], ids=["listed first", "listed last"])
def test_early_stopping_can_monitor_the_norm_of_a_run_shorter_than_the_interval(first: bool) -> None:
    given = gradients(3)
    seen = Seen()
    # The mean over all steps so far is the same after every epoch: it does not improve.
    stop = EarlyStopping("gradclip/norm", patience=2, min_delta=0.01)
    callbacks = [stop, clipping(), seen] if first else [clipping(), seen, stop]
    trainer = fit(Prescribed(), given, *callbacks, max_epochs=9, log_every_n_steps=50)
    assert trainer.current_epoch == 3
    assert seen.on_epoch == pytest.approx([sum(map(norm, given)) / 3] * 3, rel=1e-6)


@long_interval
@pytest.mark.parametrize("interval", [1.0, 0.5])
def test_validation_sees_every_step_since_the_last_log_event(tmp_path: Path, interval: float) -> None:
    given = gradients(4)
    norms = [norm(gradient) for gradient in given]
    seen = Seen()
    checkpoint = ModelCheckpoint(tmp_path, monitor="gradclip/norm", save_top_k=-1, filename="{step}")
    stop = EarlyStopping("gradclip/norm", patience=9)
    options = {"max_epochs": 2, "enable_checkpointing": True, "val_check_interval": interval}
    fit(Validated(), given, clipping(), seen, stop, checkpoint, val_dataloaders=Batches(given[:1]), **options)
    steps = range(2, 9, 2) if interval == 0.5 else (4, 8)
    expected = {f"step={step}": sum((norms * 2)[:step]) / step for step in steps}
    # The sanity check before training validates too, and has nothing to see.
    assert seen.on_validation[0] is None
    assert seen.on_validation[1:] == pytest.approx(list(expected.values()), rel=1e-6)
    scores = {Path(path).stem: float(score) for path, score in checkpoint.best_k_models.items()}
    assert scores == pytest.approx(expected, rel=1e-6)
    assert stop.stopped_epoch == 0
    assert float(stop.best_score) == pytest.approx(min(expected.values()), rel=1e-6)


@long_interval
def test_early_stopping_on_validation_ends_the_run() -> None:
    given = gradients(4)
    stop = EarlyStopping("gradclip/norm", patience=1, mode="max", min_delta=1e9)
    trainer = fit(Validated(), given, clipping(), stop, val_dataloaders=Batches(given[:1]), max_epochs=9)
    assert trainer.current_epoch == 2


@long_interval
def test_a_scheduler_can_monitor_the_norm() -> None:
    class Plateau(Prescribed):
        def configure_optimizers(self) -> dict[str, Any]:
            optimizer = SGD(self.parameters(), lr=1.0)
            scheduler = ReduceLROnPlateau(optimizer, factor=0.5, patience=0, threshold=0.1)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": "gradclip/norm"}}

    # The norm does not improve after the first epoch.
    trainer = fit(Plateau(), gradients(3), clipping(), max_epochs=4)
    assert trainer.optimizers[0].param_groups[0]["lr"] == 0.5**3


def test_a_checkpoint_can_monitor_within_an_epoch(tmp_path: Path) -> None:
    given = gradients(6)
    norms = [norm(gradient) for gradient in given]
    checkpoint = ModelCheckpoint(
        tmp_path, monitor="gradclip/norm", save_top_k=-1, every_n_train_steps=2, filename="{step}"
    )
    fit(Prescribed(), given, clipping(), checkpoint, log_every_n_steps=2, enable_checkpointing=True)
    scores = {Path(path).stem: float(score) for path, score in checkpoint.best_k_models.items()}
    assert scores == pytest.approx({f"step={i}": sum(norms[i - 2 : i]) / 2 for i in (2, 4, 6)}, rel=1e-6)


def test_counts_run_from_the_start_and_norms_over_finite_steps_only(tmp_path: Path) -> None:
    given = gradients(6)
    for bad in (1, 2, 3):
        given[bad]["head.bias"][0] = torch.nan
    csv, board = loggers(tmp_path)
    with pytest.warns(RuntimeWarning, match="dropped optimizer step 1: non-finite gradients in head.bias"):
        fit(Prescribed(), given, clipping(), logger=[csv, board], log_every_n_steps=2)
    for rows in (csv_rows(csv), tensorboard_rows(board)):
        assert [step for step, _ in rows] == [1, 3, 5]
        first, second, third = (values for _, values in rows)
        assert first["gradclip/norm"] == pytest.approx(norm(given[0]), rel=1e-6)
        assert first["gradclip/clip_rate"] == (norm(given[0]) > LIMIT)
        assert second == {"gradclip/skipped": 3.0, "gradclip/nonfinite": 3.0}
        assert third["gradclip/norm"] == pytest.approx((norm(given[4]) + norm(given[5])) / 2, rel=1e-6)
        assert (third["gradclip/skipped"], third["gradclip/nonfinite"]) == (3.0, 3.0)


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")  # in one run of a process
def test_a_run_without_a_step_logs_nothing_of_ours(tmp_path: Path) -> None:
    logger = CountingLogger()

    class Idle(Prescribed):
        def training_step(self, batch: Any, batch_idx: int) -> None: ...

    with pytest.warns(match="return a loss"):
        trainer = fit(Idle(), gradients(3), clipping(), logger=logger, log_every_n_steps=1)
    assert not [metrics for _, metrics in logger.calls if "gradclip/norm" in metrics]
    assert "gradclip/norm" not in trainer.callback_metrics


def test_another_name_is_another_prefix(tmp_path: Path) -> None:
    given = gradients(3)
    csv, board = loggers(tmp_path)
    fit(Prescribed(), given, clipping(name="limiter"), logger=[csv, board], log_every_n_steps=1)
    assert csv_rows(csv, "gradclip") == []
    assert [step for step, values in csv_rows(csv, "limiter/norm_max") if values] == [0, 1, 2]
    assert [step for step, _ in tensorboard_rows(board, "limiter/")] == [0, 1, 2]


@pytest.mark.parametrize("every", [1, 3])
def test_of_clipping_by_value_only_steps_that_log_are_looked_at_closely(every: int, tmp_path: Path) -> None:
    batches, bound = gradients(8), 0.5
    for batch in batches[:2]:
        # Within the bounds, which shows without a close look.
        for one in batch.values():
            one.clamp_(-bound, bound)
    logger = CSVLogger(tmp_path)
    fit(Prescribed(), batches, GradientClipping(ValueClip(max_value=bound)), logger=logger, log_every_n_steps=every)
    clamped = [{name: one.clamp(-bound, bound) for name, one in batch.items()} for batch in batches]
    entries = sum(one.numel() for one in batches[0].values())
    outside = [sum(int((one.abs() > bound).sum()) for one in batch.values()) for batch in batches]
    rows = csv_rows(logger)
    # What is left at the end is logged at the last batch, which is looked at for that.
    assert [step for step, _ in rows] == ([*range(8)] if every == 1 else [2, 5, 7])
    begin = 0
    for step, values in rows:
        window = range(begin, step + 1)
        assert values["gradclip/norm"] == pytest.approx(sum(norm(batches[i]) for i in window) / len(window), rel=1e-6)
        assert values["gradclip/clip_rate"] == pytest.approx(sum(outside[i] > 0 for i in window) / len(window))
        # Of the others with entries outside nobody knows what was left of them, so that there is no mean.
        if sum(outside[i] > 0 for i in window[:-1]) == 0:
            after = sum(norm(clamped[i]) for i in window) / len(window)
            assert values["gradclip/norm_clipped"] == pytest.approx(after, rel=1e-6)
            assert values["gradclip/clipped"] == pytest.approx(outside[step] / entries / len(window))
        else:
            assert {"gradclip/norm_clipped", "gradclip/clipped"}.isdisjoint(values)
        begin = step + 1
    assert sum("gradclip/norm_clipped" in values for _, values in rows) == (8 if every == 1 else 1)


class Slashes(Prescribed):
    """Layers whose names are paths, one of them the beginning of another."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.ModuleDict({"a": nn.Linear(2, 1), "a/b": nn.Linear(2, 1)})

    def loss(self, gradient: Any) -> torch.Tensor:
        return super().loss(gradient) + sum(head(torch.ones(2)).sum() for head in self.heads.values())


@pytest.mark.parametrize("module", [Prescribed, Adversaries, Slashes])
def test_no_key_is_a_path_that_another_goes_on_from(module: type[Prescribed]) -> None:
    given: Any = gradients(2)
    given = list(zip(given, given, strict=True)) if module is Adversaries else given
    logger = CountingLogger()
    options = {"measure_per": "layer", "histograms": True, "nonfinite": "ignore"}
    trainer = fit(module(), given, clipping(**options), logger=logger, log_every_n_steps=1)
    for keys in (trainer.callback_metrics, {key for _, metrics in logger.calls for key in metrics}):
        assert sum(key.startswith("gradclip_norm/") for key in keys) >= 2
        assert [(one, other) for one in keys for other in keys if other.startswith(f"{one}/")] == []


def test_the_old_names_for_one_release(tmp_path: Path) -> None:
    csv, board = loggers(tmp_path)
    fit(
        Prescribed(),
        gradients(1),
        clipping(measure_per="layer", old_names=True),
        logger=[csv, board],
        log_every_n_steps=1,
    )
    for ((_, values),) in (csv_rows(csv), tensorboard_rows(board)):
        assert {"gradclip/norm/encoder", "gradclip/norm/head"} <= values.keys()
    assert csv_rows(csv, "gradclip_norm") == []


def test_a_name_under_which_another_callback_logs_its_scopes_is_refused() -> None:
    callbacks = [clipping(measure_per="layer"), clipping(name="gradclip_norm", action="observe")]
    with pytest.raises(MisconfigurationException) as caught:
        fit(Prescribed(), gradients(1), *callbacks)
    assert str(caught.value) == (
        "a GradientClipping callback is named 'gradclip_norm', under which 'gradclip' logs its norms per layer; give "
        "it another name, such as name='gradclip_2'"
    )
    fit(Prescribed(), gradients(1), clipping(), callbacks[1])
