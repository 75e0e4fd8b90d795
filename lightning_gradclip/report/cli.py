"""The command line: `lightning-gradclip report`, `advise`, `spikes` and `compare`.

Nothing heavy is imported before a command needs it, and torch by neither.
"""

import argparse
import contextlib
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from lightning_gradclip.report import RunError

_RUN = (
    "a history folder, a metrics.csv, a TensorBoard event file, an mlflow.db, a trainer_state.json of Transformers, "
    "or a folder that holds some of these"
)


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}; see {self.prog} --help\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; what is wrong with its input is one line on stderr.

    Args:
        arguments: The words after the program's name; None: those of this process.

    Returns:
        The exit status: 0, or 2 if the command could not do what was asked.
    """
    options = _parser().parse_args(arguments)
    try:
        # Not before: help is there at once, and needs no NumPy.
        import numpy as np

        # What is beyond the largest number is infinite, and shown so.
        with np.errstate(over="ignore", invalid="ignore"):
            status = options.verb(options)
        sys.stdout.flush()
        return status
    except RunError as error:
        print(f"lightning-gradclip: error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        # Whoever reads, `head` for instance, has seen enough; Python would complain when it flushes at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = _Parser("lightning-gradclip", description="Look at what gradient clipping did, and find a limit.")
    parser.add_argument(
        "--version", action="version", version=f"%(prog)s {sys.modules['lightning_gradclip'].__version__}"
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    report = commands.add_parser("report", help="write an HTML page about one or several runs")
    report.add_argument("runs", nargs="+", metavar="RUN", help=_RUN)
    report.add_argument("--out", default="gradclip.html", metavar="FILE", help="the page to write (%(default)s)")
    report.add_argument("--force", action="store_true", help="overwrite FILE even if it is no page of this program")
    report.set_defaults(verb=_report)
    advise = commands.add_parser("advise", help="propose limits from a recorded run")
    advise.add_argument("run", metavar="RUN", help=_RUN)
    share = "share of the steps to clip, such as 0.05; may be repeated (0.1 and 0.01)"
    advise.add_argument("--rate", type=_share, action="append", metavar="SHARE", help=share)
    advise.add_argument("--from-step", type=int, metavar="STEP", help="leave out the steps before this one")
    advise.set_defaults(verb=_advise)
    spikes = commands.add_parser("spikes", help="name the steps that stand out, with their layers and batches")
    spikes.add_argument("run", metavar="RUN", help=_RUN)
    _add_forms(spikes)
    spikes.set_defaults(verb=_spikes)
    compare = commands.add_parser("compare", help="runs in a table: what differs, how a metric ended, what was clipped")
    compare.add_argument(
        "runs", nargs="+", metavar="RUNS", help="the folder of a multirun or of MLflow, or several runs"
    )
    compare.add_argument("--metric", metavar="NAME", help="a metric that a logger kept, such as val/loss")
    compare.add_argument("--mode", choices=("min", "max"), help="which value is the best (told from the metric's name)")
    _add_forms(compare)
    compare.set_defaults(verb=_compare)
    return parser


def _add_forms(parser: argparse.ArgumentParser) -> None:
    forms = parser.add_mutually_exclusive_group()
    for form in ("json", "csv"):
        forms.add_argument(f"--{form}", dest="form", action="store_const", const=form, help=f"write {form.upper()}")


def _tell(line: str) -> None:
    """Say what is damaged where something sound is left."""
    print(f"lightning-gradclip: damaged: {line}", file=sys.stderr)


def _share(word: str) -> float:
    with contextlib.suppress(ValueError):
        if 0 < float(word) < 1:
            return float(word)
    raise argparse.ArgumentTypeError(f"must be between 0 and 1, such as 0.05, got {word!r}")


def _report(options: argparse.Namespace) -> int:
    from lightning_gradclip.report.find import find_runs
    from lightning_gradclip.report.page import require_page, write_report

    require_page(options.out, force=options.force)
    runs = find_runs(options.runs, _tell)
    size = write_report(runs, options.out)
    print(f"wrote {options.out} ({size / 1e6:.1f} MB): {', '.join(run.name for run in runs)}")
    return 0


def _advise(options: argparse.Namespace) -> int:
    from lightning_gradclip.record.rule import SHARE
    from lightning_gradclip.report.advice import advice
    from lightning_gradclip.report.find import find_runs

    runs = find_runs([options.run], _tell)
    print("\n\n".join(advice(run, options.rate or (SHARE, 0.01), options.from_step) for run in runs))
    return 0


def _spikes(options: argparse.Namespace) -> int:
    from lightning_gradclip.report.find import find_runs
    from lightning_gradclip.report.forms import written
    from lightning_gradclip.report.spikes import as_row, spikes_of
    from lightning_gradclip.report.words import count, spike_line

    runs = find_runs([options.run], _tell)
    found = [(run, spikes_of(run)) for run in runs]
    if options.form:
        print(written([{"run": run.name, **as_row(one)} for run, spikes in found for one in spikes], options.form))
        return 0
    for run, spikes in found:
        lost = int(run.nonfinite.sum())
        print(f"{run.name}: {count(len(spikes), 'spike')} in {count(len(run), 'step')}")
        print(*(f"  {spike_line(one)}\n" for one in spikes), sep="", end="")
        if lost:
            first = int(run.step[run.nonfinite.argmax()])
            print(f"  {count(lost, 'step')} had NaN or infinite gradients, step {first:,} the first")
    return 0


def _compare(options: argparse.Namespace) -> int:
    from lightning_gradclip.report.compare import as_row, compare
    from lightning_gradclip.report.forms import table, written
    from lightning_gradclip.report.words import compared_cells

    found = compare(options.runs, options.metric, options.mode, _tell)
    if options.form:
        print(written([as_row(one) for one in found], options.form))
    else:
        print(table([compared_cells(one, options.metric) for one in found]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
