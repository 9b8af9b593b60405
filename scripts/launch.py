"""Puts a job into the store and asks a backend for a machine: recorded first, then done, and safe to do twice.

submission = launch(store, spec, plan, data=Path("prepared"), backend=LocalBackend(os.environ), now=time.time())
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from recipes.job import LaunchSpec, Record, Submission
from recipes.preparation import Plan
from scripts.audit import record
from scripts.backends.base import Backend
from scripts.errors import Conflict, Problem
from scripts.job_folder import JobFiles, read_job
from scripts.store import Store

IDENTITY = ("recipe_sha256", "source_sha256", "train_sha256", "valid_sha256", "backend")
"What makes two launches the same run; prices and the commit may have changed in between."
DATA = ("train.jsonl", "valid.jsonl", "report.json")


def launch(store: Store, spec: LaunchSpec, plan: Plan | None, data: Path, backend: Backend, now: float) -> Submission:
    """Starts the job `spec.job_id`, or finds it started; one job id never makes two machines.

    data: the folder with train.jsonl, valid.jsonl and report.json. Raises Conflict when the job id stands for another
    run, NotFound when data is missing, ProviderError when the store or the backend fails; then launch it again.
    """
    spec = _recorded(store, spec, plan, data)
    request = backend.request(spec)
    digest = hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()
    submission = Submission(job_id=spec.job_id, backend=backend.name, request_sha256=digest, submitted_at=now)
    key = f"{spec.job_id}/submission.json"
    created = store.create(key, _bytes(submission))
    files = read_job(store, spec.job_id)
    if not created and files.submission is not None:  # the job's cost counts from its first launch
        submission = submission.model_copy(
            update={"submitted_at": files.submission.submitted_at, "handle": files.submission.handle}
        )
    if files.stop is not None or (files.container is not None and files.container.ended is not None):
        return submission  # no machine for a job that was stopped or has ended
    submission = submission.model_copy(update={"handle": backend.submit(spec, request)})
    store.write(key, _bytes(submission))
    return submission


def launch_again(store: Store, files: JobFiles, backend: Backend, who: str, now: float) -> Submission:
    """Another machine for a job whose own was taken back or never came; the job goes on from its newest checkpoint.

    Raises what launch raises.
    """
    assert files.launch is not None
    asked = files.submission
    since = asked.submitted_at if asked else now  # a machine that was found has cost since the first request
    submission = launch(store, files.launch, None, Path(), backend, since)  # its data is in the store
    record(store, "launch", files.job_id, who=who, now=now, note="again")
    return submission


def _recorded(store: Store, spec: LaunchSpec, plan: Plan | None, data: Path) -> LaunchSpec:
    """The spec in the store: the first launch of a job id wins it. Data goes first: where launch.json is, all is."""
    key = f"{spec.job_id}/launch.json"
    known = store.read(key)
    if known is None:
        for name in DATA:
            store.put_file(data / name, f"{spec.job_id}/data/{name}")
        if plan is not None:
            store.write(f"{spec.job_id}/plan.json", _bytes(plan))
        store.create(key, _bytes(spec))
        known = store.read(key) or b""
    first = LaunchSpec.model_validate_json(known)
    if any(getattr(first, name) != getattr(spec, name) for name in IDENTITY):
        raise Conflict(
            Problem(
                f"job {spec.job_id}",
                "exists already, with another recipe, training set or backend",
                "choose another job id, or look at this one with `lorry show`",
            )
        )
    return first


def _bytes(record: Record) -> bytes:
    return record.model_dump_json(indent=2).encode() + b"\n"
