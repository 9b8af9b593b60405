"""Routes and JSON shapes of Runpod's REST v2, read from an OpenAPI document.

Contract.load(None).find("POST", "/v2/pods").request_errors({"name": "a"})
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

Json = dict[str, Any]
HAND_WRITTEN = Path(__file__).with_name("contract.yaml")


@dataclass(frozen=True)
class Route:
    """One operation of the document: its path template, its path parameters, and the shapes of its bodies."""

    method: str
    template: str
    parameters: tuple[str, ...]
    operation: Json
    document: Json

    def request_errors(self, body: object) -> list[str]:
        """Faults of a request body, each `field/path: reason`; empty when the operation takes no body."""
        if "requestBody" not in self.operation:
            return []
        return self._errors(self._follow(self.operation["requestBody"]), body)

    def answer_errors(self, status: int, body: object) -> list[str]:
        """Faults of an answer; an undocumented status is one fault, a status without a JSON shape has none."""
        responses = self.operation["responses"]
        if str(status) not in responses:
            return [f"status {status} is not documented for {self.method} {self.template}"]
        return self._errors(self._follow(responses[str(status)]), body)

    def _errors(self, holder: Json, body: object) -> list[str]:
        from jsonschema import Draft202012Validator

        schema = holder.get("content", {}).get("application/json", {}).get("schema")
        if schema is None:
            return []
        validator = Draft202012Validator({**schema, "components": self.document["components"]})
        return [
            f"{'/'.join(map(str, e.absolute_path)) or 'body'}: {e.message}"[:300]
            for e in sorted(validator.iter_errors(body), key=str)
        ]

    def _follow(self, node: Json) -> Json:
        while "$ref" in node:
            target: Json = self.document
            for key in node["$ref"].removeprefix("#/").split("/"):
                target = target[key]
            node = target
        return node


@dataclass(frozen=True)
class Contract:
    """All routes, literal paths before parametrised ones (/registries/delegations before /registries/{id})."""

    routes: tuple[tuple[re.Pattern[str], str, str, Json, Json], ...]

    @classmethod
    def load(cls, openapi: Path | None) -> Contract:
        """Read the published document when given, and the hand-written subset for what it lacks.

        Raises OSError or ValueError when the file cannot be read.
        """
        subset = yaml.safe_load(HAND_WRITTEN.read_text())
        documents = [json.loads(openapi.read_text()), subset] if openapi else [subset]
        known: dict[tuple[str, str], tuple[Json, Json]] = {}
        for document in documents:
            for path, methods in document["paths"].items():
                for method, operation in methods.items():
                    if method in ("get", "post", "put", "patch", "delete"):
                        known.setdefault((path, method.upper()), (operation, document))
        ordered = sorted(known.items(), key=lambda item: (item[0][0].count("{"), item[0]))
        return cls(tuple((_pattern(path), method, path, *found) for (path, method), found in ordered))

    def find(self, method: str, path: str) -> Route | None:
        """The operation that answers this request, or None."""
        for pattern, verb, template, operation, document in self.routes:
            if verb == method and (match := pattern.fullmatch(path)):
                return Route(method, template, match.groups(), operation, document)
        return None


def problem(status: int, title: str, detail: str, errors: list[str] | None = None) -> Mapping[str, object]:
    """The body of a refusal: application/problem+json as Runpod writes it."""
    return {"title": title, "status": status, "detail": detail} | ({"errors": errors} if errors else {})


def _pattern(template: str) -> re.Pattern[str]:
    return re.compile(re.sub(r"\{[^}]+\}", "([^/]+)", template))
