"""Which Pods a job had and who asks for the next one: pods/0001.json and so on in the job folder.

claims = PodClaims(store, "job-1", time.time); claims.pods()     # the id of every Pod the job ever had
"""

from __future__ import annotations

from scripts.backends.claims import Claim, Claims


class PodClaim(Claim):
    """pods/NNNN.json: one request for a Pod, and what came of it."""

    pod: str | None = None
    gpu: str = ""
    datacenter: str = ""
    usd_per_hour: float = 0.0
    created_at: float = 0.0
    doubles: tuple[str, ...] = ()
    "Pods of this job that were met beside the one that was kept, and terminated."

    @property
    def machine(self) -> str | None:
        return self.pod


class PodClaims(Claims[PodClaim]):
    """The claims of one job."""

    kind, folder = PodClaim, "pods"

    def pods(self) -> list[str]:
        """The id of every Pod the job ever had: what its bill is made of."""
        claims = self.all()
        return list(dict.fromkeys([*(c.pod for c in claims if c.pod), *(d for c in claims for d in c.doubles)]))

    def note_double(self, pod_id: str) -> None:
        """Remembers a second Pod of the job, since it costs too."""
        newest = self.newest()
        if newest is not None and pod_id not in self.pods():
            self.write(newest, doubles=(*newest.doubles, pod_id))
