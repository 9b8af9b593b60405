"""Wall time and memory of the demo after installation: `lorry run smoke/zero3` on this machine.

python -m benchmarks.demo

Memory is the largest sum over all processes of the run of their proportional share (PSS: a page that n processes share
counts 1/n for each), sampled every 0.2 s.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

ROOT = Path(__file__).parent.parent
GOAL_SECONDS, GOAL_GIB = 180, 4.0


def run() -> dict[str, float]:
    """demo_seconds and demo_peak_gib. Raises RuntimeError when the demo fails."""
    with tempfile.TemporaryDirectory(prefix="lorry-benchmark-") as folder:
        environment = {**os.environ, "LORRY_STORE": Path(folder, "jobs").as_uri(), "LORRY_MODELS": f"{folder}/models"}
        command = [sys.executable, "-m", "scripts.cli", "run", "smoke/zero3", "--training-set"]
        begin = time.monotonic()
        with open(Path(folder, "out"), "wb") as out:
            process = subprocess.Popen(
                [*command, "examples/bicycle-care.jsonl"], cwd=ROOT, env=environment, stdout=out, stderr=out
            )
            peak = 0
            while process.poll() is None:
                peak = max(peak, _used_bytes(folder))
                time.sleep(0.2)
        seconds = time.monotonic() - begin
        if process.returncode:
            raise RuntimeError(Path(folder, "out").read_text())
    return {"demo_seconds": round(seconds, 1), "demo_peak_gib": round(peak / 2**30, 2)}


def _used_bytes(folder: str) -> int:
    """PSS of every process that belongs to the run: its environment or command line names the run's folder."""
    total = 0
    for process in psutil.process_iter():
        try:
            if any(folder in word for word in [*process.environ().values(), *process.cmdline()]):
                total += process.memory_full_info().pss
        except (psutil.NoSuchProcess, psutil.AccessDenied, FileNotFoundError):
            continue
    return total


if __name__ == "__main__":
    print(run(), f"goal: {GOAL_SECONDS} s, {GOAL_GIB} GiB")
