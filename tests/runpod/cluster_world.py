"""The world of a job on two nodes: an Instant Cluster in the place of the Pod, and two containers that play.

world = ClusterWorld(seed, runpod, folder); ended = world.live(); world.found      # every promise that was broken
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from scripts.backends.runpod_pod_claims import PodClaims
from scripts.container.pod_end import FOLLOWERS_WAIT_SECONDS, end_of_pod
from scripts.fake_runpod.account import cluster_of
from scripts.job_folder import read_job
from tests.runpod.world import CANARY, ReplayContainer, World

NODES = 2
_ALIVE = ("PROVISIONING", "STARTING", "RUNNING")


class ClusterWorld(World):
    """One job on two nodes. Every other cluster may be ended by the key of its Pods: nothing says whether it may."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.spec = self.spec.model_copy(update={"nodes": NODES})
        self.runpod.cluster_keys_work = self.script.keys_work and self.seed % 2 == 0
        self.host.shows_restarts = self.seed % 3 == 0
        for fault in self.runpod.faults:
            fault.path = fault.path.replace("/v2/pods", "/v2/clusters")

    def start(self, pod_id: str, command: Sequence[str], environment: Mapping[str, str], folder: Path) -> Any:
        if environment["HF_TOKEN"] != CANARY:
            self.found.append("a secret did not reach the container")
        kind = LeaderContainer if environment["NODE_RANK"] == "0" else FollowerContainer
        self.containers.append(kind(self, folder / command[command.index("--work") + 1], environment))
        return self.containers[-1]

    def alive(self) -> list[str]:
        """Clusters of which a Pod costs."""
        pods = self.runpod.account.held["pods"].values()
        return sorted({str(cluster_of(pod)) for pod in pods if pod["life"][0] in _ALIVE})

    def nodes_there(self) -> int:
        """Pods that run."""
        return sum(pod["life"][0] == "RUNNING" for pod in self.runpod.account.held["pods"].values())

    def broke_ledger(self) -> bool:
        meter, now = self.runpod.account.meter, self.clock.now()
        known = PodClaims(self.store, "job-1", self.clock.now).pods()
        usd = {pod: meter.total(pod, now) for pod in meter.spans}
        unknown = sum(usd[pod] for pod in usd if meter.groups.get(pod) not in known)
        return abs(unknown) > 1e-9


class LeaderContainer(ReplayContainer):
    """Node 0: it cannot train alone."""

    world: ClusterWorld

    def do_training(self, now: float) -> None:
        if self.world.nodes_there() < NODES:
            return self.note()
        super().do_training(now)


class FollowerContainer(ReplayContainer):
    """Node 1: it trains while node 0 does, keeps no record, and outlives the job only by what node 0 may need."""

    def __init__(self, world: ClusterWorld, job: Path, environment: Mapping[str, str]) -> None:
        super().__init__(world, job, environment)
        end = end_of_pod(environment, "job-1")
        assert end is not None
        assert end.follows

    def note(self, **changes: Any) -> None:
        """Node 0 alone writes."""

    def act(self) -> None:
        now = self.world.clock.now()
        container = read_job(self.world.store, "job-1").container
        is_over = (container is not None and container.ended is not None) or now > int(
            self.environment["LORRY_DEADLINE"]
        )
        if self.end_at is None and is_over:
            self.end_at = now + FOLLOWERS_WAIT_SECONDS
        if self.end_at is not None and now >= self.end_at:
            self.environment = {**self.environment, "NODE_RANK": "0"}  # it has waited
            self.end_at, self.pause = now + self.pause, min(2 * self.pause, 300.0)
            self.end_pod()
