"""Progress as server-sent events: /v2/lorry/events/{id}. After a break, Last-Event-ID goes on with the next line.

    id: 17
    event: metrics
    data: {"step": 17, "training_loss": 1.93, "learning_rate": 0.0002, ...}

The id is the line of metrics.jsonl, so any front door can go on where another one stopped. `status` events have no id:
they say how things stand now. The stream ends with `end`.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from recipes.job import Metric
from scripts.errors import LorryError
from scripts.gateway.contact import Look, look
from scripts.gateway.door import Door
from scripts.gateway.http import Call, Endpoint, call_of, guarded
from scripts.gateway.queue import PREFIX
from scripts.gateway.views import Json, phase_of, progress

POLL_SECONDS = 1.0
LONGEST_SECONDS = 900.0
"Then the stream is closed, and the reader comes back with Last-Event-ID: no connection is held for days."
_KEEP_ALIVE_SECONDS = 15.0


def routes(door: Door) -> list[Route]:
    """The path of the events."""
    return [Route(f"{PREFIX}/events/{{id}}", _events(door), methods=["GET"])]


def metrics_of(job: Look) -> list[Metric]:
    """The lines of metrics.jsonl so far; a line that is still being written is left for later."""
    data = job.room.jobs.read(f"{job.files.job_id}/metrics.jsonl") or b""
    found = []
    for line in data[: data.rfind(b"\n") + 1].splitlines():
        try:
            found.append(Metric.model_validate_json(line))
        except ValueError:
            continue
    return found


def _events(door: Door) -> Endpoint:
    async def answer(request: Request) -> Response:
        call = await call_of(door, request)
        first = await run_in_threadpool(look, door, call.client, call.path["id"])
        text = request.headers.get("last-event-id") or call.query.get("lastEventId") or "0"
        seen = int(text) if text.isascii() and text.isdigit() and len(text) < 10 else 0
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        return StreamingResponse(_lines(door, call, first, seen), headers=headers, media_type="text/event-stream")

    return guarded(answer)


async def _lines(door: Door, call: Call, job: Look, seen: int) -> AsyncIterator[str]:
    loop = asyncio.get_running_loop()
    began, spoke, said = loop.time(), loop.time(), ""
    yield "retry: 3000\n\n"
    while True:
        metrics = await run_in_threadpool(metrics_of, job)
        text = "".join(_metric_events(metrics, seen))
        seen = max(seen, len(metrics))
        status = _event("status", _status(job))
        if status != said:
            text, said = text + status, status
        if phase_of(job) not in ("IN_QUEUE", "IN_PROGRESS"):
            yield text + _event("end", {"status": phase_of(job)})
            return
        if text or loop.time() - spoke > _KEEP_ALIVE_SECONDS:
            yield text or ": still here\n\n"
            spoke = loop.time()
        if loop.time() - began > LONGEST_SECONDS:
            return
        await asyncio.sleep(POLL_SECONDS)
        try:
            job = await run_in_threadpool(look, door, call.client, call.path["id"])
        except LorryError:  # a store that does not answer is asked again
            continue


def _metric_events(metrics: list[Metric], seen: int) -> Iterator[str]:
    for number, metric in enumerate(metrics[seen:], seen + 1):
        yield f"id: {number}\n" + _event("metrics", metric.model_dump(mode="json", exclude_none=True))


def _status(job: Look) -> Json:
    view = {"status": phase_of(job)} | progress(job)
    view.pop("eta_seconds", None)  # it moves by itself; a status is sent when something happened
    return view | ({"error": job.state.sentence} if phase_of(job) == "FAILED" else {})


def _event(kind: str, value: Json) -> str:
    return f"event: {kind}\ndata: {json.dumps(value)}\n\n"
