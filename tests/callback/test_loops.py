"""Several optimizers, several callbacks, and optimizers that step in unusual ways."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import BackboneFinetuning, GradientAccumulationScheduler
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.optim import LBFGS, SGD

from kit.boring import (
    ENCODER,
    HEAD,
    Adversaries,
    Batches,
    Gradient,
    Manual,
    Prescribed,
    Regression,
    aggregate,
    coefficient,
    csv_rows,
    fit,
    gradients,
    make_trainer,
    mean_gradient,
    norm,
    regression_data,
    tensorboard,
    tensorboard_rows,
    weights,
    windows,
)
from lightning_gradclip import GradientClipping, NormClip

LIMIT = 2.0


def clipping(**options: Any) -> GradientClipping:
    return GradientClipping(NormClip(max_norm=LIMIT), **options)


class Received(Callback):
    """Notes the gradients that the optimizer receives, parameter by parameter; listed after the clipping."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Tensor | None]] = []

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        names = {id(parameter): name for name, parameter in pl_module.named_parameters()}
        owned = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        self.steps.append({names[id(p)]: None if p.grad is None else p.grad.clone() for p in owned})


def descended(start: dict[str, Tensor], steps: Sequence[Gradient], limit: float, lr: float = 0.1) -> Gradient:
    """Weights after SGD with clipped gradients, in float64 and without torch's clipping."""
    result = {name: value.double() for name, value in start.items()}
    for gradient in steps:
        coef = coefficient(norm(gradient), limit)
        result = {name: value - lr * coef * gradient[name].double() for name, value in result.items()}
    return result


def test_weights_follow_the_clipped_gradients() -> None:
    given, module = gradients(12), Prescribed()
    expected = descended(weights(module), given, LIMIT)
    fit(module, given, clipping())
    torch.testing.assert_close(
        {name: value.double() for name, value in weights(module).items()}, expected, rtol=1e-6, atol=1e-6
    )


def test_gradients_within_the_limit_reach_the_optimizer_to_the_bit() -> None:
    given = gradients(6)
    received = Received()
    fit(Prescribed(), given, GradientClipping(NormClip(max_norm=max(map(norm, given)) * 1.001)), received)
    assert all(
        torch.equal(got[name], gave[name]) for got, gave in zip(received.steps, given, strict=True) for name in gave
    )


def test_accumulated_gradients_are_clipped_once() -> None:
    given, module = gradients(7), Prescribed()
    received = Received()
    fit(module, given, clipping(), received, accumulate_grad_batches=3)
    steps = [mean_gradient(given[i : i + 3], 3) for i in (0, 3, 6)]
    assert len(received.steps) == 3
    for got, gave in zip(received.steps, steps, strict=True):
        coef = coefficient(norm(gave), LIMIT)
        for name, value in gave.items():
            torch.testing.assert_close(got[name].double(), coef * value, rtol=2e-6, atol=1e-7)


def test_an_accumulation_that_changes_between_epochs(tmp_path: Path) -> None:
    given = gradients(6)
    csv = CSVLogger(tmp_path)
    schedule = GradientAccumulationScheduler({0: 1, 1: 3})
    fit(Prescribed(), given, clipping(), schedule, logger=csv, max_epochs=2, log_every_n_steps=2)
    steps = [norm(gradient) for gradient in given] + [norm(mean_gradient(given[i : i + 3], 3)) for i in (0, 3)]
    expected = windows([[size] for size in steps], 2)
    rows = csv_rows(csv)
    assert [step for step, _ in rows] == list(expected) == [1, 3, 5, 7]
    for step, values in rows:
        assert values == pytest.approx(aggregate(expected[step], LIMIT), rel=1e-6)


def adversaries(count: int) -> list[tuple[Gradient, Gradient]]:
    return list(zip(gradients(count, seed=1), gradients(count, seed=2), strict=True))


def test_two_optimizers_hold_their_own_norms_beside_stale_gradients(tmp_path: Path) -> None:
    given = adversaries(6)
    csv, board = CSVLogger(tmp_path, name="csv"), tensorboard(tmp_path, name="board")
    received = Received()
    trainer = fit(Adversaries(), given, clipping(), received, logger=[csv, board], log_every_n_steps=3)
    assert trainer.global_step == 12
    # The encoder's optimizer clears its gradients and steps first: it sees the first gradient only. The head's
    # optimizer clears what the first backward pass left there, while the encoder's gradients hold both by then.
    encoder = [norm(first, ENCODER) for first, _ in given]
    head = [norm(second, HEAD) for _, second in given]
    for rows in (csv_rows(csv), tensorboard_rows(board)):
        assert [step for step, _ in rows] == [2, 5]
        for step, values in rows:
            assert values == pytest.approx(
                {
                    key.replace("gradclip/", f"gradclip/{index}/"): value
                    for index, sizes in enumerate((encoder, head))
                    for key, value in aggregate(sizes[step - 2 : step + 1], LIMIT).items()
                },
                rel=1e-6,
            )
    for i, (first, second) in enumerate(given):
        for got, gave, names, size in (
            (received.steps[2 * i], first, ENCODER, encoder[i]),
            (received.steps[2 * i + 1], second, HEAD, head[i]),
        ):
            assert set(got) == set(names)
            for name in names:
                torch.testing.assert_close(got[name], gave[name] * coefficient(size, LIMIT), rtol=2e-6, atol=1e-7)


def test_clipping_one_optimizer_leaves_the_others_stale_gradients_alone() -> None:
    seen: list[bool] = []

    class Watched(Adversaries):
        def on_before_optimizer_step(self, optimizer: Any) -> None:
            other = self.encoder if optimizer is self.trainer.optimizers[1] else self.head
            now = [None if p.grad is None else p.grad.clone() for p in other.parameters()]
            before = self.before[id(other)]
            seen.append(all(a is b is None or torch.equal(a, b) for a, b in zip(now, before, strict=True)))

        def on_after_backward(self) -> None:
            self.before = {
                id(module): [None if p.grad is None else p.grad.clone() for p in module.parameters()]
                for module in (self.encoder, self.head)
            }

    fit(Watched(), adversaries(4), GradientClipping(NormClip(max_norm=1e-3)))
    assert seen == [True] * 8


def test_one_of_two_optimizers_is_served_under_plain_names(tmp_path: Path) -> None:
    given = adversaries(4)
    csv = CSVLogger(tmp_path)
    received = Received()
    fit(Adversaries(), given, clipping(optimizer=1), received, logger=csv, log_every_n_steps=2)
    rows = csv_rows(csv)
    assert [step for step, _ in rows] == [1, 3]
    for step, values in rows:
        expected = aggregate([norm(second, HEAD) for _, second in given[step - 1 : step + 1]], LIMIT)
        assert values == pytest.approx(expected, rel=1e-6)
    for got, (first, _) in zip(received.steps[::2], given, strict=True):
        assert all(torch.equal(got[name], first[name]) for name in ENCODER)
    for got, (_, second) in zip(received.steps[1::2], given, strict=True):
        size = norm({name: value for name, value in got.items() if value is not None})
        assert size == pytest.approx(min(LIMIT, norm(second, HEAD)), rel=1e-6)


def test_patterns_that_match_only_one_optimizers_parameters(tmp_path: Path) -> None:
    given = adversaries(4)
    csv = CSVLogger(tmp_path)
    received = Received()
    fit(Adversaries(), given, clipping(include="head.*"), received, logger=csv, log_every_n_steps=2)
    for got, (first, _) in zip(received.steps[::2], given, strict=True):
        assert all(torch.equal(got[name], first[name]) for name in ENCODER)
    for step, values in csv_rows(csv):
        assert not [key for key in values if key.startswith("gradclip/0/norm")]
        expected = aggregate([norm(second, HEAD) for _, second in given[step - 1 : step + 1]], LIMIT)
        ours = {key: value for key, value in values.items() if key.startswith("gradclip/1/")}
        assert ours == pytest.approx({k.replace("/", "/1/"): v for k, v in expected.items()}, rel=1e-6)


def test_optimizers_that_step_at_different_rates(tmp_path: Path) -> None:
    class Unequal(Adversaries):
        """The head takes two steps a batch, the encoder one every second batch."""

        def training_step(self, batch: tuple[Gradient, Gradient], batch_idx: int) -> None:
            encoder, head = self.optimizers()
            turns = [(head, batch[1]), (head, batch[0])] + ([(encoder, batch[0])] if batch_idx % 2 else [])
            for optimizer, gradient in turns:
                optimizer.zero_grad()
                self.manual_backward(self.loss(gradient))
                optimizer.step()

    given = adversaries(6)
    csv = CSVLogger(tmp_path)
    fit(Unequal(), given, clipping(), logger=csv, log_every_n_steps=2)
    rows = csv_rows(csv)
    assert [step for step, _ in rows] == [1, 3, 5]
    for step, values in rows:
        pairs = given[step - 1 : step + 1]
        head = aggregate([norm(one, HEAD) for first, second in pairs for one in (second, first)], LIMIT)
        encoder = aggregate([norm(pairs[1][0], ENCODER)], LIMIT)
        expected = {k.replace("/", "/0/"): v for k, v in encoder.items()}
        expected |= {k.replace("/", "/1/"): v for k, v in head.items()}
        assert values == pytest.approx(expected, rel=1e-6)


def test_callbacks_with_two_names_and_filters(tmp_path: Path) -> None:
    given = gradients(4)
    csv = CSVLogger(tmp_path)
    received = Received()
    one = GradientClipping(NormClip(max_norm=0.5), name="a", include="encoder.*")
    two = GradientClipping(NormClip(max_norm=0.25), name="b", exclude=["encoder.*", "*.bias"])
    watch = GradientClipping(None, name="after")
    fit(Prescribed(), given, one, two, watch, received, logger=csv, log_every_n_steps=1)
    left = []
    for got, gave in zip(received.steps, given, strict=True):
        a, b = coefficient(norm(gave, ENCODER), 0.5), coefficient(norm(gave, ["head.weight"]), 0.25)
        coefs = {**dict.fromkeys(ENCODER, a), "head.weight": b, "head.bias": 1.0}
        for name, coef in coefs.items():
            torch.testing.assert_close(got[name], gave[name] * coef, rtol=2e-6, atol=1e-7)
        assert torch.equal(got["head.bias"], gave["head.bias"])
        left.append(norm({name: gave[name].double() * coef for name, coef in coefs.items()}))
    rows = {name: [values[f"{name}/norm"] for _, values in csv_rows(csv, f"{name}/")] for name in ("a", "b", "after")}
    assert rows["a"] == pytest.approx([norm(gave, ENCODER) for gave in given], rel=1e-6)
    assert rows["b"] == pytest.approx([norm(gave, ["head.weight"]) for gave in given], rel=1e-6)
    # Callbacks act in their order: the last one measures what the others left.
    assert rows["after"] == pytest.approx(left, rel=1e-6)


def test_two_callbacks_of_one_name_are_refused() -> None:
    # Lightning finds two callbacks with one checkpoint key before the trainer exists.
    with pytest.raises((RuntimeError, MisconfigurationException)):
        fit(Prescribed(), gradients(1), clipping(), clipping())


def test_two_callbacks_of_one_name_from_the_module_are_refused() -> None:
    class Configured(Prescribed):
        def configure_callbacks(self) -> list[Callback]:
            return [clipping(), clipping()]

    with pytest.raises(
        MisconfigurationException, match=r"2 GradientClipping callbacks are named 'gradclip'.*gradclip_2"
    ):
        fit(Configured(), gradients(1))


def test_lbfgs_is_clipped_at_every_closure(tmp_path: Path) -> None:
    class Quadratic(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.tensor([3.0, -4.0]))
            self.sizes: list[float] = []

        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            self.sizes.append(float(torch.linalg.vector_norm(self.weight.detach().double())))
            return 0.5 * (self.weight * self.weight).sum()

        def configure_optimizers(self) -> LBFGS:
            return LBFGS(self.parameters(), lr=0.1, max_iter=3)

    module, received = Quadratic(), Received()
    csv = CSVLogger(tmp_path)
    fit(module, [torch.zeros(1)] * 2, clipping(), received, logger=csv, log_every_n_steps=1)
    # Three closures a step, and each sees the gradient at the point that clipping led it to.
    assert len(module.sizes) == len(received.steps) == 6
    got = [norm(step) for step in received.steps]
    assert got == pytest.approx([LIMIT] * 6, rel=1e-5)
    rows = csv_rows(csv)
    assert [values["gradclip/norm"] for _, values in rows] == pytest.approx(
        [sum(module.sizes[:3]) / 3, sum(module.sizes[3:]) / 3], rel=1e-6
    )


@pytest.mark.filterwarnings("ignore:The dirpath has changed:UserWarning")
def test_a_backbone_that_joins_in_mid_training_is_clipped_from_then_on(tmp_path: Path) -> None:
    class Finetuned(Prescribed):
        @property
        def backbone(self) -> nn.Module:
            return self.encoder

        def loss(self, gradient: Gradient) -> Tensor:
            trained = {name for name, parameter in self.named_parameters() if parameter.requires_grad}
            return super().loss({name: value for name, value in gradient.items() if name in trained})

        def configure_optimizers(self) -> SGD:
            return SGD([p for p in self.parameters() if p.requires_grad], lr=0.1)

    given = gradients(3)
    csv = CSVLogger(tmp_path)
    received = Received()
    # The new group's learning rate is the head's at first.
    thaw = BackboneFinetuning(unfreeze_backbone_at_epoch=1, train_bn=False, verbose=False, backbone_initial_lr=0.01)
    trainer = fit(
        Finetuned(),
        given,
        thaw,
        clipping(measure_per="group"),
        received,
        logger=csv,
        max_epochs=2,
        log_every_n_steps=1,
    )
    assert len(trainer.optimizers[0].param_groups) == 2
    assert [set(step) for step in received.steps] == [set(HEAD)] * 3 + [{*HEAD, *ENCODER}] * 3
    rows = csv_rows(csv, "gradclip")
    expected = [norm(gave, HEAD) for gave in given] + [norm(gave) for gave in given]
    assert [values["gradclip/norm"] for _, values in rows] == pytest.approx(expected, rel=1e-6)
    assert ["gradclip_norm/group1" in values for _, values in rows] == [False] * 3 + [True] * 3
    after = [values["gradclip_norm/group1"] for _, values in rows[3:]]
    assert after == pytest.approx([norm(gave, ENCODER) for gave in given], rel=1e-6)
    for got, size in zip(received.steps, expected, strict=True):
        assert norm(got) == pytest.approx(min(LIMIT, size), rel=1e-6)


@pytest.mark.filterwarnings("ignore:The number of training batches:UserWarning")
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("every", [1, 2, 6])
def test_an_optimizer_that_is_replaced_in_mid_training_is_served(tmp_path: Path, scaled: bool, every: int) -> None:
    class Restarted(Prescribed):
        """Trains the head, and from the second epoch on everything with a new optimizer."""

        def configure_optimizers(self) -> SGD:
            return SGD(self.head.parameters() if self.current_epoch == 0 else self.parameters(), lr=0.1)

        def on_train_epoch_start(self) -> None:
            if self.current_epoch == 1:
                self.trainer.strategy.setup_optimizers(self.trainer)

    given, csv = gradients(3), CSVLogger(tmp_path)
    received = Received()
    plugins = [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))] if scaled else []
    options = {"max_epochs": 2, "log_every_n_steps": every, "plugins": plugins}
    fit(Restarted(), given, clipping(), received, logger=csv, **options)
    assert [set(step) for step in received.steps] == [set(HEAD)] * 3 + [{*HEAD, *ENCODER}] * 3
    sizes = [norm(gave, HEAD) for gave in given] + [norm(gave) for gave in given]
    # The window goes on: no step is lost.
    expected = windows([[size] for size in sizes], every)
    assert {step: values["gradclip/norm"] for step, values in csv_rows(csv)} == pytest.approx(
        {step: sum(window) / len(window) for step, window in expected.items()}, rel=1e-6
    )
    assert [norm(got) for got in received.steps] == pytest.approx([min(LIMIT, size) for size in sizes], rel=1e-6)


def test_counts_go_on_when_the_optimizer_is_replaced() -> None:
    class Restarted(Prescribed):
        def on_train_epoch_start(self) -> None:
            self.trainer.strategy.setup_optimizers(self.trainer)

    given = gradients(3)
    given[1]["head.bias"][0] = torch.nan
    callback = clipping()
    with pytest.warns(RuntimeWarning, match="dropped optimizer step"):
        trainer = fit(Restarted(), given, callback, max_epochs=3)
    assert float(trainer.callback_metrics["gradclip/skipped"]) == 3.0
    assert callback.state_dict()["clippers"][0]["step"] == 9


def test_a_module_without_optimizers_trains() -> None:
    class Bare(Prescribed):
        def configure_optimizers(self) -> None: ...

    module = Bare()
    before = weights(module)
    with pytest.warns(UserWarning, match="configure_optimizers"):
        trainer = fit(module, gradients(3), clipping(), log_every_n_steps=1)
    assert trainer.fit_loop.epoch_loop.batch_progress.total.completed == 3
    assert all(torch.equal(value, before[name]) for name, value in weights(module).items())
    assert "gradclip/norm" not in trainer.callback_metrics


def test_a_compiled_submodule_keeps_its_names(tmp_path: Path) -> None:
    class Compiled(Regression):
        def __init__(self, compiled: bool) -> None:
            super().__init__()
            if compiled:
                self.layers = torch.compile(self.layers, backend="eager")

    data = regression_data(4)
    runs = {}
    for compiled in (False, True):
        module, csv = Compiled(compiled), CSVLogger(tmp_path, name=str(compiled))
        callback = clipping(include="layers.0.*", measure_per="parameter")
        fit(module, data, callback, logger=csv, log_every_n_steps=1)
        runs[compiled] = csv_rows(csv, "gradclip"), list(weights(module).values())
        assert any("_orig_mod" in name for name in weights(module)) == compiled
    assert "gradclip_norm/layers.0.weight" in runs[True][0][0][1]
    assert runs[True][0] == runs[False][0]
    assert all(map(torch.equal, runs[True][1], runs[False][1]))


def test_a_second_fit_starts_afresh(tmp_path: Path) -> None:
    given = gradients(3)
    callback = clipping()
    for name in ("first", "second"):
        csv = CSVLogger(tmp_path, name=name)
        fit(Prescribed(), given, callback, logger=csv, log_every_n_steps=3)
        assert csv_rows(csv) == [(2, pytest.approx(aggregate([norm(gave) for gave in given], LIMIT), rel=1e-6))]


def test_validating_and_testing_need_no_gradients() -> None:
    class Evaluated(Manual):
        def validation_step(self, batch: Gradient, batch_idx: int) -> None: ...

        test_step = validation_step

    trainer = make_trainer(clipping())
    trainer.validate(Evaluated(), Batches(gradients(1)), verbose=False)
    trainer.test(Evaluated(), Batches(gradients(1)), verbose=False)
    assert not [key for key in trainer.callback_metrics if key.startswith("gradclip")]


class Bypassing(Adversaries):
    """Steps the bare optimizers, so that no hook fires."""

    def training_step(self, batch: Any, batch_idx: int) -> None:
        for optimizer in self.optimizers(use_pl_optimizer=False):
            optimizer.step()


def test_steps_that_no_hook_sees_are_announced() -> None:
    with pytest.warns(UserWarning, match=r"has clipped nothing in 3 steps of optimizer \d"):
        fit(Bypassing(), list(zip(gradients(3), gradients(3), strict=True)), clipping())
