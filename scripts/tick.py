"""Does what is due for every job that is not settled, from any process, any number of times, at any moment.

report = tick(rooms, hands); report.done, report.troubles

Due are: a cancel that only the client's database knows, overdue stops, machines that outstay their job, progress and
end in the client's row, signed webhooks, training sets that shall not be kept, the settlement. Whoever calls it (a
machine at its end, a request at the front door, a cron job), what must be done once is done once: stops and tries are
conditional creates, the end in the row is a conditional UPDATE.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

from recipes.recipe import BackendName
from scripts.audit import record
from scripts.backends.base import Backend, Observation
from scripts.callbacks import Outcome
from scripts.cost import Bill, settle
from scripts.ears import Ears, End
from scripts.errors import LorryError, ProviderError
from scripts.forget import forget_training_set, owes_forgetting
from scripts.gateway.records import Request, read
from scripts.job_folder import SETTLED, JobFiles, open_jobs, read_job
from scripts.launch import UNASKED_SECONDS, launch_again
from scripts.overstay import overstay
from scripts.state import JobState, job_state, overdue, was_taken
from scripts.stop import By, stop_job
from scripts.store import Store

MOST_JOBS = 1000
"Of one store in one call; where there are more, the next call goes on elsewhere."
LOST_SECONDS = 600.0
"A machine that vanished is the end of its job after this long; until then somebody may launch it again."
RELAUNCH_SECONDS = 300.0
"A job recorded this long ago without a machine was left behind, or there was no stock: it is launched again."

OUTCOMES: dict[str, Outcome] = {"completed": "completed", "cancelled": "cancelled"}
"A state that is not here is a failure to the client."

Value = TypeVar("Value")


@dataclass(frozen=True)
class Room:
    """The jobs of one client, and how that client hears of them."""

    store: Store
    ears: Ears = field(default_factory=Ears)


@dataclass(frozen=True)
class Hands:
    """What a tick may reach: backends by name, the provider's bill, the clock."""

    backend: Callable[[BackendName], Backend]
    bill: Bill
    now: Callable[[], float] = time.time


@dataclass
class TickReport:
    """What one tick did and what it could not do, a sentence each; how many jobs it looked at and left for later."""

    done: list[str] = field(default_factory=list)
    troubles: list[str] = field(default_factory=list)
    looked_at: int = 0
    left: int = 0


@dataclass(frozen=True)
class Visit:
    """One job at one moment. seen: what the provider said; None when it was not asked or did not answer."""

    room: Room
    files: JobFiles
    request: Request | None
    seen: Observation | None
    state: JobState
    outcome: Outcome | None
    now: float

    @property
    def client_id(self) -> str:
        """What the client calls this job."""
        return (self.request.client_job_id if self.request else None) or self.files.job_id

    @property
    def was_taken(self) -> bool:
        """Whether the provider took its machine back: the job goes on elsewhere, from its newest checkpoint."""
        return was_taken(self.files, self.state, self.seen)

    @property
    def has_no_machine(self) -> bool:
        """Whether nothing of this job can cost anything any more."""
        asked = self.files.submission is not None and self.files.submission.handle
        return not asked or (self.seen is not None and self.seen.phase == "gone")


def tick(rooms: Iterable[Room], hands: Hands, *, most: int = MOST_JOBS) -> TickReport:
    """Looks at up to `most` open jobs of each room. A job or a store in trouble never keeps the others from theirs."""
    report = TickReport()
    for room in rooms:
        try:
            ids = open_jobs(room.store)
        except LorryError as error:
            report.troubles.append(f"{room.store.url}: {error}")
            continue
        # By chance, and not by the hour: a cron job comes at even times, and would meet the same jobs again and again.
        start = random.Random(hands.now()).randrange(len(ids)) if len(ids) > most else 0
        for job_id in (ids[start:] + ids[:start])[:most]:
            tick_job(room, job_id, hands, report)
        report.left += max(0, len(ids) - most)
    return report


def tick_job(room: Room, job_id: str, hands: Hands, report: TickReport) -> None:
    """What is due for one job. Whatever fails is a sentence in `report.troubles`, and due again at the next tick."""
    attempt = _Attempts(job_id, report)
    known = attempt(lambda: read_job(room.store, job_id))
    if known is None or known.launch is None:
        return
    report.looked_at += 1
    seen = attempt(lambda: _observed(known, hands))  # asked before the files are read again: see job_state
    files = attempt(lambda: read_job(room.store, job_id))
    if files is None:
        return
    request = attempt(lambda: read(room.store, f"{job_id}/request.json", Request))
    visit = visit_of(room, files, request, seen, hands.now())
    for step in (_stop, _end_what_outstays, _launch_again, _tell, _forget, _settle):
        report.done += [f"{job_id}: {sentence}" for sentence in attempt(partial(step, visit, hands)) or ()]


def visit_of(room: Room, files: JobFiles, request: Request | None, seen: Observation | None, now: float) -> Visit:
    """What follows from the files, the provider's word and the clock. Pure."""
    state = job_state(files, seen, now)
    return Visit(room, files, request, seen, state, outcome_of(files, state, now), now)


def outcome_of(files: JobFiles, state: JobState, now: float) -> Outcome | None:
    """How the job ended for its client; None while it goes on, or may go on. Pure."""
    if not state.is_final:
        return None
    if state.state == "lost" and now - _last_word(files) <= LOST_SECONDS:
        return None
    return OUTCOMES.get(state.state, "failed")


class _Attempts:
    """Steps that may fail one by one."""

    def __init__(self, job_id: str, report: TickReport) -> None:
        self._job_id, self._report = job_id, report

    def __call__(self, step: Callable[[], Value]) -> Value | None:
        try:
            return step()
        except LorryError as error:
            self._report.troubles.append(f"{self._job_id}: {error}")
            return None


def _observed(files: JobFiles, hands: Hands) -> Observation | None:
    spec, submission = files.launch, files.submission
    return hands.backend(spec.backend).observe(submission.handle) if spec and submission and submission.handle else None


def _stop(visit: Visit, hands: Hands) -> list[str]:
    """Stops the job when its client cancelled it in the database alone, or when it is past its limits."""
    files, spec = visit.files, visit.files.launch
    if visit.state.is_final or files.stop is not None or spec is None:
        return []
    due = overdue(files, visit.seen, visit.now) or _unasked(visit)
    if due is None and visit.room.ears.has_cancelled(visit.client_id):
        due = "user", "the client's database says cancelled"
    if due is None:
        return []
    by, reason = due
    stop = stop_job(visit.room.store, files.job_id, hands.backend(spec.backend), by, reason, visit.now)
    return [f"stopped ({stop.by}): {stop.reason}"] if stop else []


def _unasked(visit: Visit) -> tuple[By, str] | None:
    waited = _waits_for_a_machine(visit)
    if waited is None or waited <= UNASKED_SECONDS or visit.files.container is not None:
        return None
    return "operator", f"no machine could be had for {waited / 3600:.1f} hours"


def _end_what_outstays(visit: Visit, hands: Hands) -> list[str]:
    """Ends a machine whose job is over: its own end, or the stop that was recorded, did not reach it."""
    spec, submission = visit.files.launch, visit.files.submission
    reason = overstay(visit.files, visit.now)
    if reason is None or spec is None or submission is None or visit.has_no_machine:
        return []
    hands.backend(spec.backend).stop(submission.handle)
    note = f"ended its machine: {reason}"
    record(visit.room.store, "stop", visit.files.job_id, who="lorry (tick)", now=visit.now, note=note)
    return [note]


def _launch_again(visit: Visit, hands: Hands) -> list[str]:
    """Asks for the machine that a launch did not get or write down, and for another where one was taken back.

    Where asking again changes nothing, a job that never had a machine ends with the provider's sentence.
    """
    waited, spec = _waits_for_a_machine(visit), visit.files.launch
    is_due = visit.was_taken or (waited is not None and waited > RELAUNCH_SECONDS)
    if spec is None or not is_due or overdue(visit.files, visit.seen, visit.now):
        return []
    store, backend = visit.room.store, hands.backend(spec.backend)
    try:
        launch_again(store, visit.files, backend, "lorry (tick)", visit.now)
    except ProviderError as error:
        if not error.lasts or visit.files.container is not None:
            raise
        stop_job(store, visit.files.job_id, backend, "operator", str(error), visit.now)
        return [f"ended, since asking again changes nothing: {error}"]
    return ["launched again: its machine was taken back" if visit.was_taken else "launched again"]


def _tell(visit: Visit, hands: Hands) -> list[str]:
    """Tells the client how the job goes, or how it ended."""
    ears, state = visit.room.ears, visit.state
    if visit.was_taken:
        return []
    if visit.outcome is None:
        return ears.hear_progress(visit.client_id, visit.files) if state.state == "running" else []
    end = End(visit.files, visit.client_id, visit.outcome, state.sentence, state.spent_usd)
    return ears.hear_end(visit.room.store, end, visit.now)


def _forget(visit: Visit, hands: Hands) -> list[str]:
    """Erases the job's training set where its recipe says so, when no machine can write there any more."""
    if visit.outcome != "completed" or not visit.has_no_machine:
        return []
    said = forget_training_set(visit.room.store, visit.files, visit.now)
    if said:
        record(visit.room.store, "delete", visit.files.job_id, who="lorry (tick)", now=visit.now, note=said)
    return [said] if said else []


def _settle(visit: Visit, hands: Hands) -> list[str]:
    """Settles a job whose machine is gone, and marks it when nothing more will ever be due.

    A job that was lost may be launched again, so it is never marked.
    """
    if visit.outcome is None or visit.was_taken or not visit.has_no_machine:
        return []
    store, job_id = visit.room.store, visit.files.job_id
    settlement = settle(store, visit.files, visit.state, hands.bill, visit.now)
    is_settled = settlement is None or settlement.is_final
    if not is_settled or visit.state.state == "lost" or not visit.room.ears.have_heard(store, job_id, visit.outcome):
        return []
    if owes_forgetting(store, visit.files) or not store.create(f"{SETTLED}/{job_id}", b"\n"):
        return []
    return ["settled" if settlement is None else f"settled at ${settlement.usd:.2f} ({settlement.source})"]


def _waits_for_a_machine(visit: Visit) -> float | None:
    """For how many seconds a job that is to run has had no machine on record; None when it has one, or needs none."""
    files, submission = visit.files, visit.files.submission
    if visit.state.is_final or files.stop is not None:
        return None
    if submission is not None:
        return None if submission.handle else visit.now - submission.submitted_at
    return visit.now - visit.request.received_at if visit.request else None


def _last_word(files: JobFiles) -> float:
    submitted = files.submission.submitted_at if files.submission else 0.0
    return max(submitted, files.container.updated_at if files.container else 0.0)
