"""Which function of the account answers which request of REST v2."""

from __future__ import annotations

from typing import Any

from scripts.fake_runpod import account as rules
from scripts.fake_runpod import clusters, endpoints, pods
from scripts.fake_runpod.account import COLLECTIONS, Account, Rejected, cluster_of
from scripts.fake_runpod.billing import bill

Json = dict[str, Any]


def answer(
    account: Account,
    method: str,
    path: str,
    query: dict[str, list[str]],
    body: Json,
    last_event_id: str | None = None,
) -> tuple[int, Any]:
    """Status and JSON of a valid request; a list means server-sent events. Raises Rejected."""
    parts = path.removeprefix("/v2/").split("/")
    if parts[0] == "catalog":
        return 200, _catalog(account, parts[1:], "include" in query)
    if parts[0] == "billing" and parts[1:] in (["pods"], ["clusters"], ["serverless"]):
        return 200, _bill(account, parts[1], query)
    if parts[0] in ("account", "registries") and parts[1:2] in (["secrets"], ["delegations"]):
        parts = parts[1:]
    collection = parts[0]
    if collection not in COLLECTIONS:
        raise Rejected(404, f"the local Runpod has no {collection}")
    if len(parts) == 1:
        if method == "POST":
            return 201, _create(account, collection, body)
        with_members = query.get("includeClusterPods") == ["true"]
        items = [one for one in account.held[collection].values() if with_members or cluster_of(one) is None]
        rows = [_show(account, collection, item) for item in items]
        return 200, _page(account, COLLECTIONS[collection], rows, query)
    item = account.get(collection, parts[1])
    if parts[-1] == "logs":  # of a Pod, or of a worker of an endpoint
        item = item if len(parts) == 3 else account.worker(item, parts[3])
        return 200, pods.log_events(account, item, query, last_event_id)
    if len(parts) == 3:
        return _below(account, item, parts[2], body)
    if cluster_of(item) is not None and method != "GET":
        raise Rejected(409, f"Pod {parts[1]} belongs to a cluster")
    if method == "DELETE":
        account.delete(collection, parts[1])
        return 204, None
    if method == "PATCH":
        return 200, _change(account, collection, item, body)
    return 200, _show(account, collection, item)


def _bill(account: Account, kind: str, query: dict[str, list[str]]) -> Json:
    meter = account.worker_meter if kind == "serverless" else account.meter.part(in_groups=kind == "clusters")
    try:
        return bill(kind, meter, query, account.clock.now())
    except ValueError as error:
        raise Rejected(400, str(error)) from None


def _page(account: Account, name: str, rows: list[Json], query: dict[str, list[str]]) -> Json:
    if not account.page_rows:
        return {name: rows}
    start = int(query.get("cursor", ["0"])[0])
    end = start + account.page_rows
    pagination = {"hasNextPage": end < len(rows), "nextCursor": str(end) if end < len(rows) else None}
    return {name: rows[start:end], "pagination": pagination}


def _create(account: Account, collection: str, body: Json) -> Json:
    now = account.clock.stamp()
    if collection == "pods":
        return pods.show_pod(account, pods.create_pod(account, body, now))
    if collection == "clusters":
        return clusters.create_cluster(account, body, now)
    if collection == "serverless":
        return endpoints.create_endpoint(account, body, now)
    makers = {
        "network-volumes": rules.create_volume,
        "templates": rules.create_template,
        "registries": rules.create_registry,
        "delegations": rules.create_delegation,
        "secrets": rules.create_secret,
    }
    return makers[collection](account, body)


def _change(account: Account, collection: str, item: Json, body: Json) -> Json:
    if collection == "pods":
        return pods.change_pod(account, item, body)
    changers = {
        "network-volumes": rules.change_volume,
        "templates": rules.change_template,
        "serverless": endpoints.change_endpoint,
        "secrets": rules.change_secret,
    }
    return changers[collection](account, item, body)


def _show(account: Account, collection: str, item: Json) -> Json:
    if collection == "clusters":
        return clusters.show_cluster(account, item)
    return pods.show_pod(account, item) if collection == "pods" else item


def _below(account: Account, item: Json, part: str, body: Json) -> tuple[int, Any]:
    if part == "workers":
        return 200, endpoints.workers(account, item)
    if part == "pods":
        return 200, {"pods": clusters.members(account, item)}
    if part == "action":
        if cluster_of(item) is not None:
            raise Rejected(409, f"Pod {item['id']} belongs to a cluster")
        shown = pods.act_on_pod(account, item, body["action"])
        return (204, None) if shown is None else (200, shown)
    raise Rejected(404, f"the local Runpod has no {part}")


def _catalog(account: Account, parts: list[str], with_stock: bool) -> Json:
    kind, *rest = parts
    rows = {
        "gpus": lambda: account.catalog.gpus(with_stock),
        "datacenters": lambda: account.catalog.datacenters(with_stock),
        "cpus": account.catalog.cpus,
    }.get(kind, list)()
    if not rest:
        return {{"datacenters": "dataCenters"}.get(kind, kind): rows}
    for row in rows:
        if row["id"] == rest[0]:
            return row
    raise Rejected(404, f"{kind} {rest[0]} not found")
