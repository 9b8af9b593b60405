"""Runs a child that is watched, stopped with grace, and never left behind; tells whether a trainer still moves.

child = start_child(command, environment, log, mark=folder)
end = watch_child(child, tick, Timing(), mark=folder)      # how it ended, and whether we ended it
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from recipes.job import Status
from scripts.container.verdict import End, Halt

MARK = "LORRY_SUPERVISED"
"Environment variable that marks every process of a job: torchrun gives its workers sessions of their own."
TAIL_BYTES = 16_384

_libc = ctypes.CDLL(None, use_errno=True)  # resolved before any fork
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Timing:
    """How often the supervisor looks and how long it waits, in seconds."""

    poll: float = 1.0
    heartbeat: float = 2.0
    grace: float = 60.0
    "From SIGTERM to SIGKILL: one step and one checkpoint of the trainer must fit."
    no_progress: float = 600.0
    idle: float = 900.0
    "So long the GPUs may do nothing while the trainer runs, besides the time for loading."
    contact: float = 5.0
    "Between two looks at a store that is not on this machine."


def start_child(
    command: Sequence[str], environment: Mapping[str, str], log: Path | None, mark: Path
) -> subprocess.Popen[bytes]:
    """Starts `command` in a session of its own, to be killed when this process dies. Without a log it prints here."""
    parent = os.getpid()

    def die_with_parent() -> None:
        _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it died between fork and prctl
            os._exit(1)

    output = os.dup(1) if log is None else _opened(log)
    try:
        return subprocess.Popen(
            command,
            env={**environment, MARK: str(mark)},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=die_with_parent,
        )
    finally:
        os.close(output)


def watch_child(child: subprocess.Popen[bytes], tick: Callable[[], Halt | None], timing: Timing, mark: Path) -> End:
    """Waits for the child, calling `tick` at every poll; what tick returns ends the child: SIGTERM, grace, SIGKILL.

    When it returns, no process of the job is left.
    """
    halt: Halt | None = None
    try:
        while halt is None and _wait(child, timing.poll) is None:
            halt = tick()
        if halt is not None:
            _signal_group(child, signal.SIGTERM)
            give_up = time.monotonic() + timing.grace
            while _wait(child, timing.poll) is None and time.monotonic() < give_up:
                tick()
    finally:
        _signal_group(child, signal.SIGKILL)
        code = child.wait()
        end_leftovers(mark)
    return End(code, halt)


def end_leftovers(mark: Path, timeout: float = 60.0) -> int:
    """Kills every process that carries this job's mark and waits until none is left. Returns how many it met.

    Raises TimeoutError when one cannot be killed (a driver that hangs): the machine is of no use then.
    """
    needle, met = f"{MARK}={mark}".encode(), set[int]()
    give_up = time.monotonic() + timeout
    while pids := _marked(needle):
        met |= pids
        for pid in pids:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        if time.monotonic() > give_up:
            raise TimeoutError(f"processes {sorted(pids)} do not die; end the machine")
        time.sleep(0.02)
    return len(met)


class Patience:
    """Tells from successive looks at status.json whether the trainer of one attempt still moves.

    Moving is a new stage or a new step; its heartbeat comes from a thread and beats on when all ranks wait for each
    other. It may stand for `floor` seconds or 10 x its slowest step, before its first step for `loading` seconds more.
    """

    def __init__(self, attempt: int, floor: float, loading: float, now: float) -> None:
        self._attempt, self._floor, self._loading = attempt, floor, loading
        self._moved_at = now
        self._step_at: float | None = None
        self._slowest = 0.0
        self._seen: tuple[str, int] | None = None

    def exhausted(self, status: Status | None, now: float) -> bool:
        """Whether it has stood for too long; `now` is a clock that only goes forward."""
        if status is not None and status.attempt == self._attempt and (status.stage, status.step) != self._seen:
            self._move(status, now)
        extra = self._loading if self._step_at is None else 0.0
        return now - self._moved_at > max(self._floor, 10 * self._slowest) + extra

    def _move(self, status: Status, now: float) -> None:
        if self._seen is not None and status.step > self._seen[1]:
            if self._step_at is not None:
                self._slowest = max(self._slowest, (now - self._step_at) / (status.step - self._seen[1]))
            self._step_at = now
        self._seen, self._moved_at = (status.stage, status.step), now


def tail(log: Path) -> str:
    """The last TAIL_BYTES of a log; empty when there is none."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - TAIL_BYTES))
            return file.read().decode("utf-8", "replace")
    except OSError:
        return ""


def _opened(log: Path) -> int:
    try:
        return os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    except OSError:  # a full disk must not keep the trainer from saying so
        return os.open(os.devnull, os.O_WRONLY)


def _wait(child: subprocess.Popen[bytes], seconds: float) -> int | None:
    try:
        return child.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        return None


def _signal_group(child: subprocess.Popen[bytes], number: int) -> None:
    if child.poll() is None:  # once reaped, its number may be somebody else's
        os.killpg(child.pid, number)


def _marked(needle: bytes) -> set[int]:
    found = set()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                variables = (entry / "environ").read_bytes()
            except OSError:  # it has ended, or belongs to somebody else
                continue
            if needle in variables.split(b"\0"):
                found.add(int(entry.name))
    return found
