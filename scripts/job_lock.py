"""Exactly one container per job folder: a lock the kernel releases when its holder dies, and the holder's name in it.

with take_lock(folder) as mine: ...        # mine is False when another container works there
owner = lock_owner(folder)                 # Process(pid, started) of that container, or None
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

LOCK = ".container.lock"


@dataclass(frozen=True)
class Process:
    """A process by number and start time (clock ticks since boot), so that a reused number is another process."""

    pid: int
    started: int


@contextmanager
def take_lock(folder: Path, name: str = LOCK, wait: bool = False) -> Iterator[bool]:
    """Holds the folder's lock inside the block; yields False at once when another holds it, unless it shall `wait`."""
    handle = os.open(folder / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        if not _locked(handle, wait):
            yield False
            return
        _sign(handle)
        yield True
    finally:
        os.close(handle)


def lock_owner(folder: Path, name: str = LOCK) -> Process | None:
    """The process that holds the folder's lock now; None when none does."""
    for _ in range(500):  # between taking the lock and signing it lie microseconds
        try:
            handle = os.open(folder / name, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        try:
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return None
        except BlockingIOError:
            owner = _signature(os.pread(handle, 200, 0))
            if owner is not None and is_alive(owner):
                return owner
        finally:
            os.close(handle)
        time.sleep(0.01)
    return None


def this_process() -> Process:
    """This process."""
    return Process(os.getpid(), _started(os.getpid()) or 0)


def process_of(pid: int) -> Process | None:
    """The process that has this number now; None when there is none or it is only waiting to be reaped."""
    started = _started(pid)
    return None if started is None else Process(pid, started)


def is_alive(process: Process) -> bool:
    """Whether that very process still runs."""
    return _started(process.pid) == process.started


def _locked(handle: int, wait: bool) -> bool:
    if wait:
        fcntl.flock(handle, fcntl.LOCK_EX)
        return True
    for _ in range(20):  # lock_owner holds a shared lock for microseconds
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            time.sleep(0.01)
    return False


def _sign(handle: int) -> None:
    try:
        os.ftruncate(handle, 0)
        os.pwrite(handle, json.dumps(vars(this_process())).encode(), 0)
    except OSError:  # a full disk: the lock holds, only its owner is not named
        return


def _signature(data: bytes) -> Process | None:
    try:
        value = json.loads(data)
        return Process(int(value["pid"]), int(value["started"]))
    except (ValueError, KeyError, TypeError):
        return None


def _started(pid: int) -> int | None:
    """Field 22 of /proc/PID/stat (proc(5)); the name in field 2 may hold spaces and brackets, so count from its end."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    fields = text.rpartition(")")[2].split()
    return None if fields[0] in "ZX" else int(fields[19])
