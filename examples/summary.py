"""What the run says on the terminal: what it will do, what clipping did, and how it ended."""

import csv
import math
import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from hydra.core.hydra_config import HydraConfig
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from omegaconf import DictConfig
from outcome import in_sweep, record
from report import report
from rich.console import Console
from rich.table import Table

Log = dict[str, list[tuple[int, float]]]  # the (step, value) pairs of each metric


def announce(config: DictConfig, data: LightningDataModule, model: LightningModule, trainer: Trainer) -> None:
    if in_sweep():  # Hydra has said which job it is
        return
    weights = sum(parameter.numel() for parameter in model.parameters())
    clippings = [clipping(node) for node in config.callbacks.values() if node and "method" in node]
    rows = {
        "model": f"{described(config.model)}, {weights:,} weights",
        "data": data.describe(),
        "optimizer": described(config.optimizer),
        "clipping": "\n".join(clippings) or "none",
        "output": short(trainer.default_root_dir),
    }
    if config.ckpt_path:
        rows["resuming"] = config.ckpt_path
    show("Training", rows)


def conclude(config: DictConfig, data: LightningDataModule, trainer: Trainer, stopped: str | None) -> None:
    log = read_log(trainer)
    guessing = data.guessing()
    reached = {key: float(trainer.callback_metrics.get(key, math.nan)) for key in guessing}
    exploded = "val/loss" in guessing and diverged(log, reached["val/loss"], guessing["val/loss"])
    verdict = "diverged" if stopped or exploded else "finished"
    # A run that was stopped has no result, whatever its last validation said.
    value = math.nan if stopped else float(trainer.callback_metrics.get(config.optimized_metric, math.nan))
    record(
        verdict,
        reason=stopped,
        metric=config.optimized_metric,
        mode=config.optimized_mode,
        value=value,
        clip_rate=clip_rate(log) if "gradclip/clip_rate" in log else None,
        largest_norm=highest(log["gradclip/norm_max"])[1] if "gradclip/norm_max" in log else None,
    )
    if in_sweep():
        print(f"#{HydraConfig.get().job.num} {verdict}, {config.optimized_metric} {value:,.4g}")
        return
    rows = {"steps": f"{trainer.global_step:,}"}
    if config.ckpt_path:
        rows["steps"] += " in all; below, those since the checkpoint"
    node = config.callbacks.get("gradclip") or {}
    rows |= clipping_rows(log, "would clip" if node.get("action") == "observe" else "clipped")
    if "train/loss" in log:
        step, peak = highest(log["train/loss"])
        rows["highest training loss"] = f"{peak:,.4g} at step {step:,}"
    for key, value in reached.items():
        rows[key.replace("val/", "validation ")] = f"{value:,.4g} (guessing: {guessing[key]:.4g})"
    rows["logs"] = listed(logger.log_dir for logger in trainer.loggers)
    rows["checkpoints"] = listed(saved.best_model_path for saved in trainer.checkpoint_callbacks)
    if node.get("history") and "method" in node:
        written = report(trainer)
        rows["report"] = short(written) if Path(written).is_file() else written
    show("Outcome", rows)
    if Path(rows.get("report", "")).is_file():
        say(f"{'Clipping changed ' + rows['clipped'] if 'clipped' in rows else 'Every step'}: {rows['report']}")
    if stopped:
        say(f"Training diverged and stopped: {stopped}")
    elif exploded:
        say("Training diverged: the loss exploded and ended no better than that of guessing.")


def diverged(log: Log, loss: float, guessing: float) -> bool:
    losses = [value for _, value in log.get("train/loss", [])]
    # An untrained model is not much worse than guessing: a loss that stays there only needs more steps.
    exploded = not all(value < 2 * guessing for value in [*losses, loss])
    return exploded and not loss < guessing


def clipping_rows(log: Log, clipped: str) -> dict[str, str]:
    if "gradclip/norm" not in log:
        return {"gradient norm": "not recorded"}
    # The percentiles are those of all steps as long as log_every_n_steps=1.
    norms = [norm for _, norm in log["gradclip/norm"]]
    half, most, nearly_all = np.percentile(norms, [50, 90, 99])
    step, largest = highest(log["gradclip/norm_max"])
    rows = {
        clipped: f"{clip_rate(log):.1%} of the steps",
        "gradient norm": f"median {half:.3g}, 90th percentile {most:.3g}, 99th {nearly_all:.3g}",
        "largest norm": f"{largest:,.4g} at step {step:,}",
    }
    for key in ("nonfinite", "skipped"):
        if count := log[f"gradclip/{key}"][-1][1]:
            rows[f"{key} steps"] = f"{count:,.0f}"
    return rows


def clip_rate(log: Log) -> float:
    """The share of the steps, as long as each is logged."""
    return float(np.mean([rate for _, rate in log["gradclip/clip_rate"]]))


def read_log(trainer: Trainer) -> Log:
    log: Log = {}
    for logger in trainer.loggers:
        if isinstance(logger, CSVLogger):
            logger.save()
            with Path(logger.experiment.metrics_file_path).open(newline="") as file:
                for row in csv.DictReader(file):
                    step = int(row.pop("step"))
                    for key, value in row.items():
                        if value:
                            log.setdefault(key, []).append((step, float(value)))
    return log


def highest(values: list[tuple[int, float]]) -> tuple[int, float]:
    """The step and value of the maximum; NaN counts as the largest."""
    return max(values, key=lambda pair: math.inf if math.isnan(pair[1]) else pair[1])


def described(node: DictConfig) -> str:
    """`_target_: torch.optim.SGD, lr: 1.0` as `SGD(lr=1.0)`."""
    values = [f"{key}={value}" for key, value in node.items() if not str(key).startswith("_")]
    return f"{node._target_.rpartition('.')[2]}({', '.join(values)})"


def clipping(node: DictConfig) -> str:
    if node.method is None:
        return "none, only measured"
    chosen = "".join(f", {key}={node[key]}" for key in ("include", "exclude") if node[key] not in ("*", []))
    return f"{described(node.method)}, action={node.action}{chosen}"


def listed(paths: Iterable[str | None]) -> str:
    return "\n".join(short(path) for path in paths if path) or "none"


def short(path: str) -> str:
    """The path from where the user is, when it lies below."""
    relative = os.path.relpath(path)
    return path if relative.startswith(os.pardir) else relative


def show(title: str, rows: dict[str, str]) -> None:
    table = Table(title=title, title_justify="left", box=None, show_header=False)
    table.add_column(style="cyan", no_wrap=True)
    table.add_column(overflow="fold")
    for row in rows.items():
        table.add_row(*row)
    say(table)


def say(content: object) -> None:
    console = Console(highlight=False, markup=False)  # the text may hold square brackets
    console.print(content)
    console.print()
