"""Six steps straight equal three, a checkpoint, and three: weights, states and logs to the bit."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor
from torch.optim import AdamW

from kit.boring import (
    Adversaries,
    Prescribed,
    Regression,
    csv_rows,
    equal,
    fit,
    gradients,
    norm,
    regression_data,
    tensorboard,
    tensorboard_rows,
    weights,
    windows,
)
from lightning_gradclip import ClipMethod, GradientClipping, NormClip

KEY = "GradientClipping{'name': 'gradclip'}"
pytestmark = [
    # Runs are shorter than an interval on purpose.
    pytest.mark.filterwarnings("ignore:The number of training batches:UserWarning"),
    # A resumed run does not always save again.
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`:UserWarning"),
]


@dataclass(kw_only=True)
class AverageClip(ClipMethod):
    """Limits a scope to a multiple of the running average of its sizes."""

    ratio: float = 0.9
    per: str = "model"

    def fresh_state(self, size: Tensor) -> dict[str, Tensor]:
        return {"average": torch.zeros_like(size), "count": torch.zeros_like(size, dtype=torch.int64)}

    def limit(self, size: Tensor, weight: Tensor | None, step: int) -> Tensor:
        return self.ratio * self.state["average"]

    def update(self, size: Tensor, limit: Tensor, active: Tensor) -> None:
        count, average = self.state["count"] + 1, self.state["average"]
        moved = average + (size - average) / count
        self.state = {
            "average": torch.where(active, moved, average),
            "count": torch.where(active, count, self.state["count"]),
        }


class Crash(Callback):
    """Ends the process as a power cut would: nothing is written any more."""

    class Error(Exception): ...

    def __init__(self, after: int) -> None:
        self.after = after

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step >= self.after:
            raise Crash.Error


class Resumed(Callback):
    """Keeps the callback's state as it is right after loading."""

    def __init__(self, clipping: GradientClipping) -> None:
        self.clipping = clipping
        self.state: dict[str, Any] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.state = self.clipping.state_dict()


def adamw(params: Any) -> AdamW:
    return AdamW(params, lr=0.05, weight_decay=0.1)


METHODS: Mapping[str, Callable[[], ClipMethod | None]] = {
    "norm": lambda: NormClip(max_norm=0.5),
    "schedule": lambda: NormClip(max_norm={0: 2.0, 6: 0.1}),
    "stateful": lambda: AverageClip(),
    "stateful per parameter": lambda: AverageClip(per="parameter"),
    "measuring": lambda: None,
}


@pytest.mark.parametrize("every", [1, 2, 3, 5])
@pytest.mark.parametrize("method", METHODS)
def test_a_crashed_run_resumes_to_the_bit(tmp_path: Path, method: str, every: int) -> None:
    data = regression_data(4)

    def run(name: str, *callbacks: Callback, steps: int = 6, **options: Any) -> tuple[Any, ...]:
        module, csv = Regression(adamw), CSVLogger(tmp_path, name=name)
        clipping = GradientClipping(METHODS[method](), measure_per="layer")
        trainer = fit(
            module,
            data,
            clipping,
            *callbacks,
            logger=csv,
            max_epochs=-1,
            max_steps=steps,
            log_every_n_steps=every,
            enable_checkpointing=bool(callbacks),
            **options,
        )
        return weights(module), trainer.optimizers[0].state_dict(), clipping.state_dict(), csv_rows(csv)

    def saving() -> ModelCheckpoint:
        return ModelCheckpoint(tmp_path / "saved", every_n_train_steps=3, save_top_k=-1, filename="{step}")

    straight = run("straight")
    with pytest.raises(Crash.Error):
        run("crashed", saving(), Crash(after=4))
    # Three steps are in the middle of the first epoch of four; the loader goes on where it was.
    saved = tmp_path / "saved" / "step=3.ckpt"
    resumed = run("resumed", ckpt_path=saved, weights_only=True)
    for one, other in zip(straight[:3], resumed[:3], strict=True):
        assert equal(one, other)
    # Before the checkpoint the first run has logged, after it the second: together what the straight run logged.
    crashed = [row for row in csv_rows(CSVLogger(tmp_path, name="crashed", version=0)) if row[0] < 3]
    assert crashed + resumed[3] == straight[3]
    assert [step for step, _ in straight[3]] == list(windows([[1.0]] * 6, every))


@pytest.mark.parametrize("every", [1, 2, 3, 4, 50])
@pytest.mark.parametrize("kind", ["every_n_train_steps", "every_n_epochs"])
def test_a_finished_run_that_goes_on_logs_every_step_once(tmp_path: Path, every: int, kind: str) -> None:
    given = gradients(8)
    limit = 1e9
    # The first run ends by max_steps, or with its last epoch, and writes its last checkpoint there.
    end = {"max_epochs": -1, "max_steps": 3} if kind == "every_n_train_steps" else {"max_epochs": 1}
    count = 3 if kind == "every_n_train_steps" else 8
    checkpoint = ModelCheckpoint(
        tmp_path / "saved", save_top_k=-1, filename="end", **{kind: min(3, count) if "steps" in kind else 1}
    )
    logged: list[tuple[int, dict[str, float]]] = []
    clipping = lambda: GradientClipping(NormClip(max_norm=limit))  # noqa: E731
    for name, callbacks, options in (
        ("first", [checkpoint], end),
        ("second", [], {"max_epochs": 2, "ckpt_path": tmp_path / "saved" / "end.ckpt"}),
    ):
        csv, board = CSVLogger(tmp_path, name=name), tensorboard(tmp_path, name=f"board {name}")
        fit(
            Prescribed(),
            given,
            clipping(),
            *callbacks,
            logger=[csv, board],
            log_every_n_steps=every,
            enable_checkpointing=bool(callbacks),
            **options,
        )
        rows = csv_rows(csv)
        assert [step for step, _ in tensorboard_rows(board)] == [step for step, _ in rows]
        logged += rows
    # The first run logs what is left at its end; the second begins a window there, on the same step axis.
    steps = [norm(gradient) for gradient in given * 2]
    ends = [count - 1, *range(every - 1, 16, every), 15]
    assert [step for step, _ in logged] == sorted(set(ends))
    start = 0
    for step, values in logged:
        window = steps[start : step + 1]
        assert values["gradclip/norm"] == pytest.approx(sum(window) / len(window), rel=1e-6)
        assert values["gradclip/norm_max"] == pytest.approx(max(window), rel=1e-6)
        start = step + 1


def test_loaded_state_is_what_was_saved(tmp_path: Path) -> None:
    data = regression_data(6)
    checkpoint = ModelCheckpoint(tmp_path, every_n_train_steps=3, save_top_k=-1, filename="{step}")
    # A warning would be an error here: none is due.
    fit(Regression(), data, GradientClipping(AverageClip(per="layer")), checkpoint, enable_checkpointing=True)
    saved = torch.load(tmp_path / "step=3.ckpt", weights_only=True)["callbacks"][KEY]
    clipping = GradientClipping(AverageClip(per="layer"))
    resumed = Resumed(clipping)
    fit(Regression(), data, clipping, resumed, ckpt_path=tmp_path / "step=3.ckpt", weights_only=True)
    assert equal(resumed.state, saved)
    assert saved["clippers"][0]["step"] == 3
    assert saved["clippers"][0]["learned"]["scopes"] == ["layers.0", "layers.2"]
    assert clipping.state_dict()["clippers"][0]["step"] == 6


def test_a_checkpoint_holds_tensors_and_plain_types_only(tmp_path: Path) -> None:
    clipping = GradientClipping(AverageClip(per="parameter"), measure_per="layer", nonfinite="skip")
    data = regression_data(5)
    data[1][0][0, 0] = torch.nan
    with pytest.warns(RuntimeWarning, match="dropped optimizer step 1"):
        trainer = fit(Regression(), data, clipping, logger=False, log_every_n_steps=2)
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    state = torch.load(tmp_path / "end.ckpt", weights_only=True)["callbacks"][KEY]
    leaves = list(_leaves(state))
    assert {type(leaf) for leaf in leaves} <= {Tensor, int, float, str, bool, type(None)}
    assert any(isinstance(leaf, Tensor) for leaf in leaves)
    assert all(not leaf.requires_grad and leaf.device.type == "cpu" for leaf in leaves if isinstance(leaf, Tensor))
    assert equal(state, clipping.state_dict())


def _leaves(nest: Any) -> Any:
    if type(nest) is dict:
        for key, value in nest.items():
            yield key
            yield from _leaves(value)
    elif type(nest) in (list, tuple):
        for value in nest:
            yield from _leaves(value)
    else:
        yield nest


def test_counts_and_consecutive_skips_go_on(tmp_path: Path) -> None:
    given = gradients(6)
    for bad in (1, 2, 3, 4):
        given[bad]["head.bias"][0] = torch.inf
    checkpoint = ModelCheckpoint(tmp_path / "saved", every_n_train_steps=3, save_top_k=-1, filename="{step}")
    csv = CSVLogger(tmp_path)
    with pytest.warns(RuntimeWarning, match="dropped optimizer step 1"):
        fit(Prescribed(), given, GradientClipping(NormClip()), checkpoint, enable_checkpointing=True)
    saved = tmp_path / "saved" / "step=3.ckpt"
    with pytest.warns(RuntimeWarning, match="dropped optimizer step 3"):
        fit(Prescribed(), given, GradientClipping(NormClip()), logger=csv, log_every_n_steps=1, ckpt_path=saved)
    counts = {step: values["gradclip/nonfinite"] for step, values in csv_rows(csv)}
    assert counts == {3: 3.0, 4: 4.0, 5: 4.0}
    # Two steps were dropped before the checkpoint: one more is one too many.
    strict = GradientClipping(NormClip(), max_consecutive_skips=2)
    with pytest.raises(FloatingPointError, match=r"3 optimizer steps in a row .* optimizer step 3"):
        fit(Prescribed(), given, strict, ckpt_path=saved)


@pytest.mark.filterwarnings("ignore:Using ModelCheckpoint with manual optimization:UserWarning")
def test_two_optimizers_resume_each_with_its_own_state(tmp_path: Path) -> None:
    given = list(zip(gradients(6, seed=1), gradients(6, seed=2), strict=True))

    def run(*callbacks: Callback, **options: Any) -> tuple[Any, ...]:
        module, clipping = Adversaries(), GradientClipping(AverageClip())
        trainer = fit(module, given, clipping, *callbacks, enable_checkpointing=bool(callbacks), **options)
        assert trainer.global_step == 12
        return weights(module), clipping.state_dict()

    # Each batch has two optimizer steps.
    saving = ModelCheckpoint(tmp_path / "saved", every_n_train_steps=6, save_top_k=-1, filename="{step}")
    straight = run(saving)
    saved = tmp_path / "saved" / "step=6.ckpt"
    clippers = torch.load(saved, weights_only=True)["callbacks"][KEY]["clippers"]
    assert [clippers[i]["step"] for i in (0, 1)] == [3, 3]
    assert not equal(clippers[0]["learned"]["values"], clippers[1]["learned"]["values"])
    assert equal(straight, run(ckpt_path=saved, weights_only=True))


def test_a_run_with_a_grad_scaler_resumes_to_the_bit(tmp_path: Path) -> None:
    given = gradients(6)
    given[1]["head.bias"][0] = 1e38  # overflows when scaled
    given[4]["head.bias"][0] = 1e38

    def run(*callbacks: Callback, **options: Any) -> tuple[Any, ...]:
        module, clipping = Prescribed(adamw), GradientClipping(AverageClip())
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
        plugin = MixedPrecision("16-mixed", "cpu", scaler)
        saves = {"enable_checkpointing": bool(callbacks)}
        trainer = fit(module, given, clipping, *callbacks, plugins=[plugin], **options, **saves)
        return weights(module), trainer.optimizers[0].state_dict(), clipping.state_dict(), scaler.state_dict()

    saving = ModelCheckpoint(tmp_path / "saved", every_n_train_steps=3, save_top_k=-1, filename="{step}")
    straight = run(saving)
    saved = tmp_path / "saved" / "step=3.ckpt"
    assert torch.load(saved, weights_only=True)["callbacks"][KEY]["clippers"][0]["step"] == 3
    assert equal(straight, run(ckpt_path=saved, weights_only=True))


def checkpoint_of(tmp_path: Path, clipping: GradientClipping) -> Path:
    checkpoint = ModelCheckpoint(tmp_path, every_n_train_steps=3, save_top_k=-1, filename="{step}")
    fit(Regression(), regression_data(6), clipping, checkpoint, enable_checkpointing=True)
    return tmp_path / "step=3.ckpt"


@pytest.mark.parametrize(
    ("other", "named"),
    [
        (AverageClip(per="layer"), r"AverageClip\(per='layer'"),
        (NormClip(max_norm=1.0), r"NormClip\(per='model'"),
    ],
)
def test_learned_values_of_another_configuration_are_refused(tmp_path: Path, other: ClipMethod, named: str) -> None:
    saved = checkpoint_of(tmp_path, GradientClipping(AverageClip()))
    with pytest.raises(ValueError, match=r"AverageClip\(per='model'.*" + named):
        fit(Regression(), regression_data(6), GradientClipping(other), ckpt_path=saved)


def test_settings_that_learned_values_do_not_depend_on_may_change(tmp_path: Path) -> None:
    saved = checkpoint_of(tmp_path, GradientClipping(AverageClip(ratio=0.5)))
    module, clipping = Regression(), GradientClipping(AverageClip(ratio=2.0), action="observe")
    fit(module, regression_data(6), clipping, ckpt_path=saved)
    assert clipping.method.ratio == 2.0
    assert clipping.state_dict()["clippers"][0]["learned"]["values"]["count"].tolist() == [6]


def test_a_limit_without_memory_may_change(tmp_path: Path) -> None:
    saved = checkpoint_of(tmp_path, GradientClipping(NormClip(max_norm=1.0)))
    clipping = GradientClipping(NormClip(max_norm=0.5, per="layer"))
    fit(Regression(), regression_data(6), clipping, ckpt_path=saved)
    assert clipping.state_dict()["clippers"][0]["step"] == 6


def test_a_state_that_is_not_used_yet_is_kept(tmp_path: Path) -> None:
    saved = checkpoint_of(tmp_path, GradientClipping(AverageClip()))
    clipping = GradientClipping(AverageClip())
    # No step follows, so no clipper exists when the next checkpoint is written.
    trainer = fit(Regression(), regression_data(6), clipping, ckpt_path=saved, max_epochs=-1, max_steps=3)
    trainer.save_checkpoint(tmp_path / "again.ckpt")
    states = [torch.load(path, weights_only=True)["callbacks"][KEY] for path in (saved, tmp_path / "again.ckpt")]
    assert equal(*states)
