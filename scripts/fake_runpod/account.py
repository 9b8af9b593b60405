"""What one account holds (volumes, templates, registries, Pods, endpoints, secrets) and the rules between them.

Every function takes and returns JSON as REST v2 writes it; a rule that is broken raises Rejected with Runpod's status.
"""

from __future__ import annotations

import uuid
from dataclasses import dataclass, field
from typing import Any

from scripts.fake_runpod.billing import Meter
from scripts.fake_runpod.catalog import Catalog
from scripts.fake_runpod.clock import Clock

Json = dict[str, Any]
# collection in the path -> key of the list answer
COLLECTIONS = {
    "network-volumes": "networkVolumes",
    "templates": "templates",
    "registries": "registries",
    "delegations": "delegations",
    "serverless": "endpoints",
    "pods": "pods",
    "clusters": "clusters",
    "secrets": "secrets",
}


def cluster_of(pod: Json) -> str | None:
    """The cluster that a Pod is in."""
    return (pod.get("cluster") or {}).get("id")


NOT_CHARGED = ("EXITED", "ERROR", "TERMINATED")
KEPT_LINES = 5000


class Rejected(Exception):
    """A request that keeps to the schema but breaks a rule; status is the HTTP status of the answer."""

    def __init__(self, status: int, detail: str) -> None:
        super().__init__(detail)
        self.status = status
        self.detail = detail


@dataclass
class Account:
    """State in memory. `pod_life` scripts new Pods: each read moves to the next status and stays on the last.

    `queue_base` is where requestUrls point; `pod_logs` holds the lines that GET /pods/{id}/logs streams, `said` what
    their machines said. `page_rows` spreads list answers over pages of so many rows; 0 answers all at once. `hosted`:
    machines stand behind the Pods and move them.
    """

    catalog: Catalog = field(default_factory=Catalog)
    queue_base: str = "https://api.runpod.ai/v2"
    pod_life: tuple[str, ...] = ("RUNNING",)
    pod_logs: dict[str, list[str]] = field(default_factory=dict)
    page_rows: int = 0
    hosted: bool = False
    clock: Clock = field(default_factory=Clock)
    meter: Meter = field(default_factory=Meter)
    worker_meter: Meter = field(default_factory=Meter)
    "Workers of serverless endpoints, each as `endpoint/worker`."
    secret_values: dict[str, str] = field(default_factory=dict, repr=False)
    said: dict[str, list[Json]] = field(default_factory=dict)
    workers: dict[str, Json] = field(default_factory=dict)
    "Workers of serverless endpoints as their host last saw them, those that are gone as well."
    held: dict[str, dict[str, Json]] = field(default_factory=lambda: {name: {} for name in COLLECTIONS})

    def get(self, collection: str, object_id: str) -> Json:
        """One object. Raises Rejected 404."""
        try:
            return self.held[collection][object_id]
        except KeyError:
            raise Rejected(404, f"{collection} {object_id} not found") from None

    def is_empty(self) -> bool:
        """True when nothing is left: what a destroyed set-up must leave behind."""
        return not any(self.held.values())

    def store(self, collection: str, value: Json) -> Json:
        """Keep a new object under a fresh id."""
        made = {"id": uuid.uuid4().hex[:14], **value}
        self.held[collection][made["id"]] = made
        return made

    def delete(self, collection: str, object_id: str) -> None:
        """Remove one object. Raises Rejected 404, and 400 while something uses it."""
        self.get(collection, object_id)
        for pod in self.held["pods"].values():
            if collection == "templates" and pod["template"] == object_id:
                raise Rejected(400, f"template {object_id} is in use by {pod['name']}")
        for user_kind, field_name in (("serverless", "networkVolumes"), ("pods", "volumeIds")):
            for user in self.held[user_kind].values():
                if collection == "network-volumes" and object_id in _volume_ids(user, field_name):
                    raise Rejected(400, f"network volume {object_id} is attached to {user['name']}")
        if collection == "pods":
            self.meter.turn_off(object_id, self.clock.now())
        if collection == "clusters":
            for pod in [pod for pod in self.held["pods"].values() if cluster_of(pod) == object_id]:
                self.delete("pods", pod["id"])
        if collection == "secrets":
            self.secret_values.pop(self.held["secrets"][object_id]["name"], None)
        del self.held[collection][object_id]

    def meter_pod(self, pod: Json, status: str) -> None:
        """Charges a Pod from the moment it has a machine until that machine is given back."""
        if status in NOT_CHARGED:
            self.meter.turn_off(pod["id"], self.clock.now())
        else:
            self.meter.turn_on(pod["id"], pod["hourly"], self.clock.now(), on_gpu="gpu" in pod)

    def say(self, pod_id: str, source: str, line: str) -> None:
        """Adds a line to the log of a Pod."""
        lines = self.said.setdefault(pod_id, [])
        lines.append({"source": source, "line": line, "ts": self.clock.stamp()})
        del lines[:-KEPT_LINES]

    def lines_of(self, pod: Json) -> list[Json]:
        """All that is kept of the log of a Pod, oldest first."""
        scripted = self.pod_logs.get(pod["id"], [])
        first = [{"source": "container", "line": line, "ts": pod["createdAt"]} for line in scripted]
        return first + self.said.get(pod["id"], [])

    def worker(self, endpoint: Json, worker_id: str) -> Json:
        """One worker of an endpoint, also one that is gone. Raises Rejected 404."""
        found = self.workers.get(worker_id)
        if found is None or found["endpoint"] != endpoint["id"]:
            raise Rejected(404, f"worker {worker_id} not found")
        return found

    def add_secret(self, body: Json) -> Json:
        """Keeps a secret, its value out of sight. Raises Rejected 409 for a name that is taken."""
        if any(s["name"] == body["name"] for s in self.held["secrets"].values()):
            raise Rejected(409, f"a secret named {body['name']} already exists")
        self.secret_values[body["name"]] = body["value"]
        return self.store("secrets", {"name": body["name"]})

    def datacenter(self, datacenter: str) -> Json:
        """One datacentre of the catalogue. Raises Rejected 400."""
        for candidate in self.catalog.datacenters():
            if candidate["id"] == datacenter:
                return candidate
        raise Rejected(400, f"unknown data center {datacenter}")

    def need_registry(self, body: Json) -> None:
        """A container may only name a registry credential that exists. Raises Rejected 400."""
        registry = body.get("registry")
        if registry and registry not in self.held["registries"]:
            raise Rejected(400, f"registry {registry} not found")

    def need_volumes(self, volume_ids: list[str], datacenters: list[str]) -> None:
        """Volumes must exist, one per datacentre, where the workload may run. Raises Rejected 400."""
        seen: set[str] = set()
        for volume_id in volume_ids:
            if volume_id not in self.held["network-volumes"]:
                raise Rejected(400, f"network volume {volume_id} not found")
            home = self.held["network-volumes"][volume_id]["dataCenter"]
            if home in seen:
                raise Rejected(400, f"only one network volume per data center: {home} is named twice")
            if datacenters and home not in datacenters:
                raise Rejected(400, f"network volume {volume_id} is in {home}, not in {', '.join(datacenters)}")
            seen.add(home)


def create_volume(account: Account, body: Json) -> Json:
    """POST /v2/network-volumes."""
    made = {"type": "STANDARD", **body}
    offered = account.datacenter(made["dataCenter"])["networkVolumeTypes"]
    if made["type"] not in offered:
        raise Rejected(400, f"data center {made['dataCenter']} does not offer network volumes of type {made['type']}")
    return account.store("network-volumes", made)


def change_volume(account: Account, volume: Json, body: Json) -> Json:
    """PATCH /v2/network-volumes/{id}: a volume only grows."""
    if body.get("size", volume["size"]) < volume["size"]:
        raise Rejected(400, f"volume size cannot be reduced from {volume['size']} to {body['size']}")
    volume.update(body)
    return volume


def create_template(account: Account, body: Json) -> Json:
    """POST /v2/templates."""
    account.need_registry(body)
    if any(t["name"] == body["name"] for t in account.held["templates"].values()):
        raise Rejected(400, f"a template named {body['name']} already exists")
    defaults: Json = {
        "args": "",
        "disk": 20,
        "mounts": {},
        "ports": [],
        "env": {},
        "registry": None,
        "serverless": False,
        "public": False,
        "category": "NVIDIA",
        "startSsh": True,
        "startJupyter": True,
        "allowedCudaVersions": [],
    }
    return account.store("templates", defaults | body)


def change_template(account: Account, template: Json, body: Json) -> Json:
    """PATCH /v2/templates/{id}: never reaches Pods or endpoints that exist."""
    account.need_registry(body)
    template.update(body)
    return template


def create_registry(account: Account, body: Json) -> Json:
    """POST /v2/registries: write-only, the answer has id and name."""
    return account.store("registries", {"name": body["name"]})


def create_delegation(account: Account, body: Json) -> Json:
    """POST /v2/registries/delegations for arn:aws:ecr:REGION:ACCOUNT:repository/NAME[:TAG]."""
    parts = body["resource"].split(":", 5)
    if len(parts) != 6 or parts[2] != "ecr" or not parts[5].startswith("repository/"):
        raise Rejected(400, f"{body['resource']} is not the ARN of an ECR repository")
    name, _, tag = parts[5].removeprefix("repository/").partition(":")
    made = {
        "name": body.get("name"),
        "delegatorUserId": "user_local",
        "awsUser": f"arn:aws:iam::{parts[4]}:root",
        "repository": name,
        "tag": tag or "*",
        "awsRegion": parts[3],
        "createdAt": "2026-01-01T00:00:00Z",
    }
    return account.store("delegations", made)


def create_secret(account: Account, body: Json) -> Json:
    """POST /v2/account/secrets: the value reaches containers, only its name can be read."""
    return account.add_secret(body)


def change_secret(account: Account, secret: Json, body: Json) -> Json:
    """PATCH /v2/account/secrets/{id}: containers that start from now on get the new value."""
    account.secret_values[secret["name"]] = body["value"]
    return secret


def _volume_ids(user: Json, field_name: str) -> list[str]:
    if field_name == "networkVolumes":
        return list(user.get("networkVolumes", []))
    return [mount["volumeId"] for mount in user.get("mounts", {}).get("network", [])]
