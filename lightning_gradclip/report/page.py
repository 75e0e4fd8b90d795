"""One HTML file that needs no network: text and tables are written here, charts are drawn by the browser."""

import base64
import gzip
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from lightning_gradclip.record.files import replace_file
from lightning_gradclip.record.history import is_ours
from lightning_gradclip.report import RunError
from lightning_gradclip.report.charts import payload
from lightning_gradclip.report.layers import Finding, Heat, findings, heat
from lightning_gradclip.report.numbers import Summary, summarize
from lightning_gradclip.report.replay import what_if
from lightning_gradclip.report.run import Run
from lightning_gradclip.report.spikes import Spike, spikes_of
from lightning_gradclip.report.words import Sentence, number, percent, sentences

# In this order: each uses what those before it define.
_SCRIPTS = ("base.js", "norms.js", "page.js")
_ACTIONS = {"clip": "", "skip": ", steps over the limit dropped", "observe": ", observed only"}
_RECORDS = {".npy", ".json", ".lock"}
_LARGEST, _SPIKES = 10, 200
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
        return number(self.summary.median)

    @property
    def high(self) -> str:
        """The 99th percentile of the norms."""
        return number(self.summary.percentiles[99])

    @property
    def largest(self) -> str:
        return number(self.summary.largest)

    @property
    def settings(self) -> list[str]:
        """Method and action, with the steps they hold from where they changed."""
        lines = [_method(one["method"]) + _ACTIONS[one["action"]] for one in self.run.segments]
        if len(lines) < 2:
            return lines
        return [f"from step {one['from_step']:,}: {line}" for one, line in zip(self.run.segments, lines, strict=True)]


def require_page(out: str | Path, *, force: bool = False) -> None:
    """Refuse to write where something else is: a RunError for a file that is no page of ours, unless `force`.

    What a run is read from is never overwritten.
    """
    path = Path(out)
    if not str(out) or "\0" in str(out):
        raise RunError(f"{str(out)!r} is no name of a page; write --out gradclip.html")
    if path.is_dir() or not path.parent.is_dir():
        raise RunError(f"cannot write {out}: {'Is a directory' if path.is_dir() else 'its folder does not exist'}")
    if not os.path.lexists(path):
        return
    if not path.is_file():
        raise RunError(f"cannot write {out}: it is no regular file; name another with --out")
    logged = path.name == "metrics.csv" or path.name.startswith("events.out.tfevents")
    if logged or (is_ours(path.parent) and path.suffix in _RECORDS):
        raise RunError(f"{out} is a part of a record, which a page never overwrites; name another file with --out")
    with path.open("rb") as file:
        ours = file.read(2048)
    if not force and not (ours.startswith(b"<!doctype html>") and b"<title>Gradient clipping: " in ours):
        raise RunError(f"{out} exists and is no page of this program; name another with --out, or overwrite: --force")


def write_report(runs: Sequence[Run], out: str | Path) -> int:
    """Write the page and return its size in bytes; a page that is there is replaced when the new one is complete."""
    content = page(runs).encode("utf-8", "replace")
    try:
        replace_file(Path(out), content)
    except OSError as error:
        raise RunError(f"cannot write {out}: {error.strerror or error}") from error
    return len(content)


def page(runs: Sequence[Run]) -> str:
    """The whole page as text; a RunError if plotly or jinja2 is missing."""
    try:
        from jinja2 import Environment, StrictUndefined
        from markupsafe import Markup
        from plotly.offline import get_plotlyjs  # pyright: ignore[reportMissingTypeStubs]
    except ImportError as error:
        raise RunError("the report needs plotly and jinja2; pip install 'lightning-gradclip[report]'") from error
    shown = [_shown(run) for run in runs]
    data = [payload(s.run, s.summary, s.heat, s.found, share=1 / len(runs)) for s in shown]
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    tables = [_numbers(s) for s in shown]
    return environment.from_string(_resource("page.html.j2")).render(
        shown=shown,
        rows=[(name, [table[name] for table in tables]) for name in tables[0]],
        spikes=[[_spike(one) for one in spikes_of(s.run)[:_SPIKES]] if s.run.each_step else [] for s in shown],
        limits=[_limits(s.run) for s in shown],
        largest=[_largest(s.run) for s in shown],
        scopes=[_scopes(s) for s in shown],
        css=Markup(_resource("page.css")),
        script=Markup("\n".join(_resource(name) for name in _SCRIPTS)),
        # Compressed it takes two fifths, and most of a page.
        plotly=Markup(_packed(get_plotlyjs())),
        # Nothing in it can end the script element.
        data=Markup(json.dumps(data, allow_nan=False).replace("<", "\\u003c")),
    )


def _shown(run: Run) -> Shown:
    of_scopes = heat(run)
    return Shown(run, summarize(run), of_scopes, [] if of_scopes is None else findings(of_scopes, run.norm_type))


def _resource(name: str) -> str:
    return files("lightning_gradclip.report").joinpath(name).read_text(encoding="utf-8")


@lru_cache(maxsize=1)
def _packed(script: str) -> str:
    return base64.b64encode(gzip.compress(script.encode("utf-8"), mtime=0)).decode("ascii")


def _method(method: Mapping[str, Any] | None) -> str:
    if method is None:
        return "no method"
    return f"{method['class']}({', '.join(f'{name}={value}' for name, value in method['settings'].items())})"


def _numbers(shown: Shown) -> dict[str, str]:
    """The cells of a run in the table of numbers."""
    each_step, of = shown.run.each_step, shown.summary
    return {
        "steps": f"{of.points:,}" + ("" if each_step else " log events"),
        "first and last step": f"{of.first:,} to {of.last:,}",
        "finite steps that clipping changed": percent(of.rate),
        "mean factor of these": number(of.cut),
        "strongest factor": number(of.strongest),
        "last limit": number(of.limit),
        "smallest norm": number(of.smallest),
        "median norm": number(of.median),
        "90th percentile": number(of.percentiles[90]),
        "99th percentile": number(of.percentiles[99]),
        "99.9th percentile": number(of.percentiles[99.9]),
        "largest norm": f"{number(of.largest)} at step {of.largest_step:,}",
        "median of the first tenth": number(of.early),
        "median of the last tenth": number(of.late),
        "spikes": f"{of.spikes:,}" if each_step else "-",
        "dropped steps": f"{of.skipped:,}",
        "steps with NaN or infinity": f"{of.nonfinite:,}",
        "overflows of the GradScaler": f"{of.overflows:,}",
    }


def _limits(run: Run) -> list[tuple[str, ...]]:
    """What-if in a few rows: limit, share clipped, mean and strongest factor."""
    if not len(run.sizes):
        return []
    tried = np.unique([*np.percentile(run.sizes, _SHARES), 2 * np.median(run.sizes)])
    return [
        (number(limit), percent(share), number(mean) if run.each_step else "-", number(most))
        for limit, share, mean, most in zip(*what_if(run.sizes, tried), strict=True)
    ]


def _largest(run: Run) -> list[tuple[str, ...]]:
    """The largest steps: step, norm, that over the median, limit, norm after clipping."""
    norms = np.where(np.isfinite(run.norm_max), run.norm_max, -1.0)
    places = [place for place in np.argsort(-norms, kind="stable")[:_LARGEST].tolist() if norms[place] > 0]
    median = float(np.median(norms[norms >= 0])) if places else np.nan
    columns = norms, norms / (median or np.nan), run.limit, run.norm_clipped
    return [(f"{run.step[place]:,}", *(number(float(column[place])) for column in columns)) for place in places]


def _spike(one: Spike) -> tuple[str, ...]:
    """A spike as a row: where, how large, from which layers, what was done, and what the loss did."""
    place = ", ".join("-" if at is None else f"{at:,}" for at in (one.epoch, one.batch))
    layers = ", ".join(f"{name} {percent(share)}" for name, share in one.layers) or "-"
    losses = " / ".join(number(loss) for loss in (one.loss_before, one.loss, one.loss_after))
    back = "-" if one.back_after is None else f"{one.back_after:,}"
    numbers = number(one.norm), number(one.usual), number(one.times)
    return (f"{one.step:,}", place, *numbers, layers, one.done, losses, back, number(one.lr))


def _scopes(shown: Shown) -> list[tuple[str, ...]]:
    """Every scope: its name, level in the first and last fifth, and its largest norm."""
    if shown.heat is None:
        return []
    early, late = shown.heat.levels
    largest = np.fmax.reduce(shown.heat.largest, axis=1)
    columns = zip(early, late, largest, strict=True)
    return [(name, *map(number, row)) for name, row in zip(shown.heat.names, columns, strict=True)]
