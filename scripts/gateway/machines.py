"""Routes for rented machines, opened by the token of one job: credentials for its own prefix, its end, its tick.

A machine that sets AWS_CONTAINER_CREDENTIALS_FULL_URI to .../machines/{job}/credentials and
AWS_CONTAINER_AUTHORIZATION_TOKEN to its token needs no code: boto3 asks here, and asks again before they expire.
"""

from __future__ import annotations

from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from scripts.errors import NotFound, Problem
from scripts.gateway.auth import Unauthorized, bearer
from scripts.gateway.clients import Client
from scripts.gateway.door import Door
from scripts.gateway.http import Endpoint, guarded
from scripts.gateway.views import Json
from scripts.job_folder import read_job
from scripts.job_session import job_session
from scripts.job_token import Claim, read_token

SESSION_SECONDS = 3600
"What AWS grants a role that takes another role; boto3 renews before it ends."


def routes(door: Door) -> list[Route]:
    """The machines' paths."""
    base = "/machines/{job_id}"
    return [
        Route(f"{base}/credentials", _endpoint(door, _credentials), methods=["GET", "POST"]),
        Route(f"{base}/end", _endpoint(door, _end), methods=["POST"]),
        Route(f"{base}/tick", _endpoint(door, _tick), methods=["POST"]),
    ]


def _endpoint(door: Door, handler: Any) -> Endpoint:
    async def answer(request: Request) -> Response:
        claim, client = _claimed(door, request)
        return JSONResponse(await run_in_threadpool(handler, door, client, claim.job_id))

    return guarded(answer)


def _claimed(door: Door, request: Request) -> tuple[Claim, Client]:
    """The job whose token this is, and its client. Raises Unauthorized for the token of any other job."""
    claim = read_token(bearer(request.headers), door.settings.token_secret, door.now())
    client = door.clients.get(claim.client) if claim else None
    if claim is None or client is None or claim.job_id != request.path_params["job_id"]:
        raise Unauthorized(Problem("Authorization", "not a token of this job, or expired", "the token of this job"))
    return claim, client


def _credentials(door: Door, client: Client, job_id: str) -> Json:
    """Session credentials that reach the job's own prefix and the base models, in the form boto3 reads."""
    url = f"{door.room(client).jobs.url}/{job_id}"
    given = job_session(door.settings.trainer_role, door.settings.session_policy, url, SESSION_SECONDS)
    return {
        "AccessKeyId": given["AccessKeyId"],
        "SecretAccessKey": given["SecretAccessKey"],
        "Token": given["SessionToken"],
        "Expiration": given["Expiration"].strftime("%Y-%m-%dT%H:%M:%SZ"),
    }


def _end(door: Door, client: Client, job_id: str) -> Json:
    """Ends the job's machine: the way out for one that could not end itself."""
    files = read_job(door.room(client).jobs, job_id)
    if files.submission is None or not files.submission.handle:
        raise NotFound(Problem(f"job {job_id}", "no machine of it is recorded", "launch it first"))
    door.backend(files.submission.backend).stop(files.submission.handle)
    return {"job_id": job_id, "ended": True}


def _tick(door: Door, client: Client, job_id: str) -> Json:
    if door.tick is not None:
        door.tick(client, job_id)
    return {"job_id": job_id, "ticked": door.tick is not None}
