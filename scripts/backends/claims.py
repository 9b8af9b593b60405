"""Who may ask a provider for the next machine of a job: numbered claims in the job folder, taken by conditional create.

claims = PodClaims(store, "job-1", time.time); mine = claims.take(claims.newest()); claims.write(mine, pod="pod1")

Runpod knows no idempotency key. So each request for a machine is claimed in the store first: of several launchers one
asks, the others wait for its answer. A claim whose holder fell silent is followed by the next.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any, Generic, TypeVar

from recipes.job import Record
from scripts.errors import Problem, ProviderError
from scripts.store import Store

SILENT_SECONDS = 90.0
"Longer than one request for a machine may take: 10 s to connect and 30 s for the answer, with as much again to spare."

_WAIT_SECONDS, _WAITS = 2.0, 120


class Claim(Record):
    """FOLDER/NNNN.json: one request for a machine, and what came of it."""

    format: int = 1
    number: int
    touched_at: float
    given_up: str = ""
    "Why no machine came of it."

    @property
    @abstractmethod
    def machine(self) -> str | None:
        """What came of it, by the provider's id."""

    def is_pending(self, now: float) -> bool:
        """Whether its holder may still be asking."""
        return self.machine is None and not self.came_to_nothing and now - self.touched_at < SILENT_SECONDS

    @property
    def came_to_nothing(self) -> bool:
        """Whether no machine can come of it any more."""
        return bool(self.given_up)


Kind = TypeVar("Kind", bound=Claim)


class Claims(Generic[Kind]):
    """The claims of one job. kind: what one is; folder: where they lie in the job folder."""

    kind: type[Kind]
    folder: str

    def __init__(self, store: Store, job_id: str, now: Callable[[], float]) -> None:
        self._store, self._folder, self.now, self.job_id = store, f"{job_id}/{self.folder}", now, job_id
        self._written: dict[int, Kind] = {}

    def all(self) -> list[Kind]:
        """Oldest first. Raises ProviderError."""
        found = [self._store.read(key) for key in self._store.keys(self._folder)]
        return [self.kind.model_validate_json(data) for data in found if data is not None]

    def newest(self) -> Kind | None:
        """The last one; None before the first."""
        keys = self._store.keys(self._folder)
        data = self._store.read(keys[-1]) if keys else None
        return self.kind.model_validate_json(data) if data is not None else None

    def take(self, newest: Kind | None) -> Kind | None:
        """The claim after `newest`; None when another launcher got it."""
        claim = self.kind(number=newest.number + 1 if newest else 1, touched_at=self.now())
        return claim if self._store.create(self._key(claim), as_bytes(claim)) else None

    def write(self, claim: Kind, **changes: Any) -> Kind:
        """The claim with changes, known to all; its holder writes it before every request it sends."""
        latest = self._written.get(claim.number, claim)
        changed = latest.model_copy(update={**changes, "touched_at": self.now()})
        self._store.write(self._key(changed), as_bytes(changed))
        self._written[claim.number] = changed
        return changed

    def _key(self, claim: Kind) -> str:
        return f"{self._folder}/{claim.number:04d}.json"


def ask_once(
    claims: Claims[Kind],
    found: Callable[[Kind | None], dict[str, Any] | None],
    ask: Callable[[Kind], dict[str, Any]],
    sleep: Callable[[float], None],
) -> dict[str, Any]:
    """The handle of the job's machine: of one that is found, or of the one that this launcher alone asks for.

    found: looks for a machine of the job, given its newest claim. ask: with a claim of its own. Raises ProviderError
    when another launcher asks for too long, and what `found` and `ask` raise.
    """
    for _ in range(_WAITS):
        newest = claims.newest()
        if handle := found(newest):
            return handle
        if newest is None or not newest.is_pending(claims.now()):
            mine = claims.take(newest)
            if mine is not None:
                return ask(mine)
        sleep(_WAIT_SECONDS)
    raise ProviderError(
        Problem(f"job {claims.job_id}", "another launch is asking for its machine", "see it with `lorry show`")
    )


def as_bytes(record: Record) -> bytes:
    """The record as it is stored."""
    return record.model_dump_json(indent=2).encode() + b"\n"
