"""Two real processes under DDP: the same result as one process, and no communication of ours."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import DDPStrategy
from torch.optim import SGD, AdamW

from kit import workers
from kit.boring import (
    ENCODER,
    HEAD,
    CountingLogger,
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
from lightning_gradclip import AGC, ClipMethod, GradientClipping, Normalize, NormClip, ValueClip

pytestmark = pytest.mark.distributed

LIMIT = 1.0


def clipping(**options: Any) -> GradientClipping:
    return GradientClipping(NormClip(max_norm=LIMIT), **options)


def adamw(params: Any) -> AdamW:
    return AdamW(params, lr=0.05, weight_decay=0.1)


def two(module: LightningModule, batches: Any, *callbacks: Any, **options: Any) -> Trainer:
    """Train as one of two ranks."""
    return fit(
        module, batches, *callbacks, **{"strategy": "ddp", "devices": 2, "use_distributed_sampler": False, **options}
    )


def numbers(trainer: Trainer) -> dict[str, float]:
    return {key: float(value) for key, value in trainer.callback_metrics.items() if key.startswith("gradclip/")}


def test_two_ranks_train_like_one_process_on_the_joint_batch(tmp_path: Path) -> None:
    data = regression_data(6, size=8)

    def work(rank: int) -> Any:
        module, csv, counting = Regression(), CSVLogger(tmp_path, name="two"), CountingLogger()
        half = [tuple(part[4 * rank : 4 * rank + 4] for part in batch) for batch in data]
        trainer = two(module, half, clipping(measure_per="layer"), logger=[csv, counting], log_every_n_steps=2)
        return weights(module), numbers(trainer), counting.calls

    (first, shown, calls), (second, shown_there, calls_there) = workers.run(work)
    module, csv = Regression(), CSVLogger(tmp_path, name="one")
    fit(module, data, clipping(measure_per="layer"), logger=csv, log_every_n_steps=2)
    # Every rank clips alike, to the bit, and knows what was measured.
    assert equal(first, second)
    assert shown == shown_there
    assert shown["gradclip/norm"] > LIMIT
    torch.testing.assert_close(first, weights(module), rtol=1e-6, atol=1e-6)
    # Rank zero writes, once per log event.
    ours, theirs = csv_rows(csv), csv_rows(CSVLogger(tmp_path, name="two", version=0))
    assert [step for step, _ in theirs] == [step for step, _ in ours] == [1, 3, 5]
    for (_, values), (_, expected) in zip(theirs, ours, strict=True):
        assert values == pytest.approx(expected, rel=1e-6)
    assert len(list(tmp_path.glob("two/*/metrics.csv"))) == 1
    assert [step for step, metrics in calls if "gradclip/norm" in metrics] == [1, 3, 5]
    assert calls_there == []


def test_prescribed_gradients_are_averaged_before_they_are_measured(tmp_path: Path) -> None:
    given = [gradients(4, seed=rank) for rank in range(2)]

    def work(rank: int) -> list[tuple[int, dict[str, float]]]:
        csv = CSVLogger(tmp_path)
        two(Prescribed(), given[rank], clipping(), logger=csv, log_every_n_steps=1)
        return csv_rows(csv) if rank == 0 else []

    rows, _ = workers.run(work)
    joint = [norm(mean_gradient(pair, 2)) for pair in zip(*given, strict=True)]
    assert [step for step, _ in rows] == [0, 1, 2, 3]
    for (_, values), size in zip(rows, joint, strict=True):
        assert values == pytest.approx(aggregate([size], LIMIT), rel=1e-6)


@pytest.mark.parametrize(
    "method",
    [
        ValueClip(max_value=0.1),
        ValueClip(min_value=-0.02, max_value=0.5),
        AGC(clip_factor=0.02),
        AGC(per="parameter"),
        Normalize(),
        Normalize(per="layer", smoothing=0.0),
    ],
    ids=str,
)
def test_limits_of_every_kind_give_what_one_process_gives(method: ClipMethod) -> None:
    data = regression_data(5, size=8)

    def work(rank: int) -> Any:
        module = Regression()
        half = [tuple(part[4 * rank : 4 * rank + 4] for part in batch) for batch in data]
        trainer = two(module, half, GradientClipping(method, measure_per="parameter"))
        return weights(module), numbers(trainer)

    first, second = workers.run(work)
    assert equal(first, second)
    module = Regression()
    alone = fit(module, data, GradientClipping(method, measure_per="parameter"))
    assert first[1]["gradclip/clip_rate"] > 0
    assert first[1] == pytest.approx(numbers(alone), rel=1e-5)
    torch.testing.assert_close(first[0], weights(module), rtol=1e-6, atol=1e-6)


def test_value_clipping_clamps_the_average() -> None:
    given = [gradients(4, seed=rank) for rank in range(2)]
    low, high = -0.2, 0.4

    def work(rank: int) -> list[Gradient]:
        received: list[Gradient] = []

        class Watched(Prescribed):
            def on_before_optimizer_step(self, optimizer: Any) -> None:
                received.append({name: parameter.grad.clone() for name, parameter in self.named_parameters()})

        two(Watched(), given[rank], GradientClipping(ValueClip(min_value=low, max_value=high)))
        return received

    first, second = workers.run(work)
    assert equal(first, second)
    # Halving is exact.
    means = [{name: (one[name] + other[name]) / 2 for name in one} for one, other in zip(*given, strict=True)]
    exact = [{name: mean.clamp(low, high) for name, mean in step.items()} for step in means]
    assert not equal(exact, means)
    assert equal(first, exact)


def test_three_callbacks_clip_and_log_their_own_parts(tmp_path: Path) -> None:
    given = [gradients(4, seed=rank) for rank in range(2)]
    bound = 0.3

    def trained(train: Callable[..., Any], batches: list[Gradient], folder: str) -> dict[str, Any]:
        csv = CSVLogger(tmp_path, name=folder)
        callbacks = [
            GradientClipping(AGC(), name="body", include="encoder.weight"),
            GradientClipping(ValueClip(max_value=bound), name="bias", include="encoder.bias"),
            GradientClipping(NormClip(max_norm=LIMIT), name="head", include="head.*"),
        ]
        # The weights stay, and with them the limits of AGC.
        module = Prescribed(lambda params: SGD(params, lr=0.0))
        train(module, batches, *callbacks, logger=csv, log_every_n_steps=2)
        return {callback.name: csv_rows(csv, f"{callback.name}/") for callback in callbacks}

    steps = [mean_gradient(pair, 2) for pair in zip(*given, strict=True)]
    limits = 0.01 * weights(Prescribed())["encoder.weight"].double().norm(dim=1)

    def expected(window: list[Gradient]) -> dict[str, dict[str, float]]:
        rows = [step["encoder.weight"].norm(dim=1) for step in window]
        coefs = [(limits / row).clamp(max=1.0) for row in rows]
        biases = [step["encoder.bias"] for step in window]
        common = {"skipped": 0.0, "nonfinite": 0.0}
        body = {
            "norm": np.mean([row.norm() for row in rows]),
            "norm_clipped": np.mean([(row * coef).norm() for row, coef in zip(rows, coefs, strict=True)]),
            "norm_max": max(row.norm() for row in rows),
            "coef_min": min(coef.min() for coef in coefs),
            "clip_rate": 1.0,
            "clipped": np.mean([(coef < 1).double().mean() for coef in coefs]),
        }
        bias = {
            "norm": np.mean([one.norm() for one in biases]),
            "norm_max": max(one.norm() for one in biases),
            "limit": bound,
            "clip_rate": np.mean([bool((one.abs() > bound).any()) for one in biases]),
        }
        head = aggregate([norm(step, HEAD) for step in window], LIMIT)
        parts = {"body": body | common, "bias": bias | common}
        result = {
            part: {f"{part}/{key}": float(value) for key, value in values.items()} for part, values in parts.items()
        }
        return result | {"head": {key.replace("gradclip", "head"): value for key, value in head.items()}}

    on_two, _ = workers.run(lambda rank: trained(two, given[rank], f"rank {rank}"))
    on_one = trained(fit, [{name: value.float() for name, value in step.items()} for step in steps], "one")
    for rows in (on_two, on_one):
        for part in ("body", "bias", "head"):
            assert [step for step, _ in rows[part]] == [1, 3]
            for (_, values), window in zip(rows[part], (steps[:2], steps[2:]), strict=True):
                assert values == pytest.approx(expected(window)[part], rel=2e-6)


def test_accumulated_gradients_are_measured_on_real_steps_only() -> None:
    given = [gradients(5, seed=rank) for rank in range(2)]

    def work(rank: int) -> tuple[int, dict[str, float]]:
        trainer = two(Prescribed(), given[rank], clipping(), accumulate_grad_batches=2, log_every_n_steps=3)
        return trainer.global_step, numbers(trainer)

    results = workers.run(work)
    steps = [norm(mean_gradient(given[0][i : i + 2] + given[1][i : i + 2], 4)) for i in (0, 2, 4)]
    for count, shown in results:
        assert count == 3
        assert shown == pytest.approx(aggregate(steps, LIMIT), rel=1e-6)


@pytest.mark.parametrize("spoiled", [0, 1])
def test_one_ranks_nan_makes_both_skip(spoiled: int) -> None:
    given = [gradients(5, seed=rank) for rank in range(2)]
    given[spoiled][2]["head.bias"][0] = torch.nan

    def work(rank: int, keep: list[int]) -> tuple[Any, ...]:
        module = Prescribed(adamw)
        with warnings.catch_warnings(record=True) as caught:
            warnings.filterwarnings("always", "dropped optimizer step")
            trainer = two(module, [given[rank][i] for i in keep], clipping(), log_every_n_steps=1)
        said = [str(one.message) for one in caught]
        return weights(module), trainer.optimizers[0].state_dict(), trainer.global_step, numbers(trainer), said

    first, second = workers.run(work, [0, 1, 2, 3, 4])
    assert equal(first[:4], second[:4])
    assert first[2] == 5
    assert first[3]["gradclip/skipped"] == first[3]["gradclip/nonfinite"] == 1.0
    # As if that batch were not there, on both ranks.
    assert equal(first[:2], workers.run(work, [0, 1, 3, 4])[0][:2])
    # Only rank zero announces it.
    assert [said.startswith("dropped optimizer step 2: non-finite gradients in head.bias") for said in first[4]] == [
        True
    ]
    assert second[4] == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"nonfinite": "raise"}, "optimizer step 1 in head.bias"),
        ({"max_consecutive_skips": 0}, "1 optimizer steps in a row"),
    ],
)
def test_an_error_is_raised_on_every_rank(options: dict[str, Any], message: str) -> None:
    given = [gradients(3, seed=rank) for rank in range(2)]
    given[1][1]["head.bias"][0] = torch.inf

    def work(rank: int) -> str:
        with pytest.raises(FloatingPointError) as error:
            two(Prescribed(), given[rank], clipping(**options))
        return str(error.value)

    first, second = workers.run(work)
    assert message in first
    assert first == second


def test_parameters_that_a_rank_does_not_use() -> None:
    """The encoder has gradients on both ranks, on one of them, and on none."""
    whole, other = gradients(3, seed=1), gradients(3, seed=2)
    partial = [{name: gradient[name] for name in HEAD} for gradient in whole]
    given = [[whole[0], partial[1], partial[2]], [other[0], other[1], {name: other[2][name] for name in HEAD}]]

    def work(rank: int) -> tuple[list[Gradient], Any, dict[str, float]]:
        received: list[Gradient] = []

        class Watched(Prescribed):
            def on_before_optimizer_step(self, optimizer: Any) -> None:
                present = {name: p.grad for name, p in self.named_parameters() if p.grad is not None}
                received.append({name: gradient.clone() for name, gradient in present.items()})

        module = Watched()
        trainer = two(module, given[rank], clipping(), strategy=DDPStrategy(find_unused_parameters=True))
        return received, weights(module), numbers(trainer)

    first, second = workers.run(work)
    assert equal(first, second)
    nothing = {name: torch.zeros_like(whole[1][name]) for name in ENCODER}
    joint = [
        mean_gradient([whole[0], other[0]], 2),
        mean_gradient([{**nothing, **partial[1]}, other[1]], 2),
        mean_gradient([given[0][2], given[1][2]], 2),
    ]
    assert [set(got) for got in first[0]] == [{*ENCODER, *HEAD}, {*ENCODER, *HEAD}, set(HEAD)]
    for got, mean in zip(first[0], joint, strict=True):
        coef = coefficient(norm(mean), LIMIT)
        exact = {name: (coef * mean[name]).float() for name in got}
        torch.testing.assert_close(got, exact, rtol=2e-6, atol=1e-7)
    assert first[2]["gradclip/norm"] == pytest.approx(sum(map(norm, joint)) / 3, rel=1e-6)


def test_nothing_is_communicated(tmp_path: Path) -> None:
    def collectives(rank: int, options: dict[str, Any] | None) -> int:
        earlier = _collectives()
        callbacks = [] if options is None else [clipping(**options)]
        csv = CSVLogger(tmp_path, name=str(options), version=rank)
        data = regression_data(4, seed=rank)
        two(Regression(), data, *callbacks, logger=csv, log_every_n_steps=1, max_epochs=2)
        # The process group counts every collective; the one below shows that it does.
        before = _collectives()
        dist.all_reduce(torch.ones(1))
        assert _collectives() == before + 1
        return before - earlier

    bare = workers.run(collectives, None)
    assert bare[0] == bare[1] > 8
    options = {"measure_per": "parameter", "prog_bar": True, "log_every_n_steps": 1, "nonfinite": "skip"}
    assert workers.run(collectives, options) == bare


def _collectives() -> int:
    return dist.distributed_c10d._get_default_group()._get_sequence_number_for_group()


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`:UserWarning")
def test_every_rank_resumes_from_the_state_of_rank_zero(tmp_path: Path) -> None:
    def work(rank: int, *, resume: bool) -> tuple[Any, ...]:
        module, callback = Regression(adamw), clipping(measure_per="layer")
        saving = ModelCheckpoint(tmp_path, every_n_train_steps=3, save_top_k=-1, filename="{step}")
        options = {"ckpt_path": tmp_path / "step=3.ckpt", "weights_only": True} if resume else {}
        callbacks = [callback] if resume else [callback, saving]
        trainer = two(
            module,
            regression_data(6, seed=rank),
            *callbacks,
            enable_checkpointing=not resume,
            log_every_n_steps=4,
            **options,
        )
        return weights(module), trainer.optimizers[0].state_dict(), callback.state_dict(), numbers(trainer)

    straight = workers.run(lambda rank: work(rank, resume=False))
    resumed = workers.run(lambda rank: work(rank, resume=True))
    assert equal(straight[0], straight[1])
    assert equal(resumed, straight)
    assert straight[0][2]["clippers"][0]["step"] == 6
