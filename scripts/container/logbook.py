"""What the container writes about itself: container.json, its heartbeat, and logs/container.log.

book = Logbook(work, state, heartbeat_seconds=2.0); book.note(stage="loading"); book.beat(); book.say("attempt 1")
"""

from __future__ import annotations

import datetime
import os
import sys
import time
from pathlib import Path
from typing import Any

from recipes.job import ContainerState, write_record


class Logbook:
    """The one writer of container.json. A full disk may cost a line or a heartbeat, never the job or its cause."""

    def __init__(self, work: Path, state: ContainerState, heartbeat_seconds: float) -> None:
        self.state = state
        self._path, self._log = work / "container.json", work / "logs" / "container.log"
        self._heartbeat = heartbeat_seconds
        self._beat_at = float("-inf")
        self._silent_seconds = 0.0

    @property
    def machine_seconds(self) -> float:
        """How long the job had a machine so far, by this machine's clock."""
        return max(0.0, time.time() - self.state.started_at - self.state.waited_seconds)

    def take_up(self, earlier: ContainerState) -> None:
        """Goes on with the record of an earlier start."""
        self._silent_seconds = max(0.0, time.time() - earlier.updated_at)
        self.state = earlier.model_copy(update={"pid": os.getpid()})

    def leave_out_the_wait(self) -> None:
        """The time since the last word of the earlier start counts as none of a machine's; once for each start."""
        if self._silent_seconds:
            self.note(waited_seconds=self.state.waited_seconds + self._silent_seconds)
            self._silent_seconds = 0.0

    def note(self, **changes: Any) -> None:
        """Changes fields of container.json and writes it now."""
        self.state = self.state.model_copy(update={**changes, "updated_at": time.time()})
        self._beat_at = time.monotonic()
        try:
            write_record(self._path, self.state)
        except OSError as error:
            self._write_in_place(error)

    def beat(self, **changes: Any) -> None:
        """The same, at most once per heartbeat."""
        if time.monotonic() - self._beat_at >= self._heartbeat:
            self.note(**changes)

    def say(self, sentence: str) -> None:
        """One line to logs/container.log and to stderr."""
        stamp = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        line = f"{stamp} {sentence}\n"
        try:
            with self._log.open("a", encoding="utf-8") as file:
                file.write(line)
        except OSError as error:
            line += f"{stamp} {self._log.name} cannot be written: {error.strerror}\n"
        try:
            sys.stderr.write(line)
            sys.stderr.flush()
        except OSError:  # stderr is a file on the same full disk
            return

    def _write_in_place(self, error: OSError) -> None:
        """Where a second file has no room, the first one is overwritten: it needs no new blocks."""
        self.say(f"{self._path.name} cannot be replaced: {error.strerror}; overwriting it")
        data = self.state.model_dump_json(indent=2).encode() + b"\n"
        try:
            with self._path.open("r+b") as file:
                file.write(data)
                file.truncate()
        except OSError as second:
            self.say(f"{self._path.name} cannot be written: {second.strerror}")
