"""Runpod's queue contract: /v2/lorry/run runsync status status-sync stream cancel retry purge-queue health.

routes(door)      # the web app's GPU_CLUSTER_API_URL ends in /v2/lorry
"""

from __future__ import annotations

import asyncio
from collections import Counter

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from recipes.validate import validated
from scripts.errors import InputError, Problem
from scripts.gateway.clients import Client
from scripts.gateway.contact import Look, cancel, look, looks
from scripts.gateway.door import Door
from scripts.gateway.http import Call, Endpoint, call_of, endpoint, guarded
from scripts.gateway.links import adapter_links
from scripts.gateway.retry import retry
from scripts.gateway.submission import Accepted, submit
from scripts.gateway.tick_on_contact import tick_on_contact
from scripts.gateway.understand import Asked, Policy, understand
from scripts.gateway.views import Json, adapter_files, phase_of, progress, queue_status

PREFIX = "/v2/lorry"
DEFAULT_WAIT_SECONDS, LONGEST_WAIT_SECONDS = 90.0, 300.0
_POLL_SECONDS = 0.5


def routes(door: Door) -> list[Route]:
    """The queue's paths."""
    job = "/{id}"
    return [
        Route(f"{PREFIX}/run", endpoint(door, _run), methods=["POST"]),
        Route(f"{PREFIX}/runsync", _runsync(door), methods=["POST"]),
        Route(f"{PREFIX}/status{job}", endpoint(door, _status, tick_on_contact), methods=["GET"]),
        Route(f"{PREFIX}/status-sync{job}", _status_sync(door), methods=["GET"]),
        Route(f"{PREFIX}/stream{job}", endpoint(door, _stream, tick_on_contact), methods=["GET"]),
        Route(f"{PREFIX}/cancel{job}", endpoint(door, _cancel, tick_on_contact), methods=["POST"]),
        Route(f"{PREFIX}/retry{job}", endpoint(door, _retry), methods=["POST"]),
        Route(f"{PREFIX}/purge-queue", endpoint(door, _purge_queue), methods=["POST"]),
        Route(f"{PREFIX}/health", endpoint(door, _health), methods=["GET"]),
    ]


def asked_of(door: Door, body: Json) -> Asked:
    """The request in a /run body: `input`, and Runpod's `policy` and `webhook` beside it. Raises InputError."""
    value = body.get("input")
    if not isinstance(value, dict):
        raise InputError(Problem("input", "missing" if value is None else "not an object", '{"input": {...}}'))
    policy = validated(Policy, body.get("policy") or {}, "policy")
    webhook = body.get("webhook")
    if not isinstance(webhook, str | None):
        raise InputError(Problem("webhook", "not text", "a URL"))
    return understand(value, policy=policy, webhook=webhook, serving_url=door.settings.serving_url)


def accepted_view(door: Door, client: Client, accepted: Accepted) -> Json:
    """The answer to a submission: id and status as Runpod gives them, then what was understood and what it may cost."""
    client_id = accepted.request.client_job_id or accepted.request.job_id
    phase = "IN_QUEUE" if accepted.is_new else phase_of(look(door, client, client_id))
    spec = accepted.spec
    return {
        "id": client_id,
        "status": phase,
        "understood": accepted.request.understood.model_dump(mode="json")
        | {"gpu": spec.offer, "gpu_count": spec.gpus * spec.nodes, "backend": spec.backend},
        "quote_usd": spec.quote_usd,
        "cap_usd": spec.cap_usd,
        "notes": list(accepted.notes),
    }


def status_view(door: Door, call: Call, job: Look) -> Json:
    """The status object, with links that work now."""
    links = adapter_links(
        job.room,
        job.files.job_id,
        adapter_files(job),
        base_url=call.base_url,
        secret=door.settings.token_secret,
        now=door.now(),
    )
    return queue_status(job, links, door.now())


def _run(door: Door, call: Call) -> Json:
    accepted = submit(door, call.client, asked_of(door, call.fields()), call.headers.get("idempotency-key"))
    return accepted_view(door, call.client, accepted)


def _status(door: Door, call: Call) -> Json:
    return status_view(door, call, look(door, call.client, call.path["id"]))


def _stream(door: Door, call: Call) -> Json:
    """Each reading gives the newest progress; at the end the list is empty, which is how readers know."""
    job = look(door, call.client, call.path["id"])
    phase = phase_of(job)
    return {"status": phase, "stream": [{"output": progress(job)}] if phase in ("IN_QUEUE", "IN_PROGRESS") else []}


def _cancel(door: Door, call: Call) -> Json:
    return status_view(door, call, cancel(door, call.client, call.path["id"]))


def _retry(door: Door, call: Call) -> Json:
    return status_view(door, call, retry(door, call.client, call.path["id"]))


def _purge_queue(door: Door, call: Call) -> Json:
    queued = [job for job in looks(door, call.client) if phase_of(job) == "IN_QUEUE"]
    for job in queued:
        cancel(door, call.client, job.client_id)
    return {"removed": len(queued), "status": "completed"}


def _health(door: Door, call: Call) -> Json:
    count = Counter(phase_of(job) for job in looks(door, call.client))
    running = count["IN_PROGRESS"]
    return {
        "jobs": {
            "completed": count["COMPLETED"],
            "failed": count["FAILED"],
            "inProgress": running,
            "inQueue": count["IN_QUEUE"],
            "retried": 0,
        },
        "workers": {
            "idle": 0,
            "initializing": count["IN_QUEUE"],
            "ready": running,
            "running": running,
            "throttled": 0,
            "unhealthy": 0,
        },
    }


def _runsync(door: Door) -> Endpoint:
    async def answer(request: Request) -> Response:
        call = await call_of(door, request)
        seconds = _wait_seconds(call)
        view = await run_in_threadpool(_run, door, call)
        return JSONResponse(await _held(door, call, view["id"], seconds))

    return guarded(answer)


def _status_sync(door: Door) -> Endpoint:
    async def answer(request: Request) -> Response:
        call = await call_of(door, request)
        return JSONResponse(await _held(door, call, call.path["id"], _wait_seconds(call)))

    return guarded(answer)


async def _held(door: Door, call: Call, client_id: str, seconds: float) -> Json:
    """The status object once the job has ended, or when the time is over. No thread waits meanwhile."""
    loop = asyncio.get_running_loop()
    ends = loop.time() + seconds
    while True:
        job = await run_in_threadpool(look, door, call.client, client_id)
        if phase_of(job) not in ("IN_QUEUE", "IN_PROGRESS") or loop.time() >= ends:
            return await run_in_threadpool(status_view, door, call, job)
        await asyncio.sleep(min(_POLL_SECONDS, max(0.0, ends - loop.time())))


def _wait_seconds(call: Call) -> float:
    text = call.query.get("wait", "")
    if text and not (text.isascii() and text.isdigit() and len(text) <= 9):
        raise InputError(Problem("wait", ascii(text[:40]), "milliseconds, 1000 to 300000"))
    return min(LONGEST_WAIT_SECONDS, max(1.0, int(text) / 1000)) if text else DEFAULT_WAIT_SECONDS
