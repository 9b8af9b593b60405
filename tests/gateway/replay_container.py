"""The container with the replay trainer, also for jobs whose ids the test does not choose.

replay.json is taken from the job folder; where there is none it is a run of four short steps.
"""

from __future__ import annotations

import json
import sys

from scripts.store import open_store
from tests.container.replay_container import main

STANDARD = {"steps": 4, "step_seconds": 0.02, "checkpoint_steps": 2, "timing": {"grace": 5.0, "no_progress": 20.0}}

if __name__ == "__main__":
    words = dict(zip(sys.argv[1::2], sys.argv[2::2], strict=True))
    open_store(words["--store"]).create(f"{words['--job']}/replay.json", json.dumps(STANDARD).encode())
    sys.exit(main())
