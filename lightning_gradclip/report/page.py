"""One HTML file that needs no network: text and tables are written here, charts are drawn by the browser."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from lightning_gradclip.record.history import replace_file
from lightning_gradclip.report import RunError
from lightning_gradclip.report.charts import payload
from lightning_gradclip.report.layers import Finding, Heat, findings, heat
from lightning_gradclip.report.numbers import Summary, summarize
from lightning_gradclip.report.replay import what_if
from lightning_gradclip.report.run import Run
from lightning_gradclip.report.words import Sentence, number, percent, sentences

_MISSING = "the report needs plotly and jinja2; pip install 'lightning-gradclip[report]'"
# In this order: each uses what those before it define.
_SCRIPTS = ("base.js", "norms.js", "page.js")
_LARGEST = 10
_SHARES = (50, 75, 90, 95, 99, 99.9)


@dataclass(frozen=True, eq=False)
class Shown:
    """A run with all that the page says about it."""

    run: Run
    summary: Summary
    heat: Heat | None
    found: list[Finding]

    @property
    def sentences(self) -> list[Sentence]:
        return sentences(self.run, self.summary, self.heat, self.found)

    @property
    def median(self) -> str:
        """The median norm, as it is written."""
        return number(self.summary.median)

    @property
    def high(self) -> str:
        """The 99th percentile of the norms, as it is written."""
        return number(self.summary.percentiles[99])

    @property
    def largest(self) -> str:
        """The largest norm, as it is written."""
        return number(self.summary.largest)

    @property
    def settings(self) -> list[str]:
        """Method and action, with the steps they hold from where they changed."""
        several = len(self.run.segments) > 1
        return [
            (f"from step {one['from_step']:,}: " if several else "") + _method(one["method"]) + _action(one)
            for one in self.run.segments
        ]


def write_report(runs: Sequence[Run], out: str | Path) -> int:
    """Write the page; a file that is there is replaced when the new one is complete.

    Args:
        runs: What to show, side by side.
        out: The file.

    Returns:
        How many bytes were written.

    Raises:
        RunError: If plotly or jinja2 is missing.
        OSError: If the file cannot be written.
    """
    content = page(runs).encode("utf-8", "replace")
    replace_file(Path(out), content)
    return len(content)


def page(runs: Sequence[Run]) -> str:
    """The whole page as text.

    Raises:
        RunError: If plotly or jinja2 is missing.
    """
    try:
        from jinja2 import Environment, StrictUndefined
        from markupsafe import Markup
        from plotly.offline import get_plotlyjs  # pyright: ignore[reportMissingTypeStubs]
    except ImportError as error:
        raise RunError(_MISSING) from error
    shown = [_shown(run) for run in runs]
    data = [payload(s.run, s.summary, s.heat, s.found, share=1 / len(runs)) for s in shown]
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(_resource("page.html.j2"))
    return template.render(
        shown=shown,
        rows=_rows(shown),
        limits=[_limits(s) for s in shown],
        largest=[_largest(s.run) for s in shown],
        scopes=[_scopes(s) for s in shown],
        css=Markup(_resource("page.css")),
        script=Markup("\n".join(_resource(name) for name in _SCRIPTS)),
        plotly=Markup(get_plotlyjs()),
        # Nothing in it can end the script element.
        data=Markup(json.dumps(data, allow_nan=False).replace("<", "\\u003c")),
    )


def _shown(run: Run) -> Shown:
    of_scopes = heat(run)
    return Shown(run, summarize(run), of_scopes, [] if of_scopes is None else findings(of_scopes, run.norm_type))


def _resource(name: str) -> str:
    return files("lightning_gradclip.report").joinpath(name).read_text(encoding="utf-8")


def _method(method: Mapping[str, Any] | None) -> str:
    if method is None:
        return "no method"
    return f"{method['class']}({', '.join(f'{name}={value}' for name, value in method['settings'].items())})"


def _action(settings: Mapping[str, Any]) -> str:
    return {"clip": "", "skip": ", steps over the limit dropped", "observe": ", observed only"}[settings["action"]]


def _rows(shown: Sequence[Shown]) -> list[tuple[str, list[str]]]:
    """The table of numbers: a name, and a cell for each run."""
    described: dict[str, Callable[[Shown], str]] = {
        "steps": lambda s: f"{s.summary.points:,}" + ("" if s.run.each_step else " log events"),
        "first and last step": lambda s: f"{s.summary.first:,} to {s.summary.last:,}",
        "finite steps that clipping changed": lambda s: percent(s.summary.rate),
        "mean factor of these": lambda s: number(s.summary.cut),
        "strongest factor": lambda s: number(s.summary.strongest),
        "last limit": lambda s: number(s.summary.limit),
        "smallest norm": lambda s: number(s.summary.smallest),
        "median norm": lambda s: number(s.summary.median),
        "90th percentile": lambda s: number(s.summary.percentiles[90]),
        "99th percentile": lambda s: number(s.summary.percentiles[99]),
        "99.9th percentile": lambda s: number(s.summary.percentiles[99.9]),
        "largest norm": lambda s: f"{number(s.summary.largest)} at step {s.summary.largest_step:,}",
        "median of the first tenth": lambda s: number(s.summary.early),
        "median of the last tenth": lambda s: number(s.summary.late),
        "spikes": lambda s: f"{s.summary.spikes:,}" if s.run.each_step else "-",
        "dropped steps": lambda s: f"{s.summary.skipped:,}",
        "steps with NaN or infinity": lambda s: f"{s.summary.nonfinite:,}",
        "overflows of the GradScaler": lambda s: f"{s.summary.overflows:,}",
    }
    return [(name, [cell(s) for s in shown]) for name, cell in described.items()]


def _limits(shown: Shown) -> list[tuple[str, str, str, str]]:
    """What-if in a few rows: limit, share clipped, mean and strongest factor."""
    sizes = shown.run.sizes
    if not len(sizes):
        return []
    tried = np.unique([*np.percentile(sizes, _SHARES), 2 * np.median(sizes)])
    curve = what_if(sizes, tried)
    columns = zip(*(one.tolist() for one in (curve.limit, curve.share, curve.mean, curve.strongest)), strict=True)
    return [
        (number(limit), percent(share), number(mean) if shown.run.each_step else "-", number(most))
        for limit, share, mean, most in columns
    ]


def _largest(run: Run) -> list[tuple[str, ...]]:
    """The largest steps: step, norm, that over the median, limit, norm after clipping."""
    norms = np.where(np.isfinite(run.norm_max), run.norm_max, -1.0)
    places = [place for place in np.argsort(-norms, kind="stable")[:_LARGEST].tolist() if norms[place] > 0]
    median = float(np.median(norms[norms >= 0])) if places else np.nan
    columns = [one.tolist() for one in (run.step, norms, norms / (median or np.nan), run.limit, run.norm_clipped)]
    rows = [[column[place] for column in columns] for place in places]
    return [
        (f"{step:,}", number(norm), number(ratio), number(limit), number(after))
        for step, norm, ratio, limit, after in rows
    ]


def _scopes(shown: Shown) -> list[tuple[str, str, str, str]]:
    """Every scope: its name, level in the first and last fifth, and its largest norm."""
    if shown.heat is None:
        return []
    early, late = shown.heat.levels
    largest = np.fmax.reduce(shown.heat.largest, axis=1)
    columns = zip(shown.heat.names, early.tolist(), late.tolist(), largest.tolist(), strict=True)
    return [(name, number(first), number(last), number(most)) for name, first, last, most in columns]
