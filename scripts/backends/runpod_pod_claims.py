"""Who may ask for the next Pod of a job, and which Pods it had: pods/0001.json and so on in the job folder.

claims = PodClaims(store, "job-1", time.time); mine = claims.take(claims.newest()); claims.write(mine, pod="pod1")

Runpod knows no idempotency key. So each request for a Pod is claimed in the store first, by a conditional create: of
several launchers one asks, the others wait for its answer. A claim whose holder fell silent is followed by the next.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from recipes.job import Record
from scripts.store import Store

SILENT_SECONDS = 90.0
"Longer than one request for a Pod may take: 10 s to connect and 30 s for the answer, with as much again to spare."


class PodClaim(Record):
    """pods/NNNN.json: one request for a Pod, and what came of it."""

    format: int = 1
    number: int
    touched_at: float
    pod: str | None = None
    gpu: str = ""
    datacenter: str = ""
    usd_per_hour: float = 0.0
    created_at: float = 0.0
    given_up: str = ""
    "Why no Pod came of it."
    doubles: tuple[str, ...] = ()
    "Pods of this job that were met beside the one that was kept, and terminated."

    def is_pending(self, now: float) -> bool:
        """Whether its holder may still be asking."""
        return self.pod is None and not self.given_up and now - self.touched_at < SILENT_SECONDS


class PodClaims:
    """The claims of one job."""

    def __init__(self, store: Store, job_id: str, now: Callable[[], float]) -> None:
        self._store, self._folder, self._now = store, f"{job_id}/pods", now
        self._written: dict[int, PodClaim] = {}

    def all(self) -> list[PodClaim]:
        """Oldest first. Raises ProviderError."""
        found = [self._store.read(key) for key in self._store.keys(self._folder)]
        return [PodClaim.model_validate_json(data) for data in found if data is not None]

    def newest(self) -> PodClaim | None:
        """The last one; None before the first."""
        keys = self._store.keys(self._folder)
        data = self._store.read(keys[-1]) if keys else None
        return PodClaim.model_validate_json(data) if data is not None else None

    def take(self, newest: PodClaim | None) -> PodClaim | None:
        """The claim after `newest`; None when another launcher got it."""
        claim = PodClaim(number=newest.number + 1 if newest else 1, touched_at=self._now())
        return claim if self._store.create(self._key(claim), _bytes(claim)) else None

    def write(self, claim: PodClaim, **changes: Any) -> PodClaim:
        """The claim with changes, known to all; its holder writes it before every request it sends."""
        latest = self._written.get(claim.number, claim)
        changed = latest.model_copy(update={**changes, "touched_at": self._now()})
        self._store.write(self._key(changed), _bytes(changed))
        self._written[claim.number] = changed
        return changed

    def pods(self) -> list[str]:
        """The id of every Pod the job ever had: what its bill is made of."""
        claims = self.all()
        return list(dict.fromkeys([*(c.pod for c in claims if c.pod), *(d for c in claims for d in c.doubles)]))

    def note_double(self, pod_id: str) -> None:
        """Remembers a second Pod of the job, since it costs too."""
        newest = self.newest()
        if newest is not None and pod_id not in self.pods():
            self.write(newest, doubles=(*newest.doubles, pod_id))

    def _key(self, claim: PodClaim) -> str:
        return f"{self._folder}/{claim.number:04d}.json"


def _bytes(claim: PodClaim) -> bytes:
    return claim.model_dump_json(indent=2).encode() + b"\n"
