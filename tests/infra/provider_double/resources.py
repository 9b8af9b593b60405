"""The resources of runpod/runpod 2.0.0 that Lorry declares, attribute by attribute as its documentation lists them."""

from __future__ import annotations

from typing import Any, ClassVar

from tf.schema import Attribute
from tf.types import Bool, List, Map, Number, String, Unknown

from tests.infra.provider_double.nested import NestedAttribute
from tests.infra.provider_double.rest import RestResource, State

_STRINGS, _ENV = List(String()), Map(String())
_OWN = {"optional": True}
_FILLED = {"optional": True, "computed": True}


class NetworkVolume(RestResource):
    NAME, PATH = "network_volume", "/network-volumes"
    FIELDS: ClassVar[dict[str, Any]] = {"name": "name", "size": "size", "data_center": "dataCenter", "type": "type"}
    ATTRIBUTES = (
        Attribute("name", String(), required=True),
        Attribute("size", Number(), required=True),
        Attribute("data_center", String(), required=True, requires_replace=True),
        Attribute("type", String(), **_FILLED, requires_replace=True),
    )

    def validate(self, diagnostics: Any, type_name: str, config: State) -> None:
        super().validate(diagnostics, type_name, config)
        _in_range(diagnostics, config, "size", 10, 4096)
        _one_of(diagnostics, config, "type", "STANDARD", "HIGH_PERFORMANCE")


class Registry(RestResource):
    NAME, PATH = "registry", "/registries"
    FIELDS: ClassVar[dict[str, Any]] = {"name": "name", "username": "username", "password": "password"}
    UNREAD = frozenset({"username", "password"})
    ATTRIBUTES = (
        Attribute("name", String(), required=True, requires_replace=True),
        Attribute("username", String(), required=True, requires_replace=True),
        Attribute("password", String(), required=True, requires_replace=True, sensitive=True),
    )


class RegistryDelegation(RestResource):
    NAME, PATH = "registry_delegation", "/registries/delegations"
    FIELDS: ClassVar[dict[str, Any]] = {"name": "name", "resource": "resource"}
    UNREAD = frozenset({"resource"})
    ATTRIBUTES = (
        Attribute("name", String(), **_OWN, requires_replace=True),
        Attribute("resource", String(), required=True, requires_replace=True),
    )

    def read(self, context: Any, current: State) -> State | None:
        """REST v2 has no read of one delegation, only the list."""
        _, answer = self.provider.api.call(context, (200,), "GET", self.PATH)
        if answer is None:
            return current
        found = [d for d in answer["delegations"] if d["id"] == current["id"]]
        return self.from_json(found[0], current) if found else None


class Template(RestResource):
    NAME, PATH = "template", "/templates"
    FIELDS: ClassVar[dict[str, Any]] = {
        name: name
        for name in (
            "name",
            "image",
            "args",
            "disk",
            "env",
            "ports",
            "registry",
            "serverless",
            "public",
            "category",
        )
    }
    ATTRIBUTES = (
        Attribute("name", String(), required=True),
        Attribute("image", String(), required=True),
        Attribute("args", String(), **_OWN),
        Attribute("disk", Number(), **_FILLED),
        Attribute("env", _ENV, **_OWN),
        Attribute("ports", _STRINGS, **_OWN),
        Attribute("registry", String(), **_OWN),
        Attribute("serverless", Bool(), **_FILLED),
        Attribute("public", Bool(), **_FILLED),
        Attribute("category", String(), **_FILLED),
        NestedAttribute(
            "persistent_volume",
            [Attribute("size", Number(), required=True), Attribute("path", String(), required=True)],
            **_OWN,
        ),
    )

    def to_json(self, state: State) -> State:
        volume = state.get("persistent_volume")
        mounts = {"mounts": {"persistent": volume}} if volume not in (None, Unknown) else {}
        return super().to_json(state) | mounts

    def from_json(self, answer: State, state: State) -> State:
        return super().from_json(answer, state) | {"persistent_volume": answer["mounts"].get("persistent")}


class ServerlessEndpoint(RestResource):
    NAME, PATH = "serverless_endpoint", "/serverless"
    FIELDS: ClassVar[dict[str, Any]] = {
        "name": "name",
        "endpoint_type": "type",
        "image": "image",
        "template_id": "templateId",
        "env": "env",
        "disk": "disk",
        "ports": "ports",
        "registry": "registry",
        "timeout": "timeout",
        "flashboot": "flashboot",
        "network_volumes": "networkVolumes",
        "data_center_ids": "dataCenterIds",
        "created_at": "createdAt",
    }
    UNREAD = frozenset({"template_id"})
    _GPU: ClassVar[dict[str, Any]] = {
        "gpu_pools": "pools",
        "excluded_types": "excludedTypes",
        "gpu_count": "count",
        "min_cuda_version": "minCudaVersion",
        "allowed_cuda_versions": "allowedCudaVersions",
    }
    _WORKERS: ClassVar[dict[str, Any]] = {"workers_min": "min", "workers_max": "max", "idle_timeout": "idleTimeout"}
    ATTRIBUTES = (
        Attribute("name", String(), required=True),
        Attribute("endpoint_type", String(), required=True, requires_replace=True),
        Attribute("image", String(), **_FILLED),
        Attribute("template_id", String(), **_OWN),
        Attribute("gpu_pools", _STRINGS, **_OWN),
        NestedAttribute(
            "cpu",
            [Attribute("cpu_type_id", String(), required=True), Attribute("vcpu_count", Number(), required=True)],
            many=True,
            **_OWN,
        ),
        Attribute("gpu_count", Number(), **_FILLED),
        Attribute("excluded_types", _STRINGS, **_OWN),
        Attribute("min_cuda_version", String(), **_OWN),
        Attribute("allowed_cuda_versions", _STRINGS, **_OWN),
        Attribute("scaling_type", String(), required=True),
        Attribute("scaling_value", Number(), required=True),
        Attribute("workers_min", Number(), **_FILLED),
        Attribute("workers_max", Number(), **_FILLED),
        Attribute("idle_timeout", Number(), **_FILLED),
        Attribute("timeout", Number(), **_FILLED),
        Attribute("flashboot", String(), **_FILLED),
        Attribute("network_volumes", _STRINGS, **_OWN),
        Attribute("data_center_ids", _STRINGS, **_OWN),
        Attribute("env", _ENV, **_OWN),
        Attribute("disk", Number(), **_FILLED),
        Attribute("ports", _STRINGS, **_OWN),
        Attribute("registry", String(), **_OWN),
        Attribute("compute_type", String(), computed=True),
        Attribute("created_at", String(), computed=True),
    )

    def validate(self, diagnostics: Any, type_name: str, config: State) -> None:
        super().validate(diagnostics, type_name, config)
        _exactly_one(diagnostics, config, "gpu_pools", "cpu")
        _exactly_one(diagnostics, config, "image", "template_id")
        _one_of(diagnostics, config, "endpoint_type", "QUEUE", "LOAD_BALANCER")
        _one_of(diagnostics, config, "scaling_type", "QUEUE_DELAY", "REQUEST_COUNT")
        _in_range(diagnostics, config, "idle_timeout", 1, 3600)

    def to_json(self, state: State) -> State:
        body = super().to_json(state)
        body.pop("createdAt", None)
        value_key = {"QUEUE_DELAY": "queueDelay", "REQUEST_COUNT": "requestCount"}[state["scaling_type"]]
        value = state["scaling_value"]
        body["scaling"] = {
            "type": state["scaling_type"],
            value_key: int(value) if value_key == "requestCount" else value,
        }
        if state.get("cpu"):
            body["cpu"] = [{"id": c["cpu_type_id"], "vcpuCount": int(c["vcpu_count"])} for c in state["cpu"]]
        else:
            body["gpu"] = self._group(state, self._GPU)
        if workers := self._group(state, self._WORKERS):
            body["workers"] = workers
        return body

    def from_json(self, answer: State, state: State) -> State:
        new = super().from_json(answer, state)
        gpu = answer.get("gpu") or {}
        for group, fields in ((gpu, self._GPU), (answer["workers"], self._WORKERS)):
            for name, key in fields.items():
                value = group.get(key)
                new[name] = None if value in ("", [], None) and state.get(name) in (None, Unknown) else value
        scaling = answer["scaling"]
        new["scaling_type"] = scaling["type"]
        new["scaling_value"] = scaling.get("queueDelay", scaling.get("requestCount"))
        cpus = answer.get("cpu")
        new["cpu"] = [{"cpu_type_id": c["id"], "vcpu_count": c["vcpuCount"]} for c in cpus] if cpus else None
        return new | {"compute_type": "GPU" if gpu else "CPU"}

    @staticmethod
    def _group(state: State, fields: dict[str, str]) -> State:
        group = {key: state.get(name) for name, key in fields.items()}
        return {key: value for key, value in group.items() if value is not None and value is not Unknown}


def _in_range(diagnostics: Any, config: State, name: str, low: int, high: int) -> None:
    value = config.get(name)
    if value not in (None, Unknown) and not low <= value <= high:
        diagnostics.add_error("Invalid value", f"{name} must be between {low} and {high}, got {value}", path=[name])


def _one_of(diagnostics: Any, config: State, name: str, *allowed: str) -> None:
    value = config.get(name)
    if value not in (None, Unknown) and value not in allowed:
        diagnostics.add_error("Invalid value", f"{name} must be one of {', '.join(allowed)}, got {value}", path=[name])


def _exactly_one(diagnostics: Any, config: State, *names: str) -> None:
    given = [name for name in names if config.get(name) is not None]
    if len(given) != 1:
        diagnostics.add_error("Invalid combination", f"exactly one of {', '.join(names)} must be set, got {given}")
