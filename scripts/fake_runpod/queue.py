"""The serverless queue of the local Runpod: jobs, their states, and every clock that runs against them.

queue = Queue(Clock()); job = queue.add("ep1", body); queue.take("ep1", "w1", 1); queue.done("w1", job.id, body)

States go IN_QUEUE, IN_PROGRESS, then COMPLETED, FAILED, CANCELLED or TIMED_OUT; a final one changes by /retry alone.
"""

from __future__ import annotations

import json
import uuid
from dataclasses import dataclass, field
from typing import Any

from scripts.fake_runpod.account import Rejected
from scripts.fake_runpod.clock import Clock

Json = dict[str, Any]
FINAL = ("COMPLETED", "FAILED", "CANCELLED", "TIMED_OUT")
RUN_BYTES, RUNSYNC_BYTES = 10 * 2**20, 20 * 2**20
KEPT_SECONDS, KEPT_SYNC_SECONDS = 1800.0, 60.0
_DAY_MS = 86_400_000
_POLICY = {"executionTimeout": (600_000, 5_000, 7 * _DAY_MS), "ttl": (_DAY_MS, 10_000, 7 * _DAY_MS)}


@dataclass
class QueueJob:
    """One request. seconds: how long it may run, how long it may exist, how long its result is kept."""

    id: str
    endpoint: str
    input: Any
    queued_at: float
    run_seconds: float
    life_seconds: float
    kept_seconds: float
    status: str = "IN_QUEUE"
    worker: str | None = None
    started_at: float | None = None
    ended_at: float | None = None
    output: Any = None
    error: str | None = None
    stream: list[Json] = field(default_factory=list)
    deliveries: int = 0
    "How many workers it was handed to."

    def shown(self) -> Json:
        """The status object."""
        view: Json = {"id": self.id, "status": self.status}
        if self.worker is not None and self.started_at is not None:
            view |= {"workerId": self.worker, "delayTime": _ms(self.started_at - self.queued_at)}
            if self.ended_at is not None:
                view["executionTime"] = _ms(self.ended_at - self.started_at)
        kept = {"output": self.output, "error": self.error}
        return view | {name: value for name, value in kept.items() if value is not None}


@dataclass
class Queue:
    """Every job of every endpoint. `redelivers`: a job whose worker died goes to another one, as the platform does."""

    clock: Clock
    redelivers: bool = True
    jobs: dict[str, QueueJob] = field(default_factory=dict)
    waiting: dict[str, list[str]] = field(default_factory=dict)
    to_stop: dict[str, list[str]] = field(default_factory=dict)
    "Ids of jobs by the worker that is to stop them."
    asked_at: dict[str, float] = field(default_factory=dict)
    "When each endpoint last got a job."
    retried: dict[str, int] = field(default_factory=dict)

    def add(self, endpoint: str, raw: bytes, *, sync: bool = False) -> QueueJob:
        """A new job from the body of /run or /runsync. Raises Rejected 400."""
        if len(raw) > (RUNSYNC_BYTES if sync else RUN_BYTES):
            raise Rejected(400, f"request body too large, {20 if sync else 10}MB max")
        body = _body(raw)
        if not body.get("input"):
            raise Rejected(400, "input is required and may not be empty")
        limits = {name: _within(body.get("policy") or {}, name) / 1000 for name in _POLICY}
        kept = KEPT_SYNC_SECONDS if sync else KEPT_SECONDS
        now = self.clock.now()
        job = QueueJob(
            f"{uuid.uuid4()}-u1", endpoint, body["input"], now, limits["executionTimeout"], limits["ttl"], kept
        )
        self.jobs[job.id] = job
        self.waiting.setdefault(endpoint, []).append(job.id)
        self.asked_at[endpoint] = now
        return job

    def find(self, endpoint: str, job_id: str) -> QueueJob:
        """A job that is still known. Raises Rejected 404."""
        self.expire()
        job = self.jobs.get(job_id)
        if job is None or job.endpoint != endpoint:
            raise Rejected(404, "job not found")
        return job

    def cancel(self, job: QueueJob) -> None:
        """Ends it at once; its worker is told."""
        self._end(job, "CANCELLED")

    def retry(self, job: QueueJob) -> None:
        """Once more under its id. Raises Rejected 400 for a job that neither failed nor timed out."""
        if job.status not in ("FAILED", "TIMED_OUT"):
            raise Rejected(400, f"only FAILED and TIMED_OUT jobs can be retried; this one is {job.status}")
        job.error = job.output = None
        self.retried[job.endpoint] = self.retried.get(job.endpoint, 0) + 1
        self._requeue(job)

    def purge(self, endpoint: str) -> int:
        """Cancels what waits; returns how many that were."""
        ids = list(self.waiting.get(endpoint, []))
        for job_id in ids:
            self.cancel(self.jobs[job_id])
        return len(ids)

    def counts(self, endpoint: str) -> Json:
        """The `jobs` part of /health."""
        names = {"completed": "COMPLETED", "failed": "FAILED", "inProgress": "IN_PROGRESS", "inQueue": "IN_QUEUE"}
        jobs = [job.status for job in self.jobs.values() if job.endpoint == endpoint]
        return {name: jobs.count(status) for name, status in names.items()} | {"retried": self.retried.get(endpoint, 0)}

    def open_jobs(self, endpoint: str) -> int:
        """Jobs that wait or run: what decides how many workers there are."""
        return sum(job.endpoint == endpoint and job.status not in FINAL for job in self.jobs.values())

    def take(self, endpoint: str, worker: str, most: int) -> list[QueueJob]:
        """Hands up to `most` waiting jobs to a worker."""
        self.expire()
        taken = [self.jobs[job_id] for job_id in self.waiting.get(endpoint, [])[:most]]
        for job in taken:
            self.waiting[endpoint].remove(job.id)
            job.status, job.worker, job.started_at = "IN_PROGRESS", worker, self.clock.now()
            job.deliveries += 1
        return taken

    def give_back(self, jobs: list[QueueJob]) -> None:
        """Puts jobs back whose worker never got them."""
        for job in reversed(jobs):
            if job.status == "IN_PROGRESS":
                self._requeue(job)

    def done(self, worker: str, job_id: str, raw: bytes) -> bool:
        """What a worker says of a job: progress or its end; whether the worker asks to be stopped.

        What comes late, or from a worker that lost the job, changes nothing.
        """
        body, job = _body(raw), self.jobs.get(job_id)
        if job is not None and job.status == "IN_PROGRESS" and job.worker == worker:
            if body.get("status") == "IN_PROGRESS":
                job.output = body.get("output")
            elif "error" in body:
                job.error, job.output = str(body["error"]), body.get("output")
                self._end(job, "FAILED")
            else:
                job.output = body.get("output")
                self._end(job, "COMPLETED")
        return bool(body.get("stopPod"))

    def chunk(self, worker: str, job_id: str, raw: bytes) -> None:
        """One piece of a stream."""
        job = self.jobs.get(job_id)
        if job is not None and job.worker == worker:
            job.stream.append(_body(raw))

    def held_by(self, worker: str) -> list[QueueJob]:
        """The jobs that a worker works on."""
        return [job for job in self.jobs.values() if job.worker == worker and job.status == "IN_PROGRESS"]

    def stop_again(self, worker: str, job_ids: list[str]) -> None:
        """A worker says what it works on: of that, what was ended meanwhile is to be stopped once more.

        A stop that comes in the moment between the taking of a job and its start finds nothing to stop in the worker.
        """
        for job_id in job_ids:
            job = self.jobs.get(job_id)
            is_over = job is not None and job.worker == worker and job.status in ("CANCELLED", "TIMED_OUT")
            if is_over and job_id not in self.to_stop.setdefault(worker, []):
                self.to_stop[worker].append(job_id)

    def lose(self, worker: str) -> None:
        """The worker is gone: its jobs wait for another one, at the head of the queue."""
        self.to_stop.pop(worker, None)
        if self.redelivers:
            self.give_back(self.held_by(worker))

    def expire(self) -> None:
        """What the clocks have ended by now: run time, life (also of a running job), kept results."""
        now = self.clock.now()
        for job in list(self.jobs.values()):
            over = job.ended_at is not None and now - job.ended_at > job.kept_seconds
            if over or (job.status not in FINAL and now - job.queued_at > job.life_seconds):
                self._end(job, "CANCELLED")
                del self.jobs[job.id]
            elif job.status == "IN_PROGRESS" and now - (job.started_at or now) > job.run_seconds:
                job.error = f"job timed out after {job.run_seconds:g} s"
                self._end(job, "TIMED_OUT")

    def _end(self, job: QueueJob, status: str) -> None:
        if job.status in FINAL:
            return
        if job.id in self.waiting.get(job.endpoint, []):
            self.waiting[job.endpoint].remove(job.id)
        elif job.worker is not None and status in ("CANCELLED", "TIMED_OUT"):
            self.to_stop.setdefault(job.worker, []).append(job.id)
        job.status, job.ended_at = status, self.clock.now()

    def _requeue(self, job: QueueJob) -> None:
        job.status, job.worker, job.started_at, job.ended_at = "IN_QUEUE", None, None, None
        self.waiting.setdefault(job.endpoint, []).insert(0, job.id)


def _body(raw: bytes) -> Json:
    """Raises Rejected 400 for what is no JSON object."""
    try:
        value = json.loads(raw or b"{}")
    except ValueError:
        raise Rejected(400, "the body is not JSON") from None
    if not isinstance(value, dict):
        raise Rejected(400, "the body is not a JSON object")
    return value


def _within(policy: Json, name: str) -> float:
    usual, least, most = _POLICY[name]
    value = policy.get(name, usual)
    if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most:
        raise Rejected(400, f"policy.{name} must be {least} to {most} milliseconds")
    return float(value)


def _ms(seconds: float) -> int:
    return max(0, round(seconds * 1000))
