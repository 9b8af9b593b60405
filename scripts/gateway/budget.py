"""What a client's jobs of this month cost or may cost, and whether one more is within its cap.

reserve(room, "job-1", most_usd=3.1, received_at=now)      # raises Refused when the month is full

A job's reservation is one empty file whose name says it all, so one listing answers:
2026-11/<milliseconds>-<cents>-<job id>.
"""

from __future__ import annotations

import json
import math
import re
import time
from dataclasses import dataclass

from scripts.errors import Problem, Refused
from scripts.gateway.door import Room
from scripts.store import Store

_NAME = re.compile(r"(\d{15})-(\d+)-(.+)")


@dataclass(frozen=True)
class Reservation:
    """The most that one job of the month may cost."""

    at_ms: int
    usd: float
    job_id: str


def reserve(room: Room, job_id: str, most_usd: float, received_at: float) -> None:
    """Books the most a job may cost, its own cap, on its month. Raises Refused when the client's cap is passed.

    Booked first, then counted, and only what came earlier counts: of two that would pass the cap together exactly the
    later one is refused, whichever process it is in.
    """
    month = time.strftime("%Y-%m", time.gmtime(received_at))
    mine = Reservation(round(received_at * 1000), math.ceil(round(most_usd * 100, 6)) / 100, job_id)
    room.notes.create(f"{month}/{mine.at_ms:015d}-{round(mine.usd * 100)}-{job_id}", b"{}\n")
    others = [
        r for r in reservations(room.notes, month) if r.job_id != job_id and (r.at_ms, r.job_id) < (mine.at_ms, job_id)
    ]
    cap = room.client.max_usd_per_month
    if sum(r.usd for r in others) + mine.usd <= cap:
        return
    spent = sum(_usd(room, r) for r in others)
    if spent + mine.usd > cap:
        raise Refused(
            Problem(
                "max_usd_per_month",
                f"${spent:.2f} of ${cap:.2f} is spent or booked in {month}, and this job may cost ${mine.usd:.2f}",
                "wait for the next month, or have the cap raised",
            )
        )


def reservations(notes: Store, month: str) -> list[Reservation]:
    """What is booked on a month; a job that was booked twice counts once, with its higher figure."""
    found: dict[str, Reservation] = {}
    for key in notes.keys(month):
        name = _NAME.fullmatch(key.rpartition("/")[2])
        if name:
            booked = Reservation(int(name[1]), int(name[2]) / 100, name[3])
            known = found.get(booked.job_id)
            found[booked.job_id] = booked if known is None or known.usd < booked.usd else known
    return list(found.values())


def _usd(room: Room, booked: Reservation) -> float:
    """The settled bill of a job; nothing for one that never got a machine; else its cap."""
    if (settled := settled_usd(room.jobs, booked.job_id)) is not None:
        return settled
    was_refused = room.jobs.read(f"{booked.job_id}/refusal.json") is not None
    return 0.0 if was_refused and room.jobs.read(f"{booked.job_id}/launch.json") is None else booked.usd


def settled_usd(jobs: Store, job_id: str) -> float | None:
    """What the bill of a job came to, once it is final."""
    data = jobs.read(f"{job_id}/settlement.json")
    value = json.loads(data) if data else {}
    return float(value["usd"]) if value.get("is_final") else None
