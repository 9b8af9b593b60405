"""What the machines of a job did cost on EC2: the time each lived by EC2's own word x the price it was rented at. Pure.

charges = lifetimes(claims, rows, settled={}, files=files, now=time.time()); charges.usd["i-0123"]
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from scripts.backends.ec2_claims import InstanceClaim, ids_of
from scripts.backends.ec2_fleet import ALIVE, Group, ended_at, started_at
from scripts.cost import HOUR, Charges
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
    one, such a machine counts until the job's last word.
    """
    ids, usd, is_closed = ids_of(claims), {}, True
    if not ids:
        return None
    shown = {str(row["InstanceId"]): row for row in rows}
    for instance in ids:
        row = shown.get(instance)
        if row is None:
            usd[instance] = settled.get(instance, _until_the_last_word(instance, claims, files))
            continue
        is_alive = str(row["State"]["Name"]) in ALIVE
        is_closed = is_closed and not is_alive
        end = ended_at(row) or (now if is_alive else _last_word(files) or now)
        usd[instance] = round(max(0.0, end - started_at(row)) / HOUR * Group((row,)).usd_per_hour, 6)
    return Charges(usd, "lifetime", is_closed)


def _until_the_last_word(instance: str, claims: Sequence[InstanceClaim], files: JobFiles) -> float:
    claim = next((claim for claim in claims if instance in claim.instances), None)
    last = _last_word(files)
    if claim is None or last is None:
        return 0.0
    return round(max(0.0, last - claim.created_at) / HOUR * claim.usd_per_hour, 6)


def _last_word(files: JobFiles) -> float | None:
    return job_ended_at(files) or (files.container.updated_at if files.container else None)
