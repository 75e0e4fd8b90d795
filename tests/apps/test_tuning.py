"""Sweeps of the example from the command line to the table of results, read back from disk."""

import csv
import os
import re
import shlex
import subprocess
import sys
from importlib.resources import files
from pathlib import Path

import pytest
import yaml
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import OmegaConf

from kit import scripts
from kit.guides import commands, page
from kit.root import ROOT

for package in ("joblib", "submitit"):
    pytest.importorskip(package, reason="the sweep extra is not installed")
optuna = pytest.importorskip("optuna", reason="the sweep extra is not installed")

PACK = files("lightning_gradclip.conf") / "callbacks" / "gradclip"
SWEEPS = [command for command in commands("python examples/train.py") if " -m " in command]


def run(folder: Path, command: str, *more: str) -> subprocess.CompletedProcess[str]:
    _, script, *arguments = shlex.split(command)
    return scripts.run([str(ROOT / script), *arguments, *more], folder)


def table(folder: Path, *arguments: str) -> tuple[list[dict[str, str]], str]:
    """The rows of the printed table by the names of its columns, and the text around it."""
    done = run(folder, "python examples/results.py", *arguments)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("| ")]
    # A table is aligned when every line is as long as the others and its bars stand below each other.
    bars = {tuple(mark.start() for mark in re.finditer(r"(?<!\\)\|", line)) for line in lines}
    assert len(bars) == 1
    cells = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
    head, rule, *body = cells
    assert all(re.fullmatch("-+:?", cell) for cell in rule)
    around = "\n".join(line for line in done.stdout.splitlines() if not line.startswith("|"))
    return [dict(zip(head, row, strict=True)) for row in body], around


def job(folder: Path, overrides: list[str], **outcome: object) -> None:
    (folder / ".hydra").mkdir(parents=True)
    (folder / ".hydra" / "overrides.yaml").write_text(yaml.safe_dump(overrides))
    if "value" in outcome:
        outcome = {"metric": "val/loss", "mode": "min", **outcome}
    if outcome:
        (folder / "outcome.yaml").write_text(yaml.safe_dump(outcome))


def test_a_table_holds_every_run_best_first(tmp_path: Path) -> None:
    sweep = tmp_path / "multirun" / "day" / "time"
    finished = {"verdict": "finished", "clip_rate": 0.25, "largest_norm": 12.5}
    job(sweep / "0", ["experiment=quick", "callbacks/gradclip=norm", "x.max_norm=2.123456789"], value=1.75, **finished)
    job(sweep / "1", ["experiment=quick", "callbacks/gradclip=norm", "x.max_norm=1"], verdict="failed", reason="a\nb")
    job(sweep / "2", ["experiment=quick", "callbacks/gradclip=norm", "x.max_norm=3"])
    job(sweep / "9", ["experiment=quick", "callbacks/gradclip=value"], verdict="diverged", value=float("nan"))
    job(sweep / "10", ["experiment=quick", "callbacks/gradclip=norm", "x.max_norm=5"], value=1.5, **finished)
    rows, around = table(tmp_path)
    assert [row["val/loss"] for row in rows] == ["1.5", "1.75", "nan", "-", "-"]
    assert [row["outcome"] for row in rows] == ["finished", "finished", "diverged", "failed", "no outcome"]
    # Numbers that a sampler drew are shortened, keys to what tells them apart.
    assert rows[1]["overrides"] == "gradclip=norm, max_norm=2.123"
    assert rows[1]["steps clipped"] == "25.0%"
    assert rows[1]["largest norm"] == "12.5"
    assert "5 runs in multirun/day/time, each with experiment=quick; best first" in around
    assert "best: experiment=quick callbacks/gradclip=norm x.max_norm=5" in around
    assert "multirun/day/time/1 failed: a b" in around


def test_more_is_better_where_the_run_says_so(tmp_path: Path) -> None:
    for number, value in enumerate((0.5, 0.9, float("nan"), 0.7)):
        job(tmp_path / str(number), [f"seed={number}"], verdict="finished", metric="val/acc", mode="max", value=value)
    rows, _ = table(tmp_path, str(tmp_path))
    assert [row["val/acc"] for row in rows] == ["0.9", "0.7", "0.5", "nan"]


def test_the_newest_sweep_is_the_one_whose_job_started_last(tmp_path: Path) -> None:
    for age, name in enumerate(("b", "c", "a")):
        job(tmp_path / "multirun" / "day" / name / "0", ["seed=1"], verdict="finished", value=1.0)
        started = tmp_path / "multirun" / "day" / name / "0" / ".hydra" / "overrides.yaml"
        os.utime(started, (2e9 - age, 2e9 - age))
    assert "1 run in multirun/day/b;" in table(tmp_path)[1]


def test_seeds_share_a_row(tmp_path: Path) -> None:
    results = {"norm": [3.0, 1.0, 2.0], "value": [5.0, float("nan"), 0.5], "agc": [float("nan"), float("nan"), 0.1]}
    for method, values in results.items():
        for seed, value in enumerate(values):
            facts = {"clip_rate": 0.1 * seed, "largest_norm": 10.0 * seed, "value": value}
            verdict = "finished" if value == value else "diverged"
            job(
                tmp_path / f"{method}{seed}", [f"callbacks/gradclip={method}", f"seed={seed}"], verdict=verdict, **facts
            )
    rows, around = table(tmp_path, str(tmp_path), "--pool", "seed")
    assert [row["overrides"] for row in rows] == ["gradclip=norm", "gradclip=value", "gradclip=agc"]
    assert [row["val/loss"] for row in rows] == ["2 (1 to 3)", "5 (0.5 to nan)", "nan (0.1 to nan)"]
    assert rows[1]["outcome"] == "2 finished, 1 diverged"
    assert rows[1]["steps clipped"] == "10.0%"
    assert rows[1]["largest norm"] == "20"
    assert "best: callbacks/gradclip=norm\n" in around + "\n"


def test_overrides_are_shown_as_they_were_written(tmp_path: Path) -> None:
    job(tmp_path / "0", ["seed=1", "data.seed=2", "+data.path='a|b'", "x=${y}"], verdict="finished", value=1.0)
    job(tmp_path / "1", ["seed=2", "data.seed=1", "~optimizer", "x=${y}"], verdict="failed", reason="${ is no number")
    rows, around = table(tmp_path, str(tmp_path))
    assert rows[0]["overrides"] == r"seed=1, data.seed=2, path='a\|b'"
    assert rows[1]["overrides"] == "seed=2, data.seed=1, ~optimizer"
    assert "each with x=${y}" in around
    assert "1 failed: ${ is no number" in around


def test_what_is_not_finite_is_the_worst_and_the_largest(tmp_path: Path) -> None:
    for seed, (value, norm) in enumerate([(0.9, float("nan")), (float("nan"), 2.0), (0.7, 3.0)]):
        facts = {"metric": "val/acc", "mode": "max", "value": value, "largest_norm": norm}
        job(tmp_path / str(seed), [f"seed={seed}", "x=1"], verdict="finished", **facts)
    (row,), _ = table(tmp_path, str(tmp_path), "--pool", "seed")
    assert row["val/acc"] == "0.7 (0.7 to nan)"
    assert row["largest norm"] == "nan"
    assert row["outcome"] == "3 finished"


@pytest.mark.parametrize("arguments", [[], ["nowhere"]])
def test_a_folder_without_runs_is_refused(arguments: list[str], tmp_path: Path) -> None:
    done = run(tmp_path, "python examples/results.py", *arguments)
    assert done.returncode == 1
    assert "name" in done.stderr
    assert "Traceback" not in done.stderr


def test_printing_a_table_needs_no_torch(tmp_path: Path) -> None:
    job(tmp_path / "0", ["seed=1"], verdict="finished", value=1.0)
    program = [sys.executable, "-X", "importtime", str(ROOT / "examples/results.py"), str(tmp_path)]
    done = subprocess.run(program, capture_output=True, text=True, timeout=60)
    assert "finished" in done.stdout, done.stderr
    assert " yaml" in done.stderr
    assert not re.search(r"\| +(torch|lightning|hydra)\b", done.stderr)


def test_the_grid_of_methods_takes_every_option_of_the_pack(tmp_path: Path) -> None:
    """`none` aside, which trains as `monitor` does. The configuration is swept by a program that does not train."""
    program = tmp_path / "show.py"
    program.write_text(
        "import hydra\n"
        f"@hydra.main(version_base='1.3', config_path={str(ROOT / 'examples/conf')!r}, config_name='train')\n"
        "def main(config):\n"
        "    choices = hydra.core.hydra_config.HydraConfig.get().runtime.choices\n"
        "    print('seed', config.seed, choices['callbacks/gradclip'])\n"
        "main()\n"
    )
    arguments = [sys.executable, str(program), "-m", "hparams_search=methods", "seed=1,2"]
    done = subprocess.run(arguments, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    options = {file.name.removesuffix(".yaml") for file in PACK.iterdir() if re.match(r"[a-z].*\.yaml", file.name)}
    swept = re.findall(r"^seed (\d) (\w+)$", done.stdout, re.MULTILINE)
    assert sorted(swept) == [(seed, option) for seed in "12" for option in sorted(options - {"none"})], done.stderr
    # The table in docs/sweeps.md is that of this grid.
    assert {"norm", "monitor"} < set(re.findall(r"^\| gradclip=(\w+) ", page("sweeps"), re.MULTILINE)) <= options


def drawable() -> list[str]:
    search = yaml.safe_load((ROOT / "examples/conf/hparams_search/any_method.yaml").read_text())
    return re.findall(r"\w+", search["hydra"]["sweeper"]["params"]["callbacks/gradclip"])[1:]


def drawn(option: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    """The parameters that examples/search_space.py draws for this option."""
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    from search_space import suggest

    trial = optuna.create_study().ask()
    trial.suggest_categorical("callbacks/gradclip", [option])
    suggest(None, trial)
    return {key: value for key, value in trial.params.items() if key != "callbacks/gradclip"}


@pytest.mark.parametrize("option", drawable())
def test_the_search_space_of_every_method_is_valid(option: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with initialize_config_dir(str(ROOT / "examples/conf"), version_base="1.3"):
        config = compose("train", [f"callbacks/gradclip={option}"])
    method = instantiate(config.callbacks.gradclip).method
    for _ in range(5):
        for key, value in drawn(option, monkeypatch).items():
            OmegaConf.update(config, key, value)  # refuses a key that the option does not have
        assert instantiate(config.callbacks.gradclip).method != method


def test_a_method_without_a_search_space_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="knows no parameters of callbacks/gradclip=value; add them"):
        drawn("value", monkeypatch)


def test_a_mistake_in_one_job_does_not_stop_the_others(tmp_path: Path) -> None:
    command = "python examples/train.py -m callbacks/sample=none trainer.max_steps=2"
    done = run(tmp_path, command, "callbacks.gradclip.method.max_norm=0,0.25")
    assert done.returncode == 1
    assert "max_norm must be > 0, got 0" in done.stderr
    rows, around = table(tmp_path)
    assert [row["overrides"] for row in rows] == ["max_norm=0.25", "max_norm=0"]
    assert [row["outcome"] for row in rows] == ["finished", "failed"]
    assert "failed: max_norm must be > 0, got 0; to measure without clipping use method=None" in around
    # What the table says is what the run has logged.
    (log,) = tmp_path.rglob("metrics.csv")
    with log.open(newline="") as file:
        losses = [float(row["val/loss"]) for row in csv.DictReader(file) if row["val/loss"]]
    assert rows[0]["val/loss"] == f"{losses[-1]:,.4g}"


@pytest.mark.parametrize("command", SWEEPS)
def test_sweeps_of_the_readme(command: str, tmp_path: Path) -> None:
    short = ["trainer.max_steps=2", "callbacks/sample=none"]
    trials = "hparams_search=" in command
    if trials:
        short += ["hydra.sweeper.n_trials=2", "hydra.sweeper.n_jobs=2", "hydra.sweeper.sampler.n_startup_trials=1"]
    if trials and "launcher" not in command:  # the guide names this one beside its commands
        short += ["hydra/launcher=submitit_local"]
    done = run(tmp_path, command, *short)
    assert done.returncode == 0, done.stdout + done.stderr
    rows, around = table(tmp_path)
    assert len(rows) == 2 if trials else len(rows) > 2
    assert {row["outcome"] for row in rows} == {"finished"}
    assert "best: " in around
    losses = [float(row["val/loss"]) for row in rows]
    assert losses == sorted(losses)
    if trials:  # Optuna was told what the table shows
        (best,) = re.findall(r"Best value: (\S+)", done.stdout + done.stderr)
        assert f"{float(best):,.4g}" == rows[0]["val/loss"]
