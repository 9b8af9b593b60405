"""Tells a client how its job ended: which deliveries are due, and a hand that records each try before it makes it.

deliver(store, "job-1", due_tries("completed", ("webhook",), read_deliveries(store, "job-1"), now)[0], send, now)

Every try is a file of its own, made by a conditional create, so that of many processes exactly one makes it:

| file in the job folder | says |
|---|---|
| callbacks/webhook-completed/03.json | the third try, recorded before it is made |
| callbacks/webhook-completed/03-answer.json | how it went |

A try that has no answer was cut short. The next one follows all the same, so a delivery is made at least once, always
under the same id.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from recipes.job import Record
from scripts.errors import LorryError
from scripts.store import Store

Kind = Literal["webhook", "supabase"]
Outcome = Literal["completed", "failed", "cancelled"]

MOST_TRIES = 10
FIRST_WAIT_SECONDS = 30.0
"Before the second try; each further wait is twice as long: 10 tries take 30 x (2^9 - 1) s = 4.3 hours."

_NAME = re.compile(r"(?P<delivery>[a-z]+-[a-z]+)/(?P<number>[0-9]{2})(?P<answer>-answer)?\.json")


class Try(Record):
    """One try, recorded before it was made."""

    at: float


class Answer(Record):
    """How one try went."""

    at: float
    done: bool
    detail: str = ""


@dataclass(frozen=True)
class Delivery:
    """One delivery: its tries, when the last was made, whether one got through, what the last answer said."""

    tries: int
    last_at: float
    done: bool
    detail: str = ""

    @property
    def is_over(self) -> bool:
        """Whether nothing more will be tried."""
        return self.done or self.tries >= MOST_TRIES


@dataclass(frozen=True)
class DueTry:
    """A try to make now; `name` names the delivery within its job."""

    kind: Kind
    outcome: Outcome
    number: int

    @property
    def name(self) -> str:
        return name_of(self.kind, self.outcome)


def name_of(kind: Kind, outcome: Outcome) -> str:
    """webhook-completed, supabase-failed, ..."""
    return f"{kind}-{outcome}"


def wait_seconds(tries: int) -> float:
    """How long after the n-th try the next one comes."""
    return float(FIRST_WAIT_SECONDS * 2 ** (tries - 1))


def due_tries(outcome: Outcome, kinds: Iterable[Kind], known: Mapping[str, Delivery], now: float) -> list[DueTry]:
    """What is to be tried now for a job that ended this way. Pure."""
    due = []
    for kind in kinds:
        delivery = known.get(name_of(kind, outcome))
        if delivery is None:
            due.append(DueTry(kind, outcome, 1))
        elif not delivery.is_over and now >= delivery.last_at + wait_seconds(delivery.tries):
            due.append(DueTry(kind, outcome, delivery.tries + 1))
    return due


def are_over(outcome: Outcome, kinds: Iterable[Kind], known: Mapping[str, Delivery]) -> bool:
    """Whether every delivery of this outcome got through or was given up."""
    found = [known.get(name_of(kind, outcome)) for kind in kinds]
    return all(delivery is not None and delivery.is_over for delivery in found)


def read_deliveries(store: Store, job_id: str) -> dict[str, Delivery]:
    """The deliveries of a job by name."""
    folder = f"{job_id}/callbacks"
    found = [_NAME.fullmatch(key.removeprefix(f"{folder}/")) for key in store.keys(folder)]
    names = [match for match in found if match]
    deliveries = {}
    for name in sorted({match["delivery"] for match in names}):
        numbers = [int(m["number"]) for m in names if m["delivery"] == name and not m["answer"]]
        answered = [int(m["number"]) for m in names if m["delivery"] == name and m["answer"]]
        if numbers:
            deliveries[name] = _delivery(store, f"{folder}/{name}", max(numbers), max(answered, default=0))
    return deliveries


def deliver(store: Store, job_id: str, due: DueTry, send: Callable[[], None], now: float) -> Answer | None:
    """Records the try, then makes it; None when another process makes this very try.

    `send` raises LorryError when it did not get through; the answer then says so. Raises ProviderError for the store.
    """
    key = f"{job_id}/callbacks/{due.name}/{due.number:02}"
    if not store.create(f"{key}.json", _bytes(Try(at=now))):
        return None
    try:
        send()
        answer = Answer(at=now, done=True)
    except LorryError as error:
        answer = Answer(at=now, done=False, detail=str(error)[:500])
    store.write(f"{key}-answer.json", _bytes(answer))
    return answer


def _delivery(store: Store, folder: str, tries: int, answered: int) -> Delivery:
    made = store.read(f"{folder}/{tries:02}.json")
    said = store.read(f"{folder}/{answered:02}-answer.json") if answered else None
    answer = Answer.model_validate_json(said) if said else Answer(at=0.0, done=False, detail="no answer was recorded")
    at = Try.model_validate_json(made).at if made else 0.0
    return Delivery(tries, at, answer.done, answer.detail)


def _bytes(record: Record) -> bytes:
    return record.model_dump_json(indent=2).encode() + b"\n"
