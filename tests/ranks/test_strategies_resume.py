"""Checkpoints in the middle of an epoch under strategies that shard: to the bit, and on another number of ranks."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch.optim import AdamW

from kit import workers
from kit.boring import Batches, csv_rows, equal, fit
from kit.strategies import WAYS, Fitted, batches, quieten_torch, spreading, whole
from lightning_gradclip import EmaClip, GradientClipping

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`:UserWarning"),
]

STEPS, SAVED = 6, 3
# The format of the checkpoint, and on 2 and 4 ranks the way that writes it.
KINDS: dict[str, tuple[dict[int, str], dict[str, Any]]] = {
    "ddp": ({2: "ddp"}, {}),
    "fsdp1, full": ({2: "fsdp1_full", 4: "fsdp1_full"}, {"state_dict_type": "full"}),
    "fsdp1, sharded": ({2: "fsdp1_full", 4: "fsdp1_full"}, {"state_dict_type": "sharded"}),
    "fsdp2, full": ({2: "fsdp2", 4: "fsdp2_4"}, {"save_distributed_checkpoint": False}),
    "fsdp2, sharded": ({2: "fsdp2", 4: "fsdp2_4"}, {"save_distributed_checkpoint": True}),
}
KINDS = {kind: how for kind, how in KINDS.items() if how[0][2] in WAYS}


def adamw(groups: Any) -> AdamW:
    return AdamW(groups, lr=0.01, weight_decay=0.1)


class Killed(Callback):
    """Ends one process as the system does when memory runs out."""

    def __init__(self, rank: int, after: int) -> None:
        self.rank, self.after = rank, after

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_rank == self.rank and trainer.global_step == self.after:
            os.kill(os.getpid(), signal.SIGKILL)


def train(kind: str, rank: int, world: int, csv: CSVLogger, *callbacks: Callback, **options: Any) -> dict[str, Any]:
    """Six steps in epochs of four, as one of several ranks or alone."""
    clipping = GradientClipping(EmaClip(warmup=2, per="layer"), measure_per="layer")
    module, data = Fitted(torch.float64, adamw), batches(4)
    if world > 1:
        quieten_torch()
        ways, settings = KINDS[kind]
        way = WAYS[ways[min(world, max(ways))]]._replace(world=world, parts=world)
        data = way.share(data, rank)
        module = spreading(module, way.cut)
        options |= {"strategy": way.strategy(**settings), "devices": world, "use_distributed_sampler": False}
    trainer = fit(
        module,
        Batches(data),
        clipping,
        *callbacks,
        logger=csv,
        log_every_n_steps=2,
        max_epochs=-1,
        max_steps=STEPS,
        enable_checkpointing=bool(callbacks),
        weights_only=True,
        **options,
    )
    return {
        "weights": whole(trainer),
        "clipping": clipping.state_dict(),
        "shown": {key: value for key, value in trainer.callback_metrics.items() if key.startswith("gradclip")},
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


def straight(kind: str, world: int, folder: Path) -> list[dict[str, Any]]:
    """What a run without an interruption gives; it saves on its way."""
    return all_straight(folder)[f"{kind} on {world}"]


@workers.once
def all_straight(folder: Path) -> dict[str, list[dict[str, Any]]]:
    def work(rank: int, name: str) -> dict[str, Any]:
        kind, world = runs[name]
        return train(kind, rank, world, CSVLogger(folder / name, name="straight"), saving(folder / name))

    begun = [(kind, 2) for kind in KINDS] + [(kind, before) for kind, before, _ in CHANGES if kind in KINDS]
    runs = {f"{kind} on {world}": (kind, world) for kind, world in begun}
    return workers.run_each(work, {name: world for name, (_, world) in runs.items()})


@workers.once
def all_resumed(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """What comes of going on where these have saved, in other processes."""

    def work(rank: int, name: str) -> dict[str, Any]:
        kind, before, after = runs[name]
        saved = folder / f"{kind} on {before}"
        return going_on(kind, rank, after, saved, folder / name)

    all_straight(folder)
    changes = [(kind, 2, 2) for kind in KINDS] + [change for change in CHANGES if change[0] in KINDS]
    runs = {f"{kind} from {before} to {after}": (kind, before, after) for kind, before, after in changes}
    found = workers.run_each(work, {name: after for name, (_, _, after) in runs.items() if after > 1})
    return found | {name: [work(0, name)] for name, (_, _, after) in runs.items() if after == 1}


def resumed(kind: str, before: int, after: int, folder: Path) -> tuple[list[dict[str, Any]], CSVLogger]:
    """By rank what came of it, and what it logged."""
    name = f"{kind} from {before} to {after}"
    return all_resumed(folder)[name], CSVLogger(folder / name, version=0)


def saving(folder: Path) -> ModelCheckpoint:
    return ModelCheckpoint(folder / "saved", every_n_train_steps=SAVED, save_top_k=-1, filename="{step}")


def going_on(kind: str, rank: int, world: int, run: Path, csv: Path) -> dict[str, Any]:
    """Go on where the run in this folder saved."""
    return train(kind, rank, world, CSVLogger(csv), ckpt_path=run / "saved" / f"step={SAVED}.ckpt")


def logged(kind: str, world: int, folder: Path) -> list[tuple[int, dict[str, float]]]:
    return csv_rows(CSVLogger(folder / f"{kind} on {world}", name="straight", version=0))


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_is_the_straight_run_to_the_bit(kind: str, folder: Path) -> None:
    expected = straight(kind, 2, folder)
    got, csv = resumed(kind, 2, 2, folder)
    assert equal(expected[0], expected[1])
    assert equal(got, expected)
    assert expected[0]["clipping"]["clippers"][0]["step"] == STEPS
    rows = logged(kind, 2, folder)
    assert [step for step, _ in rows] == [1, 3, 5]
    # The window that was open when the checkpoint was written goes on: no step is lost, and none comes twice.
    assert csv_rows(csv) == rows[1:]


CHANGES = [
    ("ddp", 2, 1),
    ("fsdp1, full", 2, 1),
    ("fsdp1, sharded", 2, 4),
    ("fsdp2, full", 2, 1),
    ("fsdp2, sharded", 2, 4),
    ("fsdp2, sharded", 4, 2),
]


@pytest.mark.parametrize(("kind", "before", "after"), [change for change in CHANGES if change[0] in KINDS])
def test_another_number_of_ranks_goes_on(kind: str, before: int, after: int, folder: Path) -> None:
    expected = straight(kind, before, folder)[0]
    (got, *others), csv = resumed(kind, before, after, folder)
    assert all(equal(other, got) for other in others)
    (mine,), (theirs,) = (one["clipping"]["clippers"].values() for one in (got, expected))
    for one, other in (
        (got["weights"], expected["weights"]),
        (got["shown"], expected["shown"]),
        (mine["learned"]["values"], theirs["learned"]["values"]),
    ):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-12)
    rows = csv_rows(csv)
    assert [step for step, _ in rows] == [3, 5]
    for (_, values), (_, those) in zip(rows, logged(kind, before, folder)[1:], strict=True):
        assert values == pytest.approx(those, rel=1e-6)


@pytest.mark.parametrize("kind", [kind for kind in ("ddp", "fsdp2, sharded") if kind in KINDS])
def test_a_killed_run_fails_and_goes_on_to_the_bit(kind: str, folder: Path, tmp_path: Path) -> None:
    def killed(rank: int) -> None:
        train(kind, rank, 2, CSVLogger(tmp_path, name="killed"), saving(tmp_path), Killed(rank=1, after=SAVED + 1))

    with pytest.raises(workers.WorkerError, match="rank 1: died without an answer, exit code -9"):
        workers.run(killed)
    got = workers.run(lambda rank: going_on(kind, rank, 2, tmp_path, tmp_path))
    assert equal(got, straight(kind, 2, folder))
