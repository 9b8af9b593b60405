"""Jobs on a serverless queue of Runpod: asked for once, looked at often, cancelled; the job folder is the record.

backend = RunpodQueueBackend(os.environ); handle = backend.submit(spec, backend.request(spec)); backend.observe(handle)

Runpod keeps what it knows of a queue job for 30 minutes, and lists none. So whatever must be known later stands in the
job folder: the requests (queue/), what became of each (taken/), and all that the container writes.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from typing import Any

from recipes.catalog import load_catalog
from recipes.job import LaunchSpec
from recipes.recipe import BackendName
from scripts.backends.base import Handle, LiveOffer, Observation, Owned, machine_name
from scripts.backends.runpod_api import BASE_URL, RunpodApi
from scripts.backends.runpod_errors import RunpodError
from scripts.backends.runpod_queue_claims import QueueClaim, QueueClaims, call_off
from scripts.backends.runpod_queue_request import QUEUE_SECONDS, VARIABLE, numbered, queue_request, unfit
from scripts.errors import LorryError, Problem, ProviderError, Refused
from scripts.job_folder import JobFiles, open_jobs, read_jobs
from scripts.job_token import CLIENT_NAME
from scripts.store import Store, open_store

Json = dict[str, Any]
WOKEN_WORKERS = 1
"To how many workers an endpoint is set that idleness has brought to none; `terraform apply` restores what was planned."
_RUNNING = ("IN_PROGRESS", "RUNNING")
_WAITS, _WAIT_SECONDS = 120, 2.0
_STOP_TRIES = 3
_MOST_LINES = 5000


class RunpodQueueBackend:
    """One endpoint, RUNPOD_TRAINING_ENDPOINT_ID, of the account of RUNPOD_API_KEY. LORRY_STORE: where its jobs lie."""

    name: BackendName = "runpod_queue"

    def __init__(
        self,
        environment: Mapping[str, str],
        *,
        now: Callable[[], float] = time.time,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._environment, self._now, self._sleep = environment, now, sleep
        self._queues: dict[str, RunpodApi] = {}

    def offers(self) -> list[LiveOffer]:
        """Stock and price now of our serverless offers; the dearest GPU of a pool is its price."""
        found, rows = [], self._api.serverless_gpus()
        for name, offer in load_catalog().offers.items():
            pool = [r for r in rows if r.get("pool") == offer.provider_type and r["price"].get("serverless")]
            if offer.backend == self.name and pool:
                usd = max(float(row["price"]["serverless"]) for row in pool) * offer.gpus
                has_stock = any(row.get("availability", "NONE") != "NONE" for row in pool)
                found.append(LiveOffer(name, has_stock, round(usd, 6)))
        return found

    def request(self, spec: LaunchSpec) -> dict[str, Any]:
        """The body of /run, without the number of the request."""
        return queue_request(spec, self._environment.get(VARIABLE, ""))

    def submit(self, spec: LaunchSpec, request: Mapping[str, Any]) -> dict[str, Any]:
        """Asks for a queue job, or finds the one that was asked for, also by another launcher or before a kill.

        Raises Refused when the endpoint does not suit the plan or its price, ProviderError otherwise.
        """
        store = open_store(spec.store)
        claims = QueueClaims(store, spec.job_id, self._now)
        for _ in range(_WAITS):
            newest = claims.newest()
            if newest is not None and not newest.is_pending(self._now()):
                newest = self._settled(store, spec, claims, newest)
                if newest.queue_id and self._is_alive(newest):
                    return _handle(spec, newest)
            if newest is None or not newest.is_pending(self._now()):
                mine = claims.take(newest)
                if mine is not None and (asked := self._ask(store, spec, request, claims, mine)).queue_id:
                    return _handle(spec, asked)
            self._sleep(_WAIT_SECONDS)
        raise ProviderError(
            Problem(f"job {spec.job_id}", "the queue took no request for it", "see it with `lorry show`, launch again")
        )

    def observe(self, handle: Handle) -> Observation:
        """What Runpod says. A job that waits for too long is cancelled here, and counts as gone."""
        job = self._job(handle)
        name = f"queue job {handle.get('queue')}"
        if job is None:
            return Observation("gone", f"{name}: Runpod knows it no more; results are kept for 30 minutes")
        status = str(job.get("status"))
        if status in _RUNNING:
            return Observation("running", f"{name}: {status}")
        if status == "IN_QUEUE" and self._now() <= float(handle.get("run_by", 0.0)):
            return Observation("waiting", f"{name}: {status}", 0.0)
        if status == "IN_QUEUE":
            why = f"no worker took it in {QUEUE_SECONDS / 60:.0f} minutes ({self._workers(handle)}); it was cancelled"
            self.stop(handle)
            return Observation("gone", f"{name}: {why}", 0.0)
        said = sentence_of(job.get("error"))
        return Observation("gone", f"{name}: {status}" + (f": {said}" if said else ""), _usd(handle, job))

    def logs(self, handle: Handle) -> Iterator[str]:
        """What the worker printed that had the job, while Runpod knows which one that was."""
        worker = (self._job(handle) or {}).get("workerId")
        for line in self._api.worker_logs(str(handle["endpoint"]), str(worker), tail=_MOST_LINES) if worker else ():
            yield f"{line.get('ts', '')} {line.get('source', '')}: {line.get('line', '')}"

    def stop(self, handle: Handle) -> None:
        """Cancels the queue job: its worker ends the container. Cancelling twice does no harm."""
        if not handle.get("queue"):
            return
        for attempt in range(1, _STOP_TRIES + 1):
            try:
                self._queue(str(handle["endpoint"])).ask("POST", f"/cancel/{handle['queue']}")
                return
            except RunpodError as error:
                if error.status == 404:
                    return
                if not error.maybe_done or attempt == _STOP_TRIES:
                    raise
                self._sleep(attempt)

    def owned(self) -> list[Owned]:
        """Queue jobs that wait or run, from the job folders below LORRY_STORE: Runpod lists none."""
        root = self._environment.get("LORRY_STORE", "").rstrip("/")
        found = []
        for store in _stores_below(root) if root else ():
            for files in read_jobs(store, open_jobs(store)):
                submission = files.submission
                if submission is not None and submission.backend == self.name and submission.handle.get("queue"):
                    seen = self.observe(submission.handle)
                    if seen.phase != "gone":
                        found.append(_owned(files, store, seen))
        return found

    @cached_property
    def _api(self) -> RunpodApi:
        base = self._environment.get("RUNPOD_API_BASE_URL") or BASE_URL
        return RunpodApi(self._environment.get("RUNPOD_API_KEY", ""), base, sleep=self._sleep)

    def _queue(self, endpoint_id: str) -> RunpodApi:
        """The queue of an endpoint, at the address that the endpoint itself names."""
        if endpoint_id not in self._queues:
            endpoint = self._api.read("serverless", endpoint_id)
            if endpoint is None:
                raise RunpodError(f"endpoint {endpoint_id}", 404, "there is none of that id")
            base = str(endpoint["requestUrls"]["run"]).removesuffix("/run")
            key = self._environment.get("RUNPOD_API_KEY", "")
            self._queues[endpoint_id] = RunpodApi(key, base, sleep=self._sleep)
        return self._queues[endpoint_id]

    def _job(self, handle: Handle) -> Json | None:
        """The status object; None when Runpod knows no such job or endpoint."""
        if not handle.get("queue"):
            return None
        try:
            return self._queue(str(handle["endpoint"])).ask("GET", f"/status/{handle['queue']}")
        except RunpodError as error:
            if error.status == 404:
                return None
            raise

    def _is_alive(self, claim: QueueClaim) -> bool:
        job = self._job({"queue": claim.queue_id, "endpoint": claim.endpoint})
        return job is not None and job.get("status") in ("IN_QUEUE", *_RUNNING)

    def _settled(self, store: Store, spec: LaunchSpec, claims: QueueClaims, claim: QueueClaim) -> QueueClaim:
        """A claim whose holder died before it had an answer, completed by what became of its request."""
        if claim.queue_id or not claim.endpoint:  # without an endpoint nothing had been sent yet
            return claim
        decided = call_off(store, spec.job_id, claim.number, self._now())
        return claims.write(claim, queue_id=decided.queue_id, given_up=claim.given_up or "no answer; called off")

    def _ask(
        self, store: Store, spec: LaunchSpec, request: Mapping[str, Any], claims: QueueClaims, claim: QueueClaim
    ) -> QueueClaim:
        """Sends the request of one claim; whatever comes of it stands in the claim. Without an answer it is called off,
        unless a worker has it already."""
        try:
            endpoint_id = self._ready_endpoint(spec)
            queue = self._queue(endpoint_id)
            claim = claims.write(claim, endpoint=endpoint_id, asked_at=self._now())
            answer = queue.ask("POST", "/run", numbered(request, claim.number))
            return claims.write(claim, queue_id=str(answer["id"]))
        except RunpodError as error:
            claim = claims.write(claim, given_up=str(error))
            if not error.maybe_done:
                raise
            return self._settled(store, spec, claims, claim)
        except LorryError as error:
            claims.write(claim, given_up=str(error))
            raise

    def _ready_endpoint(self, spec: LaunchSpec) -> str:
        """The endpoint, found to suit the plan and woken up where idleness has left it without workers."""
        endpoint_id = self._environment.get(VARIABLE, "")
        endpoint = self._api.read("serverless", endpoint_id)
        if problems := unfit(endpoint, spec, self._api.serverless_gpus()):
            raise Refused(*problems)
        assert endpoint is not None
        if not (endpoint.get("workers") or {}).get("max"):
            self._api.change("serverless", endpoint_id, {"workers": {"max": WOKEN_WORKERS}})
        return endpoint_id

    def _workers(self, handle: Handle) -> str:
        """The endpoint's workers in words: a worker that dies again and again shows here."""
        try:
            summary = self._api.workers(str(handle["endpoint"]))["summary"]
        except RunpodError:
            return "its workers are not known"
        return ", ".join(f"{count} {status}" for status, count in summary.items() if count) or "it has no workers"


def sentence_of(error: Any) -> str:
    """What a queue job says of its failure: our sentence, also out of the JSON into which the worker loop wraps it."""
    try:
        value = json.loads(error)
    except (TypeError, ValueError):
        value = None
    return str(value.get("error_message", error)) if isinstance(value, dict) else str(error or "")


def _handle(spec: LaunchSpec, claim: QueueClaim) -> dict[str, Any]:
    usd = load_catalog().offers[spec.offer or ""].usd_per_hour
    return {
        "queue": claim.queue_id,
        "endpoint": claim.endpoint,
        "name": machine_name(spec.job_id),
        "number": claim.number,
        "run_by": claim.asked_at + QUEUE_SECONDS,
        "usd_per_hour": usd,
    }


def _usd(handle: Handle, job: Mapping[str, Any]) -> float | None:
    """What the run did cost, by the time that Runpod says it took; None for a job that had other requests before."""
    if handle.get("number") != 1 or not isinstance(job.get("executionTime"), int | float):
        return None
    return float(job["executionTime"]) / 3_600_000 * float(handle.get("usd_per_hour", 0.0))


def _owned(files: JobFiles, store: Store, seen: Observation) -> Owned:
    """One queue job in the form of `reap`: its deadline counts from the first word of its container."""
    assert files.submission is not None
    handle, started = dict(files.submission.handle), files.container.started_at if files.container else None
    limit = files.launch.deadline_seconds if files.launch else 0
    handle |= {"store": store.url, "deadline": (started or float(handle.get("run_by", 0.0))) + limit}
    return Owned(files.job_id, handle, seen.phase, started, handle.get("usd_per_hour"))


def _stores_below(root: str) -> Iterator[Store]:
    """The store itself and those of its clients."""
    yield open_store(root)
    for name in open_store(f"{root}/clients").folders():
        if CLIENT_NAME.fullmatch(name):
            yield open_store(f"{root}/clients/{name}/jobs")
