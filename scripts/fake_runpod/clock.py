"""The clock of the local Runpod: real time, or time that stands still until somebody moves it.

clock = Clock(frozen_at=1_800_000_000.0); clock.jump(3600); clock.stamp()     # "2027-01-15T09:00:00.000000Z"
"""

from __future__ import annotations

import time
from datetime import UTC, datetime


class Clock:
    """Seconds since 1970. `frozen_at`: it moves by `jump` alone; without it, it also runs by itself."""

    def __init__(self, frozen_at: float | None = None) -> None:
        self._frozen_at, self._jumped = frozen_at, 0.0

    @property
    def is_frozen(self) -> bool:
        """Whether it moves by `jump` alone."""
        return self._frozen_at is not None

    def now(self) -> float:
        """The time now."""
        return (time.time() if self._frozen_at is None else self._frozen_at) + self._jumped

    def jump(self, seconds: float) -> None:
        """Moves the clock, also backwards, as a time server does."""
        self._jumped += seconds

    def stamp(self) -> str:
        """The time now as REST v2 writes it, always of the same length, so that stamps sort as text."""
        return datetime.fromtimestamp(self.now(), UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def seconds_of(stamp: str) -> float:
    """The time of an RFC 3339 stamp. Raises ValueError."""
    parsed = datetime.fromisoformat(stamp)
    return (parsed if parsed.tzinfo else parsed.replace(tzinfo=UTC)).timestamp()
