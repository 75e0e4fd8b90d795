"""Trains with one kind of logger, again and again, and writes `found.json`: what can be read back from its files.

    cd tests && python -m kit.logger_runs KIND FOLDER

In a process of its own: these packages start threads and processes, and hook into imports.
"""

import json
import os
import sys
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CometLogger, Logger, MLFlowLogger, WandbLogger

from kit.boring import Adversaries, Prescribed, fit, gradients
from lightning_gradclip import GradientClipping, NormClip

LIMIT, BATCHES, SAVED = 4.0, 20, 10
EVERY = (1, 7, 50)
SCENARIOS = ("plain", "accumulated", "two optimizers", "resumed")

# Metric, step and value, in the order in which they were written.
Points = list[tuple[str, int, Any]]


class Crash(Callback):
    """Ends the first part of a run right behind its checkpoint."""

    class Error(Exception): ...

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == SAVED:
            raise self.Error


def data(scenario: str) -> list[Any]:
    given = gradients(BATCHES)
    return list(zip(given, gradients(BATCHES, seed=1), strict=True)) if scenario == "two optimizers" else given


def train(scenario: str, every: int, make: Callable[[], Logger], folder: Path) -> None:
    """One run of a scenario; a resumed one asks for its logger twice."""

    def run(*callbacks: Callback, **options: Any) -> None:
        module = Adversaries() if scenario == "two optimizers" else Prescribed()
        clipping = GradientClipping(NormClip(max_norm=LIMIT), measure_per="layer", histograms=True)
        accumulate = 3 if scenario == "accumulated" else 1
        options |= {"log_every_n_steps": every, "accumulate_grad_batches": accumulate}
        logger = make()
        try:
            fit(module, data(scenario), clipping, *callbacks, logger=logger, default_root_dir=folder, **options)
        finally:
            if isinstance(logger, WandbLogger):
                logger.experiment.finish()
            elif isinstance(logger, CometLogger):
                logger.experiment.end()

    if scenario == "resumed":
        saving = ModelCheckpoint(folder / "saves", every_n_train_steps=SAVED, save_top_k=-1, filename="saved")
        try:
            run(saving, Crash(), enable_checkpointing=True)
        except Crash.Error:
            run(ckpt_path=folder / "saves" / "saved.ckpt")
    else:
        run()


class MLflow:
    """A store in SQLite, read with MLflow's client."""

    def __init__(self, folder: Path) -> None:
        self.store = f"sqlite:///{folder}/mlflow.db"
        self.folder = folder
        self.run: str | None = None

    def logger(self) -> Logger:
        logger = MLFlowLogger(
            tracking_uri=self.store, run_id=self.run, artifact_location=(self.folder / "artifacts").as_uri()
        )
        self.run = logger.run_id
        return logger

    def read(self) -> Points:
        from mlflow import MlflowClient

        client = MlflowClient(self.store)
        keys = client.get_run(self.run).data.metrics
        histories = [client.get_metric_history(self.run, key) for key in keys]
        return [(one.key, one.step, one.value) for history in histories for one in history]


class Wandb:
    """Offline runs, read with the messages of wandb's own protocol; the package has no reader of its own any more."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(exist_ok=True)

    def logger(self) -> Logger:
        return WandbLogger(save_dir=self.folder, offline=True, project="gradclip", id=self.folder.name)

    def read(self) -> Points:
        from wandb.proto import wandb_internal_pb2

        points: Points = []
        for path in sorted(self.folder.rglob("*.wandb"), key=lambda path: path.stat().st_mtime_ns):
            for content in records(path.read_bytes()):
                record = wandb_internal_pb2.Record()
                record.ParseFromString(content)
                if record.WhichOneof("record_type") == "history":
                    values: dict[str, Any] = {}
                    for one in record.history.item:
                        key, *rest = one.nested_key or [one.key]
                        content = json.loads(one.value_json)
                        values[key] = {**values.get(key, {}), rest[0]: content} if rest else content
                    step = values.pop("trainer/global_step")
                    points += [(key, step, value) for key, value in values.items() if not key.startswith("_")]
        return points

    @staticmethod
    def close() -> None:
        """End the process that writes the files: then all of them are written."""
        import wandb

        wandb.teardown()


def records(content: bytes) -> Iterator[bytes]:
    """The records of a LevelDB log, whose first seven bytes are wandb's own."""
    place, parts = 7, []
    while place + 7 <= len(content):
        if (left := -place % 2**15) and left < 7:
            place += left
            continue
        length, kind = int.from_bytes(content[place + 4 : place + 6], "little"), content[place + 6]
        parts.append(content[place + 7 : place + 7 + length])
        place += 7 + length
        # 1: whole, 2, 3 and 4: first, middle and last part.
        if kind in (1, 4):
            yield b"".join(parts)
            parts = []


class Comet:
    """Offline archives as `comet upload` takes them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(exist_ok=True)

    def logger(self) -> Logger:
        # Lightning disables an experiment with online=False.
        os.environ["COMET_START_ONLINE"] = "false"
        return CometLogger(project="gradclip", offline_directory=str(self.folder))

    def read(self) -> Points:
        points: Points = []
        for path in sorted(self.folder.glob("*.zip"), key=lambda path: path.stat().st_mtime_ns):
            with zipfile.ZipFile(path) as archive, archive.open("messages.json") as lines:
                messages = [json.loads(line) for line in lines]
            metrics = [one["payload"]["metric"] for one in messages if one["type"] == "metric_msg"]
            points += [(one["metricName"], one["step"], one["metricValue"]) for one in metrics]
        return points


KINDS: dict[str, Any] = {"mlflow": MLflow, "wandb": Wandb, "comet_ml": Comet}


def main(kind: str, folder: Path) -> None:
    tools: dict[str, Any] = {}
    for scenario in SCENARIOS:
        for every in EVERY:
            place = folder / f"{scenario}-{every}".replace(" ", "-")
            place.mkdir()
            # MLflow makes its tables once.
            tool = tools[f"{scenario} {every}"] = KINDS[kind](folder if kind == "mlflow" else place)
            train(scenario, every, tool.logger, place)
    if kind == "wandb":
        Wandb.close()
    found = {name: tool.read() for name, tool in tools.items()}
    (folder / "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    # As in pyproject.toml: whatever a logger warns of, a user would see.
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", r"`isinstance\(treespec, LeafSpec\)` is deprecated")
    # Intervals longer than an epoch, and a second part that saves nothing, are meant here.
    warnings.filterwarnings("ignore", "The number of training batches")
    warnings.filterwarnings("ignore", "Be aware that when using `ckpt_path`")
    main(sys.argv[1], Path(sys.argv[2]))
