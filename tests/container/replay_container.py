"""The container with the replay trainer and short timings.

python -m tests.container.replay_container --store URL --job ID [--work DIR]
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from scripts import container
from scripts.container.run import run_container
from scripts.container.supervisor import Timing
from scripts.errors import LorryError
from scripts.machine import Machine, Run
from scripts.settings import read_settings
from scripts.store import FileStore, open_store

HERE = Path(__file__).parent


def train(run: Run) -> list[str]:
    return [sys.executable, str(HERE / "replay_trainer.py"), "--job", str(run.job), "--attempt", str(run.attempt)]


def prove(run: Run) -> list[str]:
    return [sys.executable, str(HERE / "replay_prover.py"), "--job", str(run.job)]


def main() -> int:
    words = dict(zip(sys.argv[1::2], sys.argv[2::2], strict=True))
    store, job_id = open_store(words["--store"]), words["--job"]
    work, node = Path(words["--work"]) if "--work" in words else None, os.environ.get("NODE_RANK", "0")
    if isinstance(store, FileStore) and node == "0":
        work = store.root / job_id
    assert work is not None
    script = store.read(f"{job_id}/replay-{node}.json") or store.read(f"{job_id}/replay.json")
    assert script is not None
    work.mkdir(parents=True, exist_ok=True)
    (work / "replay.json").write_bytes(script)
    told = json.loads(script)
    timing = Timing(**{"poll": 0.05, "heartbeat": 0.1, "contact": 0.3} | told.get("timing", {}))
    container.loading_seconds = lambda spec: told.get("loading", 0.0)
    models = read_settings(os.environ, Path.cwd()).models
    try:
        return run_container(Machine(store, job_id, work, models, os.environ, timing, train, prove))
    except LorryError as error:
        print(error, file=sys.stderr)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
