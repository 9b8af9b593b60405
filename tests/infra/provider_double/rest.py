"""A Terraform resource kept by REST v2: create, read, update with differences only, delete, import."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from typing import Any, ClassVar

from tf.iface import Resource
from tf.schema import Attribute, Schema
from tf.types import String, Unknown

State = dict[str, Any]
_EMPTY = ("", [], {})


class Api:
    """A minimal client; every refusal becomes a Terraform diagnostic with the API's own words."""

    def __init__(self, key: str, base_url: str) -> None:
        self.key = key
        self.base_url = base_url.rstrip("/")

    def call(self, context: Any, accept: tuple[int, ...], method: str, path: str, body: Any = None) -> tuple[int, Any]:
        """Status and JSON; (0, None) after adding an error to the context's diagnostics."""
        request = urllib.request.Request(
            self.base_url + path,
            method=method,
            data=None if body is None else json.dumps(body).encode(),
            headers={"authorization": f"Bearer {self.key}", "content-type": "application/json"},
        )
        try:
            with urllib.request.urlopen(request, timeout=600) as reply:
                status, raw = reply.status, reply.read()
        except urllib.error.HTTPError as refused:
            status, raw = refused.code, refused.read()
        except OSError as error:
            context.diagnostics.add_error("Request failed", f"{method} {path}: {error}")
            return 0, None
        answer = json.loads(raw) if raw else {}
        if status not in accept:
            title = answer.get("title", "API error")
            context.diagnostics.add_error(f"{title} ({status})", f"{method} {path}: {answer.get('detail', answer)}")
            return 0, None
        return status, answer


class RestResource(Resource):
    """Subclasses give NAME, PATH, ATTRIBUTES and FIELDS: attribute -> JSON key; UNREAD are never answered."""

    NAME = ""
    PATH = ""
    ATTRIBUTES: tuple[Attribute, ...] = ()
    FIELDS: ClassVar[dict[str, Any]] = {}
    UNREAD: frozenset[str] = frozenset()

    def __init__(self, provider: Any) -> None:
        self.provider = provider

    @classmethod
    def get_name(cls) -> str:
        return cls.NAME

    @classmethod
    def get_schema(cls) -> Schema:
        return Schema(version=0, attributes=[Attribute("id", String(), computed=True), *cls.ATTRIBUTES])

    def to_json(self, state: State) -> State:
        """The request for a state: only what is set and known."""
        return {key: _plain(state[name]) for name, key in self.FIELDS.items() if _is_set(state.get(name))}

    def from_json(self, answer: State, state: State) -> State:
        """The state after an answer; an empty value stands for unset unless the plan itself set it."""
        new = {name: None if value is Unknown else value for name, value in state.items()}
        for name, key in self.FIELDS.items():
            if name not in self.UNREAD and key in answer:
                value = answer[key]
                new[name] = None if value in _EMPTY and not _is_set(state.get(name)) else value
        return new | {"id": answer["id"]}

    def create(self, context: Any, planned: State) -> State | None:
        answer = self.provider.api.call(context, (201,), "POST", self.PATH, self.to_json(planned))[1]
        return self.from_json(answer, planned) if answer else None

    def read(self, context: Any, current: State) -> State | None:
        status, answer = self.provider.api.call(context, (200, 404), "GET", f"{self.PATH}/{current['id']}")
        if status == 404:
            return None
        return self.from_json(answer, current) if answer else current

    def update(self, context: Any, current: State, planned: State) -> State | None:
        old, new = self.to_json(current), self.to_json(planned)
        body = {key: value for key, value in new.items() if old.get(key) != value}
        body |= {key: _cleared(key, old[key]) for key in old.keys() - new.keys()}
        answer = self.provider.api.call(context, (200,), "PATCH", f"{self.PATH}/{current['id']}", body)[1]
        return self.from_json(answer, planned) if answer else current

    def delete(self, context: Any, current: State) -> State | None:
        status, _ = self.provider.api.call(context, (204, 404), "DELETE", f"{self.PATH}/{current['id']}")
        return None if status else current

    def import_(self, context: Any, id: str) -> State:
        return {a.name: id if a.name == "id" else None for a in self.get_schema().attributes}


def _is_set(value: Any) -> bool:
    return value is not None and value is not Unknown


def _plain(value: Any) -> Any:
    """Whole numbers may arrive as floats."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _cleared(key: str, old: Any) -> Any:
    """What removes a field: [] and {} by type; a registry goes away with null, other text with ""."""
    if isinstance(old, list | dict):
        return type(old)()
    return None if key == "registry" else ""
