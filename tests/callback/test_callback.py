"""The callback in a trainer: watching, clipping, dropping steps, and what it leaves behind."""

import copy
import pickle
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.optim import SGD, AdamW

from kit.boring import (
    Batches,
    Gradient,
    Prescribed,
    Regression,
    Validated,
    aggregate,
    csv_rows,
    equal,
    fit,
    gradients,
    norm,
    regression_data,
    tensorboard,
    tensorboard_rows,
    weights,
)
from lightning_gradclip import GradientClipping, NormClip

LIMIT = 2.0


def clipping(**options: Any) -> GradientClipping:
    return GradientClipping(NormClip(max_norm=LIMIT), **options)


def adamw(params: Any) -> AdamW:
    return AdamW(params, lr=0.05, weight_decay=0.1)


def regress(*callbacks: Any, make: Any = adamw, count: int = 10, **options: Any) -> tuple[Any, Any]:
    """Weights and optimizer state after a run whose every step depends on those before."""
    module = Regression(make)
    trainer = fit(module, regression_data(count), *callbacks, **options)
    return weights(module), trainer.optimizers[0].state_dict()


@pytest.mark.parametrize(
    "clips", [{}, {"gradient_clip_val": 0.5}, {"gradient_clip_val": 0.1, "gradient_clip_algorithm": "value"}]
)
@pytest.mark.parametrize(
    "watch",
    [
        {"method": None},
        {"method": NormClip(max_norm=LIMIT), "action": "observe"},
        {"method": NormClip(max_norm=LIMIT), "action": "observe", "nonfinite": "raise"},
    ],
    ids=["method=None", "observe", "observe and raise"],
)
def test_watching_leaves_training_as_it_is_to_the_bit(clips: dict[str, Any], watch: dict[str, Any]) -> None:
    assert equal(regress(GradientClipping(**watch), **clips), regress(**clips))


def test_watching_measures_before_the_trainer_clips(tmp_path: Path) -> None:
    given, csv = gradients(6), CSVLogger(tmp_path)
    fit(Prescribed(), given, clipping(action="observe"), gradient_clip_val=0.1, logger=csv, log_every_n_steps=3)
    rows = csv_rows(csv)
    # The norms are those before the trainer's clipping, and the rest what this method would have done.
    for step, values in rows:
        assert values == pytest.approx(aggregate([norm(g) for g in given[step - 2 : step + 1]], LIMIT), rel=1e-6)
    assert [step for step, _ in rows] == [2, 5]


def test_watching_a_method_none_has_no_limit(tmp_path: Path) -> None:
    given, csv = gradients(4), CSVLogger(tmp_path)
    fit(Prescribed(), given, GradientClipping(None), logger=csv, log_every_n_steps=4)
    ((_, values),) = csv_rows(csv)
    assert "gradclip/limit" not in values
    mean = sum(map(norm, given)) / 4
    assert values == pytest.approx(
        {
            "gradclip/norm": mean,
            "gradclip/norm_clipped": mean,
            "gradclip/norm_max": max(map(norm, given)),
            "gradclip/coef_min": 1.0,
            "gradclip/clip_rate": 0.0,
            "gradclip/skipped": 0.0,
            "gradclip/nonfinite": 0.0,
        },
        rel=1e-6,
    )


def test_clipping_equals_the_trainers_own() -> None:
    ours = regress(clipping(), make=lambda params: SGD(params, lr=0.01))
    lightnings = regress(gradient_clip_val=LIMIT, make=lambda params: SGD(params, lr=0.01))
    torch.testing.assert_close(ours[0], lightnings[0], rtol=1e-5, atol=1e-6)
    without = regress(make=lambda params: SGD(params, lr=0.01))
    assert not torch.allclose(ours[0]["layers.0.weight"], without[0]["layers.0.weight"], rtol=1e-2)


def test_gradients_within_the_limit_train_as_without_the_callback_to_the_bit() -> None:
    assert equal(regress(GradientClipping(NormClip(max_norm=1e9))), regress())


def spoiled(
    count: int, *steps: int, value: float = float("nan"), names: Sequence[str] = ("head.bias",)
) -> list[Gradient]:
    given = gradients(count)
    for step in steps:
        for name in names:
            given[step][name].view(-1)[0] = value
    return given


def trained(given: Sequence[Gradient], *callbacks: Any, **options: Any) -> tuple[Any, Any, Trainer]:
    module = Prescribed(adamw)
    trainer = fit(module, given, *callbacks, **options)
    return weights(module), trainer.optimizers[0].state_dict(), trainer


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_non_finite_step_is_dropped_while_the_count_goes_on(tmp_path: Path, value: float) -> None:
    given, csv = spoiled(6, 0, 3, value=value), CSVLogger(tmp_path)
    with pytest.warns(RuntimeWarning, match="dropped optimizer step 0: non-finite gradients in head.bias") as caught:
        skipping = trained(given, clipping(), logger=csv, log_every_n_steps=1)
    assert len([one for one in caught if "dropped" in str(one.message)]) == 1
    assert skipping[2].global_step == 6
    # Weights, moments and step counts are those of a run without the two batches.
    assert equal(skipping[:2], trained([given[i] for i in (1, 2, 4, 5)], clipping())[:2])
    rows = dict(csv_rows(csv))
    assert [rows[i]["gradclip/skipped"] for i in range(6)] == [1, 1, 1, 2, 2, 2]
    assert [rows[i]["gradclip/nonfinite"] for i in range(6)] == [1, 1, 1, 2, 2, 2]
    assert ["gradclip/norm" in rows[i] for i in range(6)] == [False, True, True, False, True, True]


def test_a_dropped_step_moves_neither_weights_nor_state() -> None:
    seen: list[tuple[Any, Any]] = []

    class Watched(Prescribed):
        def on_train_batch_end(self, *_: Any) -> None:
            seen.append((weights(self), copy.deepcopy(self.trainer.optimizers[0].state_dict())))

    with pytest.warns(RuntimeWarning, match="dropped optimizer step 2"):
        fit(Watched(adamw), spoiled(4, 2), clipping())
    assert equal(seen[1], seen[2])
    assert not equal(seen[0][0], seen[1][0])
    assert not equal(seen[2][0], seen[3][0])


def test_schedulers_go_on_when_a_step_is_dropped() -> None:
    class Scheduled(Prescribed):
        def configure_optimizers(self) -> Any:
            optimizer = SGD(self.parameters(), lr=1.0)
            scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
            return [optimizer], [{"scheduler": scheduler, "interval": "step"}]

    with pytest.warns(RuntimeWarning, match="dropped optimizer step 1"):
        trainer = fit(Scheduled(), spoiled(4, 1), clipping())
    assert trainer.optimizers[0].param_groups[0]["lr"] == 0.5**4


def test_zeroing_repairs_the_entries_and_steps(tmp_path: Path) -> None:
    given, csv = spoiled(4, 1, value=float("inf"), names=["head.bias", "encoder.weight"]), CSVLogger(tmp_path)
    repaired = [{name: torch.where(torch.isfinite(v), v, 0.0) for name, v in gradient.items()} for gradient in given]
    zeroing = trained(given, clipping(nonfinite="zero"), logger=csv, log_every_n_steps=1)
    assert equal(zeroing[:2], trained(repaired, clipping())[:2])
    rows = dict(csv_rows(csv))
    assert [rows[i]["gradclip/nonfinite"] for i in range(4)] == [0, 1, 1, 1]
    assert rows[3]["gradclip/skipped"] == 0


def test_ignoring_leaves_non_finite_gradients_to_the_optimizer(tmp_path: Path) -> None:
    given, csv = spoiled(3, 1), CSVLogger(tmp_path)
    module = Prescribed()
    fit(module, given, clipping(nonfinite="ignore"), logger=csv, log_every_n_steps=1)
    assert torch.isnan(module.head.bias[0])
    assert torch.isfinite(module.head.bias[1])
    # The other gradients of a step that cannot be measured are not clipped.
    expected = Prescribed()
    fit(expected, given[:1], clipping())
    fit_on = Prescribed()
    fit_on.load_state_dict(expected.state_dict())
    fit(fit_on, given[1:2])
    stepped = Prescribed()
    fit(stepped, given[:2], clipping(nonfinite="ignore"))
    assert torch.equal(stepped.encoder.weight, fit_on.encoder.weight)
    assert [values["gradclip/nonfinite"] for _, values in csv_rows(csv)] == [0, 1, 1]


@pytest.mark.parametrize("every", [1, 2, 50])
@pytest.mark.parametrize("options", [{}, {"action": "observe"}], ids=["clip", "observe"])
@pytest.mark.filterwarnings("ignore:The number of training batches:UserWarning")
def test_raising_names_step_and_parameter_and_logs_the_last_window(
    tmp_path: Path, options: dict[str, Any], every: int
) -> None:
    given = spoiled(9, 6, names=["head.bias", "encoder.weight"])
    csv, board = CSVLogger(tmp_path, name="csv"), tensorboard(tmp_path, name="board")
    module = Prescribed()
    with pytest.raises(FloatingPointError, match=r"optimizer step 6 in encoder\.weight, head\.bias"):
        fit(module, given, clipping(nonfinite="raise", **options), logger=[csv, board], log_every_n_steps=every)
    # Gradients are left for a post-mortem.
    assert torch.isnan(module.head.bias.grad[0])
    assert torch.equal(module.head.weight.grad, given[6]["head.weight"])
    # The last window ends with the step that failed, and lies there.
    ends = [*range(every - 1, 6, every), 6]
    for rows in (csv_rows(csv), tensorboard_rows(board)):
        assert [step for step, _ in rows] == ends
        last, start = rows[-1][1], ends[-2] + 1 if len(ends) > 1 else 0
        assert last["gradclip/nonfinite"] == 1.0
        finite = [norm(gradient) for gradient in given[start:6]]
        if finite:
            assert last["gradclip/norm"] == pytest.approx(sum(finite) / len(finite), rel=1e-6)
        else:
            assert "gradclip/norm" not in last


def test_too_many_dropped_steps_in_a_row_end_the_run(tmp_path: Path) -> None:
    given, csv = spoiled(9, 1, 2, 4, 5, 6), CSVLogger(tmp_path)
    module = Prescribed()
    with (
        pytest.warns(RuntimeWarning, match="dropped optimizer step 1"),
        pytest.raises(FloatingPointError, match=r"3 optimizer steps in a row .* optimizer step 6.*head\.bias"),
    ):
        fit(module, given, clipping(max_consecutive_skips=2), logger=csv, log_every_n_steps=4)
    rows = dict(csv_rows(csv))
    assert sorted(rows) == [3, 6]
    assert rows[6] == {"gradclip/skipped": 5.0, "gradclip/nonfinite": 5.0}


def test_no_bound_on_dropped_steps() -> None:
    with pytest.warns(RuntimeWarning, match="dropped optimizer step 0"):
        trainer = fit(Prescribed(), spoiled(30, *range(30)), clipping(max_consecutive_skips=None))
    assert trainer.global_step == 30


def test_the_default_bound_is_twenty() -> None:
    with pytest.warns(RuntimeWarning, match="dropped"), pytest.raises(FloatingPointError, match="21 optimizer steps"):
        fit(Prescribed(), spoiled(30, *range(30)), clipping())


def test_steps_over_the_limit_are_dropped(tmp_path: Path) -> None:
    given, csv = gradients(8), CSVLogger(tmp_path)
    sizes = list(map(norm, given))
    limit = sorted(sizes)[4]
    kept = [gradient for gradient, size in zip(given, sizes, strict=True) if size <= limit]
    assert len(kept) == 5
    dropping = GradientClipping(NormClip(max_norm=limit), action="skip")
    with pytest.warns(RuntimeWarning, match="over its limit"):
        result = trained(given, dropping, logger=csv, log_every_n_steps=8)
    assert result[2].global_step == 8
    assert equal(result[:2], trained(kept)[:2])
    ((_, values),) = csv_rows(csv)
    assert values == pytest.approx(
        {
            "gradclip/norm": sum(sizes) / 8,
            "gradclip/norm_clipped": sum(map(norm, kept)) / 8,
            "gradclip/norm_max": max(sizes),
            "gradclip/limit": limit,
            "gradclip/coef_min": 0.0,
            "gradclip/clip_rate": 3 / 8,
            "gradclip/skipped": 3.0,
            "gradclip/nonfinite": 0.0,
        },
        rel=1e-6,
    )


def test_a_scope_over_its_limit_drops_the_whole_step() -> None:
    given = gradients(3)
    given[1]["head.bias"] *= 1e6
    dropping = GradientClipping(NormClip(max_norm=1e4, per="parameter"), action="skip", include="head.*")
    with pytest.warns(RuntimeWarning, match="dropped optimizer step 1: .*head.bias.* over its limit"):
        result = trained(given, dropping)
    assert equal(result[:2], trained([given[0], given[2]])[:2])


@pytest.mark.parametrize("hook", ["on_train_batch_start", "training_step", "on_train_batch_end", "on_validation_start"])
def test_an_interrupted_run_logs_its_last_window(tmp_path: Path, hook: str) -> None:
    given, csv = gradients(9), CSVLogger(tmp_path)

    class Interrupted(Validated):
        """Five steps are done when the user presses a key."""

    def interrupt(self: Any, *arguments: Any) -> Any:
        if self.global_step == 5:
            raise KeyboardInterrupt
        return getattr(Validated, hook)(self, *arguments)

    setattr(Interrupted, hook, interrupt)
    options = {"val_dataloaders": Batches(given[:1]), "val_check_interval": 5, "log_every_n_steps": 3}
    # Lightning ignores further signals from there on.
    handler = signal.getsignal(signal.SIGINT)
    try:
        with pytest.raises(SystemExit):
            fit(Interrupted(), given, clipping(), logger=csv, **options)
    finally:
        signal.signal(signal.SIGINT, handler)
    rows = csv_rows(csv)
    assert [step for step, _ in rows] == [2, 4]
    for (step, values), start in zip(rows, (0, 3), strict=True):
        sizes = [norm(gradient) for gradient in given[start : step + 1]]
        assert values == pytest.approx(aggregate(sizes, LIMIT), rel=1e-6)


def test_a_copy_is_a_callback_of_its_own() -> None:
    original = clipping(include="layers.*", measure_per="layer", name="mine")
    for twin in (copy.deepcopy(original), pickle.loads(pickle.dumps(original))):
        assert twin.state_key == original.state_key
        assert equal(regress(twin), regress(copy.deepcopy(original)))
        assert twin.state_dict()["clippers"][0]["step"] == 10
    assert original.state_dict() == {"clippers": {}}


def test_a_callback_that_has_trained_can_be_copied() -> None:
    callback = clipping(measure_per="layer")
    reference = regress(callback)
    for twin in (copy.deepcopy(callback), pickle.loads(pickle.dumps(callback))):
        assert equal(twin.state_dict(), callback.state_dict())
        assert equal(regress(twin), reference)


def test_the_checkpoint_key_holds_the_name() -> None:
    keys = {clipping().state_key, clipping(name="other").state_key}
    assert len(keys) == 2
    assert clipping().state_key == clipping(action="observe").state_key


def test_each_run_clips_with_a_copy_of_the_method() -> None:
    method = NormClip(max_norm={0: 5.0, 5: 0.1})
    before = copy.deepcopy(method)
    one = regress(GradientClipping(method))
    two = regress(GradientClipping(method))
    assert method == before
    assert equal(one, two)


def test_watching_while_the_trainer_clips_is_welcome_and_clipping_is_not() -> None:
    assert regress(GradientClipping(None), gradient_clip_val=1.0)
    with pytest.raises(MisconfigurationException, match=r"gradient_clip_val=1\.0"):
        regress(clipping(), gradient_clip_val=1.0)


def test_parameters_without_gradients_stay_without() -> None:
    class Partial(Prescribed):
        def on_before_optimizer_step(self, optimizer: Any) -> None:
            assert self.encoder.weight.grad is None
            self.size = float(torch.linalg.vector_norm(self.head.weight.grad.double()))

    module = Partial()
    (given,) = gradients(1, names=["head.weight"])
    fit(module, [given], clipping())
    assert norm(given) > LIMIT
    assert module.size == pytest.approx(LIMIT, rel=1e-6)


def test_tied_weights_count_once(tmp_path: Path) -> None:
    class Tied(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.one = torch.nn.Linear(2, 2, bias=False)
            self.two = torch.nn.Linear(2, 2, bias=False)
            self.two.weight = self.one.weight

        def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
            return (self.one.weight * batch).sum() + (self.two.weight * batch).sum()

        def configure_optimizers(self) -> SGD:
            return SGD(self.parameters(), lr=0.1)

    given, csv = torch.tensor([[3.0, 0.0], [0.0, 4.0]]), CSVLogger(tmp_path)
    fit(Tied(), [given], clipping(), logger=csv, log_every_n_steps=1)
    assert csv_rows(csv)[0][1]["gradclip/norm"] == pytest.approx(10.0, rel=1e-6)
