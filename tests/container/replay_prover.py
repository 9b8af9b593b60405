"""Plays `trainer.prove`: writes proof.json for the adapter that result.json names, or fails as told by replay.json.

"prove": ["crash", "no_effect", ...]: one fault for each start, in order; afterwards it proves.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

from replay_trainer import write


def main() -> int:
    job = Path(sys.argv[sys.argv.index("--job") + 1])
    faults = json.loads((job / "replay.json").read_text()).get("prove", [])
    count = job / "proofs.txt"
    with count.open("a") as file:
        file.write("started\n")
    number = len(count.read_text().split())
    fault = faults[number - 1] if number <= len(faults) else ""
    if (job / "adapter" / "manifest.json").exists():
        (job / "violations").write_text("a manifest stood there before the proof\n")
    if fault == "crash":
        os._exit(1)
    if fault == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if fault == "hang":
        time.sleep(600)
    result = json.loads((job / "result.json").read_text())
    passed = fault != "no_effect"
    proof = {
        "job_id": result["job_id"], "passed": passed, "sentence": "it changes the model" if passed else "it is empty",
        "adapter_sha256": result["adapter_sha256"] if passed else {}, "tensors": 1, "tensors_consumed": 1,
        "effect": 0.5 * passed, "reproduction_error": 0.0, "positions": 4, "seconds": 0.1,
    }  # fmt: skip
    write(job / "proof.json", proof)
    return 0 if passed else 30


if __name__ == "__main__":
    sys.exit(main())
