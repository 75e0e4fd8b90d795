"""The page about a run that `lightning-gradclip report` would write, in the folder of its output."""

from pathlib import Path

from lightning.pytorch import Trainer

from lightning_gradclip.report import RunError
from lightning_gradclip.report.find import find_runs
from lightning_gradclip.report.page import write_report

PAGE = "gradclip.html"


def report(trainer: Trainer) -> str:
    """Where it is, or why there is none."""
    page = Path(trainer.default_root_dir, PAGE)
    try:
        write_report(find_runs([page.parent]), page)
    except RunError as error:
        return f"none: {error}"
    return str(page)
