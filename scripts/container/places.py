"""Which kind of rented machine a container finds itself on, and what that wants at its beginning and at its end.

code = run_here(lambda work, end: run_container(machine_here(store, job_id, work, end)), os.environ, job_id, work)
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

from scripts.container.pod_end import end_of_pod, run_in_pod
from scripts.container.training_job import run_in_training_job, training_job
from scripts.errors import LorryError
from scripts.machine import nothing

Run = Callable[[Path | None, Callable[[], None]], int]
"(folder to work in, end of the machine) -> exit code."


def run_here(run: Run, environment: Mapping[str, str], job_id: str, work: Path | None) -> int:
    """Runs the container as the platform of this machine wants it; returns the exit code."""
    end = end_of_pod(environment, job_id)
    if end is not None:
        return run_in_pod(lambda: run(work, end), end, environment)
    job = training_job(environment)
    if job is not None:  # a new machine each time, so a new folder; a fixed one on SageMaker's own disk is /tmp
        folder = work or Path(tempfile.mkdtemp(prefix="lorry-"))
        return run_in_training_job(job, folder, lambda: run(folder, nothing))
    try:
        return run(work, nothing)
    except LorryError as error:
        print(error, file=sys.stderr)
        return error.exit_code
