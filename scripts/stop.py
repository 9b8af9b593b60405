"""Stops a job: the reason is recorded first, then the machine is ended. The first stop wins.

stop_job(store, "job-1", backend, by="user", reason="wrong recipe", now=time.time())
"""

from __future__ import annotations

from typing import Literal

from recipes.job import Stop
from scripts.audit import record
from scripts.backends.base import Backend
from scripts.errors import NotFound, Problem
from scripts.job_folder import read_job
from scripts.store import Store

By = Literal["user", "operator", "deadline", "cap", "reaper"]


def stop_job(
    store: Store, job_id: str, backend: Backend, by: By, reason: str, now: float, who: str = ""
) -> Stop | None:
    """Writes stop.json unless one is there, then ends the machine; returns the stop that counts.

    who: the person, for the audit; empty where Lorry itself stops a job.

    A job that has ended stays as it ended: None. Raises NotFound for an unknown job, ProviderError when the store or
    the backend fails; the stop is recorded then, and stopping again is right.
    """
    files = read_job(store, job_id)
    if files.launch is None and files.submission is None:
        raise NotFound(Problem(f"job {job_id}", "no such job", "see what there is with `lorry jobs`"))
    if files.manifest is not None or (files.container is not None and files.container.ended is not None):
        return None
    stop = Stop(by=by, reason=reason, at=now)
    is_first = store.create(f"{job_id}/stop.json", stop.model_dump_json(indent=2).encode() + b"\n")
    try:
        if files.submission is not None and files.submission.handle:
            backend.stop(files.submission.handle)
    finally:
        if is_first:
            record(store, "stop", job_id, who=who or f"lorry ({by})", now=now, note=reason)
    return stop if is_first else read_job(store, job_id).stop or stop
