"""Serverless endpoints of the local Runpod: creation, change, and the rules that span several fields."""

from __future__ import annotations

from typing import Any

from scripts.fake_runpod.account import Account, Rejected

Json = dict[str, Any]
_CONTAINER = ("image", "args", "disk", "env", "ports", "registry")
_CPU_MEMORY_PER_VCPU = 4


def create_endpoint(account: Account, body: Json, created_at: str) -> Json:
    """POST /v2/serverless. A timeout left out reads back as 0, as the real service was seen to do."""
    made: Json = {
        "args": "",
        "disk": 20,
        "env": {},
        "ports": [],
        "registry": None,
        "dataCenterIds": [],
        "networkVolumes": [],
        "flashboot": "OFF",
        "timeout": 0,
        "createdAt": created_at,
        **_from_template(account, body),
        **{key: value for key, value in body.items() if key != "templateId"},
    }
    made["workers"] = {"min": 0, "max": 3, **({} if _no_idle(made) else {"idleTimeout": 10}), **body.get("workers", {})}
    _complete(made)
    _check(account, made)
    made = account.store("serverless", made)
    made["requestUrls"] = _request_urls(account.queue_base, made)
    return made


def change_endpoint(account: Account, endpoint: Json, body: Json) -> Json:
    """PATCH /v2/serverless/{id}: gpu and workers are merged, everything else replaced."""
    changed = {**endpoint, **_from_template(account, body)}
    for key, value in body.items():
        if key in ("gpu", "workers"):
            changed[key] = {**(endpoint.get(key) or {}), **value}
        elif key != "templateId":
            changed[key] = value
    if "cpu" in body:
        changed.pop("gpu", None)
    _complete(changed)
    _check(account, changed)
    endpoint.clear()
    endpoint.update(changed)
    return endpoint


def workers(account: Account, endpoint: Json) -> Json:
    """GET /v2/serverless/{id}/workers."""
    rows = [row for row in account.workers.values() if row["endpoint"] == endpoint["id"] and not row["gone"]]
    found = [row["status"].lower() for row in rows]
    states = ("running", "idle", "initializing", "throttled", "unhealthy")
    summary = {status: found.count(status) for status in states} | {"total": len(found)}
    shown = [{key: row[key] for key in ("id", "status", "gpuCount", "isStale", "startedAt")} for row in rows]
    return {"workers": shown, "summary": summary, "endpointVersion": 1}


def _from_template(account: Account, body: Json) -> Json:
    if not body.get("templateId"):
        return {}
    template = account.get("templates", body["templateId"])
    return {key: template[key] for key in _CONTAINER}


def _complete(endpoint: Json) -> None:
    if endpoint.get("gpu"):
        defaults: Json = {"count": 1, "excludedTypes": [], "allowedCudaVersions": [], "minCudaVersion": None}
        endpoint["gpu"] = defaults | endpoint["gpu"]
    if endpoint.get("cpu"):
        endpoint["cpu"] = [{**cpu, "memory": cpu["vcpuCount"] * _CPU_MEMORY_PER_VCPU} for cpu in endpoint["cpu"]]


def _check(account: Account, endpoint: Json) -> None:
    if bool(endpoint.get("gpu")) == bool(endpoint.get("cpu")):
        raise Rejected(400, "exactly one of gpu and cpu must be given")
    if _no_idle(endpoint) and "idleTimeout" in endpoint["workers"]:
        raise Rejected(422, "workers/idleTimeout: not applicable to a QUEUE endpoint that scales on REQUEST_COUNT")
    if endpoint["type"] == "LOAD_BALANCER" and endpoint["scaling"]["type"] != "REQUEST_COUNT":
        raise Rejected(422, "scaling/type: a LOAD_BALANCER endpoint scales on REQUEST_COUNT")
    if endpoint["workers"]["max"] < endpoint["workers"]["min"]:
        raise Rejected(400, "workers.max must not be less than workers.min")
    pools = {gpu["pool"] for gpu in account.catalog.gpus()}
    for pool in (endpoint.get("gpu") or {}).get("pools", []):
        if pool not in pools:
            raise Rejected(400, f"unknown GPU pool {pool}")
    for datacenter in endpoint["dataCenterIds"]:
        account.datacenter(datacenter)
    account.need_registry(endpoint)
    account.need_volumes(endpoint["networkVolumes"], endpoint["dataCenterIds"])


def _no_idle(endpoint: Json) -> bool:
    return (endpoint["type"], endpoint["scaling"]["type"]) == ("QUEUE", "REQUEST_COUNT")


def _request_urls(base: str, endpoint: Json) -> Json:
    root = f"{base}/{endpoint['id']}"
    if endpoint["type"] == "LOAD_BALANCER":
        return {"base": root, "health": f"{root}/ping"}
    return {
        "run": f"{root}/run",
        "runSync": f"{root}/runsync",
        "status": f"{root}/status/:id",
        "stream": f"{root}/stream/:id",
        "cancel": f"{root}/cancel/:id",
        "retry": f"{root}/retry/:id",
        "purgeQueue": f"{root}/purge-queue",
        "health": f"{root}/health",
    }
