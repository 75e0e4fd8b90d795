"""Python programs as a user starts them, in a fork of the test: what takes seconds to import is there already."""

import gc
import io
import logging
import os
import runpy
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

from kit.root import ROOT


def run(arguments: Sequence[str], folder: Path, *, timeout: float = 300.0) -> "CompletedProcess[str]":
    """What `python *arguments` comes to in this folder: a file or `-c` and a program, and what they are told.

    Raises:
        TimeoutError: After `timeout` seconds, with what was printed until then.
    """
    # Once for all programs.
    import hydra  # noqa: F401
    import lightning.pytorch  # noqa: F401

    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        with warnings.catch_warnings():
            # Other threads of this process may hold a lock; the program runs on one thread and uses none of theirs.
            warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)
            process = os.fork()
        if process == 0:
            os._exit(_as_a_program(arguments, folder, out.fileno(), err.fileno()))
        code = _ended(process, time.monotonic() + timeout)
        stdout, stderr = (_text(stream) for stream in (out, err))
    if code is None:
        raise TimeoutError(f"{arguments} took more than {timeout} s: {stdout}{stderr}")
    return CompletedProcess([*arguments], code, stdout, stderr)


def _ended(process: int, deadline: float) -> int | None:
    while time.monotonic() < deadline:
        done, status = os.waitpid(process, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    # The program and what it has started.
    os.killpg(process, signal.SIGKILL)
    os.waitpid(process, 0)
    return None


def _text(stream: Any) -> str:
    stream.seek(0)
    return stream.read().decode()


def _as_a_program(arguments: Sequence[str], folder: Path, out: int, err: int) -> int:
    """Runs it in this process, which is a new one; its exit code."""
    gc.freeze()
    os.setsid()
    for one, other in ((os.open(os.devnull, os.O_RDONLY), 0), (out, 1), (err, 2)):
        os.dup2(one, other)
    sys.stdout, sys.stderr = (io.TextIOWrapper(os.fdopen(number, "wb"), line_buffering=True) for number in (1, 2))
    _forget_the_test()
    os.chdir(folder)
    try:
        _start(arguments)
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:  # noqa: BLE001 - as the interpreter does
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    return code


def _start(arguments: Sequence[str]) -> None:
    if arguments[0] == "-c":
        sys.argv, sys.path[0:0] = ["-c", *arguments[2:]], [""]
        exec(compile(arguments[1], "<string>", "exec"), {"__name__": "__main__"})
    else:
        sys.argv, sys.path[0:0] = [*arguments], [str(Path(arguments[0]).parent)]
        runpy.run_path(arguments[0], run_name="__main__")


def _forget_the_test() -> None:
    """What pytest has set for its own process, and modules of other programs, which may have the same names."""
    import torch

    # What Python itself begins with, and where it writes them.
    warnings.resetwarnings()
    for category in (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning):
        warnings.simplefilter("ignore", category)
    warnings.filterwarnings("default", category=DeprecationWarning, module="__main__")
    warnings.showwarning = _on_stderr
    logging.root.handlers.clear()
    # Threads do not come along with a fork; of small models they would only wait for each other.
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    programs = [str(ROOT / name) + os.sep for name in ("examples", "benchmarks")]
    for name, module in list(sys.modules.items()):
        if (getattr(module, "__file__", None) or "").startswith(tuple(programs)):
            del sys.modules[name]


def _on_stderr(message: Any, category: Any, filename: str, lineno: int, file: Any = None, line: Any = None) -> None:
    print(warnings.formatwarning(message, category, filename, lineno, line), end="", file=sys.stderr)
