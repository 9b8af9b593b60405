"""Runs the container of a Pod as a process of this machine: own session, own folder, own environment, own output.

running = ProcessRunner().start("pod1", ["python", "-m", "scripts.container", ...], environment, folder)
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

from scripts.container.supervisor import start_child
from scripts.machine import ROOT

GRACE_SECONDS = 2.0  # from SIGTERM to SIGKILL
_PASSED_ON = ("PATH", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "VIRTUAL_ENV")


class Running(Protocol):
    """A container that was started."""

    def exit_code(self) -> int | None:
        """None while it runs."""

    def lines(self) -> list[str]:
        """What it printed since the last call, whole lines."""

    def end(self, *, at_once: bool = False) -> None:
        """Ends it and all it started: told first, unless `at_once`."""


class Runner(Protocol):
    """What starts containers."""

    def start(self, pod_id: str, command: Sequence[str], environment: Mapping[str, str], folder: Path) -> Running:
        """Starts the container of a Pod. Raises ValueError for a command that this machine has no image for."""


class ProcessRunner:
    """Starts `python -m MODULE ...` from this repository; `modules` puts one module in the place of another.

    The processes die with the thread that made them, so that one thread that stays makes them all.
    """

    def __init__(self, modules: Mapping[str, str] | None = None, grace_seconds: float = GRACE_SECONDS) -> None:
        self._modules, self._grace_seconds = modules or {}, grace_seconds
        self._thread = ThreadPoolExecutor(max_workers=1)

    def start(self, pod_id: str, command: Sequence[str], environment: Mapping[str, str], folder: Path) -> Running:
        if list(command[:2]) != ["python", "-m"] or len(command) < 3 or not command[2].startswith("scripts."):
            raise ValueError("the local Runpod has no images: it runs `python -m scripts.MODULE ...` and nothing else")
        module = self._modules.get(command[2], command[2])
        folder.mkdir(parents=True, exist_ok=True)
        machine = {name: os.environ[name] for name in _PASSED_ON if name in os.environ}
        path = ":".join([str(ROOT), *filter(None, os.environ.get("PYTHONPATH", "").split(":"))])
        own = {"HOME": str(folder), "TMPDIR": str(folder), "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}
        log = folder / "output.log"
        argv = ["env", "-C", str(folder), sys.executable, "-m", module, *command[3:]]
        child = self._thread.submit(start_child, argv, {**machine, **own, **environment}, log, folder).result()
        return _Process(child, log, self._grace_seconds)


class _Process:
    def __init__(self, child: subprocess.Popen[bytes], log: Path, grace_seconds: float) -> None:
        self._child, self._log, self._grace_seconds = child, log, grace_seconds
        self._read_bytes = log.stat().st_size if log.exists() else 0
        self._kill_at: float | None = None

    def exit_code(self) -> int | None:
        if self._kill_at is not None and time.monotonic() > self._kill_at:
            _signal(_family(self._child.pid), signal.SIGKILL)
        return self._child.poll()

    def lines(self) -> list[str]:
        try:
            with self._log.open("rb") as file:
                file.seek(self._read_bytes)
                text, newline, _ = file.read().rpartition(b"\n")
        except OSError:
            return []
        self._read_bytes += len(text) + len(newline)
        return text.decode("utf-8", "replace").split("\n") if newline else []

    def end(self, *, at_once: bool = False) -> None:
        if self._child.poll() is not None:
            return
        if at_once:
            _signal(_family(self._child.pid), signal.SIGKILL)
            self._child.wait()
        elif self._kill_at is None:
            _signal([self._child.pid], signal.SIGTERM)
            self._kill_at = time.monotonic() + self._grace_seconds


def _signal(pids: list[int], number: int) -> None:
    for pid in pids:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            continue


def _family(pid: int) -> list[int]:
    """The process and all its descendants, whatever sessions they have made."""
    parents: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
            parents.setdefault(parent, []).append(int(entry.name))
    found = [pid]
    for one in found:
        found += parents.get(one, [])
    return found
