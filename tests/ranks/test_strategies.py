"""Training under every strategy gives what one process gives, or is refused before it begins."""

import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.optim import AdamW

import lightning_gradclip
from kit import workers
from kit.boring import CountingLogger, csv_rows, equal, fit
from kit.guides import page
from kit.strategies import WAYS, Fitted, Way, batches, known, quieten_torch, spreading, whole
from lightning_gradclip import AGC, ClipMethod, EmaClip, GradientClipping, NormClip
from lightning_gradclip.gradients.ranks import settled
from lightning_gradclip.select.layout import local

# Many methods clip the same gradients, each from the start.
pytestmark = [
    pytest.mark.distributed,
    pytest.mark.filterwarnings("ignore:two callbacks clip the same parameters", "ignore:after GradientClipping"),
]

STEPS = 4
# The rows of the table in docs/distributed.md and what stands for them here.
ROWS = {
    "`ddp`": ["ddp"],
    '`FSDPStrategy`: `"FULL_SHARD"`, `"SHARD_GRAD_OP"`, `"HYBRID_SHARD"`': [
        "fsdp1_full",
        "fsdp1_grad_op",
        "fsdp1_hybrid",
    ],
    '`FSDPStrategy(sharding_strategy="NO_SHARD")`': ["fsdp1_none"],
    "`FSDPStrategy(use_orig_params=False)`": ["fsdp1_flat"],
    "`ModelParallelStrategy`: FSDP2": ["fsdp2", "fsdp2_4"],
    "`ModelParallelStrategy`: tensor parallel, sequence parallel": ["tensor", "sequence"],
    "`ModelParallelStrategy`: tensor parallel and FSDP2": ["tensor_data"],
}
# One way for each row is tried with all methods, the others with those that learn nothing.
FIRST = [names[0] for names in ROWS.values()]
COLUMNS = ["model", "group", "layer", "parameter", "unit", "element"]
# Four steps in which these do something.
SETTINGS: Mapping[str, dict[str, Any]] = {
    "NormClip": {"max_norm": 0.2},
    "ValueClip": {"max_value": 0.02},
    "AGC": {"clip_factor": 0.1},
    "QuantileClip": {"q": 0.5},
    "SigmaClip": {"k": 0.5, "window": 4, "warmup": 2},
    "ZClip": {"warmup": 2, "z_threshold": 0.5},
    "EmaClip": {"warmup": 2},
}


def methods() -> dict[str, ClipMethod]:
    """Every method at every scope that it knows, by a name for its callback, but those that want an Adam."""
    found: dict[str, ClipMethod] = {"NormClip-rms": NormClip(max_norm=0.005, statistic="rms")}
    for name in lightning_gradclip.__all__:
        kind = getattr(lightning_gradclip, name)
        if isinstance(kind, type) and issubclass(kind, ClipMethod) and kind is not ClipMethod:
            for per in () if kind.needs_moments else kind.scopes:
                scope = {"per": per} if len(kind.scopes) > 1 else {}
                found[f"{name}-{per}"] = kind(**SETTINGS.get(name, {}), **scope)
    return found


class Aside(Callback):
    """Between callbacks that clip: puts what each has left aside, and lets the next begin with the same gradients.

    In the end the optimizer gets all that was put aside, each part times a number of its own.
    """

    def __init__(self, number: int, *, last: bool) -> None:
        self.number, self.last = number, last

    @property
    def state_key(self) -> str:
        return f"Aside{self.number}"

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        params = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        if self.number == 0:
            for parameter in params:
                parameter.grad = settled(parameter.grad, parameter)
        gradients = [local(parameter.grad) for parameter in params]
        if self.number == 0:
            trainer.kept = [gradient.clone() for gradient in gradients]
            trainer.parts = [torch.zeros_like(gradient) for gradient in gradients]
            return
        torch._foreach_add_(trainer.parts, gradients, alpha=1.0 / self.number)
        torch._foreach_copy_(gradients, trainer.parts if self.last else trainer.kept)


def train(
    way: Way | None, rank: int, *callbacks: Callback, dtype: torch.dtype = torch.float64, **options: Any
) -> Trainer:
    """Train as one of several ranks, or alone."""
    data = batches(STEPS, dtype)
    if way is None:
        return fit(Fitted(dtype), data, *callbacks, **options)
    quieten_torch()
    module = spreading(Fitted(dtype), way.cut)
    spread = {"strategy": way.strategy(), "devices": way.world, "use_distributed_sampler": False}
    return fit(module, way.share(data, rank), *callbacks, **spread, **options)


def refusals(way: Way) -> dict[str, str]:
    """What `setup` says about each method that it refuses."""
    trainer = Trainer(accelerator="cpu", strategy=way.strategy(), devices=way.world, logger=False)
    said: dict[str, str] = {}
    for name, method in methods().items():
        try:
            GradientClipping(method).setup(trainer, Fitted(), "fit")
        except MisconfigurationException as error:
            said[name] = str(error)
    return said


def clip_by(names: list[str], way: Way | None = None, rank: int = 0) -> dict[str, Any]:
    """One training in which each of these methods clips the same gradients."""
    callbacks = {name: GradientClipping(methods()[name], name=name) for name in names}
    chain: list[Callback] = [Aside(0, last=False)]
    for number, (name, callback) in enumerate(callbacks.items(), start=1):
        chain += [callback, Aside(number, last=name == names[-1])]
    trainer = train(way, rank, *chain, log_every_n_steps=2)
    learned = {name: callback.state_dict()["clippers"][0]["learned"]["values"] for name, callback in callbacks.items()}
    return {"weights": whole(trainer), "metrics": numbers(trainer), "learned": learned}


def numbers(trainer: Trainer) -> dict[str, float]:
    return {key: float(value) for key, value in trainer.callback_metrics.items() if key != "x"}


def trained(name: str, folder: Path) -> list[dict[str, Any]]:
    """All that the tests ask about one way, rank by rank."""
    return all_trained(folder)[name]


@workers.once
def all_trained(folder: Path) -> dict[str, list[dict[str, Any]]]:
    def work(rank: int, name: str) -> dict[str, Any]:
        way = WAYS[name]
        said = refusals(way)
        names = [one for one in methods() if one not in said and (name in FIRST or re.match("NormClip|AGC|Value", one))]
        csv, counting = CSVLogger(folder, name=name), CountingLogger()
        clipping = GradientClipping(NormClip(max_norm=0.5))
        trainer = train(way, rank, clipping, logger=[csv, counting], log_every_n_steps=2, dtype=torch.float32)
        return {
            "refused": said,
            "names": names,
            "many": clip_by(names, way, rank),
            "single": (whole(trainer), numbers(trainer), counting.calls),
        }

    return workers.run_each(work, {name: way.world for name, way in WAYS.items()})


@cache
def alone(*names: str) -> dict[str, Any]:
    return clip_by(list(names))


@cache
def logged_alone(folder: Path) -> tuple[dict[str, torch.Tensor], list[tuple[int, dict[str, float]]]]:
    csv = CSVLogger(folder, name="alone")
    options = {"logger": csv, "log_every_n_steps": 2, "dtype": torch.float32}
    trainer = train(None, 0, GradientClipping(NormClip(max_norm=0.5)), **options)
    return whole(trainer), csv_rows(csv)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("logs")


def close(one: Any, other: Any, rtol: float = 1e-6) -> None:
    torch.testing.assert_close(one, other, rtol=rtol, atol=1e-12, equal_nan=True)


@pytest.mark.parametrize("name", WAYS)
def test_every_method_gives_what_one_process_gives(name: str, folder: Path) -> None:
    first, *others = trained(name, folder)
    expected = alone(*first["names"])
    for rank in others:
        assert equal(rank["many"], first["many"])
    for key in ("weights", "metrics", "learned"):
        close(first["many"][key], expected[key])
    # None of them was idle.
    idle = {one for one in first["names"] if not expected["metrics"][f"{one}/clip_rate"] > 0}
    assert not idle


@pytest.mark.parametrize("name", WAYS)
def test_what_is_logged(name: str, folder: Path) -> None:
    first, *others = trained(name, folder)
    weights, shown, calls = first["single"]
    weights_alone, theirs = logged_alone(folder)
    # Of float32 networks whose sums are taken in other orders.
    close(weights, weights_alone, rtol=2e-4)
    ours = csv_rows(CSVLogger(folder, name=name, version=0))
    assert [step for step, _ in ours] == [step for step, _ in theirs] == [1, 3]
    for (_, values), (_, expected) in zip(ours, theirs, strict=True):
        assert values == pytest.approx(expected, rel=2e-5)
    # Rank zero writes, and all know.
    assert [step for step, metrics in calls if "gradclip/norm" in metrics] == [1, 3]
    for rank in others:
        assert equal(rank["single"][:2], (weights, shown))
        assert not any("gradclip/norm" in metrics for _, metrics in rank["single"][2])


def table() -> dict[str, dict[str, str]]:
    """The guide's table of strategies and scopes: row to column to cell."""
    lines = page("distributed").partition("| strategy |")[2].partition("\n\n")[0].splitlines()[2:]
    rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]
    return {row[0]: dict(zip(COLUMNS, row[1:], strict=True)) for row in rows}


@pytest.mark.parametrize("row", [row for row, names in ROWS.items() if known(*names)])
def test_the_guide_says_what_is_refused(row: str, folder: Path) -> None:
    for name in ROWS[row]:
        first = trained(name, folder)[0]
        for column, cell in table()[row].items():
            here = {one for one, method in methods().items() if method.per == column}
            assert here
            assert cell == ("refused" if here <= first["refused"].keys() else "exact")
            assert here & first["refused"].keys() in (set(), here)


def test_the_readme_has_a_row_for_every_way() -> None:
    assert set(table()) == set(ROWS)
    assert sorted(name for names in ROWS.values() for name in known(*names)) == sorted(WAYS)


@pytest.mark.parametrize(
    ("name", "method", "message"),
    [
        (
            "fsdp1_full",
            "AGC-unit",
            r"sharding_strategy='FULL_SHARD'\) cuts .* ModelParallelStrategy, or use per='parameter'",
        ),
        ("fsdp1_hybrid", "AGC-unit", r"sharding_strategy='HYBRID_SHARD'\) cuts"),
        ("fsdp1_flat", "AGC-unit", r"use_orig_params=False\) joins .* each unit by; .* ModelParallelStrategy$"),
        ("fsdp1_flat", "NormClip-layer", r"each layer by; set use_orig_params=True, or use per='model' or 'group'"),
    ],
)
def test_a_refusal_names_what_works(name: str, method: str, message: str, folder: Path) -> None:
    said = trained(name, folder)[0]["refused"][method]
    assert re.search(r"^GradientClipping\((AGC|NormClip)\(.*" + message, said)


def test_measuring_what_fsdp_has_joined_is_refused_too() -> None:
    def work(rank: int) -> str:
        clipping = GradientClipping(NormClip(), measure_per="parameter")
        with pytest.raises(MisconfigurationException) as error:
            train(WAYS["fsdp1_flat"], rank, clipping)
        return str(error.value)

    assert "nothing to tell each parameter by" in workers.run(work)[0]


class Wrapping(Fitted):
    def configure_model(self) -> None: ...


def test_a_module_that_wraps_itself_is_looked_at_before_the_first_step() -> None:
    def work(rank: int) -> tuple[str, int]:
        way = WAYS["fsdp1_full"]
        options = {"strategy": way.strategy(), "devices": 2, "use_distributed_sampler": False}
        with pytest.raises(ValueError, match="output") as error:
            fit(Wrapping(), way.share(batches(2), rank), GradientClipping(AGC()), **options)
        return str(error.value)

    assert "FSDP has cut parameter 'net.embed.weight'" in workers.run(work)[0]


def test_observing_changes_no_bit() -> None:
    def work(rank: int, name: str) -> list[Any]:
        observing = GradientClipping(EmaClip(warmup=2, per="layer"), action="observe", measure_per="parameter")
        results = []
        for callbacks in ([], [observing]):
            trainer = train(WAYS[name], rank, *callbacks, log_every_n_steps=1)
            results.append((whole(trainer), numbers(trainer)))
        return results

    for (bare, observed), _ in workers.run_each(
        work, dict.fromkeys(known("fsdp1_full", "fsdp2", "sequence"), 2)
    ).values():
        assert equal(bare[0], observed[0])
        assert observed[1]["gradclip/norm"] > 0
        assert observed[1]["gradclip/norm_clipped"] < observed[1]["gradclip/norm"]


class TestLightningsOwnClipping:
    """What Trainer(gradient_clip_val=...) does where ours works."""

    def test_it_refuses_fsdp(self) -> None:
        def work(rank: int) -> None:
            with pytest.raises(MisconfigurationException, match="algorithm='norm'` is currently not supported for"):
                train(WAYS["fsdp1_full"], rank, gradient_clip_val=0.5)

        workers.run(work)

    def test_it_fails_where_some_parameters_are_cut_and_others_not(self) -> None:
        def work(rank: int, name: str) -> None:
            with pytest.raises(RuntimeError, match=r"mixed torch.Tensor and DTensor|same mesh|cross-mesh"):
                train(WAYS[name], rank, gradient_clip_val=0.5)

        workers.run_each(work, {name: WAYS[name].world for name in known("tensor", "tensor_data", "sequence")})

    def test_it_fails_for_a_fused_optimizer_under_a_scaler(self) -> None:
        module = Fitted(torch.float32, lambda groups: AdamW(groups, fused=True))
        plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))
        with pytest.raises(
            RuntimeError, match="AdamW, does not allow for gradient clipping because it performs unscaling"
        ):
            fit(module, batches(1, torch.float32), plugins=[plugin], gradient_clip_val=0.5)
