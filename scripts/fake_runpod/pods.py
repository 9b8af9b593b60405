"""Pods of the local Runpod: placement against stock, the statuses a Pod goes through, and its actions."""

from __future__ import annotations

from typing import Any

from scripts.fake_runpod.account import NOT_CHARGED, Account, Rejected
from scripts.fake_runpod.clock import seconds_of

Json = dict[str, Any]
_ACTIONS = {
    "PROVISIONING": ["stop", "terminate"],
    "STARTING": ["stop", "terminate"],
    "RUNNING": ["stop", "restart", "terminate"],
    "EXITED": ["start", "terminate"],
    "ERROR": ["start", "terminate"],
    "TERMINATED": [],
}
_INPUT_ONLY = ("startSsh", "startJupyter", "templateId", "dataCenterIds", "globalNetworking", "gpu", "cpu")
NO_CAPACITY = "There are no instances currently available with the requested specifications"


def create_pod(account: Account, body: Json, created_at: str) -> Json:
    """POST /v2/pods. Raises Rejected 400 for a broken rule and for want of stock; only `detail` tells them apart."""
    if ("gpu" in body) == ("cpu" in body):
        raise Rejected(400, "exactly one of gpu and cpu must be given")
    account.need_registry(body)
    placed = _place(account, body)
    template = account.get("templates", body["templateId"]) if "templateId" in body else {}
    made: Json = {
        "args": template.get("args", ""),
        "disk": template.get("disk", 20),
        "image": template.get("image"),
        "env": template.get("env", {}),
        "ports": template.get("ports", []),
        "registry": template.get("registry"),
        "mounts": template.get("mounts", {}),
        "template": body.get("templateId"),
        "cloud": "SECURE",
        "cudaVersion": "12.8",
        "locked": False,
        "runtime": None,
        "ssh": {"proxy": None, "direct": None},
        "createdAt": created_at,
        "startedAt": None,
        "globalNetworking": {"enabled": body.get("globalNetworking", False), "ip": "", "internalDns": ""},
        **placed,
        **{key: value for key, value in body.items() if key not in _INPUT_ONLY},
    }
    made["life"] = list(account.pod_life)
    made = account.store("pods", made)
    account.meter_pod(made, made["life"][0])
    return made


def show_pod(account: Account, pod: Json) -> Json:
    """What a read answers; it moves a scripted Pod to its next status."""
    if len(pod["life"]) > 1:
        pod["status"] = pod["life"].pop(0)
    else:
        pod["status"] = pod["life"][0]
    if pod["status"] == "RUNNING" and pod["startedAt"] is None:
        pod["startedAt"] = account.clock.stamp()
    account.meter_pod(pod, pod["status"])
    shown = {key: value for key, value in pod.items() if key not in ("life", "hourly")}
    runtime = (
        {"uptime": int(account.clock.now() - seconds_of(pod["startedAt"]))} if pod["status"] == "RUNNING" else None
    )
    cost = 0 if pod["status"] in NOT_CHARGED else pod["hourly"]
    return shown | {"actions": _ACTIONS[pod["status"]], "cost": cost, "runtime": runtime}


def log_events(account: Account, pod: Json, query: dict[str, list[str]], last_event_id: str | None) -> list[Json]:
    """GET /v2/pods/{id}/logs: what there is, by source, from a cursor or the last `tail` lines; it does not go on."""
    source = query.get("source", [None])[0]
    lines = [line for line in account.lines_of(pod) if source in (None, line["source"])]
    cursor = last_event_id or query.get("since", [None])[0]
    if cursor:
        return [line for line in lines if line["ts"] > cursor]
    tail = int(query.get("tail", ["100"])[0])
    return lines[-tail:] if tail else []


def change_pod(account: Account, pod: Json, body: Json) -> Json:
    """PATCH /v2/pods/{id}."""
    pod.update({key: value for key, value in body.items() if key not in _INPUT_ONLY})
    return show_pod(account, pod)


def act_on_pod(account: Account, pod: Json, action: str) -> Json | None:
    """POST /v2/pods/{id}/action; None after terminate. Raises Rejected 409 when the status forbids it."""
    status = show_pod(account, pod)["status"]
    if action not in _ACTIONS[status]:
        raise Rejected(409, f"action {action} is not valid for a Pod that is {status}")
    if pod["locked"] and action in ("stop", "restart"):
        raise Rejected(409, f"the Pod is locked: {action} is refused")
    if action == "terminate":
        account.delete("pods", pod["id"])
        return None
    begun = "STARTING" if action == "restart" and account.hosted else "RUNNING"
    pod["life"] = ["EXITED" if action == "stop" else begun]
    return show_pod(account, pod)


def _place(account: Account, body: Json) -> Json:
    """Where the Pod lands and what it costs an hour."""
    wanted = body.get("dataCenterIds", [])
    for datacenter in wanted:
        account.datacenter(datacenter)
    mounts = body.get("mounts", {})
    volume_ids = [mount["volumeId"] for mount in mounts.get("network", [])]
    account.need_volumes(volume_ids, wanted)
    if volume_ids and body.get("cloud") == "COMMUNITY":
        raise Rejected(400, "network volumes are only available in Secure Cloud")
    homes = [account.held["network-volumes"][v]["dataCenter"] for v in volume_ids]
    candidates = homes or wanted or [dc["id"] for dc in account.catalog.datacenters()]
    if "cpu" in body:
        cpu = {**body["cpu"], "memory": body["cpu"]["vcpuCount"] * 4}
        return {"cpu": cpu, "dataCenterId": candidates[0], "hourly": 0.03 * cpu["vcpuCount"]}
    gpu = {g["id"]: g for g in account.catalog.gpus()}.get(body["gpu"]["id"])
    if gpu is None:
        raise Rejected(400, f"unknown GPU type {body['gpu']['id']}")
    home = next((dc for dc in candidates if account.catalog.level(dc, gpu["id"]) != "NONE"), None)
    # The real scheduler matched no machine when the count was left out.
    if home is None or "count" not in body["gpu"] or body["gpu"]["count"] > gpu["maxCount"]["secure"]:
        raise Rejected(400, NO_CAPACITY)
    price = gpu["price"]["community" if body.get("cloud") == "COMMUNITY" else "secure"]
    count = body["gpu"]["count"]
    shown = {"id": gpu["id"], "count": count, "memory": gpu["memory"], "vcpuCount": 24 * count}
    return {"gpu": shown, "dataCenterId": home, "hourly": price * count * account.catalog.surcharge}
