"""What a job rents on Runpod: a Pod, or an Instant Cluster of alike Pods, shown and ended as if it were one Pod.

machines = machines_of(api, spec); rows = [row for row in machines.listed() if machines.is_of(row, spec)]
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol

from recipes.job import LaunchSpec
from scripts.backends.base import NAME_PREFIX, Handle, machine_name
from scripts.backends.runpod_api import RunpodApi

Json = dict[str, Any]
Key = Literal["pod", "cluster"]

ENDED = ("EXITED", "ERROR", "TERMINATED")
"They do nothing any more; the disk of the first two is charged."
_WORST_FIRST = (*ENDED, "PROVISIONING", "STARTING", "RUNNING")
"The status of a cluster is the first of these that one of its Pods has."
QUEUE_SECONDS = 1200.0
"How long a Pod may take to run: an image of 10 GB is pulled in 4-5 minutes; a machine that needs 20 is stuck."


class Machines(Protocol):
    """One of the two things a job may rent. A row has id, name, status, createdAt, startedAt, cost, env, gpu and
    dataCenterId, all as REST v2 has them for a Pod; a cluster's cost is that of all its Pods, and `missing` is how many
    it lacks."""

    key: Key
    "Under which name a handle keeps the id."

    def listed(self) -> list[Json]:
        """All of the account that are not terminated. Raises RunpodError, as do the others."""

    def read(self, machine_id: str) -> Json | None:
        """One; None when there is none of that id."""

    def create(self, body: Json) -> Json:
        """A new one."""

    def delete(self, machine_id: str) -> None:
        """Ends it; done when there is none."""

    def pod_that_speaks(self, machine_id: str) -> str:
        """The Pod whose log tells of the job: its only one, or node 0."""

    def is_of(self, row: Mapping[str, Any], spec: LaunchSpec) -> bool:
        """Whether this was rented for the job in its store."""


def machines_of(api: RunpodApi, job: LaunchSpec | Handle) -> Machines:
    """Where to look for the machine of a job, by its spec or by the handle of what it rented."""
    several = job.nodes > 1 if isinstance(job, LaunchSpec) else bool(job.get("cluster"))
    return Clusters(api) if several else Pods(api)


class Pods:
    """Pods that belong to no cluster."""

    key: Key = "pod"

    def __init__(self, api: RunpodApi) -> None:
        self._api = api

    def listed(self) -> list[Json]:
        return [pod for pod in self._api.listed("pods") if pod["status"] != "TERMINATED"]

    def read(self, machine_id: str) -> Json | None:
        return self._api.read("pods", machine_id)

    def create(self, body: Json) -> Json:
        return self._api.create("pods", body)

    def delete(self, machine_id: str) -> None:
        self._api.delete("pods", machine_id)

    def pod_that_speaks(self, machine_id: str) -> str:
        return machine_id

    def is_of(self, row: Mapping[str, Any], spec: LaunchSpec) -> bool:
        return bool(
            row["name"] == machine_name(spec.job_id) and (row.get("env") or {}).get("LORRY_STORE") == spec.store
        )


class Clusters:
    """Instant Clusters, each with its Pods: a cluster itself shows neither variables nor price."""

    key: Key = "cluster"

    def __init__(self, api: RunpodApi) -> None:
        self._api = api

    def listed(self) -> list[Json]:
        return [self._whole(row) for row in self._api.listed("clusters") if row["name"].startswith(NAME_PREFIX)]

    def read(self, machine_id: str) -> Json | None:
        row = self._api.read("clusters", machine_id)
        return self._whole(row) if row is not None else None

    def create(self, body: Json) -> Json:
        """Its Pods are not asked for here: a failure to see them must not look like a failure to rent them."""
        return as_one_pod(self._api.create("clusters", body), [])

    def delete(self, machine_id: str) -> None:
        self._api.delete("clusters", machine_id)

    def pod_that_speaks(self, machine_id: str) -> str:
        pods = self._api.members(machine_id)
        return next((str(pod["id"]) for pod in pods if (pod.get("cluster") or {}).get("rank") == 0), "")

    def is_of(self, row: Mapping[str, Any], spec: LaunchSpec) -> bool:
        """By its name alone: a cluster that has no Pod yet shows no variables."""
        return bool(row["name"] == cluster_name(spec.job_id, spec.store))

    def _whole(self, cluster: Json) -> Json:
        return as_one_pod(cluster, self._api.members(str(cluster["id"])))


def cluster_name(job_id: str, store: str) -> str:
    """The name of a job's cluster: it tells the store too, as the variables of a Pod do."""
    return f"{machine_name(job_id)}.{hashlib.sha256(store.encode()).hexdigest()[:12]}"


def as_one_pod(cluster: Mapping[str, Any], pods: Sequence[Json]) -> Json:
    """A cluster with its Pods in the form of one Pod. Pure.

    It runs when all its Pods do, and has ended when one has: the others cannot go on without it. While Pods are
    missing it provisions. A status that we do not know counts as one on the way.
    """
    statuses = [str(pod["status"]) if pod["status"] in _WORST_FIRST else "PROVISIONING" for pod in pods]
    missing = int(cluster["compute"]["podCount"]) - len(pods)
    first: Json = pods[0] if pods else {}
    started = [str(pod.get("startedAt") or "") for pod in pods]
    return {
        "id": cluster["id"],
        "name": cluster["name"],
        "compute": cluster["compute"],
        "status": min([*statuses, *(["PROVISIONING"] if missing > 0 else [])], key=_WORST_FIRST.index),
        "createdAt": cluster["createdAt"],
        "startedAt": max(started) if started and all(started) else None,
        "missing": missing,
        "cost": sum(float(pod["cost"]) for pod in pods),
        "env": first.get("env") or {},
        "mounts": first.get("mounts") or {},
        "gpu": {"id": cluster["compute"]["gpuTypeId"], "count": cluster["compute"]["gpuCountPerPod"]},
        "dataCenterId": cluster.get("dataCenterId") or first.get("dataCenterId"),
    }


def useless(row: Mapping[str, Any], run_by: float, now: float) -> str | None:
    """Why this Pod or cluster will not do its job any more; None while it may. Pure.

    run_by: unix seconds by which it must run for the first time. One that ran and is started again may take its time:
    whether such a Pod shows RUNNING meanwhile is not known.
    """
    if row["status"] in ENDED:
        return f"it is {row['status']}"
    if row["status"] != "RUNNING" and not row.get("startedAt") and now > run_by:
        return f"it was still {row['status']} after {QUEUE_SECONDS / 60:.0f} minutes"
    return None
