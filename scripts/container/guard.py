"""Keeps the heartbeat and the stops going whatever the container is doing: a child, a transfer, a pause.

guard = Guard(folder, book, timing); guard.child("prove", command, environment, guard.tick)
guard.aside(folder.deliver, guard.tick)          # Left is raised when a stop came first
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping

from recipes.job import Status
from scripts.container.logbook import Logbook
from scripts.container.supervisor import Timing, start_child, watch_child
from scripts.container.verdict import End, Ending, Halt, ending_of_halt
from scripts.container.work_folder import WorkFolder
from scripts.errors import LorryError

Tick = Callable[[], Halt | None]


class Left(Exception):
    """The way to the adapter was left: with an ending, or without one when only the machine ends."""

    def __init__(self, ending: Ending | None) -> None:
        super().__init__(ending.sentence if ending else "the machine is told to end")
        self.ending = ending


class Guard:
    """Looks around while something else takes its time."""

    def __init__(self, folder: WorkFolder, book: Logbook, timing: Timing) -> None:
        self._folder, self._book, self._timing = folder, book, timing
        self._interrupted = self._taken = False
        self._deadline: float | None = None

    def interrupt(self) -> None:
        """The machine is told to end. Safe in a signal handler."""
        self._interrupted = True

    def take(self) -> None:
        """The same, because the provider takes it back: container.json says so, and the job goes on elsewhere."""
        self._taken = self._interrupted = True

    def set_deadline(self, seconds: float) -> None:
        """Ends whatever runs in so many seconds from now, on the clock that no time server moves."""
        self._deadline = time.monotonic() + seconds

    def tick(self, status: Status | None = None) -> Halt | None:
        """One look around: the heartbeat, then the stops."""
        self._book.beat(stage=status.stage if status and status.stage != "done" else self._book.state.stage)
        if self._taken and self._book.state.taken_at is None:
            self._book.note(taken_at=time.time())
        try:
            stop = self._folder.stop(fresh=self._interrupted)
        except LorryError:  # the store is silent; the deadline still holds
            stop = None
        if stop:
            return "stop"
        if self._deadline is not None and time.monotonic() > self._deadline:
            return "deadline"
        return "interrupted" if self._interrupted else None

    def tick_within(self, seconds: float) -> Tick:
        """A tick for a child that writes no status: it may take the silence limit and `seconds` more."""
        give_up = time.monotonic() + self._timing.no_progress + seconds
        return lambda: self.tick() or ("no_progress" if time.monotonic() > give_up else None)

    def beat_within(self, seconds: float) -> Tick:
        """A tick that heeds no stop, only a limit: for the last errands of a job that has ended."""
        give_up = time.monotonic() + seconds

        def tick() -> Halt | None:
            self._book.beat()
            return "deadline" if time.monotonic() > give_up else None

        return tick

    def child(self, name: str, command: list[str], environment: Mapping[str, str], tick: Tick) -> End:
        """Runs a command to its end, its output in logs/NAME.log."""
        log = self._folder.path / "logs" / f"{name}.log"
        return watch_child(
            start_child(command, environment, log, self._folder.path), tick, self._timing, self._folder.path
        )

    def aside(self, work: Callable[[], None], tick: Tick) -> None:
        """Blocking work in a thread of its own; raises what the work raised, or Left when a halt came first."""
        failure: list[Exception] = []
        done = threading.Event()

        def body() -> None:
            try:
                work()
            except Exception as error:
                failure.append(error)
            finally:
                done.set()

        threading.Thread(target=body, daemon=True).start()
        while not done.wait(self._timing.poll):
            self.heed(tick())
        if failure:
            raise failure[0]

    def heed(self, halt: Halt | None) -> None:
        """Raises Left when the job or the machine is to end."""
        if halt not in (None, "no_progress", "node_failed"):
            raise Left(ending_of_halt(halt, self._folder.stop()))
