"""Loss scaling and half precision where gradients are cut: every rank unscales, clips and drops alike."""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from kit import layouts, workers
from kit.guides import page
from lightning_gradclip import Clipper, NormClip

# What torch says of its own parts, in one release or another.
pytestmark = [
    pytest.mark.distributed,
    pytest.mark.filterwarnings("ignore:FSDP2-wrapped module"),
    pytest.mark.filterwarnings("ignore::FutureWarning:torch"),
    pytest.mark.filterwarnings("ignore::UserWarning:torch"),
]

LIMIT, SCALE, STEPS = 0.1, 1024.0, 3
# torch's own scaler refuses DTensors beside plain tensors, so that tensor parallelism has to come with FSDP2.
SCALED = [name for name in ("fsdp1_full", "fsdp2") if name in layouts.SPREADS]
# Here one thing only is asked: whether ranks that hold other pieces, or copies of them, drop the same steps as well.
WIDER = [name for name in ("fsdp1_hybrid", "fsdp2_hybrid", "tensor_data") if name in layouts.SPREADS]


def scaler_for(name: str) -> torch.amp.GradScaler:
    if name.startswith("fsdp1"):
        from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler

        return ShardedGradScaler("cpu", init_scale=SCALE, growth_interval=1000)
    return torch.amp.GradScaler("cpu", init_scale=SCALE, growth_interval=1000)


def batches(rank: int, name: str) -> list[tuple[Tensor, Tensor]]:
    """What this rank sees of each batch."""
    numbers = torch.Generator().manual_seed(5)
    way = layouts.SPREADS[name]
    size = 8 // way.parts
    part = slice(way.part(rank) * size, (way.part(rank) + 1) * size)
    pairs = [(torch.randn(8, 4, 6, generator=numbers), torch.randn(8, 4, 3, generator=numbers)) for _ in range(STEPS)]
    return [(x[part], y[part]) for x, y in pairs]


def poison(model: nn.Module, rank: int, value: float) -> None:
    """A non-finite entry in what the first rank holds, and there only."""
    if rank:
        return
    for parameter in model.parameters():
        gradient: Any = parameter.grad
        if gradient is not None:
            piece = gradient.to_local() if hasattr(gradient, "to_local") else gradient
            if piece.numel():
                piece.view(-1)[0] = value
                return


def train(
    rank: int, name: str, make: Any, *, scaled: bool, clips: bool = True, bad: int | None = None, **options: Any
) -> dict[str, Any]:
    model = layouts.spread(name, layouts.net())
    optimizer: Optimizer = make(model.parameters())
    scaler = scaler_for(name) if scaled else None
    clipper = Clipper(model, NormClip(max_norm=LIMIT), optimizer=optimizer, **options) if clips else None
    found: dict[str, Any] = {"norms": [], "scales": [], "skipped": []}
    for step, (x, y) in enumerate(batches(rank, name)):
        optimizer.zero_grad()
        loss = (model(x) - y).square().mean()
        (loss if scaler is None else scaler.scale(loss)).backward()
        if step == bad:
            poison(model, rank, torch.inf)
        if clipper is not None:
            stats = clipper.step(scaler)
            found["norms"].append(stats.norm.item())
            found["skipped"].append(stats.skipped.item())
        if scaler is None:
            optimizer.step()
        else:
            scaler.step(optimizer)
            scaler.update()
            found["scales"].append(scaler.get_scale())
    found["metrics"] = {} if clipper is None else clipper.metrics()
    weights = layouts.whole(model, gradients=False)
    found["weights"] = {key: value.numpy() for key, value in weights.items() if value is not None}
    return found


def adamw(fused: bool) -> Any:
    return lambda params: AdamW(params, lr=0.01, fused=fused)


@pytest.fixture(params=SCALED)
def runs(request: pytest.FixtureRequest) -> tuple[str, list[dict[str, dict[str, Any]]]]:
    """By rank, what came of training in several ways."""
    return request.param, [runs for runs, _ in found()[request.param]]


def all_runs(rank: int, name: str) -> dict[str, dict[str, Any]]:
    if name in WIDER:
        return {
            "overflow True": train(rank, name, adamw(fused=True), scaled=True, bad=1),
            "fold overflow": train(rank, name, adamw(fused=True), scaled=True, fold=True, bad=1),
        }
    plain = {"plain": train(rank, name, adamw(fused=False), scaled=False)}
    for fused in (False, True):
        plain[f"scaled {fused}"] = train(rank, name, adamw(fused), scaled=True)
        plain[f"overflow {fused}"] = train(rank, name, adamw(fused), scaled=True, bad=1)
    plain["fold"] = train(rank, name, adamw(fused=True), scaled=True, fold=True)
    plain["fold overflow"] = train(rank, name, adamw(fused=True), scaled=True, fold=True, bad=1)
    plain["watched"] = train(rank, name, adamw(fused=True), scaled=True, action="observe")
    plain["alone"] = train(rank, name, adamw(fused=True), scaled=True, clips=False)
    return plain


def assert_close(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray], rtol: float) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        np.testing.assert_allclose(value, theirs[name], rtol=rtol, atol=rtol * np.abs(value).max(), err_msg=name)


@pytest.mark.parametrize("how", ["scaled False", "scaled True", "fold"])
def test_training_under_a_scaler_is_training_without(runs: Any, how: str) -> None:
    for one in runs[1]:
        ours, plain = one[how], one["plain"]
        assert min(plain["norms"]) > LIMIT
        np.testing.assert_allclose(ours["norms"], plain["norms"], rtol=1e-5)
        assert_close(ours["weights"], plain["weights"], rtol=1e-5)
        assert ours["scales"] == [SCALE] * STEPS


@pytest.mark.parametrize(
    ("name", "how"),
    [(name, how) for name in SCALED for how in ("overflow False", "overflow True", "fold overflow")]
    + [(name, how) for name in WIDER for how in ("overflow True", "fold overflow")],
)
def test_an_overflow_on_one_rank_is_dropped_by_all(name: str, how: str) -> None:
    ranks = [runs for runs, _ in found()[name]]
    for one in ranks:
        ours = one[how]
        assert ours["scales"] == [SCALE] + [SCALE / 2] * (STEPS - 1)
        assert ours["skipped"] == [False, True, False]
        assert ours["norms"] == ranks[0][how]["norms"]
        assert ours["metrics"]["overflows"] == 1
        for key, value in ours["weights"].items():
            assert np.array_equal(value, ranks[0][how]["weights"][key]), (name, key)
            assert np.isfinite(value).all()


def test_watching_leaves_training_as_it_is(runs: Any) -> None:
    for one in runs[1]:
        for key, value in one["watched"]["weights"].items():
            assert np.array_equal(value, one["alone"]["weights"][key]), key
        np.testing.assert_allclose(one["watched"]["norms"][0], one["plain"]["norms"][0], rtol=1e-5)


def test_lightnings_own_clipping_refuses_what_works_here() -> None:
    """A fused optimizer under a scaler, whose gradients are still scaled when Lightning would clip them."""
    from lightning.pytorch.plugins import MixedPrecision

    from kit.boring import Prescribed, fit, gradients

    class Fused(Prescribed):
        def configure_optimizers(self) -> Optimizer:
            return SGD(self.parameters(), lr=0.1, fused=True)

    options = {"plugins": MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))}
    with pytest.raises(RuntimeError, match="does not allow for gradient clipping"):
        fit(Fused(), gradients(1), gradient_clip_val=1.0, **options)


class NotWithoutUsError(Exception):
    """torch raises, with this package and without it."""


def one_step(
    rank: int, name: str, *, dtype: torch.dtype, mixed: bool = False, scaled: bool = False, fused: bool = False
) -> None:
    """Clip one step and compare with the gradients put together.

    Raises:
        NotWithoutUsError: If a step without clipping is not possible.
    """

    def backward(model: nn.Module, scaler: torch.amp.GradScaler | None) -> None:
        x, y = (one.to(dtype) for one in batches(rank, name)[0])
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            loss = (model(x) - y).square().mean()
        (loss if scaler is None else scaler.scale(loss)).backward()

    def prepared() -> tuple[nn.Module, Optimizer, torch.amp.GradScaler | None]:
        model = layouts.spread(name, layouts.net(dtype))
        return model, AdamW(model.parameters(), lr=0.01, fused=fused), scaler_for(name) if scaled else None

    if scaled:
        model, optimizer, scaler = prepared()
        backward(model, scaler)
        try:
            scaler.step(optimizer)
        except RuntimeError as error:
            raise NotWithoutUsError from error
    model, optimizer, scaler = prepared()
    backward(model, scaler)
    scale = 1.0 if scaler is None else scaler.get_scale()
    before = {key: value.double() / scale for key, value in layouts.whole(model, gradients=True).items()}
    stats = Clipper(model, NormClip(max_norm=LIMIT), optimizer=optimizer).step(scaler)
    after = layouts.whole(model, gradients=True)
    true = np.sqrt(sum(float(value.square().sum()) for value in before.values()))
    assert stats.norm.item() == pytest.approx(true, rel=1e-6)
    epsilon = max(torch.finfo(dtype).eps, 1e-6)
    for key, value in before.items():
        expected = value * LIMIT / (true + 1e-6)
        torch.testing.assert_close(after[key].double(), expected, rtol=epsilon, atol=epsilon * 1e-3, msg=key)
    # Where a step is possible without, it is with.
    optimizer.step() if scaler is None else scaler.step(optimizer)


# The columns of the table in docs/distributed.md and what stands for them here.
COLUMNS = {
    "`ddp`": "ddp",
    "FSDP": "fsdp1_full",
    "FSDP2": "fsdp2",
    "FSDP2 and tensor parallel": "tensor_data",
    "tensor parallel": "tensor",
}
ROWS: dict[str, list[Callable[[int, str], None]]] = {
    "32, 64 bits": [partial(one_step, dtype=torch.float32), partial(one_step, dtype=torch.float64)],
    "`bf16-mixed`": [partial(one_step, dtype=torch.float32, mixed=True)],
    "`bf16-true`, `16-true`": [partial(one_step, dtype=torch.bfloat16), partial(one_step, dtype=torch.float16)],
    "`16-mixed`, with a GradScaler": [partial(one_step, dtype=torch.float32, scaled=True)],
    "the same with a fused optimizer": [partial(one_step, dtype=torch.float32, scaled=True, fused=True)],
}


def table() -> dict[str, dict[str, str]]:
    """Row to column to cell."""
    text = page("distributed")
    head, _, *lines = ("| precision |" + text.partition("| precision |")[2].partition("\n\n")[0]).splitlines()
    columns = [cell.strip() for cell in head.strip("| ").split(" | ")][1:]
    rows = ([cell.strip() for cell in line.strip("| ").split(" | ")] for line in lines)
    return {row: dict(zip(columns, cells, strict=True)) for row, *cells in rows}


@pytest.mark.parametrize("column", [column for column, name in COLUMNS.items() if name in layouts.SPREADS])
def test_the_table_of_precisions_is_true(column: str) -> None:
    cells = {row: cells[column] for row, cells in table().items()}
    assert cells.keys() == ROWS.keys()
    for _, told in found()[COLUMNS[column]]:
        assert told == cells


def outcomes(rank: int, name: str) -> dict[str, str]:
    """What comes of each row of the table."""
    told = {}
    for row, steps in ROWS.items():
        try:
            for step in steps:
                step(rank, name)
            told[row] = "exact"
        except NotWithoutUsError:
            told[row] = "torch raises"
    return told


@workers.once
def found() -> dict[str, list[tuple[Any, Any]]]:
    """By layout and rank, all that the tests ask about."""

    def work(rank: int, name: str) -> tuple[Any, Any]:
        return (
            all_runs(rank, name) if name in SCALED + WIDER else None,
            outcomes(rank, name) if name in COLUMNS.values() else None,
        )

    names = [name for name in layouts.SPREADS if name in {*SCALED, *WIDER, *COLUMNS.values()}]
    return workers.run_each(work, {name: layouts.SPREADS[name].world for name in names})
