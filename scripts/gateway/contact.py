"""One look at a job by its client: how it stands, and what has to be done because somebody looked.

job = look(door, client, "bicycle-1"); job.state.sentence     # raises NotFound for a job of anybody else

Whoever looks past a deadline or a cap stops the job; whoever finds a job recorded but never launched launches it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from recipes.job import LaunchSpec
from scripts.audit import record
from scripts.backends.base import Observation
from scripts.errors import NotFound, Problem, ProviderError
from scripts.gateway.budget import settled_usd
from scripts.gateway.clients import Client
from scripts.gateway.door import Door, Room
from scripts.gateway.records import Refusal, Request, Successor, read
from scripts.gateway.understand import job_id_of
from scripts.job_folder import JobFiles, job_ids, read_job, read_jobs
from scripts.launch import launch
from scripts.state import SILENT_SECONDS, JobState, job_state, overdue
from scripts.stop import stop_job

LOOK_SECONDS = 10.0
"The provider is asked about one machine at most this often, however often its client asks."
RELAUNCH_SECONDS = 60.0
"A job recorded this long ago and not launched was left behind by a process that died."
MOST_RETRIES = 10
_FRESH_SECONDS = SILENT_SECONDS / 4


@dataclass(frozen=True)
class Look:
    """A job as its client sees it. `client_id`: what the client calls it; `files` may be of the retry that goes on."""

    client_id: str
    request: Request
    files: JobFiles
    state: JobState
    room: Room
    refusal: Refusal | None = None
    settled_usd: float | None = None
    "What the bill came to, once it is known."


def look(door: Door, client: Client, client_id: str) -> Look:
    """The job now. Raises NotFound when this client has no such job, ProviderError when the store cannot be read."""
    room, job_id = door.room(client), job_id_of(client_id)
    request = request_of(door, room, job_id)
    if request is None:
        raise NotFound(Problem(f"job {client_id[:80]!a}", "no such job", "the id that /run gave"))
    found = _followed(door, _looked(door, room, request))
    settled = settled_usd(room.jobs, found.files.job_id) if found.state.is_final else None
    return replace(found, client_id=client_id, settled_usd=settled)


def looks(door: Door, client: Client) -> list[Look]:
    """All jobs of a client, newest first, without asking providers: for lists and counts. Refused requests are none."""
    room = door.room(client)
    requests = [r for job_id in job_ids(room.jobs) if (r := request_of(door, room, job_id)) and r.retry_of is None]
    known = {r.job_id: door.memory.get(("final", client.name, r.job_id)) for r in requests}
    unknown = [r.job_id for r in requests if known[r.job_id] is None]
    files = {f.job_id: f for f in read_jobs(room.jobs, unknown)}
    found = [known[r.job_id] or _kept(door, _judged(door, room, r, files[r.job_id], None)) for r in requests]
    found = [replace(_followed(door, job), client_id=job.client_id) for job in found if job.refusal is None]
    return sorted(found, key=lambda job: job.request.received_at, reverse=True)


def cancel(door: Door, client: Client, client_id: str) -> Look:
    """Stops the job for its client, at once and for good; one that has ended stays as it ended. Raises NotFound."""
    found = look(door, client, client_id)
    files = found.files
    if found.state.is_final and found.state.state != "lost":
        return found
    backend = door.backend(files.launch.backend) if files.launch else None
    who = f"client {client.name}"
    if files.launch is None or backend is None:
        record(found.room.notes, "stop", files.job_id, who=who, now=door.now())
        stop = b'{"by": "user", "reason": "cancelled by the client", "at": %.3f}\n' % door.now()
        found.room.jobs.create(f"{files.job_id}/stop.json", stop)
    else:
        stop_job(found.room.jobs, files.job_id, backend, "user", "cancelled by the client", door.now(), who)
    return look(door, client, client_id)


def request_of(door: Door, room: Room, job_id: str) -> Request | None:
    """request.json of a job; it changes only while its job is not launched."""
    key = ("request", room.client.name, job_id)
    known: Request | None = door.memory.get(key)
    if known is None and (known := read(room.jobs, f"{job_id}/request.json", Request)) is not None:
        door.memory.keep(key, known)
    return known


def _followed(door: Door, found: Look) -> Look:
    """The retry that goes on in place of a failed job; the job itself where there is none."""
    for _ in range(MOST_RETRIES):
        successor = None
        if found.state.state == "failed":
            successor = read(found.room.jobs, f"{found.files.job_id}/retry.json", Successor)
        request = request_of(door, found.room, successor.job_id) if successor else None
        if request is None:
            break
        found = _looked(door, found.room, request)
    return found


def _looked(door: Door, room: Room, request: Request) -> Look:
    job_id, name = request.job_id, room.client.name
    known: Look | None = door.memory.get(("final", name, job_id))
    if known is not None:
        return known
    files = read_job(room.jobs, job_id)
    observation = None
    if _needs_the_provider(files, door.now()):
        observation = _observed(door, room, files)
        files = read_job(room.jobs, job_id)  # a machine that ended meanwhile has written how
    found = _judged(door, room, request, files, observation)
    if found.state.is_final:
        return _kept(door, found)
    return _acted(door, found, observation)


def _kept(door: Door, found: Look) -> Look:
    """Ends stay; a lost job may be launched again, and a refused request may be corrected."""
    if found.state.is_final and found.state.state != "lost" and found.files.launch is not None:
        door.memory.keep(("final", found.room.client.name, found.files.job_id), found)
    return found


def _needs_the_provider(files: JobFiles, now: float) -> bool:
    """Whether the files alone leave it open: no word yet, none for a while, or a stop that should have an end."""
    if files.submission is None or not files.submission.handle or files.manifest is not None:
        return False
    container = files.container
    if container is None or files.stop is not None:
        return container is None or container.ended is None
    return container.ended is None and now - container.updated_at > _FRESH_SECONDS


def _observed(door: Door, room: Room, files: JobFiles) -> Observation | None:
    assert files.submission is not None
    key = ("seen", room.client.name, files.job_id)
    at, known = door.memory.get(key) or (0.0, None)
    if door.now() - at < LOOK_SECONDS and not files.stop:
        return known
    try:
        known = door.backend(files.submission.backend).observe(files.submission.handle)
    except ProviderError:
        known = None
    door.memory.keep(key, (door.now(), known))
    return known


def _judged(door: Door, room: Room, request: Request, files: JobFiles, observation: Observation | None) -> Look:
    now = door.now()
    state, refusal = job_state(files, observation, now), None
    if files.launch is None:
        refusal = read(room.jobs, f"{files.job_id}/refusal.json", Refusal)
        if refusal is not None and refusal.body_sha256 == request.body_sha256:
            state = JobState("failed", refusal.error, 0, None, None, True)
        elif not state.is_final:
            state = JobState("queued", "its training set is being fetched and checked", 0, None, None, False)
            if now - request.received_at > door.fetcher.max_seconds + RELAUNCH_SECONDS:
                state = JobState("failed", "its submission was cut short; send it again", 0, None, None, True)
    return Look(request.client_job_id or request.job_id, request, files, state, room, refusal)


def _acted(door: Door, found: Look, observation: Observation | None) -> Look:
    """What a look has to set right. A provider that fails is asked again at the next look."""
    files, room, now = found.files, found.room, door.now()
    if files.launch is None:
        return found
    try:
        if due := overdue(files, observation, now):
            stop_job(room.jobs, files.job_id, door.backend(files.launch.backend), due[0], due[1], now)
        elif found.state.state == "queued" and now - found.request.received_at > RELAUNCH_SECONDS:
            relaunch(door, room, files.launch)
        else:
            return found
    except ProviderError:
        return found
    return _judged(door, room, found.request, read_job(room.jobs, files.job_id), observation)


def relaunch(door: Door, room: Room, spec: LaunchSpec) -> None:
    """Launches a recorded job once more: its data and its spec are in the store. Raises ProviderError."""
    door.memory.forget(("seen", room.client.name, spec.job_id))
    with door.one_at_a_time(room.client, spec.job_id):
        launch(room.jobs, spec, None, Path(), door.backend(spec.backend), door.now())  # its data is in the store
