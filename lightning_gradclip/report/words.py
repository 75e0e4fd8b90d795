"""What the numbers mean, in plain sentences; each names the number that it rests on."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from lightning_gradclip.report.compare import Compared
from lightning_gradclip.report.layers import Finding, Heat
from lightning_gradclip.report.numbers import Summary
from lightning_gradclip.report.run import Run
from lightning_gradclip.report.spikes import SPIKE, Spike

_SCOPES = {
    "vanished": "{scope} receives no gradient any more: its norm is exactly 0 at the end of the run.",
    "vanishing": "{scope} vanishes: its norm, {norm}, is {number} times smaller than that of a typical scope.",
    "exploding": "{scope} explodes: its norm, {norm}, is {number} times larger than that of a typical scope.",
    "fallen": "{scope} vanishes over the run: its norm has fallen {number}-fold, to {norm}, and others have not.",
    "risen": "{scope} explodes over the run: its norm has risen {number}-fold, to {norm}, and others have not.",
    "dominant": "{scope} dominates: its norm is {share} of the whole norm, so it decides when all are scaled down.",
    "spiking": "{scope} spikes: a norm of {norm} is {number} times its level at that time.",
}


@dataclass(frozen=True)
class Sentence:
    """One statement; `tone` is "plain", "good" or "bad"."""

    text: str
    tone: str = "plain"


def sentences(run: Run, summary: Summary, heat: Heat | None, found: list[Finding]) -> list[Sentence]:
    """The summary of a run, the most important first; `heat` and `found` are about its scopes."""
    return [*_clipping(run, summary), *_lost(summary), *_norms(run, summary), *_scopes(heat, found)]


def number(value: float) -> str:
    """Four digits at most, and no more zeros than a reader can count."""
    if not np.isfinite(value):
        return "-" if np.isnan(value) else "inf"
    if value and not 1e-3 <= abs(value) < 1e6:
        return f"{value:.2e}".replace("e-0", "e-").replace("e+0", "e").replace("e+", "e")
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4g}" if abs(value) >= 1 else f"{value:.3g}"


def percent(share: float) -> str:
    """A share as a percentage that is 0 or 100 only if it is exactly that."""
    if np.isnan(share):
        return "-"
    if 0 < share < 0.001:
        return "less than 0.1 %"
    if 0.999 < share < 1:
        return "more than 99.9 %"
    return f"{share * 100:.3g} %"


def count(value: int, noun: str) -> str:
    """A number with its noun: "1 step", "12,000 steps"."""
    return f"{value:,} {noun}{'' if value == 1 else 's'}"


def spike_line(spike: Spike) -> str:
    """What is known of a spike, in one line."""
    place = [f"{name} {at:,}" for name, at in (("epoch", spike.epoch), ("batch", spike.batch)) if at is not None]
    where = f" ({', '.join(place)})" if place else ""
    layers = ", ".join(f"{name} {percent(share)}" for name, share in spike.layers)
    parts = [f"norm {number(spike.norm)}, {number(spike.times)} times the {number(spike.usual)} around it"]
    parts += [f"from {layers}"] * bool(layers)
    limit = f" at {number(spike.threshold)}" if spike.done == "clipped" and np.isfinite(spike.threshold) else ""
    parts += [f"{spike.done}{limit}", *_loss(spike)]
    parts += [f"learning rate {number(spike.lr)}"] * bool(np.isfinite(spike.lr))
    return f"step {spike.step:,}{where}: {'; '.join(parts)}"


def compared_cells(one: Compared, metric: str | None) -> dict[str, str]:
    """A run as a row of a table."""
    step = "-" if one.best_step is None else f"{one.best_step:,}"
    ended = {metric: number(one.last), "best": number(one.best), "at step": step} if metric else {}
    counts = {"steps": one.steps, "dropped": one.dropped}
    steps, dropped = ("-" if count is None else f"{count:,}" for count in counts.values())
    norms = {"median norm": number(one.median), "largest": number(one.largest), "dropped": dropped}
    return {"run": one.run, **one.settings, **ended, "steps": steps, "clipped": percent(one.clip_rate), **norms}


def _loss(spike: Spike) -> list[str]:
    if np.isnan(spike.loss):
        return []
    losses = f"loss {number(spike.loss_before)} before, {number(spike.loss)} at it, {number(spike.loss_after)} after"
    back = "not back since" if spike.back_after is None else f"back after {count(spike.back_after, 'step')}"
    return [f"{losses}, {back}"]


def _clipping(run: Run, summary: Summary) -> Iterator[Sentence]:
    settings, rate = run.settings, summary.rate
    if settings is not None and settings["method"] is None:
        yield Sentence("No clipping method was set: these are the norms of a run without clipping.")
        return
    verb = "would have changed" if run.observed else "changed"
    changed = f"it {verb} {percent(rate)} of the steps.{_how_hard(run, summary)}"
    if rate == 0:
        yield Sentence(f"Clipping is not active: {changed}{_room(summary)}")
    elif rate <= 0.2:
        yield Sentence(f"Clipping is a filter for the largest steps: {changed}")
    elif rate <= 0.8:
        yield Sentence(f"Clipping takes part in many steps: {changed}")
    elif rate > 0.8:
        yield Sentence(f"Clipping is closer to normalization than to a filter: {changed}", "bad")
        if run.each_step and np.isfinite(summary.cut_spread):
            yield Sentence(_rescale(summary))


def _room(summary: Summary) -> str:
    if np.isnan(summary.limit_low):
        return ""
    return f" The largest norm was {number(summary.largest)}, the lowest limit {number(summary.limit_low)}."


def _how_hard(run: Run, summary: Summary) -> str:
    if not run.each_step or np.isnan(summary.cut):
        return ""
    return f" These were scaled by {number(summary.cut)} on average, at the strongest by {number(summary.strongest)}."


def _rescale(summary: Summary) -> str:
    spread = f"the 90th percentile is {number(summary.cut_spread)} times the 10th"
    if summary.cut_spread < 2:
        return (
            f"The factors hardly differ ({spread}): that is a constant rescale, which Adam ignores; under SGD it is a "
            "smaller learning rate."
        )
    return (
        f"The factors differ ({spread}), so nearly all steps are given one norm; under SGD the length of a step is "
        "then the limit times the learning rate."
    )


def _lost(summary: Summary) -> Iterator[Sentence]:
    bad, dropped = summary.nonfinite, summary.skipped
    if bad:
        share = percent(bad / summary.points)
        yield Sentence(f"{count(bad, 'step')} ({share}) had NaN or infinite gradients.", "bad")
    if dropped:
        row = f", up to {summary.streak:,} in a row" if summary.streak > 1 else ""
        yield Sentence(f"{count(dropped, 'step')} ({percent(dropped / summary.points)}) were dropped{row}.", "bad")
    if summary.overflows:
        steps = count(summary.overflows, "step")
        yield Sentence(f"The GradScaler dropped {steps} while it calibrated its scale, which is normal.")
    if not dropped and not bad:
        finite = "No other step" if summary.overflows else "All gradients were finite, and no step"
        yield Sentence(f"{finite} was dropped.", "good")


def _norms(run: Run, summary: Summary) -> Iterator[Sentence]:
    if np.isnan(summary.median):
        yield Sentence("No norm was finite, so there is nothing to show of them.", "bad")
        return
    what = "norm" if run.each_step else "mean norm"
    yield Sentence(
        f"The median {what} is {number(summary.median)}; 99 % stay below {number(summary.percentiles[99])}, and the "
        f"largest norm, {number(summary.largest)}, came at step {summary.largest_step:,}."
    )
    change = summary.late / summary.early if summary.early else np.nan
    if change > 2 or change < 0.5:
        yield Sentence(
            f"The level moves: the median was {number(summary.early)} in the first tenth of the run and "
            f"{number(summary.late)} in the last, so one fixed limit acts differently early and late."
        )
    if run.each_step and summary.spikes:
        spikes = f"{count(summary.spikes, 'step')} ({percent(summary.spikes / summary.points)})"
        yield Sentence(f"{spikes} stood out from their neighbours, {SPIKE:g}-fold and more.")


def _scopes(heat: Heat | None, found: list[Finding]) -> Iterator[Sentence]:
    for one in found:
        values = {"norm": number(one.norm), "number": number(one.number), "share": percent(one.number)}
        yield Sentence(_SCOPES[one.kind].format(scope=one.scope, **values), "bad")
    if heat is not None and not found and np.isfinite(late := heat.levels[1]).any():
        bounds = f"between {number(float(np.nanmin(late)))} and {number(float(np.nanmax(late)))}"
        yield Sentence(f"No scope vanishes or explodes: at the end their norms lie {bounds}.", "good")
