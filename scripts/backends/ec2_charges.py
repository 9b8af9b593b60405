"""What the machines of a job did cost on EC2: the time each lived by EC2's own word x the price it was rented at. Pure.

charges = lifetimes(claims, rows, settled={}, files=files, now=time.time()); charges.usd["i-0123"]
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from scripts.backends.base import Charges
from scripts.backends.ec2_claims import InstanceClaim, ids_of
from scripts.backends.ec2_fleet import ALIVE, Group, ended_at, started_at
from scripts.cost import HOUR
from scripts.job_folder import JobFiles
from scripts.overstay import ended_at as job_ended_at


def lifetimes(
    claims: Sequence[InstanceClaim],
    rows: Sequence[Mapping[str, Any]],
    settled: Mapping[str, float],
    files: JobFiles,
    now: float,
) -> Charges | None:
    """USD by machine; closed when all of them have ended. None for a job that never got one.

    rows: what EC2 still knows of them. settled: what an earlier settlement said of those that it knows no more; without
    one, such a machine counts as its claim noted, or until the job's last word.
    """
    shown = {str(row["InstanceId"]): row for row in rows}
    ids, is_closed = list(dict.fromkeys([*ids_of(claims), *shown])), True
    usd: dict[str, float] = {}
    for instance in ids:
        row = shown.get(instance)
        if row is None:
            usd[instance] = settled.get(instance, _by_the_claim(instance, claims, files))
            continue
        is_closed = is_closed and str(row["State"]["Name"]) not in ALIVE
        usd[instance] = _cost(row, _last_word(files) or now, now)
    return Charges(usd, "lifetime", is_closed) if ids else None


def costs_of_ended(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """USD of each machine of which EC2 says when it ended."""
    return {str(row["InstanceId"]): _cost(row, at, at) for row in rows if (at := ended_at(row)) is not None}


def _cost(row: Mapping[str, Any], last_word: float, now: float) -> float:
    """Until its end; of one that ended without a stamp, until the job's last word."""
    is_alive = str(row["State"]["Name"]) in ALIVE
    end = ended_at(row) or (now if is_alive else last_word)
    return round(max(0.0, end - started_at(row)) / HOUR * Group((row,)).usd_per_hour, 6)


def _by_the_claim(instance: str, claims: Sequence[InstanceClaim], files: JobFiles) -> float:
    claim = next((claim for claim in claims if instance in (*claim.instances, *claim.doubles)), None)
    last = _last_word(files)
    if claim is None or last is None or instance in claim.usd:
        return claim.usd.get(instance, 0.0) if claim else 0.0
    return round(max(0.0, last - claim.created_at) / HOUR * claim.usd_per_hour, 6)


def _last_word(files: JobFiles) -> float | None:
    return job_ended_at(files) or (files.container.updated_at if files.container else None)
