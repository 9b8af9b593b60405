"""Instant Clusters of the local Runpod: some alike Pods in one datacentre, made, shown and ended together."""

from __future__ import annotations

from collections import Counter
from typing import Any

from scripts.container.nodes import free_port
from scripts.fake_runpod.account import Account, Rejected, cluster_of
from scripts.fake_runpod.pods import create_pod, show_pod

Json = dict[str, Any]
_SHAPE = ("name", "type", "compute")
NETWORK = "10.65.0.0/16"


def create_cluster(account: Account, body: Json, created_at: str) -> Json:
    """POST /v2/clusters: all Pods or none. Raises Rejected 400 as for a Pod."""
    compute = body["compute"]
    gpu = {"id": compute["gpuTypeId"], "count": compute["gpuCountPerPod"]}
    shape = {key: value for key, value in body.items() if key not in _SHAPE}
    made = account.store("clusters", {key: body[key] for key in _SHAPE} | {"createdAt": created_at})
    # All are processes of this machine, where another cluster may be at work too: each has ports of its own.
    made["port"] = free_port()
    try:
        for rank in range(compute["podCount"]):
            pod = create_pod(account, {**shape, "name": f"{body['name']}-{rank}", "gpu": gpu}, created_at)
            pod["cluster"] = {"id": made["id"], "rank": rank, "ip": f"10.65.0.{rank + 2}"}
            account.meter.groups[pod["id"]] = made["id"]
    except Rejected:
        account.delete("clusters", made["id"])
        raise
    return show_cluster(account, made)


def show_cluster(account: Account, cluster: Json) -> Json:
    """What a read answers: a summary, without variables and price."""
    pods = members(account, cluster)
    statuses = Counter(pod["status"] for pod in pods)
    shown: Json = {key: cluster[key] for key in ("id", *_SHAPE, "createdAt")}
    shown |= {"pods": {"total": len(pods), "byStatus": dict(statuses)}, "network": {"cidr": NETWORK}}
    return shown | ({"dataCenterId": pods[0]["dataCenterId"]} if pods else {})


def members(account: Account, cluster: Json) -> list[Json]:
    """GET /v2/clusters/{id}/pods."""
    pods = [pod for pod in account.held["pods"].values() if cluster_of(pod) == cluster["id"]]
    return [show_pod(account, pod) for pod in pods]


def variables_of(account: Account, pod: Json) -> dict[str, str]:
    """What the platform tells a Pod of its cluster; nothing to one that is in none."""
    if (cluster := cluster_of(pod)) is None:
        return {}
    held, rank = account.get("clusters", cluster), pod["cluster"]["rank"]
    compute, port = held["compute"], str(held["port"])
    nodes, gpus = compute["podCount"], compute["gpuCountPerPod"]
    address = {f"{name}_ADDR": "127.0.0.1" for name in ("PRIMARY", "MASTER", "NODE")}
    ports = {"PRIMARY_PORT": port, "MASTER_PORT": port, "HOST_NODE_ADDR": f"127.0.0.1:{port}"}
    numbers = {"NODE_RANK": rank, "NUM_NODES": nodes, "NUM_TRAINERS": gpus, "WORLD_SIZE": nodes * gpus}
    return {**address, **ports, **{name: str(number) for name, number in numbers.items()}}
