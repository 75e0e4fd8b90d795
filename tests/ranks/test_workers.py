"""The workers that other tests stand on: one group that is kept, new ones, and failures that are told."""

import os
import socket
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from kit import workers
from kit.boring import Batches, Prescribed, gradients, make_trainer

pytestmark = pytest.mark.distributed

Run = Callable[..., list[Any]]
either = pytest.mark.parametrize("run", [workers.run, workers.run_fresh])


@either
def test_two_workers_see_each_other_and_the_environment_of_torchrun(run: Run) -> None:
    def work(rank: int) -> tuple[int, int, float]:
        trainer = make_trainer(strategy="ddp", devices=2)
        trainer.fit(Prescribed(), Batches(gradients(1)))
        total = torch.tensor(float(rank + 1))
        dist.all_reduce(total)
        return int(os.environ["RANK"]), trainer.world_size, float(total)

    assert run(work) == [(0, 2, 3.0), (1, 2, 3.0)]


@either
def test_what_is_inside_a_test_travels(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    weight = torch.arange(6.0).view(2, 3).T

    def depth(rank: int, left: int = 3) -> Any:
        return depth(rank, left - 1) if left else (rank, weight[1:], weight.to_sparse(), torch.empty(0, 2), Path.cwd())

    with warnings.catch_warnings():
        warnings.simplefilter("error", ImportWarning)
        with pytest.raises(workers.WorkerError, match="ImportWarning: like this one"):
            run(lambda rank: warnings.warn("like this one", ImportWarning, stacklevel=1))
    for rank, (other, dense, sparse, empty, folder) in enumerate(run(depth)):
        assert (rank, tmp_path) == (other, folder)
        assert torch.equal(dense, weight[1:])
        assert torch.equal(sparse.to_dense(), weight)
        assert empty.shape == (0, 2)


def test_they_are_kept_until_one_fails() -> None:
    def processes() -> list[int]:
        return workers.run(lambda rank: os.getpid())

    first = processes()
    assert processes() == first
    with pytest.raises(workers.WorkerError):
        workers.run(lambda rank: 1 // rank)
    assert not {*processes()} & {*first}
    assert workers.run_fresh(lambda rank: dist.is_initialized()) == [False, False]


def _raises() -> None:
    raise ValueError("this is the reason")


@either
@pytest.mark.parametrize(
    ("fail", "message"),
    [
        (_raises, r"rank 1: Traceback(.|\n)*in _raises(.|\n)*ValueError: this is the reason"),
        (lambda: os._exit(3), "rank 1: died without an answer, exit code 3"),
        (lambda: (one for one in ()), r"rank 1: (.|\n)*pickle"),
    ],
    ids=["raises", "dies", "returns what cannot travel"],
)
def test_a_worker_that_fails_fails_the_test(run: Run, fail: Callable[[], Any], message: str) -> None:
    def work(rank: int) -> Any:
        if rank == 1:
            return fail()
        # Rank zero waits for rank one, as in a collective.
        time.sleep(30.0)
        return None

    start = time.monotonic()
    with pytest.raises(workers.WorkerError, match=message):
        run(work)
    assert time.monotonic() - start < 20.0


@either
def test_a_worker_that_hangs_fails_the_test(run: Run) -> None:
    start = time.monotonic()
    with pytest.raises(workers.WorkerError, match=r"no answer in time from ranks \[1\]"):
        run(lambda rank: time.sleep(30.0 * rank), timeout=0.5)
    assert time.monotonic() - start < 20.0


def test_nothing_is_left_of_them_in_the_end() -> None:
    first = workers.run(lambda rank: os.getpid())
    folder = Path(workers._kept[2]._folder)
    assert folder.is_dir()
    workers.leave()
    assert not folder.exists()
    assert not {*workers.run(lambda rank: os.getpid())} & {*first}
    for process in first:
        with pytest.raises(ProcessLookupError):
            os.kill(process, 0)


def test_a_port_is_given_to_nobody_else_while_a_rank_may_listen_there() -> None:
    with workers._port_of_ours() as port, socket.socket() as other, socket.socket() as rank:
        with pytest.raises(OSError, match="in use"):
            other.bind(("127.0.0.1", port))
        rank.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        rank.bind(("127.0.0.1", port))
        rank.listen()
