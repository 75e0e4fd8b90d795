"""Which limits a recorded run suggests, how many steps each would clip, and what to write to use it."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

import numpy as np
import yaml

from lightning_gradclip.report import RunError
from lightning_gradclip.report.replay import Places, moments, quantile_limits, what_if
from lightning_gradclip.report.run import Flags, Numbers, Run
from lightning_gradclip.report.words import number, percent

# Fewer steps say nothing; a share is only told from a run in which at least ten steps are beyond it.
LEAST, LEAST_OVER = 100, 10
# An adaptive limit is looked at in so many steps of a long run, evenly spread: that is +- 0.4 points at a share of 0.1.
_SAMPLED = 20_000
# A run is cut into so many parts to see how much its clip rate varies.
_PARTS = 20


@dataclass(frozen=True)
class Proposal:
    """A method that would clip about a given share of the steps.

    Attributes:
        method: Name of the class; `option` of its Hydra option.
        arguments: Those that are not the default.
        rate: Share of the recorded steps that it would have clipped; `uncertain` half the width of its 95 % interval.
        early: The same share in the first third of the run, and `late` in the last.
    """

    method: str
    option: str
    arguments: Mapping[str, float]
    rate: float
    uncertain: float
    early: float
    late: float


def advice(run: Run, rates: Sequence[float] = (0.01, 0.1), from_step: int | None = None) -> str:
    """What to tell about a run, ready to be printed.

    Args:
        run: Of which every step was recorded.
        rates: Shares of the steps that shall be clipped, each in (0, 1).
        from_step: Steps before this one are left out; None: none are.

    Raises:
        RunError: If points are means over several steps, or there are too few.
    """
    sizes = usable_sizes(run, from_step)
    blocks = [_about(run, sizes, from_step)]
    for rate in rates:
        if len(sizes) * rate < LEAST_OVER:
            needed = math.ceil(LEAST_OVER / rate)
            blocks.append(f"To clip {percent(rate)} of the steps: too few to tell, {needed:,} steps are needed.")
            continue
        written = "\n".join(_written(one, run) for one in proposals(sizes, rate) if one.arguments.get("k") != 0)
        blocks.append(f"To clip about {percent(rate)} of the steps:\n{written}")
    blocks.append(
        "Use one of them. Hydra: without the + where your defaults list already has callbacks/gradclip. Keep the\n"
        "include= and exclude= of the recorded run: its norms are those of the parameters that they select."
    )
    return "\n\n".join(blocks)


def usable_sizes(run: Run, from_step: int | None = None) -> Numbers:
    """The norms that a limit would have been compared with, `(n,)`, in the order of the steps.

    Raises:
        RunError: If points are means over several steps, or there are too few.
    """
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
    """A fixed limit and two adaptive ones that clip about this share of such norms.

    Args:
        sizes: Finite norms > 0, `(n,)`, in the order of the steps.
        rate: The share, in (0, 1).
    """
    max_norm = _rounded(float(np.quantile(sizes, 1 - rate)), 3)
    everywhere = np.arange(len(sizes))
    places = everywhere if len(sizes) <= _SAMPLED else np.linspace(0, len(sizes) - 1, _SAMPLED).astype(np.int64)
    q = _rounded(1 - rate, 6)
    window = defaults("quantile")["window"]
    by_quantile = sizes[places] > quantile_limits(sizes, places, q=q, window=window)
    sigma = defaults("sigma")
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
    common = 2 * float(np.median(sizes))
    over = float(what_if(sizes, np.array([common])).share[0])
    lines = [
        f"{run.name}: {len(run):,} steps, {len(sizes):,} norms to go by{since}",
        f"before clipping: median {number(low)}, 90 % below {number(high)}, 99 % below {number(most)}, "
        f"largest {number(float(sizes.max()))}",
        f"twice the median, a common choice, is {number(common)}: {percent(over)} of the steps are over it",
    ]
    changed = float(np.nanmean(run.changed))
    if changed and not run.observed:
        lines.append(
            f"{percent(changed)} of these steps were changed by clipping. The norms are those from before, so they\n"
            "can be used; but under another limit the parameters take another path, and the norms with them."
        )
    return "\n".join(lines)


def _written(one: Proposal, run: Run) -> str:
    """A proposal with its clip rate and the three ways to write it."""
    drift = ""
    low, high = sorted((one.early, one.late))
    if high > 2 * low and high - low > 2 * one.uncertain:
        drift = f"; {percent(one.early)} in the first third of the run, {percent(one.late)} in the last"
    lines = [
        f"  {python(one, run.norm_type)}",
        f"    expected      {percent(one.rate)} of the steps clipped, +- {one.uncertain * 100:.2g} points{drift}",
        f"    Python        GradientClipping({', '.join([python(one, run.norm_type), *_callback(run)])})",
        f"    Hydra         {' '.join(hydra(one, run))}",
        f"    LightningCLI  {' '.join(cli(one, run))}",
    ]
    return "\n".join(lines)


def python(one: Proposal, norm_type: float = 2.0) -> str:
    """The method as Python writes it."""
    return f"{one.method}({', '.join(f'{name}={value!r}' for name, value in _arguments(one, norm_type))})"


def hydra(one: Proposal, run: Run) -> list[str]:
    """The overrides of a Hydra application."""
    method = [f"callbacks.gradclip.method.{name}={value!r}" for name, value in _arguments(one, run.norm_type)]
    return [f"+callbacks/gradclip={one.option}", *method, *(f"callbacks.gradclip.{word}" for word in _callback(run))]


def cli(one: Proposal, run: Run) -> list[str]:
    """The flags of a LightningCLI."""
    method = [f"--trainer.callbacks.method.{name}={value!r}" for name, value in _arguments(one, run.norm_type)]
    return [
        "--trainer.callbacks+=lightning_gradclip.GradientClipping",
        f"--trainer.callbacks.method=lightning_gradclip.{one.method}",
        *method,
        *(f"--trainer.callbacks.{word}" for word in _callback(run)),
    ]


def _arguments(one: Proposal, norm_type: float) -> Iterator[tuple[str, float]]:
    yield from one.arguments.items()
    if norm_type != 2.0:
        yield "norm_type", norm_type


def _callback(run: Run) -> list[str]:
    return [] if run.optimizer is None else [f"optimizer={run.optimizer}"]


def _rounded(value: float, digits: int) -> float:
    return float(f"{value:.{digits}g}")
