"""The report: numbers against plain calculations, words against runs that were made to deserve them."""

import base64
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lightning.pytorch.loggers import CSVLogger

from kit.boring import Prescribed, fit, gradients, tensorboard
from kit.extras import needs_report
from kit.histories import record
from lightning_gradclip import GradientClipping, NormClip, ValueClip
from lightning_gradclip.record.history import History
from lightning_gradclip.report.charts import bucketed
from lightning_gradclip.report.find import find_runs
from lightning_gradclip.report.layers import findings, heat, median
from lightning_gradclip.report.numbers import summarize
from lightning_gradclip.report.page import page, write_report
from lightning_gradclip.report.replay import what_if
from lightning_gradclip.report.run import Run, from_history
from lightning_gradclip.report.words import number, percent, sentences

Array = np.ndarray
RNG = np.random.default_rng(0)


def recorded(folder: Path, norms: Array, limit: float = np.inf, **options: object) -> Run:
    return from_history(History(record(folder, norms, limit, **options)), "run")


def said(run: Run) -> str:
    of_scopes = heat(run)
    found = [] if of_scopes is None else findings(of_scopes, run.norm_type)
    return " ".join(one.text for one in sentences(run, summarize(run), of_scopes, found))


def data_of(html: str) -> list[dict[str, Any]]:
    """What the charts are drawn from."""
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', html, re.DOTALL)
    assert found
    return json.loads(found[1])


def decoded(text: str, dtype: str = "<f4") -> Array:
    return np.frombuffer(base64.b64decode(text), dtype)


def layers(count: int = 8, steps: int = 600) -> dict[str, Array]:
    return {f"layer{i}": np.exp(RNG.normal(0, 0.3, steps)) for i in range(count)}


def test_what_if_is_clipping_each_norm_by_each_limit() -> None:
    norms = np.exp(RNG.normal(size=500))
    limits = np.array([1e-3, 0.5, 1.0, 3.0, norms.max(), 1e3])
    curve = what_if(norms, limits)
    for i, limit in enumerate(limits):
        factors = np.array([limit / (norm + 1e-6) for norm in norms if norm > limit])
        assert curve.share[i] == len(factors) / 500
        assert curve.mean[i] == pytest.approx(factors.mean() if len(factors) else np.nan, rel=1e-12, nan_ok=True)
        assert curve.strongest[i] == pytest.approx(factors.min() if len(factors) else np.nan, rel=1e-12, nan_ok=True)
    spread = what_if(norms)
    assert (spread.share[0], spread.share[-1]) == (1, 0)


def test_the_numbers_are_those_of_the_steps(tmp_path: Path) -> None:
    norms = np.exp(RNG.normal(size=1000))
    norms[[10, 11, 12, 500]] = [np.nan, np.inf, np.nan, np.nan]
    run = recorded(tmp_path, norms, limit=2.0)
    summary, finite = summarize(run), norms[np.isfinite(norms)]
    for share, value in summary.percentiles.items():
        assert value == np.percentile(finite, share)
    over = finite > 2
    assert summary.rate == over.sum() / 996
    assert summary.cut == pytest.approx(float(np.mean(2 / (finite[over] + 1e-6))))
    assert summary.strongest == pytest.approx(2 / (finite.max() + 1e-6))
    assert (summary.nonfinite, summary.skipped, summary.streak) == (4, 4, 3)
    assert (summary.largest, norms[summary.largest_step]) == (finite.max(), finite.max())
    assert (summary.limit, summary.points, summary.first, summary.last) == (2.0, 1000, 0, 999)


@pytest.mark.parametrize("most", [1, 7, 100, 5000])
def test_no_spike_is_lost_in_buckets(most: int, tmp_path: Path) -> None:
    norms = np.exp(RNG.normal(size=5000))
    norms[RNG.choice(5000, 50)] = np.nan
    run = recorded(tmp_path, norms, limit=1.5)
    found = bucketed(run, most)
    assert len(found.step) <= most
    for i, start in enumerate(found.step):
        block = norms[start : start + found.width]
        finite = block[np.isfinite(block)]
        assert (found.low[i], found.high[i]) == (finite.min(), finite.max()) if len(finite) else np.isnan(found.high[i])
        assert not len(finite) or norms[found.high_step[i]] == finite.max()
        assert found.nonfinite[i] == len(block) - len(finite)
        assert found.changed[i] == pytest.approx(float(np.mean(block > 1.5)))
        assert found.median[i] == pytest.approx(np.median(finite) if len(finite) else np.nan, nan_ok=True)


@needs_report
def test_a_million_steps_stay_small_and_keep_every_spike(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    norms = np.exp(rng.normal(0, 0.2, 1_000_000))
    spikes = rng.choice(1_000_000, 300, replace=False)
    norms[spikes] *= 50
    record(tmp_path / "run", norms, limit=5.0, scopes={f"layer{i}": norms / (i + 1) for i in range(5)})
    size = write_report(find_runs([tmp_path / "run"]), tmp_path / "page.html")
    assert size == (tmp_path / "page.html").stat().st_size < 10_000_000
    (run,) = data_of((tmp_path / "page.html").read_text(encoding="utf-8"))
    high, steps = decoded(run["norms"]["high"]), decoded(run["norms"]["highStep"], "<f8").astype(int)
    assert np.array_equal(high, norms[steps].astype(np.float32))
    starts = decoded(run["norms"]["step"], "<f8").astype(int)
    for step in spikes:
        bucket = np.searchsorted(starts, step, side="right") - 1
        assert high[bucket] >= np.float32(norms[step])


@pytest.mark.parametrize(
    ("quantile", "words"),
    [
        (1.0, "Clipping is not active: it changed 0 % of the steps. The largest norm was"),
        (0.95, "Clipping is a filter for the largest steps: it changed 5 % of the steps."),
        (0.5, "Clipping takes part in many steps: it changed 50 % of the steps."),
        (0.1, "Clipping is closer to normalization than to a filter: it changed 90 % of the steps."),
    ],
)
def test_how_active_clipping_is(quantile: float, words: str, tmp_path: Path) -> None:
    norms = np.exp(RNG.normal(size=1000))
    limit = float(np.sort(norms)[int(quantile * 1000) - 1])
    assert words in said(recorded(tmp_path, norms, limit, method=NormClip(max_norm=limit)))


def test_a_constant_rescale_is_told_from_normalization(tmp_path: Path) -> None:
    steady = 10 * np.exp(RNG.normal(0, 0.05, 1000))
    assert "a constant rescale, which Adam ignores" in said(
        recorded(tmp_path / "steady", steady, 1.0, method=NormClip())
    )
    varied = 10 * np.exp(RNG.normal(0, 1.0, 1000))
    text = said(recorded(tmp_path / "varied", varied, 0.1, method=NormClip()))
    assert "nearly all steps are given one norm" in text
    assert "constant rescale" not in text


def test_an_observed_run_is_told_in_the_conditional(tmp_path: Path) -> None:
    norms = np.exp(RNG.normal(size=1000))
    run = recorded(tmp_path / "watched", norms, 5.0, method=NormClip(max_norm=5.0), action="observe")
    assert "it would have changed" in said(run)
    assert "No clipping method was set" in said(recorded(tmp_path / "monitored", norms))


def test_lost_steps_and_moving_levels_are_told(tmp_path: Path) -> None:
    norms = np.linspace(4, 1, 1000) * np.exp(RNG.normal(0, 0.05, 1000))
    norms[100:103] = np.nan
    norms[700] = 300.0
    text = said(recorded(tmp_path / "bad", norms, 10.0, method=NormClip(max_norm=10.0)))
    assert "3 steps (0.3 %) had NaN or infinite gradients." in text
    assert "3 steps (0.3 %) were dropped, up to 3 in a row." in text
    assert "The level moves: the median was 3.8" in text
    assert "1 step (0.1 %) stood out from their neighbours" in text
    assert "the largest norm, 300, came at step 700." in text
    # Dropping what is not finite is not clipping.
    assert "Clipping" not in said(recorded(tmp_path / "nan", np.full(50, np.nan), 1.0, method=NormClip()))
    assert "All gradients were finite, and no step was dropped." in said(recorded(tmp_path / "good", np.ones(50)))


def test_the_calibration_of_a_scaler_is_no_fault(tmp_path: Path) -> None:
    norms = np.ones(100)
    norms[:4] = np.inf
    steps = np.load(record(tmp_path, norms) / "steps.npy", mmap_mode="r+")
    steps["overflow"][:4] = True
    steps.flush()
    run = from_history(History(tmp_path))
    text = said(run)
    assert "The GradScaler dropped 4 steps while it calibrated its scale, which is normal." in text
    assert "No other step was dropped." in text
    summary = summarize(run)
    assert (summary.overflows, summary.skipped, summary.nonfinite) == (4, 0, 0)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda norms: norms * 1e-5, "layer3 vanishes: its norm, "),
        (lambda norms: norms * np.geomspace(1, 1e-2, 600) ** 1.3, "layer3 vanishes over the run: its norm has fallen"),
        (lambda norms: np.where(np.arange(600) < 300, norms, 0.0), "layer3 receives no gradient any more"),
        (lambda norms: norms * 1e5, "layer3 explodes: its norm, "),
        (lambda norms: norms * np.geomspace(1, 1e2, 600) ** 1.4, "layer3 explodes over the run"),
        (lambda norms: norms * 9, "layer3 dominates: its norm is 9"),
        (lambda norms: np.where(np.arange(600) == 77, 500.0, norms), "layer3 spikes: a norm of 500 is "),
    ],
)
def test_a_scope_that_stands_out_is_named(change: Any, words: str, tmp_path: Path) -> None:
    scopes = layers()
    usual = said(recorded(tmp_path / "usual", np.ones(600), scopes=scopes))
    assert "No scope vanishes or explodes: at the end their norms lie between" in usual
    scopes["layer3"] = change(scopes["layer3"])
    text = said(recorded(tmp_path / "odd", np.ones(600), scopes=scopes))
    assert words in text
    assert not re.search(r"layer[^3] ", text)


def test_what_all_scopes_do_is_said_of_none(tmp_path: Path) -> None:
    falling = {name: norms * np.geomspace(1, 1e-4, 600) for name, norms in layers().items()}
    spiking = {name: np.where(np.arange(600) == 77, 500.0, norms) for name, norms in layers().items()}
    for name, scopes in (("falling", falling), ("spiking", spiking)):
        assert "No scope vanishes or explodes" in said(recorded(tmp_path / name, np.ones(600), scopes=scopes))


def test_the_heat_map_holds_medians_and_peaks(tmp_path: Path) -> None:
    norms = np.exp(RNG.normal(size=480)).astype(np.float32)
    late = np.where(np.arange(480) < 240, np.nan, norms)
    found = heat(recorded(tmp_path, np.ones(480), scopes={"one": norms, "late": late}))
    assert found is not None
    assert found.median.shape == (2, 240)
    pairs = norms.reshape(240, 2).astype(float)
    assert np.array_equal(found.median[0], pairs.mean(1))
    assert np.array_equal(found.largest[0], pairs.max(1))
    assert np.isnan(found.median[1, :120]).all()
    assert np.array_equal(found.median[1, 120:], pairs.mean(1)[120:])
    assert found.step.tolist() == list(range(0, 480, 2))


def test_the_heat_map_misses_no_peak_of_a_long_run(tmp_path: Path) -> None:
    norms = np.ones(24_000)
    norms[7777] = 300.0
    found = heat(recorded(tmp_path, np.ones(24_000), scopes={"one": norms}))
    assert found is not None
    assert found.largest[0].argmax() == 77
    assert found.largest[0].max() == 300
    assert (found.median == 1).all()


def test_medians_leave_out_what_is_absent() -> None:
    rows = np.exp(RNG.normal(size=(9, 40)))
    rows[RNG.random(rows.shape) < 0.5] = np.nan
    rows[:, 0] = np.nan
    assert np.isnan(median(rows)[0])
    assert np.allclose(median(rows)[1:], np.nanmedian(rows[:, 1:], axis=0), rtol=1e-15, equal_nan=True)


@needs_report
def test_names_are_shown_as_text(tmp_path: Path) -> None:
    name = "</script><script>alert(1)</script><img src=x onerror=alert(2)>&amp;"
    folder = tmp_path / name.replace("/", "_")
    run = find_runs([record(folder, np.ones(20), scopes={name: np.ones(20), "other": np.ones(20)})])
    html = page(run)
    assert html.count("<script>") == 1
    assert "<img" not in html
    (data,) = data_of(html)
    assert data["heat"]["names"] == [name, "other"]


@needs_report
def test_the_page_asks_nobody(tmp_path: Path) -> None:
    html = page([recorded(tmp_path, np.exp(RNG.normal(size=100)))])
    ours = re.sub(r"<script>.*?</script>", "", html, flags=re.DOTALL)
    assert not re.search(r'(src|href)="(?!data:)', ours)
    assert "default-src 'none'" in ours


def test_numbers_are_written_short() -> None:
    values = [0, 1, 0.00123456, 12.3456, 1234.5, 123456, 3.2e9, 4.5e-7, 1.5e-300, np.inf, np.nan]
    texts = ["0", "1", "0.00123", "12.35", "1,234", "123,456", "3.20e9", "4.50e-7", "1.50e-300", "inf", "-"]
    assert [number(value) for value in values] == texts
    shares = [0, 1e-5, 0.001, 0.12345, 0.99999, 1]
    assert [percent(share) for share in shares] == [
        "0 %", "less than 0.1 %", "0.1 %", "12.3 %", "more than 99.9 %", "100 %",
    ]  # fmt: skip


@pytest.mark.parametrize("every", [1, 10])
def test_logged_points_are_read_from_both_loggers(every: int, tmp_path: Path) -> None:
    loggers = [CSVLogger(tmp_path / "csv", name=""), tensorboard(tmp_path / "board", name="")]
    batches = gradients(60, scale=2.0)
    callback = GradientClipping(NormClip(max_norm=5.0), measure_per="layer")
    fit(Prescribed(), batches, callback, logger=loggers, log_every_n_steps=every, max_epochs=1)
    table, board = find_runs([tmp_path / "csv"]), find_runs([tmp_path / "board"])
    for (run,) in (table, board):
        assert len(run) == 60 // every
        assert run.each_step == (every == 1)
        norms = np.array([np.sqrt(sum(float(one.square().sum()) for one in batch.values())) for batch in batches])
        windows = norms.reshape(-1, every)
        assert np.allclose(run.norm, windows.mean(1), rtol=1e-5)
        assert np.allclose(run.norm_max, windows.max(1), rtol=1e-5)
        assert np.allclose(run.changed, (windows > 5).mean(1), rtol=1e-5)
        assert np.allclose(run.limit, 5.0)
        assert run.parts[0].names == ("encoder", "head")
        text = said(run)
        assert f"it changed {percent(float((norms > 5).mean()))} of the steps" in text
        html = page([run])
        assert ("log events with a step over it" in html) == (every > 1)
        # A mean over the largest steps of log events would not be one over steps.
        assert np.isnan(decoded(data_of(html)[0]["whatIf"]["mean"], "<f8")).all() == (every > 1)


def test_several_callbacks_and_optimizers_of_a_logger_are_told_apart(tmp_path: Path) -> None:
    names = ["gradclip/0", "gradclip/1", "second"]
    header = "step," + ",".join(f"{name}/{one}" for name in names for one in ("clip_rate", "norm", "norm_max"))
    lines = [",".join([str(step), *["0.5,1.0,2.0"] * 3]) for step in range(0, 100, 10)]
    (tmp_path / "metrics.csv").write_text("\n".join([header, *lines]) + "\n")
    runs = find_runs([tmp_path])
    assert [run.name.rpartition(" ")[2] for run in runs] == names
    assert [run.optimizer for run in runs] == [0, 1, None]


def test_counts_since_the_start_are_told_apart_by_point(tmp_path: Path) -> None:
    lines = [f"{step},0.0,1.0,1.0,{skipped}" for step, skipped in enumerate((0, 2, 5, 5, 1))]
    header = "step,gradclip/clip_rate,gradclip/norm,gradclip/norm_max,gradclip/skipped"
    (tmp_path / "metrics.csv").write_text("\n".join([header, *lines]) + "\n")
    (run,) = find_runs([tmp_path / "metrics.csv"])
    # The last one was written after a start from the beginning.
    assert run.skipped.tolist() == [0, 2, 3, 0, 1]
    assert summarize(run).skipped == 6


def test_runs_are_named_by_what_differs(tmp_path: Path) -> None:
    for name in ("version_0", "version_1"):
        record(tmp_path / "lightning_logs" / name / "gradclip", np.ones(10))
    (tmp_path / "lightning_logs" / "version_0" / "metrics.csv").write_text("step,gradclip/clip_rate\n1,0.5\n")
    (one,) = find_runs([tmp_path / "lightning_logs" / "version_0"])
    assert one.name == "lightning_logs/version_0/gradclip"
    assert [run.name for run in find_runs([tmp_path])] == ["version_0", "version_1"]
    twice = [tmp_path / "lightning_logs", tmp_path / "lightning_logs" / "version_1"]
    assert [run.name for run in find_runs(twice)] == ["version_0", "version_1"]


def test_a_limit_that_is_no_norm_is_not_drawn(tmp_path: Path) -> None:
    """The bounds of entries and root mean squares are not on the axis of norms."""
    norms = np.ones(20)
    rms = recorded(tmp_path / "rms", norms, 0.01, method=NormClip(max_norm=0.01, statistic="rms"))
    assert np.isnan(rms.limit).all()
    folder = record(tmp_path / "value", norms, method=ValueClip(max_value=0.5))
    steps = np.load(folder / "steps.npy", mmap_mode="r+")
    steps["coef"], steps["limit"] = np.nan, 0.5
    steps.flush()
    assert np.isnan(from_history(History(folder)).limit).all()
    assert recorded(tmp_path / "norm", norms, 0.5).limit.tolist() == [0.5] * 20


@needs_report
@pytest.mark.parametrize("norms", [np.ones(1), np.zeros(30), np.full(30, np.nan), np.array([1e-300, 1e300] * 9)])
def test_odd_runs_have_a_page(norms: Array, tmp_path: Path) -> None:
    run = recorded(tmp_path, norms, 1.0, scopes={"a": norms, "b": norms}, method=NormClip())
    html = page([run])
    assert len(data_of(html)) == 1
    assert "nan" not in re.sub(r"<script.*?</script>", "", html, flags=re.DOTALL).lower().replace("nan or inf", "")


@needs_report
def test_a_page_of_many_scopes_shows_those_that_are_named(tmp_path: Path) -> None:
    scopes = layers(450, 40)
    scopes["layer311"] = scopes["layer311"] * 1e-6
    (data,) = data_of(page([recorded(tmp_path, np.ones(40), scopes=scopes)]))
    assert data["heat"]["total"] == 450
    assert len(data["heat"]["names"]) <= 200
    assert data["heat"]["marked"][data["heat"]["names"].index("layer311")]
