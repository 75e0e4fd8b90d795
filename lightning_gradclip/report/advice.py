"""Which limits a recorded run suggests, how many steps each would clip, and what to write to use it."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.resources import files
from typing import Any

import numpy as np
import yaml

from lightning_gradclip.record.rule import LEAST, SHARE, limit_for
from lightning_gradclip.report import RunError
from lightning_gradclip.report.replay import Places, moments, quantile_limits
from lightning_gradclip.report.run import Flags, Numbers, Run
from lightning_gradclip.report.words import number, percent

# A share is only told from a run in which at least ten steps are beyond it.
_LEAST_OVER = 10
# An adaptive limit is looked at in so many steps of a long run, evenly spread: that is +- 0.4 points at a share of 0.1.
_SAMPLED = 20_000
# A run is cut into so many parts to see how much its clip rate varies.
_PARTS = 20
_USE = (
    "Use one of them. Hydra: without the + where your defaults list already has callbacks/gradclip. Keep the\n"
    "include= and exclude= of the recorded run: its norms are those of the parameters that they select."
)


@dataclass(frozen=True)
class Proposal:
    """A method that would clip about a given share of the steps."""

    method: str  # name of the class
    option: str  # of its Hydra option
    arguments: Mapping[str, float | str]  # those that are not the default
    rate: float  # share of the recorded steps that it would have clipped
    uncertain: float  # half the width of the 95 % interval of the rate
    early: float  # the same share in the first third of the run
    late: float  # in the last


def advice(run: Run, rates: Sequence[float] = (SHARE, 0.01), from_step: int | None = None) -> str:
    """What to tell about a run, from `from_step` on, ready to be printed; `rates` of its steps shall be clipped."""
    sizes, per = usable_sizes(run, from_step), _own_scopes(run)
    blocks = [_about(run, sizes, from_step)]
    if per is not None and run.settings is not None and run.settings["measure_per"] == per:
        return "\n\n".join([*blocks, *_of_scopes(run, per, rates, from_step), _USE])
    if per is not None:
        blocks.append(
            f'It was clipped with per="{per}", which limits the norm of each {per} by itself. What follows are limits\n'
            f'on the whole norm; for those of a {per} record with measure_per="{per}".'
        )
    for rate in rates:
        if len(sizes) * rate < _LEAST_OVER:
            blocks.append(_too_few(rate))
            continue
        written = "\n".join(_written(one, run, rate) for one in proposals(sizes, rate))
        blocks.append(f"To clip about {percent(rate)} of the steps:\n{written}")
    return "\n\n".join([*blocks, _USE])


def _too_few(rate: float) -> str:
    needed = math.ceil(_LEAST_OVER / rate)
    return f"To clip {percent(rate)} of the steps: too few to tell, {needed:,} steps are needed."


def _own_scopes(run: Run) -> str | None:
    """What the run limited one by one, such as "layer"; None for the whole model, or where nobody knows."""
    method = run.settings["method"] if run.settings else None
    per = method["settings"].get("per", "model") if method else "model"
    return per if per in ("group", "layer", "parameter") else None


def _of_scopes(run: Run, per: str, rates: Sequence[float], from_step: int | None) -> Iterator[str]:
    """One limit for the norm of every scope: a step is clipped if the largest of them is over it."""
    largest = largest_scopes(run, from_step)
    for rate in rates:
        if len(largest) * rate < _LEAST_OVER:
            yield _too_few(rate)
            continue
        one = proposals(largest, rate)[0]
        of_scopes = replace(one, arguments={**one.arguments, "per": per})
        yield (
            f"To clip a {per} in about {percent(rate)} of the steps:\n{_written(of_scopes, run, rate)}\n"
            f"  Learned limits follow each {per} by itself; which of them would clip so much is not told here."
        )


def largest_scopes(run: Run, from_step: int | None = None) -> Numbers:
    """At each step with a finite norm the largest norm of a scope, `(n,)`; those above zero."""
    largest = np.full(len(run), np.nan)
    for part in run.parts:
        rows = slice(part.first_row, part.first_row + len(part.norms))
        largest[rows] = np.fmax.reduce(part.norms, axis=1)
    chosen = np.isfinite(run.norm) & np.isfinite(largest) & (largest > 0)
    return largest[chosen if from_step is None else chosen & (run.step >= from_step)]


def usable_sizes(run: Run, from_step: int | None = None) -> Numbers:
    """The norms that a limit would have been compared with, `(n,)`, in order; a RunError if they cannot be told."""
    if not run.each_step:
        raise RunError(
            f"{run.name} holds means over several steps, from which single steps cannot be told; "
            "log with log_every_n_steps=1, or record a history"
        )
    chosen = np.isfinite(run.norm) & (run.norm > 0)
    if from_step is not None:
        chosen &= run.step >= from_step
    if (found := int(chosen.sum())) < LEAST:
        raise RunError(
            f"{run.name} holds {found} steps with a finite norm, too few for advice; record at least {LEAST}"
        )
    return run.norm[chosen]


def proposals(sizes: Numbers, rate: float) -> list[Proposal]:
    """A fixed limit and two adaptive ones that clip about this share of finite norms > 0, `(n,)`, in their order."""
    max_norm, q = limit_for(sizes, rate), _rounded(1 - rate, 6)
    everywhere = np.arange(len(sizes))
    places = np.linspace(0, len(sizes) - 1, min(len(sizes), _SAMPLED)).astype(np.int64)
    sigma = defaults("sigma")
    by_quantile = sizes[places] > quantile_limits(sizes, places, q=q, window=defaults("quantile")["window"])
    mean, deviation = moments(sizes, places, window=sigma["window"], warmup=sigma["warmup"])
    k = _fitting_k(sizes[places], mean, deviation, rate)
    return [
        _proposal("NormClip", "norm", {"max_norm": max_norm}, everywhere, sizes > max_norm),
        _proposal("QuantileClip", "quantile", {"q": q}, places, by_quantile),
        _proposal("SigmaClip", "sigma", {"k": k}, places, sizes[places] > mean + k * deviation),
    ]


def defaults(option: str) -> dict[str, Any]:
    """The arguments of a method in its Hydra option, which are those of its constructor."""
    path = files("lightning_gradclip.conf") / "callbacks" / "gradclip" / f"{option}.yaml"
    return yaml.safe_load(path.read_text(encoding="utf-8"))["method"]


def _fitting_k(sizes: Numbers, mean: Numbers, deviation: Numbers, rate: float) -> float:
    """How many deviations above the mean the share `rate` of the sizes is; 0 where it would have to be negative."""
    known = deviation > 0
    scores = (sizes[known] - mean[known]) / deviation[known]
    return max(0.0, _rounded(float(np.quantile(scores, 1 - rate)), 3)) if len(scores) else 0.0


def _proposal(method: str, option: str, arguments: dict[str, float], places: Places, over: Flags) -> Proposal:
    third = places[-1] / 3
    early, late = float(over[places <= third].mean()), float(over[places > 2 * third].mean())
    return Proposal(method, option, arguments, float(over.mean()), _uncertainty(over), early, late)


def _uncertainty(over: Flags) -> float:
    """Half the width of the 95 % interval of a share, from the steps themselves."""
    # Agresti and Coull's, which holds for few clipped steps too.
    share = (int(over.sum()) + 2) / (len(over) + 4)
    independent = math.sqrt(share * (1 - share) / (len(over) + 4))
    # Steps that share a memory are clipped together, and then tell less: parts of the run differ more.
    parts = [float(part.mean()) for part in np.array_split(over, _PARTS)]
    return 1.96 * max(independent, float(np.std(parts, ddof=1)) / math.sqrt(_PARTS))


def _about(run: Run, sizes: Numbers, from_step: int | None) -> str:
    """What the advice rests on."""
    since = "" if from_step is None else f" from step {from_step:,} on"
    low, high, most = np.percentile(sizes, (50, 90, 99)).tolist()
    lines = [
        f"{run.name}: {len(run):,} steps, {len(sizes):,} norms to go by{since}",
        f"before clipping: median {number(low)}, 90 % below {number(high)}, 99 % below {number(most)}, "
        f"largest {number(float(sizes.max()))}",
    ]
    known = run.changed[np.isfinite(run.changed)]
    changed = float(known.mean()) if len(known) else 0.0
    if changed and not run.observed:
        lines.append(
            f"{percent(changed)} of these steps were changed by clipping. The norms are those from before, so they\n"
            "can be used; but under another limit the parameters take another path, and the norms with them."
        )
    return "\n".join(lines)


def _remark(one: Proposal, rate: float) -> str:
    """What is to be known about the share that a proposal would have clipped, beside the share itself."""
    if one.uncertain > max(one.rate, rate):
        return "; too uncertain to go by"
    if abs(one.rate - rate) > max(one.uncertain, 0.2 * rate):
        return f"; not {percent(rate)}, since the level of the norms moves"
    return ""


def _written(one: Proposal, run: Run, rate: float) -> str:
    """A proposal with its clip rate and the three ways to write it."""
    if one.arguments.get("k") == 0:
        return f"  SigmaClip: none, since {percent(rate)} of the norms lie no deviation above their mean"
    drift = ""
    low, high = sorted((one.early, one.late))
    if high > 2 * low and high - low > 2 * one.uncertain:
        drift = f"; {percent(one.early)} in the first third of the run, {percent(one.late)} in the last"
    method, callback = _arguments(one, run)
    python = f"{one.method}({', '.join(method)})"
    lines = [
        f"  {python}",
        f"    expected      {percent(one.rate)} of the steps clipped, +- {one.uncertain * 100:.2g} points"
        + drift
        + _remark(one, rate),
        f"    Python        GradientClipping({', '.join([python, *callback])})",
        f"    Hydra         {' '.join(hydra(one, run))}",
        f"    LightningCLI  {' '.join(_cli(one, run))}",
    ]
    return "\n".join(lines)


def hydra(one: Proposal, run: Run) -> list[str]:
    """The overrides of a Hydra application."""
    return [f"+callbacks/gradclip={one.option}", *(f"callbacks.gradclip.{word}" for word in _words(one, run))]


def _cli(one: Proposal, run: Run) -> list[str]:
    """The flags of a LightningCLI."""
    return [
        "--trainer.callbacks+=lightning_gradclip.GradientClipping",
        f"--trainer.callbacks.method=lightning_gradclip.{one.method}",
        *(f"--trainer.callbacks.{word}" for word in _words(one, run)),
    ]


def _words(one: Proposal, run: Run) -> list[str]:
    """All arguments as a configuration of the callback has them."""
    method, callback = _arguments(one, run)
    return [*(f"method.{word}" for word in method), *callback]


def _arguments(one: Proposal, run: Run) -> tuple[list[str], list[str]]:
    """Those of the method and those of the callback, each "name=value"."""
    norm_type = {} if run.norm_type == 2.0 else {"norm_type": run.norm_type}
    method = [f"{name}={value!r}" for name, value in {**one.arguments, **norm_type}.items()]
    return method, [] if run.optimizer is None else [f"optimizer={run.optimizer}"]


def _rounded(value: float, digits: int) -> float:
    return float(f"{value:.{digits}g}")
