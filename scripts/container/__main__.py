"""python -m scripts.container --store URL --job ID: the command of every rented machine."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from scripts.container.places import run_here
from scripts.container.run import machine_here, run_container


def main(arguments: Sequence[str] | None = None) -> int:
    """Reads argv and environment, runs the container of one job, returns the exit code."""
    parser = argparse.ArgumentParser(description="Runs one job on this machine.")
    parser.add_argument("--store", required=True, help="URL of the folder that holds the job's folder")
    parser.add_argument("--job", required=True)
    parser.add_argument("--work", type=Path, help="folder for the copy of a job in a bucket (default: a new one)")
    parser.add_argument("verb", nargs="?", choices=("train",), help="what SageMaker says to every image; it may say it")
    given = parser.parse_args(arguments)

    def run(work: Path | None, end: Callable[[], None]) -> int:
        return run_container(machine_here(given.store, given.job, work, end))

    return run_here(run, os.environ, given.job, given.work)


if __name__ == "__main__":
    sys.exit(main())
