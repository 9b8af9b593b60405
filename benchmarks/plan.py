"""Wall time of `lorry plan`, start of the process included: the goal is one second. Best and median of seven runs.

python -m benchmarks.plan
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from pathlib import Path

from recipes.catalog import load_catalog
from recipes.load import load_recipe
from scripts.plan import make_plan

ROUNDS = 7
RECIPE = "qwen3-next-80b/zero3"
ROOT = Path(__file__).parent.parent
NOMINAL, WITH_SET = f"lorry plan {RECIPE}", "lorry plan smoke/zero3 --training-set"
COMMANDS = {
    "python that does nothing": ("-c", "pass"),
    NOMINAL: ("-m", "scripts.cli", "plan", RECIPE),
    WITH_SET: (
        *("-m", "scripts.cli", "plan", "smoke/zero3"),
        *("--training-set", "examples/bicycle-care.jsonl"),
    ),
}


def run() -> dict[str, float]:
    """Best seconds by command, rounds interleaved so that a busy moment of the machine hits all alike."""
    seconds: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for _ in range(ROUNDS):
        for name, words in COMMANDS.items():
            started = time.perf_counter()
            subprocess.run([sys.executable, *words], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
            seconds[name].append(time.perf_counter() - started)
    for name, found in seconds.items():
        print(f"{name:<42} best {min(found):.3f} s, median {statistics.median(found):.3f} s")
    return {
        "plan_seconds": min(seconds[NOMINAL]),
        "plan_with_set_seconds": min(seconds[WITH_SET]),
        "make_plan_seconds": _make_plan_seconds(),
    }


def _make_plan_seconds() -> float:
    """The planning itself: every offer of the catalog, best of the rounds."""
    loaded, catalog = load_recipe(RECIPE), load_catalog()
    found = []
    for _ in range(ROUNDS):
        started = time.perf_counter()
        make_plan(loaded, None, catalog)
        found.append(time.perf_counter() - started)
    return min(found)


if __name__ == "__main__":
    run()
