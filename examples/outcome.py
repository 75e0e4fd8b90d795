"""How a run ended, left in its folder as `outcome.yaml`: what `results.py` makes a table of."""

import os
import sys
from pathlib import Path
from typing import NoReturn

import yaml
from hydra.core.hydra_config import HydraConfig
from hydra.errors import InstantiationException
from hydra.types import RunMode
from lightning.pytorch.utilities import rank_zero_only


def in_sweep() -> bool:
    return HydraConfig.get().mode == RunMode.MULTIRUN


@rank_zero_only
def record(verdict: str, **facts: str | float | None) -> None:
    """Write `verdict`, which is finished, diverged or failed, and what else is known."""
    path = Path(HydraConfig.get().runtime.output_dir, "outcome.yaml")
    # In one piece: a run that is killed here leaves no outcome rather than half of one.
    written = path.with_suffix(".part")
    written.write_text(yaml.safe_dump({"verdict": verdict, **facts}, sort_keys=False), encoding="utf-8")
    written.replace(path)


def refuse(error: Exception) -> NoReturn:
    """End the run at a mistake in its configuration, with one sentence, which says more than the traceback."""
    # Hydra wraps what a constructor raises.
    sentence = str(error.__cause__ or error) if isinstance(error, InstantiationException) else str(error)
    record("failed", reason=sentence)
    if in_sweep():
        # The other jobs go on; Hydra reports the first error once they have ended.
        print(f"#{HydraConfig.get().job.num} failed: {sentence}")
        raise error
    if os.environ.get("HYDRA_FULL_ERROR") == "1":
        raise error
    sys.exit(sentence)
