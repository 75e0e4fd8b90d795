"""Mixed precision with a real GradScaler on the CPU, fused optimizers, and half precision."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor
from torch.optim import SGD, AdamW

from kit.boring import (
    Adversaries,
    Gradient,
    Prescribed,
    Regression,
    aggregate,
    coefficient,
    csv_rows,
    equal,
    fit,
    gradients,
    mean_gradient,
    norm,
    regression_data,
    weights,
)
from lightning_gradclip import GradientClipping, NormClip

LIMIT = 2.0
SCALE = 2.0**16
# Times the scale it leaves the range of float32; alone it does not.
OVERFLOWING = 1e35
returns_none = pytest.mark.filterwarnings("ignore:`training_step` returned `None`:UserWarning")


def clipping(**options: Any) -> GradientClipping:
    return GradientClipping(NormClip(max_norm=LIMIT), **options)


def sgd(params: Any) -> SGD:
    return SGD(params, lr=0.1, momentum=0.9)


def adamw(params: Any) -> AdamW:
    return AdamW(params, lr=0.05, weight_decay=0.1)


def fused_sgd(params: Any) -> SGD:
    return SGD(params, lr=0.1, momentum=0.9, fused=True)


def fused_adamw(params: Any) -> AdamW:
    return AdamW(params, lr=0.05, weight_decay=0.1, fused=True)


def half(**options: Any) -> MixedPrecision:
    return MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=SCALE, **options))


def overflowing(count: int, *steps: int) -> list[Gradient]:
    given = gradients(count)
    for step in steps:
        given[step]["head.weight"][1, 2] = OVERFLOWING
    return given


def trained(given: Sequence[Any], make: Any = sgd, callback: Any = None, **options: Any) -> tuple[Any, Any, Trainer]:
    module = Prescribed(make)
    trainer = fit(module, given, *([callback] if callback else []), **options)
    return weights(module), trainer.optimizers[0].state_dict()["state"], trainer


@pytest.mark.parametrize("make", [sgd, adamw])
def test_unscaled_gradients_are_clipped(make: Any) -> None:
    given = gradients(8)
    single = trained(given, make, clipping())
    mixed = trained(given, make, clipping(), plugins=[half()])
    # The scale is a power of two: unscaling is exact.
    assert equal(mixed[:2], single[:2])


@pytest.mark.parametrize("make", [sgd, adamw])
@pytest.mark.parametrize("nonfinite", [None, "skip", "zero", "raise", "ignore"])
def test_an_overflow_is_the_scalers_business(tmp_path: Path, make: Any, nonfinite: str | None) -> None:
    given = overflowing(6, 1, 2)
    csv, plugin = CSVLogger(tmp_path), half()
    callback = clipping(nonfinite=nonfinite, max_consecutive_skips=0)
    mixed = trained(given, make, callback, plugins=[plugin], logger=csv, log_every_n_steps=2)
    assert mixed[2].global_step == 6
    assert plugin.scaler.get_scale() == SCALE / 4
    # As if the two steps were not there: weights, momentum and step counts.
    kept = [given[i] for i in (0, 3, 4, 5)]
    assert equal(mixed[:2], trained(kept, make, clipping())[:2])
    rows = csv_rows(csv)
    assert [values["gradclip/overflows"] for _, values in rows] == [1.0, 2.0, 2.0]
    assert {values["gradclip/skipped"] for _, values in rows} == {0.0}
    assert {values["gradclip/nonfinite"] for _, values in rows} == {0.0}
    sizes = [[norm(given[0])], [norm(given[3])], [norm(given[4]), norm(given[5])]]
    assert [values["gradclip/norm"] for _, values in rows] == pytest.approx([sum(s) / len(s) for s in sizes], rel=1e-6)
    assert [values["gradclip/norm_max"] for _, values in rows] == pytest.approx([max(s) for s in sizes], rel=1e-6)


def test_an_overflow_in_the_first_steps_and_between_dropped_ones() -> None:
    # Overflows neither add to the dropped steps in a row nor end them; under a scaler nothing is dropped by us.
    given = overflowing(6, 0, 1, 2, 3, 4)
    mixed = trained(given, adamw, clipping(max_consecutive_skips=1), plugins=[half()])
    assert equal(mixed[:2], trained(given[5:], adamw, clipping())[:2])


def test_a_scaler_overflows_and_steps_over_the_limit_are_dropped_apart(tmp_path: Path) -> None:
    given = overflowing(6, 2)
    sizes = [norm(gradient) for gradient in given]
    limit = sorted(sizes)[2] * (1 + 1e-5)
    over = [i for i, size in enumerate(sizes) if size > limit and i != 2]
    assert len(over) == 2
    csv = CSVLogger(tmp_path)
    callback = GradientClipping(NormClip(max_norm=limit), action="skip")
    with pytest.warns(RuntimeWarning, match=f"dropped optimizer step {over[0]}: .*over its limit"):
        mixed = trained(given, adamw, callback, plugins=[half()], logger=csv, log_every_n_steps=6)
    ((_, values),) = csv_rows(csv)
    assert values["gradclip/overflows"] == 1.0
    assert values["gradclip/skipped"] == 2.0
    assert equal(mixed[:2], trained([given[i] for i in range(6) if i not in (2, *over)], adamw)[:2])


@pytest.mark.parametrize(("make", "plain"), [(fused_sgd, sgd), (fused_adamw, adamw)])
def test_a_fused_optimizer_under_the_scaler_is_clipped(tmp_path: Path, make: Any, plain: Any) -> None:
    given = overflowing(8, 3)
    csv, plugin = CSVLogger(tmp_path), half()
    mixed = trained(given, make, clipping(), plugins=[plugin], logger=csv, log_every_n_steps=8)
    # The gradients carry the scale when the hook fires; what is measured and clipped does not.
    ((_, values),) = csv_rows(csv)
    expected = aggregate([norm(gradient) for i, gradient in enumerate(given) if i != 3], LIMIT)
    # Beside AdamW, of the step that logs.
    assert values.pop("gradclip/stalled", 0.0) == 0.0
    assert values == pytest.approx({**expected, "gradclip/overflows": 1.0}, rel=1e-6)
    assert plugin.scaler.get_scale() == SCALE / 2
    # Fused kernels round differently: the same kernel without a scaler is the bit-equal reference.
    kept = [gradient for i, gradient in enumerate(given) if i != 3]
    assert equal(mixed[:2], trained(kept, make, clipping())[:2])
    torch.testing.assert_close(mixed[0], trained(kept, plain, clipping())[0], rtol=1e-6, atol=1e-6)
    with pytest.raises(RuntimeError, match="does not allow for gradient clipping"):
        trained(given, make, gradient_clip_val=LIMIT, plugins=[half()])


@pytest.mark.parametrize("make", [sgd, fused_sgd, adamw, fused_adamw])
def test_watching_under_the_scaler_changes_nothing(tmp_path: Path, make: Any) -> None:
    given = overflowing(6, 2)
    csv = CSVLogger(tmp_path)
    watched = trained(given, make, clipping(action="observe"), plugins=[half()], logger=csv, log_every_n_steps=6)
    assert equal(watched[:2], trained(given, make, plugins=[half()])[:2])
    ((_, values),) = csv_rows(csv)
    sizes = [norm(gradient) for i, gradient in enumerate(given) if i != 2]
    assert values["gradclip/norm"] == pytest.approx(sum(sizes) / 5, rel=1e-6)
    assert values["gradclip/overflows"] == 1.0


@pytest.mark.parametrize("make", [sgd, fused_sgd, fused_adamw])
def test_dropping_a_step_of_a_fused_optimizer_under_the_scaler(make: Any) -> None:
    given = gradients(6)
    sizes = sorted(map(norm, given))
    limit = (sizes[3] + sizes[4]) / 2
    callback = GradientClipping(NormClip(max_norm=limit), action="skip")
    with pytest.warns(RuntimeWarning, match="over its limit"):
        mixed = trained(given, make, callback, plugins=[half()])
    assert equal(mixed[:2], trained([g for g in given if norm(g) <= limit], make)[:2])


def test_two_optimizers_under_one_scaler() -> None:
    given = list(zip(gradients(6, seed=1), gradients(6, seed=2), strict=True))
    results = []
    for options in ({}, {"plugins": [half()]}):
        module = Adversaries()
        fit(module, given, clipping(), **options)
        results.append(weights(module))
    assert equal(*results)


class Sometimes(Prescribed):
    """Batches that are None give no loss."""

    def training_step(self, batch: Gradient | str, batch_idx: int) -> Tensor | None:
        return None if batch == "nothing" else self.loss(batch)


def run(given: Sequence[Any], make: Any = sgd, *callbacks: Any, **options: Any) -> tuple[Any, Any]:
    module = Sometimes(make)
    trainer = fit(module, given, *callbacks, **options)
    return weights(module), trainer.optimizers[0].state_dict()["state"]


def counted(csv: CSVLogger) -> list[float]:
    return [values["gradclip/norm"] for _, values in csv_rows(csv) if "gradclip/norm" in values]


@returns_none
@pytest.mark.parametrize("make", [sgd, adamw, fused_adamw])
@pytest.mark.parametrize("scaled", [False, True])
def test_a_batch_without_a_loss_is_no_step(tmp_path: Path, make: Any, scaled: bool) -> None:
    given: list[Any] = gradients(5)
    given[1] = given[3] = "nothing"
    csv = CSVLogger(tmp_path)
    options = {"plugins": [half()]} if scaled else {}
    result = run(given, make, clipping(), logger=csv, log_every_n_steps=1, **options)
    kept = [given[i] for i in (0, 2, 4)]
    assert equal(result, run(kept, make, clipping()))
    assert counted(csv) == pytest.approx([norm(gradient) for gradient in kept], rel=1e-6)


@returns_none
@pytest.mark.parametrize("make", [sgd, adamw, fused_adamw])
@pytest.mark.parametrize("scaled", [False, True])
def test_a_window_whose_first_batch_has_no_loss(tmp_path: Path, make: Any, scaled: bool) -> None:
    given: list[Any] = gradients(6)
    given[2] = "nothing"
    csv = CSVLogger(tmp_path)
    options = {"plugins": [half()]} if scaled else {}
    run(given, make, clipping(), accumulate_grad_batches=2, logger=csv, log_every_n_steps=1, **options)
    steps = [given[0:2], given[3:4], given[4:6]]
    assert counted(csv) == pytest.approx([norm(mean_gradient(step, 2)) for step in steps], rel=1e-6)


@returns_none
@pytest.mark.parametrize("make", [sgd, adamw, fused_adamw])
def test_a_window_whose_last_batch_has_no_loss_steps_without_a_scaler(tmp_path: Path, make: Any) -> None:
    given: list[Any] = gradients(6)
    given[3] = "nothing"
    csv = CSVLogger(tmp_path)
    clipped = run(given, make, clipping(), accumulate_grad_batches=2, logger=csv, log_every_n_steps=1)
    steps = [given[0:2], given[2:3], given[4:6]]
    assert counted(csv) == pytest.approx([norm(mean_gradient(step, 2)) for step in steps], rel=1e-6)
    lightnings = run(given, make, accumulate_grad_batches=2, gradient_clip_val=LIMIT)
    torch.testing.assert_close(clipped, lightnings, rtol=1e-6, atol=1e-6)


@returns_none
@pytest.mark.parametrize("make", [sgd, fused_sgd, adamw, fused_adamw])
@pytest.mark.parametrize("action", ["clip", "observe"])
def test_a_window_whose_last_batch_has_no_loss_is_no_step_under_a_scaler(
    tmp_path: Path, make: Any, action: str
) -> None:
    given: list[Any] = gradients(8)
    given[3] = "nothing"
    csv, plugin = CSVLogger(tmp_path), half()
    options = {"accumulate_grad_batches": 2, "log_every_n_steps": 1}
    result = run(given, make, clipping(action=action), plugins=[plugin], logger=csv, **options)
    # Lightning neither unscales nor steps there, and the next window begins with cleared gradients.
    steps = [given[0:2], given[4:6], given[6:8]]
    assert counted(csv) == pytest.approx([norm(mean_gradient(step, 2)) for step in steps], rel=1e-6)
    kept = [gradient for step in steps for gradient in step]
    reference = [clipping()] if action == "clip" else []
    assert equal(result, run(kept, make, *reference, accumulate_grad_batches=2))
    assert plugin.scaler.get_scale() == SCALE


class Watched(Regression):
    """Notes its gradients before and after the callbacks."""

    def __init__(self) -> None:
        super().__init__()
        self.before: list[Gradient] = []
        self.after: list[Gradient] = []

    def on_after_backward(self) -> None:
        self.before.append(self.gradient())

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.after.append(self.gradient())

    def gradient(self) -> Gradient:
        return {name: parameter.grad.clone() for name, parameter in self.named_parameters()}


@pytest.mark.parametrize(("precision", "dtype"), [("bf16-mixed", torch.float32), ("bf16-true", torch.bfloat16)])
def test_half_precision(tmp_path: Path, precision: str, dtype: torch.dtype) -> None:
    module, csv = Watched(), CSVLogger(tmp_path)
    fit(module, regression_data(6), clipping(), precision=precision, logger=csv, log_every_n_steps=1)
    sizes = [norm(gradient) for gradient in module.before]
    assert any(size > LIMIT for size in sizes)
    # Sizes are float32 or wider whatever the gradients are.
    assert counted(csv) == pytest.approx(sizes, rel=1e-6)
    for before, after, size in zip(module.before, module.after, sizes, strict=True):
        for name, value in before.items():
            assert value.dtype == after[name].dtype == dtype
            exact = coefficient(size, LIMIT) * value.double()
            # One unit in the last place.
            torch.testing.assert_close(after[name].double(), exact, rtol=torch.finfo(dtype).eps, atol=0.0)


def test_half_precision_gradients_as_prescribed(tmp_path: Path) -> None:
    given, csv = gradients(4), CSVLogger(tmp_path)
    trained(given, sgd, clipping(), precision="bf16-true", logger=csv, log_every_n_steps=1)
    rounded = [{name: value.bfloat16() for name, value in gradient.items()} for gradient in given]
    assert counted(csv) == pytest.approx([norm(gradient) for gradient in rounded], rel=1e-6)
    assert counted(csv) != pytest.approx([norm(gradient) for gradient in given], rel=1e-5)


def test_double_precision(tmp_path: Path) -> None:
    module, csv = Watched(), CSVLogger(tmp_path)
    fit(module, regression_data(4), clipping(), precision="64-true", logger=csv, log_every_n_steps=1)
    sizes = [norm(gradient) for gradient in module.before]
    assert counted(csv) == pytest.approx(sizes, rel=1e-14)
    for before, after, size in zip(module.before, module.after, sizes, strict=True):
        exact = {name: coefficient(size, LIMIT) * value for name, value in before.items()}
        torch.testing.assert_close(after, exact, rtol=1e-14, atol=0.0)
