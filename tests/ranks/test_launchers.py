"""What starts the processes of a run makes no difference: torchrun with two nodes, submitit, one process by hand.

Each is a program of its own that trains with a Trainer and writes what its first rank knows.
"""

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from kit.extras import needs_tensorboard
from lightning_gradclip import History

pytestmark = [pytest.mark.distributed, pytest.mark.processes]

PROGRAM = """
import copy
import json
import pickle
import sys
import warnings

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from torch.utils.data import DataLoader, TensorDataset

from lightning_gradclip import EmaClip, GradientClipping

torch.set_num_threads(1)


class Regression(LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = torch.nn.Linear(4, 2, dtype=torch.float64)

    def training_step(self, batch, batch_idx):
        return self.layer(batch[0]).square().mean()

    def train_dataloader(self):
        torch.manual_seed(1)
        ranks = self.trainer.world_size
        own = torch.randn(16, 4, dtype=torch.float64)[self.trainer.global_rank :: ranks]
        return DataLoader(TensorDataset(own), batch_size=4 // ranks)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.5)


def train(devices, nodes, strategy="ddp"):
    warnings.filterwarnings("ignore")
    spawns = strategy == "ddp_spawn"
    more = {"measure_per": "layer", "histograms": True, "log_every_n_steps": 2} if spawns else {}
    callback = GradientClipping(EmaClip(warmup_max_norm=0.05), history="history", **more)
    run = {"devices": devices, "num_nodes": nodes, "strategy": "auto" if devices * nodes == 1 else strategy}
    run |= {"enable_checkpointing": False, "enable_progress_bar": False}
    run |= {"logger": TensorBoardLogger(".") if spawns else False}
    model = Regression()
    trainer = Trainer(accelerator="cpu", max_epochs=2, callbacks=[callback], use_distributed_sampler=False, **run)
    trainer.fit(model)
    assert copy.deepcopy(callback).method == pickle.loads(pickle.dumps(callback)).method == callback.method
    return trainer.world_size, trainer.global_rank, torch.cat([one.flatten() for one in model.parameters()]).tolist()


if __name__ == "__main__":
    world, rank, weights = train(*map(int, sys.argv[1:3]), *sys.argv[3:])
    with open(f"rank{rank}.json", "w") as file:
        json.dump([world, weights], file)
"""


def environment() -> dict[str, str]:
    """As it is outside of a run, on the loopback interface alone."""
    ours = {key: value for key, value in os.environ.items() if not re.match("RANK|WORLD|LOCAL_|MASTER|SLURM", key)}
    return {**ours, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}


def written(folder: Path, world: int, of: int | None = None) -> list[Any]:
    """What each rank has, or so many of them, and what stands in the one history that they have written."""
    found = [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(of or world)]
    assert found == [[world, found[0][1]]] * (of or world)
    steps = History(folder / "history").steps
    return [found[0][1], steps["norm"].tolist(), steps["norm_clipped"].tolist()]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    folder = tmp_path_factory.mktemp("alone")
    (folder / "program.py").write_text(PROGRAM)
    subprocess.run([sys.executable, "program.py", "1", "1"], cwd=folder, env=environment(), check=True, timeout=100)
    return written(folder, 1)


def same(found: list[Any], alone: list[Any]) -> None:
    assert len(alone[1]) == 8
    assert alone[2] != alone[1]
    for one, other in zip(found, alone, strict=True):
        assert one == pytest.approx(other, rel=1e-9)


def test_torchrun_with_two_nodes(tmp_path: Path, alone: list[Any]) -> None:
    (tmp_path / "program.py").write_text(PROGRAM)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        where = f"--master-addr=127.0.0.1 --master-port={free.getsockname()[1]}".split()
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1", *where]
    nodes = [
        subprocess.Popen(
            [*command, f"--node-rank={node}", "program.py", "1", "2"],
            cwd=tmp_path,
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for node in range(2)
    ]
    try:
        said = [node.communicate(timeout=150)[0] for node in nodes]
    finally:
        for node in nodes:
            node.kill()
    assert [node.returncode for node in nodes] == [0, 0], "\n".join(said)
    same(written(tmp_path, 2), alone)


def test_a_job_of_submitit(tmp_path: Path, alone: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    submitit = pytest.importorskip("submitit", reason="the sweep extra is not installed")
    (tmp_path / "program.py").write_text(PROGRAM)
    monkeypatch.chdir(tmp_path)
    for key in os.environ.keys() - environment().keys():
        monkeypatch.delenv(key)
    executor = submitit.LocalExecutor(folder=tmp_path / "jobs")
    executor.update_parameters(timeout_min=3)
    command = [sys.executable, "program.py", "2", "1"]
    job = executor.submit(
        submitit.helpers.CommandFunction(command, cwd=str(tmp_path), env=environment(), verbose=False)
    )
    job.result()
    same(written(tmp_path, 2), alone)


@needs_tensorboard
def test_processes_that_are_spawned(tmp_path: Path, alone: list[Any]) -> None:
    """To which the callback travels, with a history, histograms and norms of layers; it can be copied afterwards."""
    (tmp_path / "program.py").write_text(PROGRAM)
    command = [sys.executable, "program.py", "2", "1", "ddp_spawn"]
    done = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    same(written(tmp_path, 2, of=1), alone)
    names, norms = History(tmp_path / "history").scope_norms()
    assert (names, norms[:, 0].tolist()) == (("layer",), pytest.approx(alone[1], rel=1e-6))
    assert list(tmp_path.rglob("events.out.tfevents*"))
