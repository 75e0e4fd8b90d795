"""The study of benchmarks/training: its tasks and rows, that it resumes and repeats, and what its page says."""

import csv
import itertools
import json
import math
import re
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate

from kit import guides
from kit.root import ROOT

pytest.importorskip("sklearn", reason="the digits come with scikit-learn")
pytest.importorskip("gymnasium", reason="a task plays CartPole with gymnasium")
sys.path.append(str(ROOT / "benchmarks" / "training"))

import advise
import cells
import gather
import page
import study
from cells import median_interval, wilson
from recorder import count_spikes
from scipy import stats
from transformer import NoisyText, Transformer
from wgan import DIRECTIONS, WGAN, DigitSamples, sliced_distance

from lightning_gradclip import GradientClipping, NormClip
from lightning_gradclip.report.advice import proposals
from lightning_gradclip.report.find import find_runs

TRAINING = Path(study.__file__).parent
TASKS = sorted(path.stem for path in (TRAINING / "conf" / "task").glob("*.yaml"))
CLIPPINGS = sorted(path.stem for path in (TRAINING / "conf" / "clipping").glob("*.yaml"))
# Two steps, one of the generator among them, and little to validate on.
SMALL = {
    "cartpole": ["data.val_episodes=4", "rates.comfortable=1"],
    "char_lstm": ["data.val_fraction=0.01", "data.length=32"],
    "transformer": ["data.val_fraction=0.01", "data.length=32"],
    "wgan": ["model.critic_steps=1"],
}
DIVERGES = ("optimizer.lr=1e30", "trainer.max_steps=60", "data.batch_size=64")
TELLS = ("value", "norm_median", "clip_rate", "spikes_per_1000", "steps", "settings")


@pytest.fixture(autouse=True)
def _as_it_was(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """A run sets threads and determinism for its whole process, and the seed."""
    monkeypatch.chdir(tmp_path)
    threads, random = torch.get_num_threads(), torch.random.get_rng_state()
    yield
    torch.set_num_threads(threads)
    torch.random.set_rng_state(random)
    torch.use_deterministic_algorithms(False)


def configured(*overrides: str):
    with initialize_config_dir(str(TRAINING / "conf"), version_base="1.3"):
        return compose("study", [*overrides, "trainer.default_root_dir=."])


def train(task: str, *overrides: str) -> dict:
    return study.train(configured(f"task={task}", "trainer.max_steps=2", *SMALL.get(task, []), *overrides))


def call(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    """As from the command line."""
    monkeypatch.setattr(sys, "argv", ["study.py", *arguments])
    study.main()


# A limit this small is for the test: it leaves AdamW and RMSprop nothing to feel.
@pytest.mark.filterwarnings("ignore:clipping by :RuntimeWarning")
@pytest.mark.parametrize("task", TASKS)
def test_every_task_trains(task: str) -> None:
    free = train(task)
    held = train(task, "clipping=norm_low", "limits.low=1e-5")
    assert math.isfinite(free["value"])
    assert free["steps"] == held["steps"] == 2
    assert (math.isnan(free["clip_rate"]), held["clip_rate"]) == (True, 1)
    assert free["value"] != held["value"]
    # The first step is the same in both; it is measured before anything clips.
    assert free["norm_median"] > 1e-3
    assert held["norm_median"] > 1e-3


@pytest.mark.parametrize("clipping", CLIPPINGS)
def test_every_way_to_clip_is_one_of_the_pack(clipping: str) -> None:
    config = configured("task=nfnet", f"clipping={clipping}")
    assert config.clipping_name == clipping
    assert list(config.callbacks) == ["recorder", "gradclip"], "the recorder sees gradients before they are clipped"
    callback = instantiate(config.callbacks.gradclip)
    assert isinstance(callback, GradientClipping) == (clipping != "none")
    if clipping.startswith("norm_"):
        assert callback.method == NormClip(max_norm=config.limits[clipping.removeprefix("norm_")])


def test_a_sweep_is_resumed_and_repeats_to_the_digit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    sweep = ("-m", "task=nfnet", "clipping=none,norm_low", "seed=11", "trainer.max_steps=3", "hydra.sweep.dir=sweep")
    call(monkeypatch, *sweep)
    files = sorted((tmp_path / "sweep").rglob("row.json"))
    assert [str(file.relative_to(tmp_path / "sweep").parent) for file in files] == [
        "nfnet/none/comfortable/11",
        "nfnet/norm_low/comfortable/11",
    ]
    before = [json.loads(file.read_text()) for file in files]
    files[0].write_text(files[0].read_text().replace('"threads": 1', '"threads": "kept"'))
    files[1].unlink()
    call(monkeypatch, *sweep)
    kept, again = (json.loads(file.read_text()) for file in files)
    assert kept == {**before[0], "threads": "kept"}, "a run that has ended was run again"
    assert [again[name] for name in TELLS] == [before[1][name] for name in TELLS]
    # The command of the row alone, without a sweep.
    call(monkeypatch, *before[1]["overrides"].split(), "hydra.run.dir=single")
    single = json.loads((tmp_path / "single" / "row.json").read_text())
    assert [single[name] for name in TELLS] == [before[1][name] for name in TELLS]
    # Another setting is another run.
    call(monkeypatch, *sweep, "data.batch_size=256")
    assert json.loads(files[0].read_text())["settings"] != before[0]["settings"]
    gather.write_results(tmp_path / "results.csv", gather.read_rows(tmp_path / "sweep"))
    with (tmp_path / "results.csv").open(newline="") as file:
        assert [row["clipping"] for row in csv.DictReader(file)] == ["none", "norm_low"]


@pytest.mark.parametrize("clipping", ["none", "norm_mid"])
@pytest.mark.filterwarnings("ignore:.*dropped")
def test_a_run_that_diverges_leaves_a_row(clipping: str) -> None:
    row = train("nfnet", f"clipping={clipping}", *DIVERGES)
    assert row["diverged"]
    assert row["nonfinite"] >= 19
    assert row["steps"] < 60, "it went on without end"
    assert row["skipped"] == (0 if clipping == "none" else row["nonfinite"])
    assert row["reason"] == ""


def test_a_run_that_clipping_stops_leaves_a_row() -> None:
    row = train("nfnet", "clipping=norm_mid", "callbacks.gradclip.nonfinite=raise", *DIVERGES)
    assert row["diverged"]
    assert row["nonfinite"] == 1
    assert row["reason"].startswith("non-finite gradients at optimizer step 1")


# A limit this small is for the test: it leaves AdamW and RMSprop nothing to feel.
@pytest.mark.filterwarnings("ignore:clipping by :RuntimeWarning")
def test_rows_count_what_each_optimizer_did() -> None:
    row = train("wgan", "trainer.max_steps=10", "model.critic_steps=4", "clipping=norm_low", "limits.low=1e-5")
    assert (row["steps"], row["clip_rate"]) == (10, 1)


def test_spikes_stand_out_from_the_norms_before() -> None:
    random = np.random.default_rng(1)
    norms = random.lognormal(sigma=1.2, size=300)
    norms[[60, 200]] = math.nan, math.inf
    expected = 0
    for place in range(10, 300):
        before = norms[max(0, place - 50) : place]
        expected += not norms[place] <= 5 * np.median(before[np.isfinite(before)])
    assert count_spikes(norms.tolist()) == expected > 10
    # Exactly 50 are looked back at: their median is 5.5, and would be 10 without the first.
    level = [1.0] * 25 + [10.0] * 25
    assert count_spikes([*level, 40.0]) == count_spikes([*level, 20.0]) + 1
    assert count_spikes([1.0] * 9 + [1e9]) == 0
    assert count_spikes([1.0] * 10 + [5.01, 4.99, math.nan]) == 2


@pytest.mark.parametrize("n", [1, 2, 4, 5, 8, 9, 15, 40])
def test_a_median_lies_between_order_statistics(n: int) -> None:
    values = np.random.default_rng(n).normal(size=n)
    low, middle, high = median_interval(values.tolist())
    assert middle == pytest.approx(np.median(values))
    k = int(np.flatnonzero(np.sort(values) == low)[0]) + 1
    assert high == np.sort(values)[-k]
    # k - 1 or fewer values on one side of the true median: the interval misses it. The next narrower one misses more.
    assert k == 1 or 2 * stats.binom.cdf(k - 1, n, 0.5) <= 0.07
    assert n < 5 or 2 * stats.binom.cdf(k, n, 0.5) > 0.07


def test_a_median_of_diverged_runs_is_infinite() -> None:
    assert median_interval([1.0, math.inf, math.inf]) == (1.0, math.inf, math.inf)
    assert median_interval([1.0, 2.0, math.inf, math.inf]) == (1.0, math.inf, math.inf)
    assert median_interval([1.0, 2.0, 3.0, math.inf, math.inf]) == (1.0, 3.0, math.inf)


@pytest.mark.parametrize(("count", "n"), [(0, 5), (2, 5), (5, 5), (30, 100)])
def test_shares_have_wilsons_interval(count: int, n: int) -> None:
    expected = stats.binomtest(count, n).proportion_ci(method="wilson")
    assert wilson(count, n) == pytest.approx((expected.low, expected.high), abs=1e-6)


def results(path: Path) -> dict[tuple[str, str, str], list[float]]:
    """A small table of results, and its metrics by cell: a diverged run is a NaN."""
    random = np.random.default_rng(3)
    values, rows = {}, []
    for task, better in (("char_lstm", -1), ("nfnet", 1)):
        for clipping in ("none", "norm_mid", "zclip"):
            for rate, lr in zip(cells.RATES, (1, 2, 3), strict=True):
                found = random.uniform(0.3, 0.9, size=5)
                if (clipping, rate) == ("none", "too_high"):
                    found[:3] = math.nan
                values[task, clipping, rate] = (better * found).tolist()
                for seed, value in enumerate(found.tolist(), 11):
                    row = dict.fromkeys(gather.COLUMNS, "") | {"task": task, "clipping": clipping, "rate": rate}
                    row |= {"lr": lr, "seed": seed, "value": value, "diverged": math.isnan(value), "steps": 10}
                    row |= {"spikes_per_1000": 1.0, "clip_rate": 0.25, "skipped": 0, "nonfinite": 0}
                    row |= {"ms_per_step": 3.0 if clipping == "zclip" else 2.0, "norm_median": 1.0}
                    rows.append(row)
    gather.write_results(path, rows)
    return values


def test_cells_hold_medians_and_counts(tmp_path: Path) -> None:
    values = results(tmp_path / "results.csv")
    tasks = cells.read_tasks()
    found = cells.cells_of(cells.read_results(tmp_path / "results.csv"), tasks)
    assert found.keys() == values.keys()
    for key, cell in found.items():
        # The larger the better, with runs without a metric as the worst.
        sizes = np.nan_to_num(np.array(values[key]), nan=-np.inf)
        expected = sizes.min(), np.median(sizes), sizes.max()
        expected = expected if tasks[key[0]].maximized else tuple(-one for one in reversed(expected))
        assert cell.interval == pytest.approx(expected)
        assert cell.diverged == np.isnan(values[key]).sum()


def test_pages_say_what_the_results_do(tmp_path: Path) -> None:
    values = results(tmp_path / "results.csv")
    rows, tasks = cells.read_results(tmp_path / "results.csv"), cells.read_tasks()
    shown = {name: tasks[name] for name in ("char_lstm", "nfnet")}
    text = "\n\n".join(page.blocks(rows, shown, {"overview": "a.png", "char_lstm": "b.png", "nfnet": "c.png"}, ".."))
    lines = {line.split(" | ")[0]: line for line in text.partition("## nfnet")[2].partition("##")[0].splitlines()}
    accuracy = values["nfnet", "zclip", "comfortable"]
    expected = f"{np.median(accuracy):.3g}", f"({min(accuracy):.3g} to {max(accuracy):.3g})"
    told = lines["| `zclip`"].split(" | ")
    assert told[1].replace("*", "").split(" ", 1) == list(expected)
    assert told[4] == "0 / 0 / 0"
    assert lines["| `none`"].split(" | ")[3].startswith("∞")
    assert lines["| `none`"].split(" | ")[4] == "0 / 0 / 3"
    assert "| `zclip` | 1.50 (1.50 to 1.50) | 1.50 (1.50 to 1.50) |" in text
    # Run by run against the same seeds; what diverged twice is equal.
    cell = cells.cells_of(rows, shown)
    mine, other = ([values[task, name, "too_high"] for task in shown] for name in ("zclip", "none"))
    pairs = [(a, b) for one, two in zip(mine, other, strict=True) for a, b in zip(one, two, strict=True)]
    better = sum(math.isnan(b) or a > b for a, b in pairs)
    assert page.duels(cell, shown, "zclip", "none", "too_high") == (better, 10 - better, 10)
    assert page.duels(cell, shown, "none", "none", "too_high") == (0, 0, 10)


def committed() -> tuple[list[cells.Row], dict[str, cells.Task]]:
    return cells.read_results(TRAINING / "results.csv"), cells.read_tasks()


def test_the_page_is_made_from_the_results() -> None:
    rows, tasks = committed()
    assert len({row["seed"] for row in rows}) >= 5
    drawn = {name: f"study-{name}.png" for name in ("overview", *tasks)}
    made = "\n\n".join(page.blocks(rows, tasks, drawn, "../benchmarks")) + "\n"
    assert made == (ROOT / "docs/study.md").read_text(encoding="utf-8")
    assert all((ROOT / "docs" / name).is_file() for name in drawn.values())


def test_the_guide_quotes_the_results() -> None:
    found = cells.cells_of(*committed())
    lines = guides.page("evidence").partition("| task | learning rate |")[2].splitlines()[2:]
    quoted = 0
    for line in itertools.takewhile(str.strip, lines):
        task, rate, *told = line.strip("| ").split(" | ")
        task, rate = task.strip("`").partition("`")[0], rate.strip().replace(" ", "_")
        for clipping, value in re.findall(r"`(\w+)` ([^(]+\(\S+ to [^)]+\))", " ".join(told)):
            cell = found[task, clipping, rate]
            assert value == page.shown(cell), line
            words = {5: "all diverged", 2: "two diverged", 1: "one diverged", 0: ""}[cell.diverged]
            said = line.partition(f"`{clipping}` {value}")[2].partition("`")[0]
            assert words in said if words else "diverged" not in said, line
            quoted += 1
    assert quoted == 13


def test_figures_are_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the bench extra is not installed")
    import figures

    results(tmp_path / "results.csv")
    rows = cells.read_results(tmp_path / "results.csv")
    tasks = {name: task for name, task in cells.read_tasks().items() if name in ("char_lstm", "nfnet")}
    drawn = figures.draw(rows, tasks, tmp_path / "page.md")
    assert sorted(drawn) == ["char_lstm", "nfnet", "overview"]
    for name in drawn.values():
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_advice_is_taken_for_each_optimizer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    log = ("callbacks/gradclip=monitor", "logger=csv", "trainer.log_every_n_steps=1", "hydra.run.dir=monitored")
    call(monkeypatch, "task=wgan", "trainer.max_steps=220", "model.critic_steps=1", *log)
    runs = find_runs([tmp_path / "monitored"])
    assert [len(run) for run in runs] == [110, 110]
    [fixed, *_] = zip(*(proposals(run.sizes, 0.1) for run in runs), strict=True)
    overrides = [one for pair in zip(fixed, runs, strict=True) for one in advise.settings(*pair)]
    config = configured("task=wgan", *overrides)
    clippings = [instantiate(node) for name, node in config.callbacks.items() if name != "recorder"]
    assert [(one.optimizer, one.method.max_norm) for one in clippings] == [
        (index, proposal.arguments["max_norm"]) for index, proposal in enumerate(fixed)
    ]
    assert clippings[0].name != clippings[1].name


def test_some_batches_are_noise() -> None:
    text = {"path": None, "length": 16, "batch_size": 4, "val_fraction": 0.1, "seed": 1}
    data = NoisyText(noise=0.2, **text)
    batches = [data.draw(np.random.default_rng([1, number])) for number in range(500)]
    noisy = [one for one in batches if one[0] < 0]
    assert 60 < len(noisy) < 140
    codes, following = data.examples(torch.from_numpy(noisy[0]))
    assert codes.shape == following.shape == (4, 16)
    assert torch.equal(codes[:, 1:], following[:, :-1])
    assert torch.equal(codes, data.examples(torch.from_numpy(noisy[0]))[0])
    many = torch.cat([data.examples(torch.from_numpy(one))[0].flatten() for one in noisy])
    assert many.bincount(minlength=len(data.characters)).min() > 0
    with pytest.raises(ValueError, match="noise must be at least 0"):
        NoisyText(noise=1.0, **text)


def test_a_transformer_sees_the_past_alone() -> None:
    torch.manual_seed(1)
    model = Transformer(20, length=12, width=16, heads=2, layers=2, optimizer=partial(torch.optim.SGD, lr=0.1))
    codes = torch.randint(20, (1, 12))
    changed = codes.clone()
    changed[0, 7] = (codes[0, 7] + 1) % 20
    with torch.no_grad():
        before, after = model(codes)[0][0], model(changed)[0][0]
    assert torch.allclose(before[:7], after[:7], atol=1e-6)
    assert ((before[7:] - after[7:]).abs().amax(1) > 1e-4).all()


def test_distances_are_those_of_scipy_along_each_direction() -> None:
    torch.manual_seed(1)
    some, others = torch.randn(50, 4), 2 * torch.randn(50, 4) + 1
    directions = torch.randn(4, DIRECTIONS, generator=torch.Generator().manual_seed(0))
    directions /= directions.norm(dim=0)
    along = [stats.wasserstein_distance((some @ one).numpy(), (others @ one).numpy()) for one in directions.T]
    assert sliced_distance(some, others).item() == pytest.approx(np.mean(along), rel=1e-5)


def test_the_critics_weights_are_bounded() -> None:
    config = configured("task=wgan", "trainer.max_steps=4", "model.weight_bound=0.02")
    data = instantiate(config.data)
    assert isinstance(data, DigitSamples)
    model = instantiate(config.model, optimizer=partial(torch.optim.RMSprop, lr=0.1), **data.facts())
    assert isinstance(model, WGAN)
    study.quieten()
    instantiate(config.trainer, callbacks=[], logger=[]).fit(model, data)
    assert max(weight.detach().abs().max() for weight in model.critic.parameters()) == pytest.approx(0.02)
    assert max(weight.detach().abs().max() for weight in model.generator.parameters()) > 0.02
