"""Runs side by side: every number is NumPy's on what was recorded, whichever logger kept it."""

import csv
import io
import json
import sqlite3
from pathlib import Path

import numpy as np
import pytest
import yaml

from kit.histories import record
from lightning_gradclip import NormClip, compare
from lightning_gradclip.report import RunError
from lightning_gradclip.report.cli import main

METRIC = {9: 2.0, 19: 0.5, 29: 0.75}


def sweep(folder: Path) -> dict[str, np.ndarray]:
    """A multirun of eleven jobs: one without clipping, ten with; of each the norms."""
    found = {}
    for job in range(11):
        place = folder / str(job)
        (place / ".hydra").mkdir(parents=True)
        limit = f"callbacks.gradclip.method.max_norm={job}" if job else "~callbacks.gradclip"
        (place / ".hydra" / "overrides.yaml").write_text(yaml.safe_dump(["+seed=1", limit]))
        (place / "csv").mkdir()
        lines = [f"{step},{value + job}" for step, value in METRIC.items()]
        (place / "csv" / "metrics.csv").write_text("\n".join(["step,val/loss", *lines]) + "\n")
        if job:
            found[str(job)] = np.exp(np.random.default_rng(job).normal(0, 1, 200))
            record(place / "csv" / "gradclip", found[str(job)], float(job), action="skip", method=NormClip())
    return found


def test_a_multirun_is_a_table_of_what_differs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    norms = sweep(tmp_path)
    found = compare(tmp_path, "val/loss")
    assert [one.run for one in found] == [str(job) for job in range(11)]
    # The seed is the same in all.
    assert [*found[0].settings] == ["callbacks.gradclip", "callbacks.gradclip.method.max_norm"]
    assert found[3].settings["callbacks.gradclip.method.max_norm"] == "3"
    assert (found[0].steps, found[0].dropped) == (None, None)
    assert (found[0].last, found[0].best, found[0].best_step) == (0.75, 0.5, 19)
    for one in found[1:]:
        own, limit = norms[one.run], float(one.run)
        assert (one.steps, one.dropped, one.median) == (200, (own > limit).sum(), np.median(own))
        assert (one.clip_rate, one.largest) == ((own > limit).mean(), own.max())
    words = ["compare", str(tmp_path), "--metric", "val/loss"]
    assert main([*words, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert rows[2]["callbacks.gradclip.method.max_norm"] == "2"
    assert rows[0]["clip_rate"] is None
    assert main([*words, "--csv", "--mode", "max"]) == 0
    table = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [float(row["best"]) for row in table] == [2.0 + job for job in range(11)]
    assert main(words) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len({len(line) for line in lines[2:]}) == 1
    assert lines[0].split()[-4:] == ["median", "norm", "largest", "dropped"]


def test_a_metric_that_nobody_kept_is_refused(tmp_path: Path) -> None:
    sweep(tmp_path)
    with pytest.raises(RunError, match="no run holds the metric 'val/los': did you mean val/loss"):
        compare(tmp_path, "val/los")
    with pytest.raises(RunError, match="holds no run"):
        compare(tmp_path / "0" / ".hydra")


def test_more_is_better_of_an_accuracy(tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_text("step,val_acc\n1,0.5\n2,0.75\n3,0.25\n")
    (one,) = compare(tmp_path, "val_acc")
    assert (one.last, one.best, one.best_step) == (0.25, 0.75, 2)


def points() -> dict[str, list[float]]:
    """What a logger has of a run that logged each of its 120 steps."""
    norms = np.exp(np.random.default_rng(0).normal(0, 1, 120))
    clipped = (norms > 1).astype(float)
    names = {"norm": norms, "norm_max": norms, "norm_clipped": np.minimum(norms, 1), "clip_rate": clipped}
    return {f"gradclip/{name}": values.tolist() for name, values in names.items()} | {"val/loss": [3.0, 1.0, 2.0]}


def file_store(folder: Path) -> None:
    for run, limit in (("a" * 32, "1.0"), ("b" * 32, "2.0")):
        for name, values in points().items():
            path = folder / "1" / run / "metrics" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(f"1700000000000 {value!r} {step}\n" for step, value in enumerate(values)))
        (folder / "1" / run / "params").mkdir()
        (folder / "1" / run / "params" / "limit").write_text(limit)
        (folder / "1" / run / "meta.yaml").write_text("run_id: x\n")


def database(folder: Path) -> None:
    made = sqlite3.connect(folder / "mlflow.db")
    made.execute("create table runs (run_uuid text, start_time int)")
    made.execute("create table params (run_uuid text, key text, value text)")
    made.execute("create table metrics (run_uuid text, key text, value float, timestamp int, step int, is_nan boolean)")
    for place, (run, limit) in enumerate((("a" * 32, "1.0"), ("b" * 32, "2.0"))):
        made.execute("insert into runs values (?, ?)", (run, place))
        made.execute("insert into params values (?, 'limit', ?)", (run, limit))
        for name, values in points().items():
            rows = [(run, name, value, 0, step, False) for step, value in enumerate(values)]
            made.executemany("insert into metrics values (?, ?, ?, ?, ?, ?)", rows)
    made.commit()
    made.close()


@pytest.mark.parametrize("store", [file_store, database])
def test_what_mlflow_kept(store: object, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store(tmp_path)  # type: ignore[operator]
    norms = np.array(points()["gradclip/norm"])
    found = compare(tmp_path, "val/loss")
    assert [one.settings for one in found] == [{"limit": "1.0"}, {"limit": "2.0"}]
    for one in found:
        assert (one.last, one.best, one.best_step, one.steps) == (2.0, 1.0, 1, 120)
        assert (one.median, one.clip_rate) == (np.median(norms), (norms > 1).mean())
    assert main(["advise", str(tmp_path)]) == 0
    assert "120 steps" in capsys.readouterr().out


def test_a_run_of_transformers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    norms = np.exp(np.random.default_rng(0).normal(0, 1, 150))
    norms[70] = 1e3
    log = [
        {"step": step, "loss": 2.0, "grad_norm": norm, "learning_rate": 1e-3, "epoch": 0.1}
        for step, norm in enumerate(norms.tolist(), 1)
    ]
    for checkpoint in (90, 100):
        folder = tmp_path / f"checkpoint-{checkpoint}"
        folder.mkdir()
        state = {"log_history": [*log, {"step": 150, "eval_loss": 1.5}, {"no": "step"}], "global_step": 150}
        (folder / "trainer_state.json").write_text(json.dumps(state))
    assert main(["advise", str(tmp_path)]) == 0
    told = capsys.readouterr()
    assert told.out.startswith("checkpoint-100: ") or "checkpoint-100: 150 steps" in told.out
    assert "1 of 152 log events have no step" in told.err
    assert main(["spikes", str(tmp_path)]) == 0
    assert "step 71: norm 1,000" in capsys.readouterr().out
    (one,) = compare(tmp_path / "checkpoint-100", "eval_loss", tell=print)
    assert (one.last, one.steps, one.median) == (1.5, 150, np.median(norms))
    assert np.isnan(one.clip_rate)
