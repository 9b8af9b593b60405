"""Peaks of memory as the kernel sees them: growth of the resident set during one step, a fresh process per variant."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

# The kernel gives freed blocks back at once; otherwise the resident set says nothing about peaks.
HONEST_MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def growth_mib(step: Callable[[], object]) -> float:
    """How far this process's resident set rises above its present size during the step."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    before = _status_mib("VmRSS")
    step()
    return _status_mib("VmHWM") - before


def peak_of_a_process(module: str, variant: str) -> float:
    """What `python -m MODULE --peak VARIANT` prints last, in a process whose allocator hides nothing."""
    done = subprocess.run(
        [sys.executable, "-m", module, "--peak", variant],
        cwd=Path(__file__).parent.parent,
        env=os.environ | HONEST_MALLOC,
        capture_output=True,
        text=True,
        check=True,
    )
    return float(done.stdout.split()[-1])


def _status_mib(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024
