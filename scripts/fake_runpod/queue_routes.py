"""What the serverless queue of the local Runpod answers, to clients and to the worker loop of the `runpod` package.

status, reply = QueueRoutes(local).answer(request)      # None where the path is none of a queue; holds local.lock

The worker asks with its key alone, no `Bearer` before it, and sends JSON under the type of a form.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from threading import Condition
from typing import Any

from scripts.fake_runpod.account import Rejected
from scripts.fake_runpod.fleet import Fleet, Worker
from scripts.fake_runpod.queue import FINAL, QueueJob

Json = dict[str, Any]
HOLD_SECONDS = 2.0
"How long a worker's question is held open; answered at once, it would be asked thousands of times a second."
_SYNC_SECONDS, _LONGEST_SYNC_SECONDS = 90.0, 300.0


@dataclass(frozen=True)
class Asked:
    """One request to a queue. is_gone: whether who asked has hung up."""

    method: str
    endpoint: str
    verb: str
    rest: tuple[str, ...]
    query: Mapping[str, list[str]]
    raw: bytes
    authorization: str
    is_gone: Callable[[], bool]


def asked_of(endpoints: Mapping[str, Any], method: str, path: str, **given: Any) -> Asked | None:
    """The request as one to a queue; None for any other path."""
    parts = path.removeprefix("/v2/").split("/")
    if not path.startswith("/v2/") or parts[0] not in endpoints or len(parts) < 2:
        return None
    return Asked(method, parts[0], parts[1], tuple(parts[2:]), **given)


class QueueRoutes:
    """The routes below /v2/{endpoint}. `changed` is the condition of the lock under which all this runs."""

    def __init__(self, fleet: Fleet, changed: Condition, key: str) -> None:
        self._fleet, self._queue, self._changed, self._key = fleet, fleet.queue, changed, key

    def answer(self, asked: Asked) -> tuple[int, Any]:
        """Status and JSON; None stands for an empty body."""
        workers: dict[tuple[str, str], Any] = {
            ("GET", "job-take"): self._take,
            ("GET", "job-take-batch"): self._take,
            ("GET", "job-stop"): self._stop,
            ("POST", "job-done"): self._done,
            ("POST", "job-stream"): self._chunk,
            ("GET", "ping"): self._ping,
        }
        clients: dict[tuple[str, str], Any] = {
            ("POST", "run"): self._run,
            ("POST", "runsync"): self._runsync,
            ("GET", "status"): lambda asked: self._job(asked).shown(),
            ("GET", "status-sync"): lambda asked: self._held(self._job(asked), asked),
            ("GET", "stream"): self._stream,
            ("POST", "cancel"): self._cancel,
            ("POST", "retry"): self._retry,
            ("POST", "purge-queue"): lambda asked: {"removed": self._purged(asked), "status": "completed"},
            ("GET", "health"): self._health,
        }
        route = (asked.method, asked.verb)
        try:
            if route in workers:
                return self._of_worker(asked, workers[route])
            if not secrets.compare_digest(asked.authorization.encode(), f"Bearer {self._key}".encode()):
                return 401, {"error": "unauthorized"}
            if route not in clients:
                return 404, {"error": f"no such route: {asked.verb}"}
            return 200, clients[route](asked)
        except Rejected as refused:
            return refused.status, {"error": refused.detail}
        finally:
            self._changed.notify_all()

    def unsent(self, asked: Asked, reply: Any) -> None:
        """A job that could not be written to the worker that asked for it goes back to the head of the queue."""
        rows = reply if isinstance(reply, list) else [reply]
        if asked.verb.startswith("job-take") and reply:
            self._queue.give_back([self._queue.jobs[row["id"]] for row in rows if row["id"] in self._queue.jobs])

    # what clients ask

    def _run(self, asked: Asked) -> Json:
        job = self._queue.add(asked.endpoint, asked.raw)
        return {"id": job.id, "status": job.status}

    def _runsync(self, asked: Asked) -> Json:
        return self._held(self._queue.add(asked.endpoint, asked.raw, sync=True), asked)

    def _job(self, asked: Asked) -> QueueJob:
        return self._queue.find(asked.endpoint, asked.rest[0] if asked.rest else "")

    def _held(self, job: QueueJob, asked: Asked) -> Json:
        wanted = asked.query.get("wait", [""])[0]
        seconds = min(max(int(wanted) / 1000, 1.0), _LONGEST_SYNC_SECONDS) if wanted.isdecimal() else _SYNC_SECONDS
        self._wait(lambda: job.status in FINAL, seconds)
        return job.shown()

    def _stream(self, asked: Asked) -> Json:
        job = self._job(asked)
        chunks, job.stream = job.stream, []
        return {"status": job.status, "stream": chunks}

    def _cancel(self, asked: Asked) -> Json:
        job = self._job(asked)
        self._queue.cancel(job)
        return job.shown()

    def _retry(self, asked: Asked) -> Json:
        job = self._job(asked)
        self._queue.retry(job)
        return {"id": job.id, "status": job.status}

    def _purged(self, asked: Asked) -> int:
        return self._queue.purge(asked.endpoint)

    def _health(self, asked: Asked) -> Json:
        self._queue.expire()
        return {"jobs": self._queue.counts(asked.endpoint), "workers": self._fleet.health(asked.endpoint)}

    # what workers ask

    def _of_worker(self, asked: Asked, handler: Callable[[Asked, Worker], tuple[int, Any]]) -> tuple[int, Any]:
        worker = self._fleet.workers.get(asked.rest[0] if asked.rest else "")
        if worker is None or worker.endpoint != asked.endpoint:
            return 401, {"error": "unknown worker"}
        if not secrets.compare_digest(asked.authorization.encode(), worker.key.encode()):
            return 401, {"error": "not the key of this worker"}
        worker.seen_at = self._fleet.clock.now()
        return handler(asked, worker)

    def _take(self, asked: Asked, worker: Worker) -> tuple[int, Any]:
        batch = asked.verb == "job-take-batch"
        most = int(asked.query.get("batch_size", ["1"])[0]) if batch else 1
        self._fleet.ready(worker)
        self._wait(lambda: bool(self._queue.waiting.get(asked.endpoint)) or asked.is_gone(), HOLD_SECONDS)
        if asked.is_gone() or worker.id not in self._fleet.workers:
            return 204, None
        jobs = self._queue.take(asked.endpoint, worker.id, most)
        rows = [{"id": job.id, "input": job.input} for job in jobs]
        return (200, rows if batch else rows[0]) if rows else (204, None)

    def _stop(self, asked: Asked, worker: Worker) -> tuple[int, Any]:
        def due() -> bool:
            self._queue.expire()
            return bool(self._queue.to_stop.get(worker.id)) or asked.is_gone()

        self._wait(due, HOLD_SECONDS)
        if asked.is_gone():
            return 204, None
        ids = self._queue.to_stop.pop(worker.id, [])
        return (200, {"jobsToStop": ids}) if ids else (204, None)

    def _done(self, asked: Asked, worker: Worker) -> tuple[int, Any]:
        if self._queue.done(worker.id, asked.rest[1], asked.raw):
            worker.is_to_end = True
        return 200, {}

    def _chunk(self, asked: Asked, worker: Worker) -> tuple[int, Any]:
        self._queue.chunk(worker.id, asked.rest[1], asked.raw)
        return 200, {}

    def _ping(self, asked: Asked, worker: Worker) -> tuple[int, Any]:
        self._queue.stop_again(worker.id, asked.query.get("job_id", [""])[0].split(","))
        worker.is_unhealthy = asked.query.get("status", [""])[0] == "unhealthy"
        return 200, {}

    def _wait(self, due: Callable[[], bool], seconds: float) -> None:
        """Until it is due, at most so long; others have the lock meanwhile."""
        give_up = time.monotonic() + seconds
        while not due() and (left := give_up - time.monotonic()) > 0:
            self._changed.wait(min(left, 0.2))
