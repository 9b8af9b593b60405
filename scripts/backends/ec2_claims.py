"""Which machines of EC2 a job had and who asks for the next ones: instances/0001.json and so on in the job folder.

claims = InstanceClaims(store, "job-1", time.time); claims.instances()     # the id of every machine the job ever had
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

from pydantic import Field

from scripts.backends.claims import Claim, Claims
from scripts.backends.ec2_places import Place


class InstanceClaim(Claim):
    """instances/NNNN.json: one request for the machines of a job, and what came of it."""

    instances: tuple[str, ...] = ()
    instance_type: str = ""
    zone: str = ""
    usd_per_hour: float = 0.0
    "Of each machine."
    created_at: float = 0.0
    doubles: tuple[str, ...] = ()
    "Machines of this job that were met beside those that were kept, and ended."

    is_unclear: bool = False
    "The answer to its request was lost, so that machines may show that came of it although it was given up."

    usd: dict[str, float] = Field(default_factory=dict)
    "What each did cost that has ended: noted before the next is asked for, since EC2 forgets in an hour."

    @property
    def machine(self) -> str | None:
        return self.instances[0] if self.instances else None

    @property
    def came_to_nothing(self) -> bool:
        return super().came_to_nothing and not self.is_unclear

    def client_token(self, store: str, job_id: str, place: Place) -> str:
        """What makes one request, sent twice, one machine: this claim at this place."""
        text = f"{store}|{job_id}|{self.number}|{place.instance_type}|{place.subnet}"
        return hashlib.sha256(text.encode()).hexdigest()


class InstanceClaims(Claims[InstanceClaim]):
    """The claims of one job."""

    kind, folder = InstanceClaim, "instances"

    def instances(self) -> list[str]:
        """The id of every machine the job ever had."""
        return ids_of(self.all())

    def note_costs(self, usd: Mapping[str, float]) -> None:
        """Remembers what machines did cost that have ended, also those that no claim names yet."""
        self.note_doubles(list(usd))
        for claim in self.all():
            mine = {one: cost for one, cost in usd.items() if one in (*claim.instances, *claim.doubles)}
            if not mine.keys() <= claim.usd.keys():
                self.write(claim, usd={**claim.usd, **mine})

    def note_doubles(self, instances: list[str]) -> None:
        """Remembers machines of the job that cost beside those that were kept."""
        newest, known = self.newest(), self.instances()
        new = [one for one in instances if one not in known]
        if newest is not None and new:
            self.write(newest, doubles=(*newest.doubles, *new))


def ids_of(claims: Sequence[InstanceClaim]) -> list[str]:
    """The id of every machine in these claims."""
    return list(dict.fromkeys([i for c in claims for i in (*c.instances, *c.doubles)]))
