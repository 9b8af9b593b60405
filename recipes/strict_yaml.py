"""Reads YAML the way people mean it: `2e-4` is a number, `no` is a word, a key stands once, values know their line.

    value, lines = read_yaml(text, "recipes/smoke/zero3.yaml")

PyYAML 6.0.3 `safe_load` turns `2e-4` into a string, `no` into False, `12:30` into 750 and keeps the last of two equal
keys without a word (observed 2026-11). This loader resolves scalars as YAML 1.2's core schema does, refuses the rest.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

from recipes.errors import InputError, Problem

MAX_BYTES = 256 * 1024  # the largest file of ours is a tenth of this
MAX_DEPTH = 12

Path = tuple[str | int, ...]


def read_yaml(text: str, name: str) -> tuple[Any, dict[Path, int]]:
    """The value of one YAML document and the line (1-based) of each path in it.

    Raises InputError with line and column of a syntax error, and with every duplicate key, alias or odd tag at once.
    """
    if len(text.encode()) > MAX_BYTES:
        raise InputError(Problem(name, f"{len(text.encode())} bytes", f"at most {MAX_BYTES} bytes"))
    try:
        node = yaml.compose(text, Loader=_CoreLoader)
    except RecursionError:
        raise InputError(Problem(name, "nested too deeply to read", f"at most {MAX_DEPTH} levels")) from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{name}:{mark.line + 1}:{mark.column + 1}" if mark else name
        raise InputError(
            Problem(where, f"not valid YAML ({error.problem})", "indent with spaces; quote odd values")
        ) from None
    except yaml.YAMLError as error:
        raise InputError(Problem(name, f"not valid YAML ({_one_line(error)})", "save the file as UTF-8 text")) from None
    if node is None:
        raise InputError(Problem(name, "an empty file", "a mapping of keys to values"))
    reader = _Reader(name)
    value = reader.value(node, ())
    if reader.problems:
        raise InputError(*reader.problems)
    return value, reader.lines


_PLAIN_TAGS = ("tag:yaml.org,2002:map", "tag:yaml.org,2002:seq")


class _CoreLoader(yaml.SafeLoader):
    """SafeLoader with the scalar rules of YAML 1.2's core schema in place of YAML 1.1's."""


_CoreLoader.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in (
    ("bool", r"^(?:true|True|false|False)$", "tTfF"),
    ("null", r"^(?:~|null|Null|)$", ["~", "n", "N", ""]),
    ("int", r"^[-+]?[0-9]+$", "-+0123456789"),
    ("float", r"^[-+]?(?:[0-9]+\.[0-9]*|\.[0-9]+|[0-9]+)(?:[eE][-+]?[0-9]+)?$", "-+.0123456789"),
):
    _CoreLoader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(_pattern), list(_first))


class _Reader:
    """Walks the composed nodes; collects line numbers and everything that is refused."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.lines: dict[Path, int] = {}
        self.problems: list[Problem] = []
        self._seen: set[int] = set()

    def value(self, node: yaml.Node, path: Path) -> Any:
        self.lines[path] = node.start_mark.line + 1
        where = f"{self.name}:{node.start_mark.line + 1}"
        if id(node) in self._seen:
            return self._refuse(where, "an alias (*name)", "write the value out")
        self._seen.add(id(node))
        if len(path) > MAX_DEPTH:
            return self._refuse(where, f"more than {MAX_DEPTH} levels deep", "a flatter file")
        if not isinstance(node, yaml.ScalarNode) and node.tag not in _PLAIN_TAGS:
            return self._refuse(where, f"the tag {node.tag}", "plain values only")
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, path)
        if isinstance(node, yaml.SequenceNode):
            return [self.value(child, (*path, index)) for index, child in enumerate(node.value)]
        return self._scalar(node, where)

    def _mapping(self, node: yaml.MappingNode, path: Path) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key_node, value_node in node.value:
            where = f"{self.name}:{key_node.start_mark.line + 1}"
            if not isinstance(key_node, yaml.ScalarNode):
                self._refuse(where, "a key that is not a word", "keys are plain words")
                continue
            key = str(key_node.value)
            if key in result:
                first = self.lines[(*path, key)]
                self._refuse(where, f"the key '{key}' a second time (first on line {first})", "keep one of them")
                continue
            result[key] = self.value(value_node, (*path, key))
        return result

    def _scalar(self, node: yaml.Node, where: str) -> Any:
        kind = node.tag.rpartition(":")[2]
        text = str(node.value)
        if kind == "int":
            return (
                int(text) if len(text) < 20 else self._refuse(where, f"the number {text[:20]}...", "a smaller number")
            )
        if kind == "float":
            return float(text)
        if kind == "bool":
            return text.lower() == "true"
        if kind == "null":
            return None
        if kind == "str":
            return text
        return self._refuse(where, f"the tag {node.tag}", "plain values only")

    def _refuse(self, where: str, got: str, want: str) -> None:
        self.problems.append(Problem(where, got, want))


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:120]
