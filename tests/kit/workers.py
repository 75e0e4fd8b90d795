"""Run a function in several processes at once, the ranks of one run.

`run` asks processes that are kept for the session, one gloo group all the time: a case costs what it does. `run_fresh`
forks new ones, each in the environment that torchrun would give it: Lightning then believes that its processes were
started for it and launches none, so that any strategy runs inside a test. That costs a second for each, and is for what
makes or leaves a group itself, or leaves something else behind.
"""

import contextlib
import faulthandler
import functools
import gc
import multiprocessing
import os
import queue
import shutil
import socket
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple

from kit.travel import packed, unpacked

# Seconds that other workers have to answer after one has failed.
_GRACE = 0.5
# Seconds after which an idle worker looks whether its test is still there.
_PATIENCE = 5.0


class WorkerError(Exception):
    """A worker failed, died or did not answer; the message is its traceback, or says which."""


class _Task(NamedTuple):
    """What a kept worker is to do, in the folder and with the warnings of the test that asks."""

    call: bytes
    timeout: float
    folder: str
    filters: list[Any]


def run(function: Callable[..., Any], *arguments: Any, world: int = 2, timeout: float = 60.0) -> list[Any]:
    """Call `function(rank, *arguments)` in `world` processes and return what it returned, by rank.

    They are the same processes for each call, in one gloo group, until one of them fails. All that travels is pickled:
    functions inside others as well, classes inside functions not. Tensors arrive as copies, on the CPU.

    Raises:
        WorkerError: Soon after one worker fails or dies, or after `timeout` seconds.
    """
    task = _Task(packed((function, arguments)), timeout, os.getcwd(), warnings.filters)
    kept = _kept.pop(world, None) or _Kept(world)
    results = kept.do(task)
    _kept[world] = kept
    return results


def run_fresh(function: Callable[..., Any], *arguments: Any, world: int = 2, timeout: float = 60.0) -> list[Any]:
    """As `run`, in processes of its own that are in no group yet and see what this one has; results are pickled."""
    answers = _context.Queue()
    deadline = time.monotonic() + timeout
    with _port_of_ours() as port:
        workers = _started(world, lambda rank: _work_once(rank, world, port, timeout, answers, function, arguments))
        try:
            return _collect(answers, workers, deadline)
        finally:
            _end(workers)


def leave() -> None:
    """End the processes that are kept, and delete where they met."""
    while _kept:
        _kept.popitem()[1].end()


def once(function: Callable[..., Any]) -> Callable[..., Any]:
    """`functools.cache` that keeps what was raised as well: hundreds of tests do not run a broken thing again."""

    @functools.cache
    def outcome(*arguments: Any) -> tuple[Any, Exception | None]:
        try:
            return function(*arguments), None
        except Exception as error:  # noqa: BLE001 - raised again for each that asks
            return None, error

    def told(*arguments: Any) -> Any:
        result, error = outcome(*arguments)
        if error is not None:
            raise error
        return result

    return told


def run_each(function: Callable[..., Any], worlds: Mapping[str, int], *, timeout: float = 60.0) -> dict[str, list[Any]]:
    """Call `function(rank, name)` for each name, in as many processes as `worlds` says; by name what `run` returns.

    Names with worlds of one size come one after the other in one call, each has `timeout` seconds.
    """
    found: dict[str, list[Any]] = {}
    for world in sorted(set(worlds.values())):
        names = [name for name in worlds if worlds[name] == world]

        def work(rank: int, names: list[str] = names) -> dict[str, Any]:
            results = {}
            for name in names:
                try:
                    results[name] = function(rank, name)
                except BaseException as error:
                    raise RuntimeError(f"at {name!r}") from error
            return results

        ranks = run(work, world=world, timeout=timeout * len(names))
        found |= {name: [results[name] for results in ranks] for name in names}
    return {name: found[name] for name in worlds}


class _Kept:
    """Processes that are kept, and were forked when all modules of tests had been imported."""

    def __init__(self, world: int) -> None:
        self._answers = _context.Queue()
        self._tasks = [_context.Queue() for _ in range(world)]
        self._folder = tempfile.mkdtemp(prefix="ranks-")
        meeting = str(Path(self._folder) / "meeting")
        self._workers = _started(world, lambda rank: _serve(rank, world, meeting, self._tasks[rank], self._answers))

    def do(self, task: _Task) -> list[Any]:
        deadline = time.monotonic() + task.timeout
        for tasks in self._tasks:
            tasks.put(task)
        try:
            return _collect(self._answers, self._workers, deadline)
        except BaseException:
            # Whoever is left waits for the others in some collective.
            self.end()
            raise

    def end(self) -> None:
        for worker in self._workers:
            worker.kill()
        _end(self._workers)
        shutil.rmtree(self._folder, ignore_errors=True)


_context = multiprocessing.get_context("fork")
_kept: dict[int, _Kept] = {}


def _started(world: int, work: Callable[[int], None]) -> list[BaseProcess]:
    # What they would each import when they first use it.
    import torch._dynamo
    import torch.distributed.algorithms.ddp_comm_hooks.debugging_hooks
    import torch.distributed.checkpoint.state_dict
    import torch.distributed.fsdp.sharded_grad_scaler  # noqa: F401

    workers = [_context.Process(target=work, args=(rank,), daemon=True) for rank in range(world)]
    with warnings.catch_warnings():
        # Other threads of this process may hold a lock; a worker runs on one thread and uses none of theirs.
        warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)
        for worker in workers:
            worker.start()
    return workers


def _end(workers: list[BaseProcess]) -> None:
    for worker in workers:
        worker.join(5.0)
        if worker.is_alive():
            worker.kill()
            worker.join()


def _collect(answers: Any, workers: list[BaseProcess], deadline: float) -> list[Any]:
    results: dict[int, Any] = {}
    failures: dict[int, str] = {}
    while len(results) + len(failures) < len(workers):
        # Asked before the queue is: what a dead worker has sent is in it by then.
        open_ones = [rank for rank in range(len(workers)) if rank not in results and rank not in failures]
        dead = [rank for rank in open_ones if not workers[rank].is_alive()]
        try:
            rank, failure, result = answers.get(timeout=0.1)
        except queue.Empty:
            if dead:
                failures |= {rank: f"died without an answer, exit code {workers[rank].exitcode}" for rank in dead}
            elif time.monotonic() > deadline:
                break
        else:
            if failure:
                failures[rank] = failure
            else:
                results[rank] = unpacked(result)
        if failures:
            # The others lose their connection to it: whoever comes first, all that went wrong is told.
            deadline = min(deadline, time.monotonic() + _GRACE)
    if len(results) == len(workers):
        return [results[rank] for rank in range(len(workers))]
    for worker in workers:
        worker.kill()
    if failures:
        raise WorkerError("\n".join(f"rank {rank}: {failures[rank]}" for rank in sorted(failures)))
    late = [rank for rank in range(len(workers)) if rank not in results]
    raise WorkerError(f"no answer in time from ranks {late}; their stacks are on stderr")


def _work_once(
    rank: int,
    world: int,
    port: int,
    timeout: float,
    answers: Any,
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> None:
    _become(rank, world, MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    import torch

    failure = _answer(rank, answers, timeout, lambda: function(rank, *arguments))
    answers.close()
    answers.join_thread()
    if not failure and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _serve(rank: int, world: int, meeting: str, tasks: Any, answers: Any) -> None:
    """Do what comes, until the test has gone."""
    test = os.getppid()
    _become(rank, world)
    import torch

    # A file, since a port could be taken by somebody else before rank 0 listens there.
    store = torch.distributed.FileStore(meeting, world)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=world)
    while os.getppid() == test:
        with contextlib.suppress(queue.Empty):
            task: _Task = tasks.get(timeout=_PATIENCE)
            _answer(rank, answers, task.timeout, lambda task=task: _done(rank, task))


def _done(rank: int, task: _Task) -> Any:
    os.chdir(task.folder)
    with warnings.catch_warnings():
        warnings.filters[:] = task.filters
        function, arguments = unpacked(task.call)
        return function(rank, *arguments)


def _answer(rank: int, answers: Any, timeout: float, work: Callable[[], Any]) -> str:
    # A worker that hangs says where, just before it is killed.
    faulthandler.dump_traceback_later(0.9 * timeout)
    failure, result = "", b""
    try:
        # Pickled here, so that a result that cannot travel is a failure with a traceback as well.
        result = packed(work())
    except BaseException:  # noqa: BLE001 - also SystemExit: whatever ends a worker is the test's failure
        failure = traceback.format_exc()
    faulthandler.cancel_dump_traceback_later()
    answers.put((rank, failure, result))
    return failure


def _become(rank: int, world: int, **more: str) -> None:
    """One of the processes that torchrun would start."""
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world),
        LOCAL_WORLD_SIZE=str(world),
        GROUP_RANK="0",
        TORCHELASTIC_RUN_ID="tests",
        GLOO_SOCKET_IFNAME="lo",
        OMP_NUM_THREADS="1",
        **more,
    )
    # What the fork brought along stays: a collection would look at each object of it, and copy the memory they lie in.
    gc.freeze()
    import torch

    torch.set_num_threads(1)


@contextlib.contextmanager
def _port_of_ours() -> Iterator[int]:
    """A port on which a rank may listen, and which the system gives to nobody else meanwhile."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        # Set only now: nobody was bound to it then, and whoever asks for this very port may be, as a listener does.
        one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        yield one.getsockname()[1]
