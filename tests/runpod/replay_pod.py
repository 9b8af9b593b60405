"""What `scripts.container` does on a rented machine, with the replay trainer and short timings.

python -m tests.runpod.replay_pod --store URL --job ID [--work DIR]
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from scripts.container.places import run_here
from scripts.container.run import machine_here, run_container
from scripts.container.supervisor import Timing
from tests.container.replay_container import prove, train


def main() -> int:
    words = dict(zip(sys.argv[1::2], sys.argv[2::2], strict=True))
    (Path("environment.json")).write_text(json.dumps(dict(os.environ)))

    def run(work: Path | None, end: Callable[[], None]) -> int:
        machine = machine_here(words["--store"], words["--job"], work, end)
        script = machine.store.read(f"{machine.job_id}/replay.json")
        assert script is not None
        machine.work.mkdir(parents=True, exist_ok=True)
        (machine.work / "replay.json").write_bytes(script)
        told = json.loads(script)
        timing = Timing(**{"poll": 0.05, "heartbeat": 0.1, "contact": 0.3} | told.get("timing", {}))
        busy = told.get("gpus_busy")
        return run_container(replace(machine, timing=timing, train=train, prove=prove, gpus_busy=lambda: busy))

    return run_here(run, os.environ, words["--job"], Path(words["--work"]) if "--work" in words else None)


if __name__ == "__main__":
    sys.exit(main())
