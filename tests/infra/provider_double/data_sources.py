"""The two catalogue data sources of runpod/runpod 2.0.0: GPU types and datacentres."""

from __future__ import annotations

from typing import Any, ClassVar

from tf.iface import DataSource
from tf.schema import Attribute, Schema
from tf.types import Bool, List, Number, String

from tests.infra.provider_double.nested import NestedAttribute


class CatalogList(DataSource):
    """One computed list read from the catalogue; subclasses give NAME, PATH, KEY and the COLUMNS."""

    NAME = ""
    PATH = ""
    KEY = ""
    COLUMNS: ClassVar[dict[str, Any]] = {}

    def __init__(self, provider: Any) -> None:
        self.provider = provider

    @classmethod
    def get_name(cls) -> str:
        return cls.NAME

    @classmethod
    def get_schema(cls) -> Schema:
        columns = [Attribute(name, kind, computed=True) for name, kind in cls.COLUMNS.items()]
        return Schema(version=0, attributes=[NestedAttribute(cls.NAME, columns, many=True, computed=True)])

    def read(self, context: Any, config: dict[str, Any]) -> dict[str, Any] | None:
        _, answer = self.provider.api.call(context, (200,), "GET", self.PATH)
        return {self.NAME: [self.row(item) for item in answer[self.KEY]]} if answer else None

    def row(self, item: dict[str, Any]) -> dict[str, Any]:
        raise TypeError(f"{self.NAME} has no rows")


class GpuTypes(CatalogList):
    NAME, PATH, KEY = "gpu_types", "/catalog/gpus", "gpus"
    COLUMNS: ClassVar[dict[str, Any]] = {
        "id": String(),
        "name": String(),
        "memory": Number(),
        "secure": Bool(),
        "community": Bool(),
        "price_secure": Number(),
        "price_community": Number(),
        "pool": String(),
    }

    def row(self, item: dict[str, Any]) -> dict[str, Any]:
        prices = {"price_secure": item["price"]["secure"], "price_community": item["price"]["community"]}
        return {name: item.get(name) for name in self.COLUMNS} | prices


class DataCenters(CatalogList):
    NAME, PATH, KEY = "data_centers", "/catalog/datacenters", "dataCenters"
    COLUMNS: ClassVar[dict[str, Any]] = {
        "id": String(),
        "name": String(),
        "region": String(),
        "global_network": Bool(),
        "compliance": List(String()),
        "network_volume_types": List(String()),
    }

    def row(self, item: dict[str, Any]) -> dict[str, Any]:
        return {
            "id": item["id"],
            "name": item["name"],
            "region": item["region"],
            "global_network": item["globalNetwork"],
            "compliance": item["compliance"],
            "network_volume_types": item["networkVolumeTypes"],
        }
