"""Advice: what it expects is what the methods do, and what it prints can be used."""

import io
import sys
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hydra import compose, initialize_config_module
from hydra.utils import instantiate

import lightning_gradclip
from kit.histories import record
from kit.streams import Fed, noisy
from lightning_gradclip import ClipMethod, GradientClipping, NormClip, QuantileClip, SigmaClip
from lightning_gradclip.record.history import History
from lightning_gradclip.report import RunError, advice
from lightning_gradclip.report.cli import main
from lightning_gradclip.report.replay import moments, quantile_limits
from lightning_gradclip.report.run import Run, from_history

Array = np.ndarray

# Norms as they are drawn, each stationary, so that fresh ones have the same distribution.
DRAWS = {
    "lognormal": lambda rng, n: np.exp(rng.normal(-0.5, 0.4, n)),
    "spiky": lambda rng, n: np.exp(rng.normal(0, 0.2, n)) * np.where(rng.random(n) < 0.02, rng.uniform(3, 30, n), 1.0),
    "gamma": lambda rng, n: rng.gamma(3.0, 0.2, n),
}


def recorded(folder: Path, norms: Array, **options: object) -> Run:
    return from_history(History(record(folder, norms, **options)), "run")


def clip_rate(method: ClipMethod, norms: Array) -> float:
    """Share of the steps that the real pipeline clips; each column, `(steps, columns)`, is a run of its own."""
    fed = Fed(replace(method, per="layer"), norms.shape[1])
    return float(np.mean([float(fed.step(row).clipped) for row in norms]))


@pytest.mark.parametrize("q", [0.5, 0.9, 0.99, 1.0])
def test_replayed_quantiles_are_the_limits_of_the_method(q: float) -> None:
    norms = noisy(400, seed=3)[:, 0]
    ours = quantile_limits(norms, np.arange(400), q=q, window=100)
    assert np.allclose(ours, Fed(QuantileClip(q=q, window=100)).limits(norms[:, None])[:, 0], rtol=1e-12, atol=0)


def test_replayed_moments_are_the_limits_of_the_method() -> None:
    norms = noisy(400, seed=4)[:, 0]
    mean, deviation = moments(norms, np.arange(400), window=50, warmup=20)
    theirs = Fed(SigmaClip(k=2.5, window=50, warmup=20)).limits(norms[:, None])[:, 0]
    assert np.isinf(theirs[:20]).all()
    assert np.isnan(mean[:20]).all()
    assert np.allclose((mean + 2.5 * deviation)[20:], theirs[20:], rtol=1e-12, atol=0)


def test_single_places_are_replayed_as_all_of_them() -> None:
    norms, places = noisy(3000, seed=5)[:, 0], np.array([0, 1, 7, 499, 500, 501, 2999])
    everywhere = quantile_limits(norms, np.arange(3000), q=0.9, window=500)
    assert np.array_equal(quantile_limits(norms, places, q=0.9, window=500), everywhere[places])


@pytest.mark.parametrize("draw", DRAWS)
@pytest.mark.parametrize("rate", [0.01, 0.1])
def test_the_expected_rate_comes_true_on_fresh_norms(draw: str, rate: float) -> None:
    rng = np.random.default_rng(7)
    seen, fresh = DRAWS[draw](rng, 20_000), DRAWS[draw](rng, 20 * 1200).reshape(1200, 20)
    found = advice.proposals(seen, rate)
    assert [one.method for one in found] == ["NormClip", "QuantileClip", "SigmaClip"]
    for one in found:
        assert one.rate == pytest.approx(rate, abs=0.01)
        realised = clip_rate(getattr(lightning_gradclip, one.method)(**one.arguments), fresh)
        assert realised == pytest.approx(one.rate, abs=0.01), one
        assert one.uncertain < 0.015


def test_a_rate_that_depends_on_the_last_spikes_is_called_uncertain() -> None:
    """With a spike in 50 steps the deviation of the last 128 is the deviation of two spikes, more or less."""
    fixed, _, sigma = advice.proposals(DRAWS["spiky"](np.random.default_rng(7), 3000), 0.1)
    assert sigma.uncertain > 2 * fixed.uncertain


def test_steps_without_a_finite_norm_do_not_count(tmp_path: Path) -> None:
    """The real methods remember neither those nor zeros, and the replay is told of neither."""
    norms = noisy(1500, seed=6)[:, 0]
    norms[[40, 41, 700]] = np.nan
    norms[[3, 900]] = 0.0
    sizes = advice.usable_sizes(recorded(tmp_path, norms))
    assert len(sizes) == 1495
    ours = quantile_limits(sizes, np.arange(len(sizes)), q=0.9, window=300)
    fed = Fed(QuantileClip(q=0.9, window=300), nonfinite="ignore")
    theirs = fed.limits(norms[:, None])[:, 0]
    assert np.allclose(ours, theirs[np.isfinite(norms) & (norms > 0)], rtol=1e-12, atol=0)


def test_the_interval_holds_the_truth_about_as_often_as_it_says(tmp_path: Path) -> None:
    rng, held = np.random.default_rng(8), 0
    for _ in range(60):
        one = advice.proposals(np.exp(rng.normal(size=1000)), 0.1)[0]
        # The true share of a lognormal beyond the limit, by a large sample.
        truth = float(np.mean(np.exp(SAMPLE) > one.arguments["max_norm"]))
        held += abs(truth - one.rate) <= one.uncertain
    assert 52 <= held < 60


SAMPLE = np.random.default_rng(9).normal(size=200_000)


def test_a_falling_level_is_told(tmp_path: Path) -> None:
    norms = np.exp(np.random.default_rng(1).normal(0, 0.1, 3000)) * np.linspace(5, 1, 3000)
    run = recorded(tmp_path, norms)
    fixed, adaptive, _ = advice.proposals(advice.usable_sizes(run), 0.1)
    assert fixed.late == 0 < 0.2 < fixed.early
    said = f"clipped, +- {100 * fixed.uncertain:.2g} points; {fixed.early:.1%}"
    assert said.replace("%", " % in the first third of the run, 0 % in the last") in advice.advice(run)
    assert adaptive.rate < 0.05


def test_what_can_be_told_depends_on_the_number_of_steps(tmp_path: Path) -> None:
    norms = DRAWS["gamma"](np.random.default_rng(2), 1000)
    with pytest.raises(
        RunError, match="run holds 99 steps with a finite norm, too few for advice; record at least 100"
    ):
        advice.advice(recorded(tmp_path / "99", norms[:99]))
    text = advice.advice(recorded(tmp_path / "999", norms[:999]))
    assert "To clip 1 % of the steps: too few to tell, 1,000 steps are needed." in text
    assert "To clip about 10 % of the steps:" in text
    assert "too few" not in advice.advice(recorded(tmp_path / "1000", norms))


def test_early_steps_can_be_left_out(tmp_path: Path) -> None:
    norms = np.concatenate([np.full(500, 100.0), DRAWS["gamma"](np.random.default_rng(2), 2000)])
    run = recorded(tmp_path, norms)
    assert len(advice.usable_sizes(run, 500)) == 2000
    assert "2,000 norms to go by from step 500 on" in advice.advice(run, from_step=500)
    ((_, limit),) = advice.proposals(advice.usable_sizes(run, 500), 0.01)[0].arguments.items()
    assert limit == pytest.approx(np.quantile(norms[500:], 0.99), rel=1e-2)


def test_a_clipped_run_is_called_so(tmp_path: Path) -> None:
    norms = DRAWS["gamma"](np.random.default_rng(2), 1000)
    limit = float(np.quantile(norms, 0.75))
    text = advice.advice(recorded(tmp_path / "clipped", norms, limit=limit, method=NormClip(max_norm=limit)))
    assert "25 % of these steps were changed by clipping. The norms are those from before" in text
    assert "another path" in text
    watched = recorded(tmp_path / "watched", norms, limit=limit, method=NormClip(max_norm=limit), action="observe")
    assert "changed by clipping" not in advice.advice(watched)


def printed(tmp_path: Path, **options: object) -> dict[str, list[str]]:
    """The lines of the command, by what they start with."""
    norms = DRAWS["spiky"](np.random.default_rng(3), 1500)
    record(tmp_path / "gradclip", norms, **options)
    with redirect_stdout(io.StringIO()) as output:
        assert main(["advise", str(tmp_path), "--rate", "0.1"]) == 0
    lines = [line.split(maxsplit=1) for line in output.getvalue().splitlines() if line.startswith("    ")]
    return {first: [rest for start, rest in lines if start == first] for first, _ in lines}


@pytest.mark.parametrize("options", [{}, {"optimizer": 1, "method": NormClip(norm_type=1.0)}])
def test_every_printed_line_makes_the_same_callback(options: dict, tmp_path: Path) -> None:
    lines = printed(tmp_path, **options)
    names = {name: getattr(lightning_gradclip, name) for name in lightning_gradclip.__all__}
    callbacks = [eval(line, names) for line in lines["Python"]]
    assert [type(one.method) for one in callbacks] == [NormClip, QuantileClip, SigmaClip]
    for callback, overrides in zip(callbacks, lines["Hydra"], strict=True):
        with initialize_config_module("hydra.conf", version_base="1.3"):
            node = compose(overrides=overrides.split()).callbacks.gradclip
        assert_same(instantiate(node), callback, options)


def assert_same(made: GradientClipping, callback: GradientClipping, options: dict) -> None:
    assert made.method == callback.method
    assert made.optimizer == callback.optimizer == options.get("optimizer")
    assert made.method.norm_type == getattr(options.get("method"), "norm_type", 2.0)


# Lightning 2.6 asks jsonargparse 4.53 for what it deprecates.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_printed_flags_work_in_a_lightning_cli(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("jsonargparse", reason="LightningCLI needs jsonargparse")
    from lightning.pytorch.cli import LightningCLI
    from lightning.pytorch.demos.boring_classes import BoringModel

    lines = printed(tmp_path, optimizer=1)
    quiet = {"logger": False, "enable_checkpointing": False, "accelerator": "cpu", "enable_progress_bar": False}
    for flags, line in zip(lines["LightningCLI"], lines["Python"], strict=True):
        monkeypatch.setattr(sys, "argv", ["train.py", *flags.split()])
        made = LightningCLI(
            BoringModel, run=False, trainer_defaults=quiet, save_config_callback=None, seed_everything_default=False
        )
        (callback,) = (one for one in made.trainer.callbacks if isinstance(one, GradientClipping))
        names = {name: getattr(lightning_gradclip, name) for name in lightning_gradclip.__all__}
        assert_same(callback, eval(line, names), {"optimizer": 1})


def test_the_defaults_are_those_of_the_constructors() -> None:
    assert advice.defaults("quantile")["window"] == QuantileClip().window
    assert (advice.defaults("sigma")["window"], advice.defaults("sigma")["warmup"]) == (
        SigmaClip().window,
        SigmaClip().warmup,
    )


def test_constant_norms_get_a_limit_that_clips_nothing(tmp_path: Path) -> None:
    for one in advice.proposals(np.full(2000, 0.5), 0.1):
        assert one.rate == 0
        assert clip_rate(getattr(lightning_gradclip, one.method)(**one.arguments), np.full((300, 2), 0.5)) == 0


def test_means_over_several_steps_are_refused(tmp_path: Path) -> None:
    table = "step,gradclip/clip_rate,gradclip/norm,gradclip/norm_max\n"
    (tmp_path / "metrics.csv").write_text(table + "".join(f"{step},0.0,1.0,1.5\n" for step in range(0, 9000, 50)))
    from lightning_gradclip.report.find import find_runs

    with pytest.raises(RunError, match="holds means over several steps, from which single steps cannot be told"):
        advice.advice(find_runs([tmp_path])[0])


def test_a_limit_that_cannot_clip_so_much_is_not_proposed(tmp_path: Path) -> None:
    # Of norms that fall all the time, hardly any is above the mean of those before it.
    falling = np.exp(-np.arange(600) / 50) * np.exp(np.random.default_rng(8).normal(0, 0.05, 600))
    text = advice.advice(recorded(tmp_path, falling), (0.1,))
    assert "QuantileClip(" in text
    assert "SigmaClip(" not in text
    assert "SigmaClip: none, since" in text


def test_limits_of_each_layer_are_proposed_for_each_layer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(0)
    scopes = {name: np.exp(rng.normal(0, 0.5, 1000)) * scale for name, scale in (("body", 1.0), ("head", 1.1))}
    norms = np.hypot(scopes["body"], scopes["head"])
    method = NormClip(max_norm=1.0, per="layer")
    path = record(tmp_path / "run", norms, 1.0, scopes=scopes, method=method)
    assert main(["advise", str(path), "--rate", "0.1"]) == 0
    told = capsys.readouterr().out
    word = next(one for one in told.split() if one.startswith("NormClip(max_norm=")).rstrip(",")
    limit = float(word.partition("=")[2])
    over = np.max([*scopes.values()], axis=0) > limit
    assert over.mean() == pytest.approx(0.1, abs=0.005)
    assert f"NormClip(max_norm={limit:g}, per='layer')" in told
    assert "callbacks.gradclip.method.per='layer'" in told
    # What no history holds cannot be told, and that is said.
    path = record(tmp_path / "whole", norms, 1.0, method=method)
    assert main(["advise", str(path), "--rate", "0.1"]) == 0
    assert 'for those of a layer record with measure_per="layer"' in capsys.readouterr().out
