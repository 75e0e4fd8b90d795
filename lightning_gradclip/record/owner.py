"""A folder belongs to one writer: a lock that dies with its process, and a mark that says who holds or held it.

The operating system gives up the lock of a process that ends, however it ends, so that a mark without a lock is that of
a dead owner. Between machines locks are not always told: there the owner touches its mark every few seconds, and one
that is old was left behind. The clock is that of the file system, on both sides.
"""

import fcntl
import getpass
import os
import socket
import sys
import threading
import time
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning_gradclip.record.files import HistoryFormatError, read_json, write_json

# Seconds between two signs of life, and how long their absence means death.
_BEAT, _DEAD = 15.0, 120.0
_MARK, _LOCK = "owner.json", ".owner.lock"
# Locks do not tell two writers of one process apart; nor may a process open a locked file again, which unlocks it.
_held: "weakref.WeakValueDictionary[tuple[int, int], Owner]" = weakref.WeakValueDictionary()


class HistoryOwnedError(HistoryFormatError):
    """Somebody else writes to this folder; the message says who."""


class Owner:
    """Holds a folder for one writer, from here to `close`, and says so in its mark.

    Args:
        folder: A folder that is there.

    Raises:
        HistoryOwnedError: If a living owner holds it, in this process, on this machine or on another.
        OSError: If the file system refuses.
    """

    def __init__(self, folder: Path) -> None:
        self._mark = folder / _MARK
        at = folder.stat()
        self._key = (at.st_dev, at.st_ino)
        if (other := _held.get(self._key)) is not None and other._pid == os.getpid():
            raise _refusal(folder, _mark_of(folder), "this process")
        self._file = (folder / _LOCK).open("ab")
        try:
            _lock(self._file.fileno(), folder)
            _require_dead(folder)
            self._pid = os.getpid()
            self._write(closed=False)
        except BaseException:
            self._file.close()
            raise
        _held[self._key] = self
        self._ends = threading.Event()
        # It must not keep alive an owner that nobody else has.
        threading.Thread(target=_beat, args=(self._mark, self._ends), daemon=True).start()
        weakref.finalize(self, self._ends.set)

    def moved(self, folder: Path) -> None:
        """Go on with the mark in the folder that has another name by now."""
        self._mark = folder / _MARK
        self._ends.set()
        self._ends = threading.Event()
        threading.Thread(target=_beat, args=(self._mark, self._ends), daemon=True).start()
        weakref.finalize(self, self._ends.set)

    def close(self) -> None:
        """Give the folder up; the mark says who wrote last."""
        if self._file.closed:
            return
        self._ends.set()
        if self._pid == os.getpid():
            try:
                if self._mark.exists():
                    self._write(closed=True)
            finally:
                self._file.close()
                _held.pop(self._key, None)

    def _write(self, *, closed: bool) -> None:
        write_json(self._mark, {**_self(), "closed": closed})


def _self() -> dict[str, Any]:
    """Who this process is, to those who find its mark."""
    return {
        "host": socket.gethostname(),
        "machine": _machine(),
        "pid": os.getpid(),
        "user": _user(),
        "command": " ".join(sys.argv)[:500],
        "since": time.strftime("%Y-%m-%d %H:%M:%S"),
    }


def _machine() -> str:
    """What tells this machine, since it was started, from all others; its name where that cannot be known."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return socket.gethostname()


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):
        return str(os.getuid())


def _lock(descriptor: int, folder: Path) -> None:
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:
        raise _refusal(folder, _mark_of(folder), "another process") from error
    except OSError:
        # A file system without locks: the signs of life have to do.
        return


def _require_dead(folder: Path) -> None:
    """Refuse a mark whose owner may live where its lock is not seen: on another machine."""
    mark = _mark_of(folder)
    if not mark or mark.get("closed") or mark.get("machine") == _machine():
        return
    try:
        last = (folder / _MARK).stat().st_mtime
        # The lock file gets the present time of the file system.
        os.utime(folder / _LOCK)
        now = (folder / _LOCK).stat().st_mtime
    except FileNotFoundError:
        return
    if now - last < _DEAD:
        raise _refusal(folder, mark, "another machine")


def _mark_of(folder: Path) -> Mapping[str, Any]:
    try:
        mark = read_json(folder / _MARK)
    except (OSError, HistoryFormatError):
        return {}
    return mark if isinstance(mark, dict) else {}


def _refusal(folder: Path, mark: Mapping[str, Any], where: str) -> HistoryOwnedError:
    known = {key: mark.get(key, "unknown") for key in ("pid", "host", "user", "since", "command")}
    return HistoryOwnedError(
        f"{folder} belongs to {where}, which is writing to it: process {known['pid']} of {known['user']} on "
        f"{known['host']} since {known['since']} ({known['command']}); use another folder, or end that one"
    )


def _beat(mark: Path, ends: threading.Event) -> None:
    """Touch the mark until its owner is done or gone."""
    while not ends.wait(_BEAT):
        try:
            os.utime(mark)
        except OSError:
            # Moved or deleted: the writer sees to that.
            continue
