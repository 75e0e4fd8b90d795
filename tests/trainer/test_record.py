"""The history of a trainer's run: every optimizer step once, whatever steps, stops, fails or goes on."""

import html
import json
import os
import resource
import signal
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from kit import fake_device, workers
from kit.boring import (
    ENCODER,
    HEAD,
    Adversaries,
    Batches,
    CountingLogger,
    Manual,
    Prescribed,
    Regression,
    Validated,
    coefficient,
    equal,
    fit,
    gradients,
    make_trainer,
    mean_gradient,
    norm,
    regression_data,
    tensorboard,
    weights,
)
from kit.extras import needs_report
from lightning_gradclip import AGC, GradientClipping, NormClip, ValueClip
from lightning_gradclip.record.history import History, HistoryFormatError
from lightning_gradclip.record.kept import Kept
from lightning_gradclip.record.step import Row, row_of
from lightning_gradclip.record.window import Packed, Recorded, Window
from lightning_gradclip.report.cli import main
from lightning_gradclip.report.find import find_runs
from lightning_gradclip.trainer.record import Recorder

LIMIT = 4.0
MARKUP = "<b>x<img src=x onerror=alert(1)>"
pytestmark = [
    pytest.mark.filterwarnings("ignore:The number of training batches:UserWarning"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`:UserWarning"),
    pytest.mark.filterwarnings("ignore:Using ModelCheckpoint with manual optimization:UserWarning"),
]


def clipping(history: Any, **options: Any) -> GradientClipping:
    return GradientClipping(NormClip(max_norm=LIMIT), **{"history": history, **options})


def assert_recorded(folder: Path, batches: Sequence[Sequence[float]], first: int = 0) -> None:
    """A row for each of these norms, batch by batch, with what a limit of their norm does to them."""
    rows = History(folder).steps
    sizes = [size for batch in batches for size in batch]
    assert rows["step"].tolist() == [first + i for i, batch in enumerate(batches) for _ in batch]
    assert rows["norm"] == pytest.approx(sizes, rel=1e-6)
    coefs = [coefficient(size, LIMIT) for size in sizes]
    assert rows["coef"] == pytest.approx(coefs, rel=1e-6)
    assert rows["norm_clipped"] == pytest.approx(np.multiply(sizes, coefs), rel=1e-6)
    assert set(rows["limit"].tolist()) == {LIMIT}
    for name, flags in (("changed", np.less(coefs, 1)), ("clipped", np.less(coefs, 1)), ("finite", np.isfinite(sizes))):
        assert rows[name].astype(bool).tolist() == flags.tolist()
    assert not rows["skipped"].any()
    assert not rows["overflow"].any()
    assert np.array_equal(np.load(folder / "steps.npy"), rows)


@pytest.mark.parametrize("every", [0, 1, 7, 50])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_every_step_is_recorded(tmp_path: Path, every: int, accumulate: int) -> None:
    given = gradients(20)
    options = {"max_epochs": 2, "log_every_n_steps": every, "accumulate_grad_batches": accumulate}
    fit(Prescribed(), given, clipping(tmp_path / "here"), **options)
    steps = [norm(mean_gradient(given[i : i + accumulate], accumulate)) for i in range(0, 20, accumulate)]
    assert_recorded(tmp_path / "here", [[size] for size in steps * 2])


@pytest.mark.parametrize("every", [1, 7, 50])
def test_several_steps_of_a_batch_share_its_number(tmp_path: Path, every: int) -> None:
    given = gradients(40)
    batches = [given[i : i + 5] for i in range(0, 40, 5)]
    fit(Manual(), batches, clipping(tmp_path), log_every_n_steps=every)
    assert_recorded(tmp_path, [[norm(gradient) for gradient in batch] for batch in batches])


def test_each_optimizer_has_its_own_history(tmp_path: Path) -> None:
    given = list(zip(gradients(9, seed=1), gradients(9, seed=2), strict=True))
    watching = clipping(tmp_path / "one", name="one", optimizer=1, action="observe")
    fit(Adversaries(), given, clipping(tmp_path / "both"), watching)
    for index, names in enumerate((ENCODER, HEAD)):
        folder = tmp_path / "both" / str(index)
        assert_recorded(folder, [[norm(pair[index], names)] for pair in given])
        assert History(folder).meta["optimizer"] == index
    assert sorted(path.name for path in (tmp_path / "both").iterdir()) == ["0", "1"]
    # Both optimizers step in each batch, and the second callback sees the second only, clipped.
    clipped = [min(norm(pair[1], HEAD), LIMIT) for pair in given]
    assert History(tmp_path / "one").steps["norm"] == pytest.approx(clipped, rel=1e-5)
    assert History(tmp_path / "one").meta["optimizer"] == 1
    assert [(run.name, run.optimizer) for run in find_runs([tmp_path])] == [("both/0", 0), ("both/1", 1), ("one", 1)]


@pytest.mark.parametrize("method", [NormClip(max_norm=LIMIT), NormClip(max_norm=LIMIT, per="layer"), AGC(), None])
@pytest.mark.parametrize("per", ["layer", "parameter"])
def test_norms_of_scopes_are_recorded(tmp_path: Path, per: str, method: Any) -> None:
    given = gradients(12)
    del given[5]["head.weight"], given[5]["head.bias"]
    callback = GradientClipping(method, measure_per=per, history=tmp_path)
    fit(Prescribed(), given, callback, log_every_n_steps=5)
    scopes = {name: [name] for name in given[0]} if per == "parameter" else {"encoder": ENCODER, "head": HEAD}
    names, norms = History(tmp_path).scope_norms()
    assert names == tuple(scopes)
    for gradient, row in zip(given, norms, strict=True):
        expected = [norm(gradient, of) if of[0] in gradient else np.nan for of in scopes.values()]
        assert row == pytest.approx(expected, rel=1e-6, nan_ok=True)


def test_scopes_that_change_begin_a_new_part(tmp_path: Path) -> None:
    class Unfreezing(Prescribed):
        def configure_optimizers(self) -> Any:
            return self.make_optimizer(self.encoder.parameters())

        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            if batch_idx == 4:
                self.trainer.optimizers[0].add_param_group({"params": [*self.head.parameters()]})

    given = gradients(10)
    fit(Unfreezing(), given, GradientClipping(None, measure_per="layer", history=tmp_path))
    parts = History(tmp_path).parts
    assert [(part.first_row, part.names, len(part.norms)) for part in parts] == [
        (0, ("encoder",), 4),
        (4, ("encoder", "head"), 6),
    ]
    assert parts[1].norms[:, 1] == pytest.approx([norm(gradient, HEAD) for gradient in given[4:]], rel=1e-6)


def test_many_scopes_wait_in_bounded_memory_too() -> None:
    names = tuple(map(str, range(3000)))
    taken: list[Packed] = []
    window = Window(taken.append)
    for step in range(90):
        window.add(step, row_of(2.0, 1.0, limit=1.0, coef=0.5), names, torch.full((3000,), float(step)))
        # 2**18 / 3,000 is 87.4.
        assert len(taken) == (step >= 86)
    window.look()
    assert [len(one.steps) for one in taken] == [87, 3]
    assert np.array_equal(np.concatenate([one.norms[:, 0] for one in taken]), np.arange(90.0))


@pytest.mark.skipif(not fake_device.AVAILABLE, reason="this version of torch has no Python backends for devices")
def test_steps_on_a_device_are_fetched_in_one_copy() -> None:
    with fake_device.attached() as device:
        taken: list[Packed] = []
        window = Window(taken.append)
        rows = torch.arange(5 * len(Row._fields), dtype=torch.float64).view(5, -1)
        norms = torch.arange(10, dtype=torch.float32).view(5, 2)
        for step, (row, norm_of) in enumerate(zip(rows, norms, strict=True)):
            window.add(step, device.put(row), ("a", "b"), device.put(norm_of))
        assert window.is_on_device
        assert device.waits == []
        window.look()
        assert len(device.waits) == 1
        # Nobody is told twice, and what the host has seen it needs not fetch again.
        window.look()
        assert window.scope_norms()["b"] == norms[:, 1].mean().item()
        assert not window.is_on_device
        assert len(device.waits) == 1
    (packed,) = taken
    assert packed.steps == [0, 1, 2, 3, 4]
    assert packed.scopes == ("a", "b")
    assert np.array_equal(packed.rows, rows.numpy())
    assert np.array_equal(packed.norms, norms.numpy())


@pytest.mark.skipif(not fake_device.AVAILABLE, reason="this version of torch has no Python backends for devices")
def test_a_checkpoint_after_an_error_on_a_device_leaves_the_history_as_it_is(tmp_path: Path) -> None:
    with fake_device.attached() as device:
        clippers: dict[int, Recorded] = {}
        recorder = Recorder(clippers, lambda index: Kept(tmp_path), histograms=False)
        window = Window(*recorder.readers(0))
        clippers[0] = Recorded(window)
        recorder.begin(0)
        row = device.put(torch.tensor(row_of(2.0, 1.0, limit=1.0, coef=0.5), dtype=torch.float64))
        for step in range(6):
            window.add(step, row)
        window.look()
        window.add(6, row)
        recorder.close(device_answers=False)
        recorder.state_dict()
    assert History(tmp_path).steps["step"].tolist() == [0, 1, 2, 3, 4, 5]


def test_a_step_after_the_last_batch_of_an_epoch_has_the_number_of_that_batch(tmp_path: Path) -> None:
    class Leftover(Manual):
        def on_train_epoch_end(self) -> None:
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(sum(parameter.sum() for parameter in self.parameters()))
            optimizer.step()

    fit(Leftover(), [[gradient] for gradient in gradients(3)], clipping(tmp_path), max_epochs=2)
    assert History(tmp_path).steps["step"].tolist() == [0, 1, 2, 2, 3, 4, 5, 5]


def test_a_folder_that_is_refused_is_refused_once(tmp_path: Path) -> None:
    told: list[BaseException] = []

    class Later(Callback):
        def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
            told.append(exception)

    (tmp_path / "meta.json").write_text("{}")
    (tmp_path / "steps.npy").write_text("x")
    with pytest.raises(HistoryFormatError) as error:
        fit(Prescribed(), gradients(2), clipping(tmp_path), Later())
    assert told == [error.value]


def test_a_method_given_later_is_the_one_that_clips_and_is_recorded(tmp_path: Path) -> None:
    callback = clipping(tmp_path)
    callback.method = NormClip(max_norm=0.25)
    fit(Prescribed(), gradients(2), callback)
    history = History(tmp_path)
    assert set(history.steps["limit"].tolist()) == {0.25}
    assert history.meta["segments"][0]["method"]["settings"]["max_norm"] == 0.25


def test_a_long_run_that_never_logs_is_recorded_in_bounded_memory(tmp_path: Path) -> None:
    class Waiting(Callback):
        most = 0

        def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
            written = len(np.load(tmp_path / "steps.npy", mmap_mode="r"))
            self.most = max(self.most, trainer.global_step - written)

    given, waiting = gradients(1), Waiting()
    fit(Prescribed(), given * 1100, clipping(tmp_path), waiting, log_every_n_steps=0)
    assert_recorded(tmp_path, [[norm(given[0])]] * 1100)
    assert waiting.most == 1023


@pytest.mark.parametrize("log", [True, False])
def test_it_needs_no_logging_and_does_not_change_any(tmp_path: Path, log: bool) -> None:
    given = regression_data(12)

    def run(**options: Any) -> tuple[Any, ...]:
        module, logger = Regression(), CountingLogger()
        trainer = fit(module, given, clipping(**options), logger=logger, log_every_n_steps=5)
        return weights(module), logger.calls, {k: float(v) for k, v in trainer.callback_metrics.items()}

    with_history, without = (
        run(history=history, log=log, measure_per="layer") for history in (tmp_path / "history", False)
    )
    assert equal(with_history[0], without[0])
    assert with_history[1:] == without[1:]
    assert bool(with_history[2]) is log
    assert len(History(tmp_path / "history").steps) == 12


class Directory(CountingLogger):
    """A user's logger with a directory for all of its runs."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.save_dir = str(folder)

    save_dir = ""


@pytest.mark.parametrize(
    ("make", "place"),
    [
        (lambda folder: CSVLogger(folder, name="csv"), "csv/version_0"),
        (lambda folder: tensorboard(folder, name="board", sub_dir="deep"), "board/version_0/deep"),
        (lambda folder: [CountingLogger(), CSVLogger(folder, name="csv")], "csv/version_0"),
        # As ModelCheckpoint does it.
        (lambda folder: CountingLogger(), "root/counting/version_0"),
        (lambda folder: Directory(folder / "mine"), "mine/counting/version_0"),
        (lambda folder: False, "root"),
    ],
)
def test_it_is_in_the_directory_of_the_logger(tmp_path: Path, make: Callable[[Path], Any], place: str) -> None:
    given = gradients(3)
    fit(Prescribed(), given, clipping(True), logger=make(tmp_path), default_root_dir=tmp_path / "root")
    fit(Prescribed(), given, clipping(True, name="second"), logger=make(tmp_path), default_root_dir=tmp_path / "second")
    assert_recorded(tmp_path / place / "gradclip", [[norm(gradient)] for gradient in given])
    assert len(list(tmp_path.rglob("second/meta.json"))) == 1


def test_a_folder_is_taken_as_a_user_writes_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for history in ("here/it is", "~/there"):
        fit(Prescribed(), gradients(2), clipping(history), logger=CSVLogger(tmp_path / "logs"))
    assert [len(History(tmp_path / place).steps) for place in ("here/it is", "home/there")] == [2, 2]
    assert list(tmp_path.rglob("gradclip")) == []


def test_what_was_recorded_is_described(tmp_path: Path) -> None:
    method = NormClip(max_norm={0: 2.0, 10: 1.0}, norm_type=1.0)
    given = gradients(2, scale=0.01)
    fit(Prescribed(), given, GradientClipping(method, action="skip", measure_per="layer", history=tmp_path))
    meta = json.loads((tmp_path / "meta.json").read_text())
    assert (meta["name"], meta["optimizer"]) == ("gradclip", None)
    assert meta["segments"] == [
        {
            "from_step": 0,
            "method": {
                "class": "NormClip",
                "settings": {
                    "max_norm": {"0": 2.0, "10": 1.0},
                    "norm_type": 1.0,
                    "min_norm": 0.0,
                    "per": "model",
                    "statistic": "norm",
                },
            },
            "action": "skip",
            "norm_type": 1.0,
            "measure_per": "layer",
        }
    ]


# Lightning says so once in a process.
@pytest.mark.filterwarnings("ignore:.*returned `None`")
def test_nothing_is_left_where_nothing_was_trained(tmp_path: Path) -> None:
    given, options = gradients(4), {"default_root_dir": tmp_path}
    fit(Prescribed(), given, clipping(True), fast_dev_run=2, **options)
    fit(Prescribed(), given, clipping(tmp_path / "named"), fast_dev_run=True, **options)
    make_trainer(clipping(True), **options).validate(Validated(), Batches(given), verbose=False)

    class Idle(Prescribed):
        def training_step(self, batch: Any, batch_idx: int) -> None: ...

    with pytest.warns(UserWarning, match="clipped nothing in 4 steps"):
        fit(Idle(), given, clipping(True), **options)
    fit(Prescribed(), given, clipping(True), limit_train_batches=0, **options)
    assert list(tmp_path.iterdir()) == []


def test_flags_of_steps_that_are_not_finite(tmp_path: Path) -> None:
    given = gradients(6)
    given[2]["head.bias"][0] = torch.nan
    given[4]["head.bias"][0] = torch.inf
    with pytest.warns(RuntimeWarning, match="dropped optimizer step 2"):
        fit(Prescribed(), given, clipping(tmp_path))
    rows = History(tmp_path).steps
    bad = [False, False, True, False, True, False]
    assert (~rows["finite"]).tolist() == rows["skipped"].tolist() == bad
    assert rows["norm_clipped"][rows["skipped"]].tolist() == [0.0, 0.0]


def test_the_step_that_ends_a_run_is_recorded(tmp_path: Path) -> None:
    given = gradients(6)
    given[4]["head.bias"][0] = torch.nan
    with pytest.raises(FloatingPointError):
        fit(Prescribed(), given, clipping(tmp_path, nonfinite="raise"))
    rows = History(tmp_path).steps
    assert rows["step"].tolist() == [0, 1, 2, 3, 4]
    assert rows["finite"].tolist() == [True] * 4 + [False]


@pytest.mark.parametrize("error", [ValueError, RuntimeError, KeyboardInterrupt, torch.OutOfMemoryError])
def test_an_exception_loses_no_step(tmp_path: Path, error: type[BaseException]) -> None:
    class Failing(Callback):
        def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
            if trainer.global_step == 5:
                raise error("in the middle")

    given = gradients(8)
    with pytest.raises((error, SystemExit)):
        fit(Prescribed(), given, clipping(tmp_path), Failing())
    assert_recorded(tmp_path, [[norm(gradient)] for gradient in given[:5]])


def straight_and_resumed(
    tmp_path: Path, make: Callable[[], LightningModule], data: Sequence[Any], saving: ModelCheckpoint, **options: Any
) -> tuple[Path, Path]:
    """The folders of a run of two epochs, and of one that was stopped later than its checkpoint and resumed there."""
    common = {"max_epochs": 2, "val_dataloaders": Batches(gradients(2)), "num_sanity_val_steps": 0, **options}
    straight, folder = tmp_path / "straight", tmp_path / "resumed"
    fit(make(), data, clipping(straight, measure_per="layer"), **common)

    class Stopping(Callback):
        class Error(Exception): ...

        def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
            # Listed before the checkpoint, which Lightning moves to the end.
            if (tmp_path / "saves" / "saved.ckpt").exists() and trainer.fit_loop.total_batch_idx >= 13:
                raise self.Error

    with pytest.raises(Stopping.Error):
        fit(
            make(), data, clipping(folder, measure_per="layer"), Stopping(), saving, **common, enable_checkpointing=True
        )
    rows = lambda: sum(len(History(path.parent).steps) for path in folder.rglob("meta.json"))  # noqa: E731
    before = rows()
    callback = clipping(folder, measure_per="layer")
    fit(make(), data, callback, ckpt_path=tmp_path / "saves" / "saved.ckpt", weights_only=True, **common)
    assert rows() > before > 0
    return straight, folder


def checkpoints(folder: Path) -> dict[str, Callable[[], ModelCheckpoint]]:
    """That save once, as `saved.ckpt`, at different times."""
    options: dict[str, Any] = {"dirpath": folder / "saves", "filename": "saved", "enable_version_counter": False}
    return {
        "in mid-epoch": lambda: ModelCheckpoint(every_n_train_steps=3, **options),
        "after an epoch": lambda: ModelCheckpoint(save_on_train_epoch_end=True, **options),
        "after a validation": lambda: ModelCheckpoint(save_on_train_epoch_end=False, **options),
    }


@pytest.mark.parametrize("when", ["in mid-epoch", "after an epoch", "after a validation"])
@pytest.mark.parametrize("every", [4, 50])
@pytest.mark.parametrize("kind", ["one step a batch", "accumulation", "many steps a batch", "two optimizers"])
def test_a_resumed_run_appends_without_duplicates_or_gaps(tmp_path: Path, kind: str, every: int, when: str) -> None:
    class ValidatedManual(Manual, Validated): ...

    class ValidatedAdversaries(Adversaries, Validated): ...

    given = gradients(40)
    make, data = {
        "one step a batch": (Validated, given[:10]),
        "accumulation": (Validated, given[:10]),
        "many steps a batch": (ValidatedManual, [given[i : i + 3] for i in range(0, 30, 3)]),
        "two optimizers": (ValidatedAdversaries, list(zip(given[:10], given[10:20], strict=True))),
    }[kind]
    options = {"log_every_n_steps": every, "val_check_interval": 0.5}
    if kind == "accumulation":
        options["accumulate_grad_batches"] = 2
    saving = checkpoints(tmp_path)[when]()
    straight, resumed = straight_and_resumed(tmp_path, make, data, saving, **options)
    folders = ["0", "1"] if kind == "two optimizers" else ["."]
    for folder in folders:
        one, other = History(straight / folder), History(resumed / folder)
        assert len(one.steps) == {"accumulation": 10, "many steps a batch": 60}.get(kind, 20)
        assert np.array_equal(one.steps, other.steps)
        assert one.scope_norms()[0] == other.scope_norms()[0]
        assert np.array_equal(one.scope_norms()[1], other.scope_norms()[1])


@pytest.mark.processes
@pytest.mark.parametrize("saved", [20, 26])
def test_a_killed_run_keeps_all_but_the_last_window_and_goes_on(tmp_path: Path, saved: int) -> None:
    given = gradients(60)
    saving = ModelCheckpoint(tmp_path / "saves", every_n_train_steps=saved, save_top_k=-1, filename="{step}")
    options = {"log_every_n_steps": 10, "logger": False}

    def work(rank: int) -> None:
        class Killing(Callback):
            def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
                if trainer.global_step == 37:
                    os.kill(os.getpid(), signal.SIGKILL)

        callbacks = clipping(tmp_path / "it", measure_per="layer"), Killing(), saving
        fit(Prescribed(), given, *callbacks, enable_checkpointing=True, **options)

    with pytest.raises(workers.WorkerError):
        workers.run_fresh(work, world=1)
    # The checkpoint of step 26 wrote what was pending, and the log event after batch 29 the rest.
    assert_recorded(tmp_path / "it", [[norm(gradient)] for gradient in given[:30]])
    assert find_runs([tmp_path])[0].step.tolist() == [*range(30)]
    resumed = {"ckpt_path": tmp_path / "saves" / f"step={saved}.ckpt", "weights_only": True}
    fit(Prescribed(), given, clipping(tmp_path / "it", measure_per="layer"), **options, **resumed)
    assert_recorded(tmp_path / "it", [[norm(gradient)] for gradient in given])
    norms = History(tmp_path / "it").scope_norms()[1]
    assert norms[:, 1] == pytest.approx([norm(gradient, HEAD) for gradient in given], rel=1e-6)


@pytest.mark.processes
def test_a_checkpoint_leaves_no_gap_behind_it(tmp_path: Path) -> None:
    class Ending(Callback):
        def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
            if trainer.global_step == 8:
                os._exit(0)

    given = gradients(12)
    saving = ModelCheckpoint(tmp_path / "saves", every_n_train_steps=7, save_top_k=-1, filename="{step}")
    options = {"log_every_n_steps": 50, "logger": False}

    def work(rank: int) -> None:
        fit(Prescribed(), given, clipping(tmp_path / "it"), Ending(), saving, enable_checkpointing=True, **options)

    with pytest.raises(workers.WorkerError):
        workers.run_fresh(work, world=1)
    assert_recorded(tmp_path / "it", [[norm(gradient)] for gradient in given[:7]])
    saved = tmp_path / "saves" / "step=7.ckpt"
    fit(Prescribed(), given, clipping(tmp_path / "it"), **options, ckpt_path=saved, weights_only=True)
    assert_recorded(tmp_path / "it", [[norm(gradient)] for gradient in given])


def test_a_fit_that_goes_on_without_a_checkpoint_appends(tmp_path: Path) -> None:
    given = gradients(5)
    trainer = fit(module := Prescribed(), given, clipping(tmp_path))
    trainer.fit_loop.max_epochs = 3
    trainer.fit(module, Batches(given))
    assert_recorded(tmp_path, [[norm(gradient)] for gradient in given * 3])


def test_a_new_run_in_an_old_folder_says_that_it_replaces(tmp_path: Path) -> None:
    given = gradients(5)
    fit(Prescribed(), given, clipping(tmp_path))
    with pytest.warns(UserWarning, match=r"held a history of 5 steps, .*; to keep both name another folder"):
        fit(Prescribed(), given[:3], clipping(tmp_path))
    assert_recorded(tmp_path, [[norm(gradient)] for gradient in given[:3]])


def test_a_folder_of_something_else_ends_the_run_at_its_first_step(tmp_path: Path) -> None:
    (tmp_path / "meta.json").write_text('{"mine": true}')
    module = Prescribed()
    with pytest.raises(HistoryFormatError, match="was not written by lightning-gradclip; name the folder of a history"):
        fit(module, gradients(5), clipping(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["meta.json"]


def test_norms_of_another_kind_are_not_mixed(tmp_path: Path) -> None:
    given, saving = gradients(6), ModelCheckpoint(tmp_path, every_n_train_steps=3, save_top_k=-1, filename="{step}")
    fit(Prescribed(), given, clipping(tmp_path / "it"), saving, enable_checkpointing=True)
    other = GradientClipping(NormClip(norm_type=1.0), history=tmp_path / "it")
    with pytest.raises(HistoryFormatError, match=r"norm_type=2.0, and this run measures norm_type=1.0"):
        fit(Prescribed(), given, other, ckpt_path=tmp_path / "step=3.ckpt", weights_only=True)
    assert len(History(tmp_path / "it").steps) == 6


@pytest.mark.processes
@pytest.mark.parametrize("where", ["below a file", "a disk that becomes full", "a disk that is full"])
def test_a_folder_that_cannot_be_written_costs_one_warning(tmp_path: Path, where: str) -> None:
    given = regression_data(40)
    folder, most = tmp_path / "folder", {"a disk that becomes full": 1500, "a disk that is full": 100}.get(where)
    if where == "below a file":
        (tmp_path / "file").touch()
        folder = tmp_path / "file" / "folder"

    def work(rank: int) -> tuple[list[str], Any]:
        module, logger = Regression(), CountingLogger()
        if most is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (most, resource.RLIM_INFINITY))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            fit(module, given, clipping(folder, measure_per="layer"), logger=logger, log_every_n_steps=5)
        assert [step for step, metrics in logger.calls if "gradclip/norm" in metrics] == [*range(4, 40, 5)]
        fit(plain := Regression(), given, clipping(False, measure_per="layer"))
        return [str(one.message) for one in caught if "history" in str(one.message)], weights(module), weights(plain)

    ((said, reached, expected),) = workers.run_fresh(work, world=1)
    assert equal(reached, expected)
    (message,) = said
    assert message.startswith("cannot write the history: ")
    assert message.endswith("; training goes on, and its further steps are not recorded")
    assert str(folder) in message
    if where == "a disk that becomes full":
        # (1,500 - 512) bytes are 19 rows, written five at a time.
        written = History(folder).steps["step"].tolist()
        assert 0 < len(written) < 40
        assert written == [*range(len(written) // 5 * 5)]


@pytest.mark.filterwarnings("ignore:two callbacks clip the same parameters")
def test_two_callbacks_cannot_share_a_folder(tmp_path: Path) -> None:
    both = clipping(tmp_path / "it"), clipping(os.path.join(tmp_path, "x", "..", "it"), name="other")
    with pytest.raises(MisconfigurationException, match=r"two callbacks would write their histories to .*; give each"):
        fit(Prescribed(), gradients(2), *both)


def test_a_directory_on_no_file_system_is_refused() -> None:
    class Remote(CountingLogger):
        save_dir = "s3://bucket/runs"

    with pytest.raises(MisconfigurationException, match=r"s3://bucket/runs.*; name a folder .* history='gradclip'"):
        fit(Prescribed(), gradients(2), clipping(True), logger=Remote())


def test_entries_clipped_by_value_are_recorded(tmp_path: Path) -> None:
    given = gradients(6)
    fit(Prescribed(), given, GradientClipping(ValueClip(max_value=0.5), history=tmp_path), log_every_n_steps=1)
    rows = History(tmp_path).steps
    flat = [torch.cat([value.flatten() for value in gradient.values()]).numpy() for gradient in given]
    assert rows["norm"] == pytest.approx([np.linalg.norm(one) for one in flat], rel=1e-6)
    assert rows["norm_clipped"] == pytest.approx([np.linalg.norm(one.clip(-0.5, 0.5)) for one in flat], rel=1e-6)
    assert rows["clipped"] == pytest.approx([np.mean(np.abs(one) > 0.5) for one in flat])
    assert np.isnan(rows["coef"]).all()


@pytest.mark.processes
def test_rank_zero_alone_writes(tmp_path: Path) -> None:
    given = [gradients(6, seed=rank) for rank in range(2)]

    def work(rank: int) -> list[str]:
        trainer = make_trainer(
            clipping(tmp_path / "it", measure_per="layer", histograms=True),
            strategy="ddp",
            devices=2,
            use_distributed_sampler=False,
            log_every_n_steps=2,
        )
        opened: set[str] = set()

        class Watching(Callback):
            def on_train_batch_end(self, *_: Any) -> None:
                opened.update(os.path.realpath(f"/proc/self/fd/{one}") for one in os.listdir("/proc/self/fd"))

        trainer.callbacks.append(Watching())
        trainer.fit(Prescribed(), Batches(given[rank]))
        return sorted(Path(one).suffix for one in opened if one.startswith(str(tmp_path)))

    assert [sorted(set(one)) for one in workers.run_fresh(work)] == [["", ".lock", ".npy"], []]
    joint = [mean_gradient(pair, 2) for pair in zip(*given, strict=True)]
    assert_recorded(tmp_path / "it", [[norm(gradient)] for gradient in joint])
    names, norms = History(tmp_path / "it").scope_norms()
    assert names == ("encoder", "head")
    expected = [[norm(gradient, of) for of in (ENCODER, HEAD)] for gradient in joint]
    assert norms == pytest.approx(np.array(expected), rel=1e-6)


@needs_report
def test_markup_in_names_of_a_trained_run_is_text(tmp_path: Path) -> None:
    class Naughty(Prescribed):
        def __init__(self) -> None:
            super().__init__()
            self.extra = torch.nn.ParameterDict({MARKUP: torch.nn.Parameter(torch.zeros(2))})

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return super().training_step(batch, batch_idx) + self.extra[MARKUP].sum()

    logger = CSVLogger(tmp_path, name="<i>run")
    fit(Naughty(), gradients(3), clipping(True, measure_per="parameter"), logger=logger)
    assert f"extra.{MARKUP}" in History(tmp_path / "<i>run" / "version_0" / "gradclip").scope_norms()[0]
    assert main(["report", str(tmp_path), "--out", str(tmp_path / "page.html")]) == 0
    page = (tmp_path / "page.html").read_text()
    assert "<i>run" not in page
    assert MARKUP not in page
    assert f"extra.{html.escape(MARKUP)}" in page


@pytest.mark.parametrize("command", ["report", "advise"])
@pytest.mark.parametrize("damage", ["empty", "cut off", "foreign"])
def test_a_damaged_history_of_a_trained_run_is_one_line(
    tmp_path: Path, damage: str, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    fit(Prescribed(), gradients(3), clipping(tmp_path / "it"))
    capsys.readouterr()
    path = tmp_path / "it" / "steps.npy"
    path.write_bytes({"empty": b"", "cut off": path.read_bytes()[:300], "foreign": b"PK" * 400}[damage])
    assert main([command, str(tmp_path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("lightning-gradclip: error: ")
    assert "steps.npy" in line


@pytest.mark.skipif(not fake_device.AVAILABLE, reason="this version of torch has no Python backends for devices")
@pytest.mark.parametrize(("error", "written"), [(torch.OutOfMemoryError, 3), (RuntimeError, 2), (ValueError, 3)])
def test_a_device_that_is_out_of_memory_still_tells_its_steps(
    tmp_path: Path, error: type[Exception], written: int
) -> None:
    """After other errors of torch it may not answer any more."""
    callback = clipping(tmp_path)
    with fake_device.attached() as device:

        class Failing(Callback):
            def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
                if trainer.global_step == 2:
                    row = torch.tensor(row_of(2.0, 1.0, limit=1.0, coef=0.5), dtype=torch.float64)
                    callback._clippers[0]._window.add(2, device.put(row))
                    raise error("as torch has it")

        with pytest.raises(error, match="as torch has it"):
            fit(Prescribed(), gradients(4), callback, Failing(), log_every_n_steps=1)
    assert History(tmp_path).steps["step"].tolist() == [*range(written)]
