"""Which queue jobs were asked for a job of ours, and which of them trains it: queue/0001.json and taken/0001.json.

claims = QueueClaims(store, "job-1", time.time)
take(store, "job-1", 1, queue_id="abc-u1", worker="w1", now=now)     # a worker; call_off(...) is the launcher's

A request to the queue whose answer was lost may wait there under an id that nobody knows. So each request has a number,
and one conditional create decides what becomes of a number: a worker takes it, and leaves the id of its queue job, or
the launcher calls it off, and then whoever finds it later does nothing. Two trainings cannot come of it.
"""

from __future__ import annotations

from recipes.job import Record
from scripts.backends.claims import Claim, Claims, as_bytes
from scripts.store import Store


class QueueClaim(Claim):
    """queue/NNNN.json: one request to the queue, and the id it was given."""

    endpoint: str = ""
    queue_id: str | None = None
    asked_at: float = 0.0

    @property
    def machine(self) -> str | None:
        return self.queue_id


class QueueClaims(Claims[QueueClaim]):
    """The requests of one job."""

    kind, folder = QueueClaim, "queue"


class Taken(Record):
    """taken/NNNN.json: the queue job that may train the request of that number; none when it was called off."""

    format: int = 1
    number: int
    queue_id: str | None
    worker: str = ""
    at: float


def take(store: Store, job_id: str, number: int, *, queue_id: str, worker: str, now: float) -> Taken:
    """Who may train request `number`: this queue job, unless another one or its launcher was first."""
    return _decided(store, job_id, Taken(number=number, queue_id=queue_id, worker=worker, at=now))


def call_off(store: Store, job_id: str, number: int, now: float) -> Taken:
    """Makes sure that nobody will train request `number`, unless a worker has begun: then it names that."""
    return _decided(store, job_id, Taken(number=number, queue_id=None, at=now))


def _decided(store: Store, job_id: str, mine: Taken) -> Taken:
    key = f"{job_id}/taken/{mine.number:04d}.json"
    if store.create(key, as_bytes(mine)):
        return mine
    known = store.read(key)
    return Taken.model_validate_json(known) if known is not None else mine
