"""The provider itself: its arguments, their fallbacks in the environment, and what it offers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tf.iface import Provider
from tf.schema import Attribute, Schema
from tf.types import String, Unknown

from tests.infra.provider_double.data_sources import DataCenters, GpuTypes
from tests.infra.provider_double.resources import (
    NetworkVolume,
    Registry,
    RegistryDelegation,
    ServerlessEndpoint,
    Template,
)
from tests.infra.provider_double.rest import Api


class RunpodProvider(Provider):
    def __init__(self, environment: Mapping[str, str]) -> None:
        self.environment = environment
        self.api: Api | None = None

    def get_model_prefix(self) -> str:
        return "runpod_"

    def full_name(self) -> str:
        return "registry.terraform.io/runpod/runpod"

    def get_provider_schema(self, diagnostics: Any) -> Schema:
        return Schema(
            version=0,
            attributes=[
                Attribute("api_key", String(), optional=True, sensitive=True),
                Attribute("base_url", String(), optional=True),
                Attribute("graphql_url", String(), optional=True),
            ],
        )

    def validate_config(self, diagnostics: Any, config: dict[str, Any]) -> None:
        """Nothing spans several arguments."""

    def configure_provider(self, diagnostics: Any, config: dict[str, Any]) -> None:
        key = self._argument(config, "api_key", "RUNPOD_API_KEY")
        if not key:
            diagnostics.add_error("Missing API key", "Set api_key or the variable RUNPOD_API_KEY", path=["api_key"])
        base_url = self._argument(config, "base_url", "RUNPOD_API_BASE_URL") or "https://api.runpod.io/v2"
        self.api = Api(key, base_url)

    def get_data_sources(self) -> list[Any]:
        return [GpuTypes, DataCenters]

    def get_resources(self) -> list[Any]:
        return [NetworkVolume, Registry, RegistryDelegation, Template, ServerlessEndpoint]

    def _argument(self, config: dict[str, Any], name: str, variable: str) -> str:
        value = config.get(name)
        return self.environment.get(variable, "") if value in (None, Unknown) else str(value)
