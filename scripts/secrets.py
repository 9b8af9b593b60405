"""The secrets that Runpod keeps and that templates and endpoints refer to as {{ RUNPOD_SECRET_name }}.

missing = [s for s in check_secrets(runpod) if s.state == "missing"]
set_secrets(runpod, values_from(os.environ))       # the value of `name` comes from the variable RUNPOD_SECRET_name

A reference without a secret reaches the container as that very text. No value is ever printed, logged or put in argv.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

from scripts.backends.runpod_api import RunpodApi
from scripts.errors import InputError, Problem

State = Literal["present", "created", "updated", "missing"]

_REFERENCE = re.compile(r"\{\{\s*RUNPOD_SECRET_([^\s{}]+)\s*\}\}")
_NAME = re.compile(r"(?!RUNPOD)[A-Za-z_][A-Za-z0-9_.\-/]{0,190}")
_MAX_BYTES = 16 * 2**20 - 1


@dataclass(frozen=True)
class Secret:
    """A secret that is needed: its state, the variable its value is read from, and what refers to it."""

    name: str
    state: State
    variable: str
    used_by: tuple[str, ...]


def variable_of(name: str) -> str:
    """The environment variable that holds the value of a secret: RUNPOD_SECRET_name, with _ for . - and /."""
    return "RUNPOD_SECRET_" + re.sub(r"[^A-Za-z0-9_]", "_", name)


def check_secrets(runpod: RunpodApi, names: Iterable[str] = ()) -> list[Secret]:
    """Every secret that is named or that something of the account refers to, and whether it exists. Changes nothing."""
    needed = _needed(runpod, names)
    present = {row["name"] for row in runpod.listed("account/secrets")}
    return [
        Secret(name, "present" if name in present else "missing", variable_of(name), users)
        for name, users in sorted(needed.items())
    ]


def set_secrets(runpod: RunpodApi, value_of: Callable[[str], str | None], names: Iterable[str] = ()) -> list[Secret]:
    """Creates or replaces each needed secret for which `value_of(variable)` has a value; the others stay as they are.

    Doing it twice does no harm. Raises InputError for values that cannot be one, before anything is sent.
    """
    needed = _needed(runpod, names)
    values = {name: value for name in needed if (value := value_of(variable_of(name)))}
    _require_sound(values)
    ids = {row["name"]: row["id"] for row in runpod.listed("account/secrets")}
    done = []
    for name, users in sorted(needed.items()):
        state: State = "present" if name in ids else "missing"
        if name in values and name in ids:
            runpod.change("account/secrets", ids[name], {"value": values[name]}, secret=True)
            state = "updated"
        elif name in values:
            runpod.create("account/secrets", {"name": name, "value": values[name]}, secret=True)
            state = "created"
        done.append(Secret(name, state, variable_of(name), users))
    return done


def _needed(runpod: RunpodApi, names: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Secret name -> what refers to it, over the account's templates and endpoints."""
    users: dict[str, list[str]] = {name: [] for name in names}
    if wrong := [name for name in users if not _NAME.fullmatch(name)]:
        want = "letters, digits and _.-/, beginning with a letter or _, not with RUNPOD"
        raise InputError(*(Problem("secrets", f"{name[:80]!r} cannot be the name of a secret", want) for name in wrong))
    rows: list[dict[str, Any]] = [*runpod.listed("templates"), *runpod.listed("serverless")]
    for row in rows:
        for text in (row.get("env") or {}).values():
            for name in _REFERENCE.findall(str(text)):
                users.setdefault(name, []).append(str(row["name"]))
    return {name: tuple(sorted(set(used))) for name, used in users.items()}


def _require_sound(values: dict[str, str]) -> None:
    problems = []
    for name, value in values.items():
        if value.strip().startswith("{{"):
            problems.append(Problem(variable_of(name), "its value begins with {{", "the secret itself, no reference"))
        elif value != value.strip():
            problems.append(Problem(variable_of(name), "it begins or ends with white space", "the bare value"))
        elif len(value.encode(errors="surrogateescape")) > _MAX_BYTES:
            problems.append(Problem(variable_of(name), "it is longer than 16 MiB", "a shorter value"))
        elif not _NAME.fullmatch(name):
            problems.append(Problem(variable_of(name), f"Runpod takes no secret named {name[:80]!r}", "another name"))
    if problems:
        raise InputError(*problems)
