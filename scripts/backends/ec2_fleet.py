"""The machines of one request as EC2 shows them: whose they are, how they are, what they cost. Pure.

for group in groups_of(rows): group.job_id, group.deadline, group.is_whole(2)
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from recipes.catalog import load_catalog
from recipes.job import JOB_ID
from scripts.backends.base import Owned, Phase, machine_name
from scripts.forgotten import MONTH_HOURS, Forgotten

Row = Mapping[str, Any]
ALIVE = ("pending", "running")
_PHASES: dict[str, Phase] = {"pending": "waiting", "running": "running"}
_TAKEN = ("Server.SpotInstanceTermination", "Server.SpotInstanceShutdown", "Server.InternalError")
UNSEEN_SECONDS = 120.0
"A machine that was just made may not be listed yet."
DISK_USD_PER_GB = 0.08
"EBS gp3 by the month, us-east-1; AWS EBS pricing page, read 2026-11."
_ENDED_AT = re.compile(r"\((\d{4}-\d\d-\d\d \d\d:\d\d:\d\d) (?:GMT|UTC)\)")


@dataclass(frozen=True)
class Group:
    """What one RunInstances gave: its rows, node 0 first."""

    rows: tuple[Row, ...]

    @property
    def ids(self) -> list[str]:
        return [str(row["InstanceId"]) for row in self.rows]

    @property
    def addresses(self) -> list[str]:
        """Private addresses, node 0 first."""
        return [str(row.get("PrivateIpAddress", "")) for row in self.rows]

    @property
    def tags(self) -> dict[str, str]:
        return {str(tag["Key"]): str(tag["Value"]) for tag in self.rows[0].get("Tags") or ()}

    @property
    def job_id(self) -> str:
        return self.tags.get("lorry_job", "")

    @property
    def store(self) -> str:
        return self.tags.get("lorry_store", "")

    @property
    def deadline(self) -> int:
        """Seconds since 1970 after which anybody may end them; 0 where the tag says no time."""
        try:
            return int(datetime.fromisoformat(self.tags.get("expires_at", "")).timestamp())
        except ValueError:
            return 0

    @property
    def created_at(self) -> float:
        return min(started_at(row) for row in self.rows)

    @property
    def instance_type(self) -> str:
        return str(self.rows[0].get("InstanceType", ""))

    @property
    def zone(self) -> str:
        return str((self.rows[0].get("Placement") or {}).get("AvailabilityZone", ""))

    @property
    def usd_per_hour(self) -> float:
        """Of each machine: as its tag says it was rented, else as the catalog has its type."""
        try:
            return float(self.tags["lorry_usd_per_hour"])
        except (KeyError, ValueError):
            offers = load_catalog().offers.values()
            prices = (o.usd_per_hour for o in offers if o.backend == "ec2" and o.provider_type == self.instance_type)
            return max(prices, default=0.0)

    @property
    def is_marked(self) -> bool:
        """Whether they carry our name, a job of ours and a deadline."""
        ours = JOB_ID.fullmatch(self.job_id) is not None and self.tags.get("Name") == machine_name(self.job_id)
        return ours and self.deadline > 0

    def is_whole(self, nodes: int) -> bool:
        """Whether all nodes of the request live."""
        return len(self.rows) == nodes and all(row["State"]["Name"] in ALIVE for row in self.rows)

    def owned(self) -> Owned:
        """As every backend shows what it owns."""
        handle = {"instances": self.ids, "name": self.tags.get("Name", ""), "store": self.store}
        usd = self.usd_per_hour * len(self.rows)
        states = {str(row["State"]["Name"]) for row in self.rows}
        phase: Phase = "running" if "running" in states else "waiting"
        return Owned(self.job_id, handle | {"deadline": self.deadline}, phase, self.created_at, usd)


def group_of(reservation: Mapping[str, Any]) -> Group:
    """The group of one answer of RunInstances."""
    return Group(tuple(sorted(reservation["Instances"], key=_order)))


def groups_of(rows: Sequence[Row]) -> list[Group]:
    """Rows of DescribeInstances by the request that made them."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(str(row["ReservationId"]), []).append(row)
    return [Group(tuple(sorted(some, key=_order))) for some in found.values()]


def forgotten_at_ec2(rows: Sequence[Row], volumes: Sequence[Row]) -> list[Forgotten]:
    """Machines and disks with the tag of our rooms that nothing of ours uses.

    rows: machines that cost. volumes: rows of DescribeVolumes. Both carry the tag `lorry` of the launch template.
    """
    found = []
    for group in groups_of(rows):
        if not group.is_marked:
            name, month = f"machine {', '.join(group.ids)}", group.usd_per_hour * len(group.rows) * MONTH_HOURS
            found.append(Forgotten(name, "it is of our template, but carries no job and no deadline of ours", month))
    for volume in volumes:
        if volume["State"] == "available":
            said = f"{volume['Size']} GB that no machine uses"
            found.append(Forgotten(f"disk {volume['VolumeId']}", said, volume["Size"] * DISK_USD_PER_GB))
    return found


def may_be_whole(rows: Sequence[Row], nodes: int, created_at: float, now: float) -> bool:
    """Whether all nodes may live, as far as they are listed by now: just after a create some may not be yet."""
    has_ended = any(row["State"]["Name"] not in ALIVE for row in rows)
    return not has_ended and (len(rows) == nodes or now < created_at + UNSEEN_SECONDS)


def phase_of(rows: Sequence[Row], nodes: int) -> Phase:
    """Gone when one of the nodes is: the others cannot go on without it."""
    states = [str(row["State"]["Name"]) for row in rows]
    if len(states) < nodes or not states or any(state not in ALIVE for state in states):
        return "gone"
    return "waiting" if "pending" in states else "running"


def reason_of(rows: Sequence[Row]) -> tuple[str, bool]:
    """What EC2 says of them in a few words, and whether it took one back."""
    if not rows:
        return "EC2 knows none of them", False
    worst = max(rows, key=lambda row: str(row["State"]["Name"]) not in ALIVE)
    code = str((worst.get("StateReason") or {}).get("Code", ""))
    said = str(worst["State"]["Name"]) + (f" ({code})" if code else "")
    return said, any(str((row.get("StateReason") or {}).get("Code", "")) in _TAKEN for row in rows)


def started_at(row: Row) -> float:
    """When EC2 began to charge, seconds since 1970."""
    at: datetime = row["LaunchTime"]
    return at.timestamp()


def ended_at(row: Row) -> float | None:
    """When a machine ended, by EC2's own word; None while it lives, or where EC2 does not say."""
    found = _ENDED_AT.search(str(row.get("StateTransitionReason") or ""))
    if row["State"]["Name"] in ALIVE or found is None:
        return None
    return datetime.strptime(found[1], "%Y-%m-%d %H:%M:%S").replace(tzinfo=UTC).timestamp()


def _order(row: Row) -> tuple[int, str]:
    return int(row.get("AmiLaunchIndex", 0)), str(row["InstanceId"])
