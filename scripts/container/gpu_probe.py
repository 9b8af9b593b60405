"""Whether the GPUs of this machine do anything: a rented GPU that idles for long costs as much as one that trains.

idleness = Idleness(gpus_busy, limit_seconds=900, now=time.monotonic()); idleness.exhausted(time.monotonic())
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable

Probe = Callable[[], bool | None]
"True: busy. False: idle. None: it cannot be said."

SAMPLE_SECONDS = 30.0


def gpus_busy() -> bool | None:
    """Whether any GPU computes now, by nvidia-smi; None on a machine without it."""
    command = ["nvidia-smi", "--query-gpu=utilization.gpu", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
        return any(int(line) > 0 for line in done.stdout.split())
    except (OSError, subprocess.SubprocessError, ValueError):
        return None


class Idleness:
    """Tells from samples whether the GPUs idled for too long. What cannot be said counts as busy."""

    def __init__(self, probe: Probe, limit_seconds: float, now: float) -> None:
        self._probe, self._limit = probe, limit_seconds
        self._every = min(SAMPLE_SECONDS, limit_seconds / 3)
        self._busy_at = self._sampled_at = now

    def exhausted(self, now: float) -> bool:
        """Whether the limit is passed; `now` is a clock that only goes forward."""
        if now - self._sampled_at >= self._every:
            self._sampled_at = now
            if self._probe() is not False:
                self._busy_at = now
        return now - self._busy_at > self._limit
