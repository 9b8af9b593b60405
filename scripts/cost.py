"""What a job did cost: settled from the provider's bill where it can be asked, else from hours x price.

settlement = settle(store, files, state, bill, now=time.time()); settlement.usd, settlement.source
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Literal

from pydantic import ValidationError

from recipes.job import Record
from scripts.backends.base import Charges, Source, machine_of
from scripts.backends.runpod_api import Bill as BillOf
from scripts.backends.runpod_api import RunpodApi
from scripts.backends.runpod_pod_claims import PodClaims
from scripts.job_folder import JobFiles, read_jobs
from scripts.overstay import ended_at
from scripts.state import JobState
from scripts.store import Store

HOUR = 3600
BILL_SECONDS = 2.0 * HOUR
"A bill comes by the hour; two hours after the end its last hour is closed."
LONGEST_WAIT_SECONDS = 48.0 * HOUR
"A bill that has not come by then is not waited for: hours x price stands."

_BY_POD: tuple[BillOf, str] = ("pods", "podId")
_BY_CLUSTER: tuple[BillOf, str] = ("clusters", "clusterId")
"Which of Runpod's bills, and where it names the machine."

Bill = Callable[[Store, JobFiles], Charges | None]
"The charges for all that a job rented; None where the provider says nothing by machine. Raises ProviderError."


class Settlement(Record):
    """settlement.json: what the job did cost. One that is not final is written again when more is known."""

    format: Literal[1] = 1
    job_id: str
    quote_usd: float
    cap_usd: float
    usd: float
    source: Source
    machines: Mapping[str, float] = {}
    "USD by machine on the bill."
    submitted_at: float
    ended_at: float
    settled_at: float
    is_final: bool
    prepaid: str = ""
    "The Capacity Block that it ran in: `usd` is its share of a fee that was paid before."


@dataclass(frozen=True)
class Quote:
    """What a job may yet cost. at: when it was submitted, seconds since 1970."""

    job_id: str
    at: float
    usd: float


def settlement_of(files: JobFiles, state: JobState, charges: Charges | None, now: float) -> Settlement | None:
    """The settlement of a job whose machine is gone; None for a job that never asked for one. Pure.

    charges: as the provider says them now, empty while it says nothing, None where it never does.
    """
    spec, submission = files.launch, files.submission
    if spec is None or submission is None:
        return None
    over = ended_at(files) or (files.container.updated_at if files.container else None)
    over = over or (files.stop.at if files.stop else submission.submitted_at)
    age, usd = now - over, charges.usd if charges else {}
    is_closed = charges is None or charges.is_closed or age > LONGEST_WAIT_SECONDS or (bool(usd) and age > BILL_SECONDS)
    return Settlement(
        job_id=spec.job_id,
        quote_usd=spec.quote_usd,
        cap_usd=spec.cap_usd,
        usd=round(sum(usd.values()) if usd else state.spent_usd or 0.0, 6),
        source=charges.source if charges and usd else "hours",
        machines=usd,
        submitted_at=submission.submitted_at,
        ended_at=over,
        settled_at=now,
        is_final=is_closed,
        prepaid=str(submission.handle.get("prepaid", "")),
    )


def read_settlement(store: Store, job_id: str) -> Settlement | None:
    """settlement.json of a job; None when there is none that can be read."""
    data = store.read(f"{job_id}/settlement.json")
    try:
        return Settlement.model_validate_json(data) if data else None
    except ValidationError:
        return None


def settle(store: Store, files: JobFiles, state: JobState, bill: Bill, now: float) -> Settlement | None:
    """Writes and returns the settlement of a job whose machine is gone. A final one is not asked for again.

    Raises ProviderError when the bill or the store does not answer.
    """
    known = read_settlement(store, files.job_id)
    if known is not None and known.is_final:
        return known
    settlement = settlement_of(files, state, bill(store, files), now)
    if settlement is not None:
        store.write(f"{files.job_id}/settlement.json", settlement.model_dump_json(indent=2).encode() + b"\n")
    return settlement


def pod_bill(api: RunpodApi, store: Store, files: JobFiles) -> Charges | None:
    """What Runpod charged for every Pod or cluster of a job, by its id; None where the job ran in none."""
    submission = files.submission
    if submission is None or submission.backend != "runpod_pod":
        return None
    kind, name = _BY_CLUSTER if files.launch is not None and files.launch.nodes > 1 else _BY_POD
    claims = PodClaims(store, files.job_id, time.time).all()
    rented = {one for claim in claims for one in (claim.pod, *claim.doubles)} | {machine_of(submission.handle)}
    if rented == {None} and all(claim.given_up for claim in claims):
        return None  # it never got a Pod
    asked_at = min([submission.submitted_at, *(claim.touched_at for claim in claims)])
    usd: dict[str, float] = {}
    for row in api.bill(kind, datetime.fromtimestamp(asked_at // HOUR * HOUR, UTC)):
        if row.get(name) in rented - {None}:
            usd[row[name]] = usd.get(row[name], 0.0) + float(row.get("totalAmount") or 0.0)
    return Charges(usd)


def spent_this_month(settlements: Iterable[Settlement], quotes: Iterable[Quote], now: float) -> float:
    """USD of the jobs submitted in the month (UTC) of `now`: what was settled, and for the others what they may cost.

    A job with a final settlement counts by that; with one that is not final, by the greater of both figures. One in a
    Capacity Block counts as nothing: the fee is counted where it was paid. Pure.
    """
    settled = {s.job_id: s for s in settlements}
    at = {q.job_id: q.at for q in quotes} | {s.job_id: s.submitted_at for s in settled.values()}
    open_usd = {q.job_id: q.usd for q in quotes}
    total = 0.0
    for job_id, submitted_at in at.items():
        settlement, quoted = settled.get(job_id), open_usd.get(job_id, 0.0)
        if not is_same_month(submitted_at, now) or (settlement is not None and settlement.prepaid):
            continue
        if settlement is None:
            total += quoted
        else:
            total += settlement.usd if settlement.is_final else max(settlement.usd, quoted)
    return round(total, 6)


def ledger(store: Store, ids: Iterable[str]) -> tuple[list[Settlement], list[Quote]]:
    """The settlements and quotes of these jobs, for `spent_this_month`."""
    settlements, quotes = [], []
    for files in read_jobs(store, ids):
        settlement = read_settlement(store, files.job_id)
        if settlement is not None:
            settlements.append(settlement)
        if files.launch is not None and files.submission is not None:
            usd = 0.0 if files.submission.handle.get("prepaid") else files.launch.cap_usd
            quotes.append(Quote(files.job_id, files.submission.submitted_at, usd))
    return settlements, quotes


def is_same_month(one: float, other: float) -> bool:
    """Whether two moments, in seconds since 1970, are in one month (UTC)."""
    return _month(one) == _month(other)


def _month(at: float) -> tuple[int, int]:
    day = datetime.fromtimestamp(at, UTC)
    return day.year, day.month
