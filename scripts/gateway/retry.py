"""A failed job once more, from the training set and the settings it had; its client goes on calling it by the same id.

retry(door, client, "bicycle-1")      # raises Conflict for a job that did not fail

A job whose machine was lost goes on from its newest checkpoint in its own folder. One that ended gets a successor with
a folder of its own, since how a job ended is never overwritten.
"""

from __future__ import annotations

import hashlib
import tempfile
from pathlib import Path

from recipes.job import LaunchSpec
from recipes.preparation import Plan
from scripts.errors import Conflict, Problem
from scripts.forget import SETS
from scripts.gateway.budget import reserve
from scripts.gateway.clients import Client
from scripts.gateway.contact import Look, look, relaunch
from scripts.gateway.door import Door
from scripts.gateway.records import Successor, as_bytes, read
from scripts.gateway.views import phase_of
from scripts.job_folder import download_folder
from scripts.launch import launch
from scripts.store.erase import erase


def retry(door: Door, client: Client, client_id: str) -> Look:
    """Starts the job again; asked twice, it starts once. Raises NotFound, Conflict, Refused, ProviderError."""
    found = look(door, client, client_id)
    spec, phase = found.files.launch, phase_of(found)
    if phase != "FAILED" or spec is None:
        got = "its training set was refused" if phase == "FAILED" else f"it is {phase}"
        want = "only a job that FAILED after its launch is retried; send another one to /run"
        raise Conflict(Problem(f"job {client_id[:80]!a}", got, want))
    if found.state.state == "lost":
        relaunch(door, found.room, spec)
    else:
        _succeed(door, found, spec)
    return look(door, client, client_id)


def _succeed(door: Door, found: Look, spec: LaunchSpec) -> None:
    room, failed = found.room, spec.job_id
    job_id = "r" + hashlib.sha256(f"{failed}|retry".encode()).hexdigest()[:31]
    again = found.request.model_copy(update={"job_id": job_id, "retry_of": failed, "received_at": door.now()})
    with door.one_at_a_time(room.client, job_id), tempfile.TemporaryDirectory(prefix="lorry-retry-") as folder:
        room.jobs.create(f"{job_id}/request.json", as_bytes(again))
        reserve(room, job_id, spec.cap_usd, again.received_at)
        download_folder(room.jobs, f"{failed}/data", Path(folder))
        plan = read(room.jobs, f"{failed}/plan.json", Plan)
        again_spec = spec.model_copy(update={"job_id": job_id})
        launch(room.jobs, again_spec, plan, Path(folder), door.backend(spec.backend), door.now())
        room.jobs.create(f"{failed}/retry.json", as_bytes(Successor(job_id=job_id, at=door.now())))
        if spec.recipe.data.after_training == "delete":  # the successor has its own copy
            erase(f"{room.jobs.url}/{failed}/data", SETS)
