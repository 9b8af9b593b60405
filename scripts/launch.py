"""Puts a job into the store and asks a backend for a machine: recorded first, then done, and safe to do twice.

submission = launch(store, spec, plan, data=Path("prepared"), backend=LocalBackend(os.environ), now=time.time())
launch_by_hand(...)      # the same for a person, who is told what becomes of a job that got no machine
"""

from __future__ import annotations

import hashlib
import json
import time
from pathlib import Path

from recipes.job import LaunchSpec, Record, Submission
from recipes.preparation import Plan
from scripts.audit import record
from scripts.backends.base import Backend
from scripts.errors import Conflict, InputError, LorryError, Problem, ProviderError, Refused
from scripts.job_folder import JobFiles, open_jobs, read_job, read_jobs
from scripts.stop import stop_job
from scripts.store import Store

IDENTITY = ("recipe_sha256", "source_sha256", "train_sha256", "valid_sha256", "backend")
"What makes two launches the same run; prices and the commit may have changed in between."
UNASKED_SECONDS = 7200.0
"A job that got no machine for this long is given up; until then it is asked for again."
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


def launch_by_hand(
    store: Store, spec: LaunchSpec, plan: Plan | None, data: Path, backend: Backend, now: float
) -> Submission:
    """Launches as `launch` does. An error says what becomes of the job: it is kept, and asked for again by the tick;
    where asking again changes nothing, it is ended here.

    Raises what launch raises, and Conflict for a job that was stopped.
    """
    try:
        submission = launch(store, spec, plan, data, backend, now)
    except (ProviderError, Refused, InputError) as error:
        if (said := _what_becomes(store, spec.job_id, backend, error, now)) is None:
            raise
        kind = ProviderError if isinstance(error, ProviderError) else type(error)
        raise kind(*error.problems, said) from None
    if not submission.handle and (stop := read_job(store, spec.job_id).stop) is not None:
        want = "launch it under another job id"
        raise Conflict(Problem(f"job {spec.job_id}", f"it was stopped ({stop.by}): {stop.reason}", want))
    return submission


def waiting_like(store: Store, spec: LaunchSpec, now: float) -> LaunchSpec | None:
    """The job that is the same run as `spec` under another id and still waits for its machine; the oldest of several.

    Launched beside it, `spec` would be rented twice: the tick asks for that one again. Raises ProviderError.
    """
    found = [
        (files.submission.submitted_at, files.job_id, files.launch)
        for files in read_jobs(store, open_jobs(store))
        if files.launch is not None
        and files.submission is not None
        and _waits(files, now)
        and _is_same(files.launch, spec)
    ]
    return min(found, key=lambda one: one[:2])[2] if found else None


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
    if not _is_same(first, spec):
        raise Conflict(
            Problem(
                f"job {spec.job_id}",
                "exists already, with another recipe, training set or backend",
                "choose another job id, or look at this one with `lorry show`",
            )
        )
    return first


def _is_same(one: LaunchSpec, other: LaunchSpec) -> bool:
    return all(getattr(one, name) == getattr(other, name) for name in IDENTITY)


def _waits(files: JobFiles, now: float) -> bool:
    """Whether a job was asked for, got no machine, and is not given up."""
    asked = files.submission
    is_over = files.stop is not None or files.container is not None or files.manifest is not None
    return asked is not None and not asked.handle and not is_over and now - asked.submitted_at <= UNASKED_SECONDS


def _what_becomes(store: Store, job_id: str, backend: Backend, error: LorryError, now: float) -> Problem | None:
    """What a person is told of a job that got no machine; None where nothing was recorded, or nobody can say."""
    try:
        files = read_job(store, job_id)
        if files.submission is None or not _waits(files, now):
            return None
        if isinstance(error, ProviderError) and error.lasts:
            stop_job(store, job_id, backend, "operator", str(error), now)
            return Problem(f"job {job_id}", "ended: asking again would change nothing", "mend that, and launch again")
    except ProviderError:
        return None
    until = time.strftime("%H:%M", time.gmtime(files.submission.submitted_at + UNASKED_SECONDS))
    kept = f"it is kept; `lorry tick` asks again until {until} (UTC)"
    return Problem(f"job {job_id}", kept, f"`lorry stop {job_id}` ends that")


def _bytes(record: Record) -> bytes:
    return record.model_dump_json(indent=2).encode() + b"\n"
