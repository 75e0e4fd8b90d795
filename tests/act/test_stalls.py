"""What clipping leaves an optimizer to feel: the metric `stalled`, and one warning with a way out."""

import csv
import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch.nn import Parameter
from torch.optim import SGD, Adam, AdamW, Optimizer, RAdam, RMSprop

from kit import boring, layouts, workers
from lightning_gradclip import Clipper, EmaClip, GradientClipping, NormClip, ValueClip

ROWS = Path(__file__).parents[2] / "benchmarks" / "training" / "stalls.csv"
NAMES = ("large.weight", "small.weight")
STALL = "less than half of their movement: of 'small.weight'"


class Pair:
    """Two parameters of 16 entries, a large and a small gradient, and a clipper."""

    def __init__(self, method: Any, kind: Any = AdamW, **options: Any) -> None:
        self.params = [Parameter(torch.zeros(16)) for _ in range(2)]
        self.optimizer: Optimizer = kind(self.params, lr=1e-3, **options)
        self.clipper = Clipper(zip(NAMES, self.params, strict=True), method, optimizer=self.optimizer)

    def step(self, large: float, small: float, *, looks: bool = False) -> dict[str, float]:
        for parameter, size in zip(self.params, (large, small), strict=True):
            parameter.grad = torch.full((16,), size / 4)
        self.clipper.step(detailed=looks)
        self.optimizer.step()
        return self.clipper.metrics() if looks else {}


def stalled(method: Any, kind: Any = AdamW, **options: Any) -> float | None:
    pair = Pair(method, kind, **options)
    for _ in range(3):
        pair.step(1e6, 1e-2)
    return pair.step(1e6, 1e-2, looks=True).get("stalled")


@pytest.mark.parametrize("kind", [AdamW, RAdam, RMSprop])
def test_a_small_layer_beside_a_large_one(kind: Any) -> None:
    with pytest.warns(RuntimeWarning, match=STALL) as said:
        assert stalled(NormClip(max_norm=1.0), kind) == 0.5
    [text] = [str(one.message) for one in said]
    for part in (f"{kind.__name__} is given gradients of ", "beside its eps=", "per='layer'", "joint norm of 1e+06"):
        assert part in text
    if kind is AdamW:
        assert "2.5e-09 (root mean square) instead of 0.0025, and cannot feel them beside its eps=1e-08" in text


@pytest.mark.parametrize(
    ("method", "kind", "options"),
    [
        (NormClip(max_norm=1.0, per="layer"), AdamW, {}),
        (NormClip(max_norm=1e6), AdamW, {}),
        (NormClip(max_norm=1.0), AdamW, {"eps": 1e-15}),
        (ValueClip(max_value=1e-3), AdamW, {}),
        (EmaClip(warmup=2), AdamW, {}),
    ],
)
def test_the_ways_out(method: Any, kind: Any, options: dict[str, float]) -> None:
    assert stalled(method, kind, **options) == 0.0


def test_nothing_is_said_of_optimizers_that_feel_everything() -> None:
    assert stalled(NormClip(max_norm=1.0), SGD) is None


def test_the_warm_up_of_ema_is_named_where_it_is_the_cause() -> None:
    with pytest.warns(RuntimeWarning, match="Set warmup_max_norm near the usual norm, which is 1e.06"):
        assert stalled(EmaClip(warmup_max_norm=1.0, per="layer")) == 0.5


def test_squares_that_float32_does_not_hold_are_felt_least() -> None:
    pair = Pair(NormClip(max_norm=1e-20))
    pair.step(1.0, 1e-4)
    with pytest.warns(RuntimeWarning, match="2 of 2 parameters"):
        assert pair.step(1.0, 1e-4, looks=True)["stalled"] == 1.0


def test_it_is_said_once_and_found_unasked_every_50_steps() -> None:
    pair = Pair(NormClip(max_norm=1.0))

    def run(steps: int) -> None:
        for _ in range(steps):
            for parameter, size in zip(pair.params, (1e6, 1e-2), strict=True):
                parameter.grad = torch.full((16,), size)
            pair.clipper.step()
            pair.optimizer.step()

    run(49)
    assert "stalled" not in pair.clipper.metrics()
    run(1)
    with pytest.warns(RuntimeWarning, match=STALL):
        assert pair.clipper.metrics(reset=False)["stalled"] == 0.5
    run(50)
    assert pair.clipper.metrics()["stalled"] == 0.5


@pytest.mark.parametrize("small", [1e-2, 1e-9])
def test_a_spike_is_no_stall(small: float) -> None:
    """Neither for what is felt otherwise, nor for what never was."""
    pair = Pair(NormClip(max_norm=1.0))
    for _ in range(20):
        pair.step(0.5, small)
    assert pair.step(1e6, small, looks=True)["stalled"] == 0.0


def test_what_a_dropped_or_observed_step_would_be_is_not_counted() -> None:
    for action in ("skip", "observe"):
        pair = Pair(None)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "dropped optimizer step")
            pair.clipper = Clipper(
                zip(NAMES, pair.params, strict=True),
                NormClip(max_norm=1.0),
                optimizer=pair.optimizer,
                action=action,
            )
            pair.step(0.1, 1e-9)
            assert "stalled" not in pair.step(1e6, 1e-2, looks=True)


def test_the_bench_warns_of_what_loses_half_and_its_advice_helps() -> None:
    with ROWS.open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert 0.1 < sum(row["warned"] == "1" for row in rows) / len(rows) < 0.5
    for row in rows:
        assert (row["warned"] == "1") == (float(row["kept"]) < 0.5), row
        taken = [float(row[way]) for way in ("per layer", "usual size", "eps") if row[way]]
        assert bool(taken) == (row["warned"] == "1")
        assert all(kept >= 0.9 for kept in taken), row


def test_a_trainer_logs_it_and_warns(tmp_path: Path) -> None:
    module = boring.Prescribed(lambda params: Adam(params, lr=1e-3))
    generator = torch.Generator().manual_seed(0)
    scales = {"encoder.weight": 1e6, "encoder.bias": 1e6, "head.weight": 1e-4, "head.bias": 1e-4}
    batches = [
        {name: scale * torch.randn(boring.SHAPES[name], generator=generator) for name, scale in scales.items()}
        for _ in range(8)
    ]
    logger = CSVLogger(tmp_path)
    with pytest.warns(RuntimeWarning, match="'head.[a-z]+' Adam is given") as said:
        boring.fit(module, batches, GradientClipping(NormClip(max_norm=1.0)), logger=logger, log_every_n_steps=4)
    assert sum("movement" in str(one.message) for one in said) == 1
    found = [row["gradclip/stalled"] for _, row in boring.csv_rows(logger)]
    assert found == [0.5, 0.5]


@pytest.mark.distributed
@pytest.mark.skipif(not layouts.FSDP2_ON_CPU, reason="this torch knows FSDP2 on GPUs only")
def test_ranks_that_hold_pieces_find_the_same() -> None:
    def steps(module: Any) -> tuple[float, str]:
        optimizer = AdamW(module.parameters(), lr=0.0)
        clipper = Clipper(module, NormClip(max_norm=1e-6), optimizer=optimizer)
        x = torch.linspace(-1, 1, 4 * layouts.WIDTHS["features"]).view(1, 4, -1)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            for step in range(3):
                optimizer.zero_grad()
                module(x).square().sum().backward()
                clipper.step(detailed=step == 2)
                optimizer.step()
            stalled = clipper.metrics()["stalled"]
        return stalled, "".join(text for one in said if "movement" in (text := str(one.message)))

    def work(rank: int) -> Any:
        return steps(layouts.spread("fsdp2", layouts.net()))

    [(first, said), (second, silent)] = workers.run(work)
    share, text = steps(layouts.net())
    assert 0 < share == first == second
    assert said == text
    assert silent == ""
    assert math.isfinite(share)
