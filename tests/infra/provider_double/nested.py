"""Nested attributes (x = {...} and x = [{...}]), which protocol 6 has and the library `tf` 1.2.0 does not offer."""

from __future__ import annotations

import json
from typing import Any

from tf import types
from tf.gen import tfplugin_pb2 as pb
from tf.schema import Attribute
from tf.types import Unknown


class ObjectType(types.TfType):
    """A fixed set of named fields."""

    def __init__(self, fields: dict[str, types.TfType]) -> None:
        self.fields = fields

    def encode(self, value: Any) -> Any:
        return self._each(value, "encode")

    def decode(self, value: Any) -> Any:
        return self._each(value, "decode")

    def tf_type(self) -> bytes:
        return json.dumps(["object", {name: json.loads(t.tf_type()) for name, t in self.fields.items()}]).encode()

    def _each(self, value: Any, how: str) -> Any:
        if value is None or value is Unknown:
            return value
        return {
            name: value.get(name) if value.get(name) in (None, Unknown) else getattr(kind, how)(value[name])
            for name, kind in self.fields.items()
        }


class NestedAttribute(Attribute):
    """An attribute whose value is an object, or a list of objects when `many`."""

    def __init__(self, name: str, attributes: list[Attribute], many: bool = False, **flags: Any) -> None:
        value = ObjectType({a.name: a.type for a in attributes})
        super().__init__(name, types.List(value) if many else value, **flags)
        self.attributes = attributes
        self.many = many

    def to_pb(self) -> pb.Schema.Attribute:
        modes = pb.Schema.Object.NestingMode
        nesting = modes.LIST if self.many else modes.SINGLE
        return pb.Schema.Attribute(
            name=self.name,
            nested_type=pb.Schema.Object(attributes=[a.to_pb() for a in self.attributes], nesting=nesting),
            required=bool(self.required),
            optional=bool(self.optional),
            computed=bool(self.computed),
            sensitive=bool(self.sensitive),
        )
