"""The workers behind the serverless endpoints of the local Runpod: as many as the queue wants, each really running.

fleet = Fleet(Path("workers"), ProcessRunner(), Queue(clock)); fleet.advance(account)     # as often as one likes

A worker is charged from its start to its end, idle or not. One that exits is started again, as the platform does, and
the job it had goes to another. An endpoint without requests shrinks: to two workers after 3 days, to none after 7.
"""

from __future__ import annotations

import math
import secrets
import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote_plus

from scripts.fake_runpod.account import Account
from scripts.fake_runpod.clock import Clock, seconds_of
from scripts.fake_runpod.host import Mishap, filled_in, mishap_for
from scripts.fake_runpod.processes import Runner, Running
from scripts.fake_runpod.queue import Queue

Json = dict[str, Any]
MOUNT = "/runpod-volume"
IMAGE_COMMAND = "python -m scripts.worker"
"What the trainer image runs where an endpoint names no arguments."
IDLE_SECONDS = 5.0
"Where an endpoint scales by requests, and may not say how long a worker may idle."
_STATUSES = ("running", "idle", "initializing", "throttled", "unhealthy")
_DAY = 86_400.0


@dataclass
class Worker:
    """One worker. seen_at: when its loop last asked for something, None before the first time."""

    id: str
    endpoint: str
    key: str
    started_at: float
    mishap: Mishap | None = None
    seen_at: float | None = None
    idle_since: float | None = None
    running: Running | None = None
    exited_at: float | None = None
    is_ready: bool = False
    is_unhealthy: bool = False
    is_to_end: bool = False


@dataclass
class Fleet:
    """All workers of all endpoints. `url`: where they find the queue.

    lease_seconds: a worker that is silent for so long is lost. mishaps: what befalls the next workers, matched by the
    name of their endpoint: stuck, error, vanish and kill, as for Pods.
    """

    folder: Path
    runner: Runner | None
    queue: Queue
    url: str = ""
    initializing_seconds: float = 0.0
    restart_seconds: float = 0.2
    lease_seconds: float = 60.0
    ping_milliseconds: int = 1000
    mishaps: list[Mishap] = field(default_factory=list)
    workers: dict[str, Worker] = field(default_factory=dict)
    ending: list[Running] = field(default_factory=list)

    @property
    def clock(self) -> Clock:
        """The clock of the account."""
        return self.queue.clock

    def advance(self, account: Account) -> None:
        """Brings every queue and every worker to where they are by now."""
        self.queue.expire()
        self.ending = [running for running in self.ending if running.exit_code() is None]
        endpoints = {e["id"]: e for e in account.held["serverless"].values() if e["type"] == "QUEUE"}
        for worker in list(self.workers.values()):
            endpoint = endpoints.get(worker.endpoint)
            if endpoint is None or worker.is_to_end:
                self.end(account, worker)
            else:
                self._look(account, endpoint, worker)
        for endpoint in endpoints.values():
            self._shrink_idle(endpoint)
            self._scale(account, endpoint)
        for worker in self.workers.values():
            account.workers[worker.id]["status"] = self.status(worker)

    def add(self, account: Account, endpoint: Json, worker_id: str | None = None) -> Worker:
        """One more worker of an endpoint, charged from now on; its process is started by `advance`."""
        made = Worker(
            worker_id or secrets.token_hex(7), endpoint["id"], f"wk-{secrets.token_hex(16)}", self.clock.now()
        )
        made.mishap = mishap_for(self.mishaps, endpoint["name"])
        self.workers[made.id] = made
        count, now = int((endpoint.get("gpu") or {}).get("count", 0)), account.clock.stamp()
        row = {"id": made.id, "endpoint": endpoint["id"], "status": self.status(made), "gpuCount": count}
        account.workers[made.id] = row | {"isStale": False, "startedAt": now, "createdAt": now, "gone": False}
        account.worker_meter.turn_on(f"{endpoint['id']}/{made.id}", _hourly(account, endpoint), self.clock.now())
        return made

    def end(self, account: Account, worker: Worker) -> None:
        """Takes a worker away; what it worked on waits for another one."""
        if worker.running is not None:
            worker.running.end()
            self.ending.append(worker.running)
        self.workers.pop(worker.id, None)
        account.workers[worker.id]["gone"] = True
        self.queue.lose(worker.id)
        account.worker_meter.turn_off(f"{worker.endpoint}/{worker.id}", self.clock.now())

    def ready(self, worker: Worker) -> None:
        """The worker's loop asked for a job."""
        if not worker.is_ready:
            worker.is_ready, worker.idle_since = True, self.clock.now()

    def health(self, endpoint_id: str) -> Json:
        """The `workers` part of /health."""
        counts = self.summary(endpoint_id)
        del counts["total"]
        return counts | {"ready": counts["idle"] + counts["running"]}

    def summary(self, endpoint_id: str) -> Json:
        """Workers of an endpoint by status."""
        found = [self.status(worker).lower() for worker in self.workers.values() if worker.endpoint == endpoint_id]
        return {status: found.count(status) for status in _STATUSES} | {"total": len(found)}

    def status(self, worker: Worker) -> str:
        """Its status in the words of REST v2."""
        if worker.is_unhealthy or worker.exited_at is not None:
            return "UNHEALTHY"
        if not worker.is_ready:
            return "INITIALIZING"
        return "RUNNING" if self.queue.held_by(worker.id) else "IDLE"

    def environment(self, account: Account, endpoint: Json, worker: Worker) -> dict[str, str]:
        """What the platform puts into a worker; the unmodified worker loop needs nothing else."""
        gpu = quote_plus(_gpu(account, endpoint))
        base = f"{self.url}/{endpoint['id']}"
        end = f"?gpu={gpu}"
        own = {
            "RUNPOD_WEBHOOK_GET_JOB": f"{base}/job-take/$ID{end}",
            "RUNPOD_WEBHOOK_POST_OUTPUT": f"{base}/job-done/$RUNPOD_POD_ID/$ID{end}",
            "RUNPOD_WEBHOOK_POST_STREAM": f"{base}/job-stream/$RUNPOD_POD_ID/$ID{end}",
            "RUNPOD_WEBHOOK_PING": f"{base}/ping/$RUNPOD_POD_ID{end}",
            "RUNPOD_PING_INTERVAL": str(self.ping_milliseconds),
            "RUNPOD_AI_API_KEY": worker.key,
            "RUNPOD_POD_ID": worker.id,
            "RUNPOD_ENDPOINT_ID": endpoint["id"],
            "RUNPOD_GPU_COUNT": str((endpoint.get("gpu") or {}).get("count", 0)),
            # This machine is no GPU host: the loop's own checks of one would end it.
            "RUNPOD_SKIP_AUTO_SYSTEM_CHECKS": "true",
            "RUNPOD_SKIP_GPU_CHECK": "true",
        }
        mounts = dict.fromkeys(endpoint["networkVolumes"], MOUNT)
        return {**filled_in(account, endpoint["env"], mounts, self.folder), **own}

    def close(self) -> None:
        """Ends every process at once."""
        for running in [*self.ending, *(w.running for w in self.workers.values() if w.running is not None)]:
            running.end(at_once=True)

    def _look(self, account: Account, endpoint: Json, worker: Worker) -> None:
        now = self.clock.now()
        for line in worker.running.lines() if worker.running else ():
            account.say(worker.id, "container", line)
        if self._befalls(account, worker):
            return
        if worker.running is not None and (code := worker.running.exit_code()) is not None:
            account.say(worker.id, "system", f"the worker exited with {code}; starting it again")
            worker.running, worker.exited_at, worker.is_ready = None, now, False
            self.queue.lose(worker.id)
        if self.queue.held_by(worker.id):
            worker.idle_since = None
        elif worker.is_ready:
            worker.idle_since = worker.idle_since or now
        silent = worker.seen_at is not None and now - worker.seen_at > self.lease_seconds
        if silent and worker.running is not None:
            account.say(worker.id, "system", "the worker does not answer; it is replaced")
            self.end(account, worker)
        elif worker.running is None:
            self._start(account, endpoint, worker)

    def _start(self, account: Account, endpoint: Json, worker: Worker) -> None:
        now = self.clock.now()
        since, pause = worker.started_at, self.initializing_seconds
        if worker.exited_at is not None:
            since, pause = worker.exited_at, self.restart_seconds
        if self.runner is None or now - since < pause or (worker.mishap and worker.mishap.kind == "stuck"):
            return
        command = shlex.split(endpoint["args"] or IMAGE_COMMAND)
        if worker.mishap is not None and worker.mishap.kind == "error":
            worker.exited_at, worker.is_unhealthy = now, True
            return account.say(worker.id, "system", "the image could not be started")
        environment = self.environment(account, endpoint, worker)
        worker.running = self.runner.start(worker.id, command, environment, self.folder / worker.id)
        worker.exited_at = worker.seen_at = None

    def _befalls(self, account: Account, worker: Worker) -> bool:
        """Whether its mishap took the worker away now; the seconds count from the moment it got a job."""
        mishap, jobs = worker.mishap, self.queue.held_by(worker.id)
        if mishap is None or not jobs or self.clock.now() - (jobs[0].started_at or 0.0) < mishap.after_seconds:
            return False
        if mishap.kind not in ("kill", "vanish"):
            return False
        worker.mishap = None
        if worker.running is not None:
            worker.running.end(at_once=True)
        if mishap.kind == "vanish":
            self.end(account, worker)
        return mishap.kind == "vanish"

    def _scale(self, account: Account, endpoint: Json) -> None:
        """REQUEST_COUNT: a worker for every so many jobs; QUEUE_DELAY: one more when a job has waited for so long."""
        mine = [worker for worker in self.workers.values() if worker.endpoint == endpoint["id"]]
        scaling, limits, now = endpoint["scaling"], endpoint["workers"], self.clock.now()
        wanted = math.ceil(self.queue.open_jobs(endpoint["id"]) / scaling.get("requestCount", 1))
        waiting = self.queue.waiting.get(endpoint["id"], [])
        if scaling["type"] == "QUEUE_DELAY" and mine:
            waited = now - self.queue.jobs[waiting[0]].queued_at if waiting else 0.0
            wanted = min(wanted, len(mine) + (waited >= scaling["queueDelay"]))
        wanted = max(limits["min"], min(wanted, limits["max"]))
        for _ in range(wanted - len(mine)):
            self.add(account, endpoint)
        patience = limits.get("idleTimeout", IDLE_SECONDS)
        idle = [w for w in mine if not self.queue.held_by(w.id) and now - (w.idle_since or w.started_at) >= patience]
        for worker in idle[: max(0, len(mine) - wanted)]:
            self.end(account, worker)

    def _shrink_idle(self, endpoint: Json) -> None:
        asked = self.queue.asked_at.get(endpoint["id"], seconds_of(endpoint["createdAt"]))
        idle_days = (self.clock.now() - asked) / _DAY
        if idle_days >= 3 and endpoint["workers"]["max"] > (0 if idle_days >= 7 else 2):
            endpoint["workers"] = endpoint["workers"] | {"max": 0 if idle_days >= 7 else 2, "min": 0}


def _gpu(account: Account, endpoint: Json) -> str:
    """The GPU of its workers: the first of its first pool."""
    pools = (endpoint.get("gpu") or {}).get("pools", ["CPU"])
    return next((str(gpu["id"]) for gpu in account.catalog.gpus() if gpu["pool"] == pools[0]), "CPU")


def _hourly(account: Account, endpoint: Json) -> float:
    """USD an hour for one worker."""
    name = _gpu(account, endpoint)
    price = next((gpu["price"].get("serverless", 0.0) for gpu in account.catalog.gpus() if gpu["id"] == name), 0.0)
    return float(price) * int((endpoint.get("gpu") or {}).get("count", 1))
