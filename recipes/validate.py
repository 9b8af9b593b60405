"""Turns pydantic's findings into our sentences: `file: path: what was got; what would be right (did you mean ...)`."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from recipes.errors import InputError, Problem
from recipes.strict_yaml import Path

Model = TypeVar("Model", bound=BaseModel)

_WANTED = {
    "greater_than": "more than {gt}",
    "greater_than_equal": "{ge} or more",
    "less_than": "less than {lt}",
    "less_than_equal": "{le} or less",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "string_type": "text",
    "string_too_short": "at least {min_length} characters",
    "string_too_long": "at most {max_length} characters",
    "string_pattern_mismatch": "text of the form {pattern}",
    "tuple_type": "a list",
    "list_type": "a list",
    "too_short": "{min_length} or more entries",
    "too_long": "{max_length} entries or fewer",
    "literal_error": "one of {expected}",
    "model_type": "a mapping of keys to values",
    "dict_type": "a mapping of keys to values",
}


def validated(model: type[Model], value: Any, name: str, lines: Mapping[Path, int] | None = None) -> Model:
    """`value` as a `model`, or an InputError with every problem of it at once; `lines` gives line numbers."""
    try:
        return model.model_validate(value)
    except ValidationError as error:
        raise InputError(*(_problem(model, e, name, lines or {}) for e in _causes(error.errors()))) from None


def _causes(errors: list[ErrorDetails]) -> list[ErrorDetails]:
    """Without follow-ups: pydantic also calls a list too short once it has thrown out a bad entry."""
    inside = {error["loc"][:n] for error in errors for n in range(len(error["loc"]))}
    return [error for error in errors if not (error["type"] == "too_short" and error["loc"] in inside)]


def place(name: str, path: Path, lines: Mapping[Path, int]) -> str:
    """`file:line: path.inside.it`, with the line of the nearest part of the path that the file has."""
    line = next((lines[path[:n]] for n in range(len(path), -1, -1) if path[:n] in lines), None)
    dotted = ".".join(str(part) for part in path)
    return ": ".join(part for part in (f"{name}:{line}" if line else name, dotted) if part)


def _problem(model: type[BaseModel], error: ErrorDetails, name: str, lines: Mapping[Path, int]) -> Problem:
    path = tuple(error["loc"])
    where = place(name, path, lines)
    kind = error["type"]
    if kind == "extra_forbidden":
        near = difflib.get_close_matches(str(path[-1]), _keys(model, path[:-1]), n=1, cutoff=0.5)
        known = ", ".join(_keys(model, path[:-1]))
        return Problem(where, "unknown key", f"did you mean '{near[0]}'?" if near else f"known keys: {known}")
    if kind == "missing":
        return Problem(where, "missing", "it is required")
    if kind == "value_error":  # our own validators say both halves, joined by "; "
        got, _, want = str(error["ctx"]["error"] if "ctx" in error else error["msg"]).partition("; ")
        key, _, rest = got.partition(" ")  # they name the key at fault first
        named = (*path, *key.split("."))
        return Problem(place(name, named, lines), rest, want) if named in lines else Problem(where, got, want)
    wanted = _WANTED.get(kind, error["msg"])
    bounds = {key: f"{bound:g}" if isinstance(bound, float) else bound for key, bound in error.get("ctx", {}).items()}
    return Problem(where, _shown(error["input"]), wanted.format(**bounds) + _near(error))


def _near(error: ErrorDetails) -> str:
    """For a word outside a fixed list: its nearest neighbour."""
    if error["type"] != "literal_error" or not isinstance(error["input"], str):
        return ""
    choices = [c.strip("' ") for c in str(error.get("ctx", {}).get("expected", "")).replace(" or ", ",").split(",")]
    near = difflib.get_close_matches(error["input"], choices, n=1, cutoff=0.5)
    return f" (did you mean '{near[0]}'?)" if near else ""


def _keys(model: type[BaseModel], path: Path) -> list[str]:
    """The keys that are known at `path` inside `model`."""
    current: Any = model
    for part in path:
        field = current.model_fields.get(part) if isinstance(part, str) else None
        current = (
            next((a for a in (field.annotation, *_arguments(field.annotation)) if _is_model(a)), None)
            if field
            else None
        )
        if current is None:
            return []
    return list(current.model_fields)


def _arguments(annotation: Any) -> tuple[Any, ...]:
    return tuple(getattr(annotation, "__args__", ()))


def _is_model(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _shown(value: Any) -> str:
    """The value as YAML would write it, where Python's spelling differs."""
    text = "null" if value is None else str(value).lower() if isinstance(value, bool) else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
