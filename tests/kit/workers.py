"""Run a function in several forked processes, each in the environment that torchrun would give it.

Lightning then believes that its processes were started for it and launches none, so that any strategy runs inside a
test. Forking takes a fraction of a second where starting an interpreter and importing torch takes many.
"""

import faulthandler
import functools
import gc
import io
import multiprocessing
import os
import pickle
import queue
import socket
import time
import traceback
import warnings
from collections.abc import Callable, Mapping
from multiprocessing.process import BaseProcess
from typing import Any

# Seconds that other workers have to answer after one has failed.
_GRACE = 0.5


class WorkerError(Exception):
    """A worker failed, died or did not answer; the message is its traceback, or says which."""


def run(function: Callable[..., Any], *arguments: Any, world: int = 2, timeout: float = 60.0) -> list[Any]:
    """Call `function(rank, *arguments)` in `world` processes and return what it returned, by rank.

    Results travel pickled: tensors arrive as copies, on the CPU.

    Raises:
        WorkerError: Soon after one worker fails or dies, or after `timeout` seconds.
    """
    # What they would each import when they first use it.
    import torch.distributed.algorithms.ddp_comm_hooks.debugging_hooks
    import torch.distributed.checkpoint.state_dict
    import torch.distributed.fsdp.sharded_grad_scaler  # noqa: F401

    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    port = _free_port()
    deadline = time.monotonic() + timeout
    workers = [
        context.Process(target=_work, args=(rank, world, port, timeout, answers, function, arguments), daemon=True)
        for rank in range(world)
    ]
    try:
        with warnings.catch_warnings():
            # Other threads of this process may hold a lock; a worker runs on one thread and uses none of theirs.
            warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)
            for worker in workers:
                worker.start()
        results = _collect(answers, workers, deadline)
    finally:
        for worker in workers:
            worker.join(5.0)
            if worker.is_alive():
                worker.kill()
                worker.join()
    return [results[rank] for rank in range(world)]


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

    Names with worlds of one size come one after the other in the same processes, which saves most of the time; each
    has `timeout` seconds.
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


def _collect(answers: Any, workers: list[BaseProcess], deadline: float) -> dict[int, Any]:
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
                results[rank] = pickle.loads(result)
        if failures:
            # The others lose their connection to it: whoever comes first, all that went wrong is told.
            deadline = min(deadline, time.monotonic() + _GRACE)
    if len(results) == len(workers):
        return results
    for worker in workers:
        worker.kill()
    if failures:
        raise WorkerError("\n".join(f"rank {rank}: {failures[rank]}" for rank in sorted(failures)))
    late = [rank for rank in range(len(workers)) if rank not in results]
    raise WorkerError(f"no answer in time from ranks {late}; their stacks are on stderr")


class _Pickler(pickle.Pickler):
    """Tensors as plain bytes: torch's own way takes a tenth of a millisecond for each at either end.

    They arrive contiguous and without a gradient.
    """

    def reducer_override(self, value: Any) -> Any:
        import torch

        if type(value) is not torch.Tensor:
            return NotImplemented
        # As integers, of which numpy knows every size.
        bits = value.detach().contiguous().view(-1).view(torch.uint8)
        return _tensor, (bits.numpy().tobytes(), value.dtype, tuple(value.shape))


def _tensor(bits: bytes, dtype: Any, shape: tuple[int, ...]) -> Any:
    import torch

    if not bits:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(bytearray(bits), dtype=dtype).view(shape)


def _work(
    rank: int,
    world: int,
    port: int,
    timeout: float,
    answers: Any,
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world),
        LOCAL_WORLD_SIZE=str(world),
        GROUP_RANK="0",
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        TORCHELASTIC_RUN_ID="tests",
        GLOO_SOCKET_IFNAME="lo",
        OMP_NUM_THREADS="1",
    )
    # What the fork brought along stays: a collection would look at each object of it, and copy the memory they lie in.
    gc.freeze()
    # A worker that hangs says where, just before it is killed.
    faulthandler.dump_traceback_later(0.9 * timeout)
    import torch

    torch.set_num_threads(1)
    failure, result = "", b""
    try:
        # Pickled here, so that a result that cannot travel is a failure with a traceback as well.
        stream = io.BytesIO()
        _Pickler(stream, pickle.HIGHEST_PROTOCOL).dump(function(rank, *arguments))
        result = stream.getvalue()
    except BaseException:  # noqa: BLE001 - also SystemExit: whatever ends a worker is the test's failure
        failure = traceback.format_exc()
    answers.put((rank, failure, result))
    answers.close()
    answers.join_thread()
    if not failure and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]
