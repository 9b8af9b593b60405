"""Who may use the front door: one YAML file, read strictly. It holds hashes of keys and names of variables, no secret.

clients = load_clients(Path("clients.yaml")); clients["acme"].max_usd_per_month

    acme:
      key_sha256: [9f86d0...]        # printf %s "$KEY" | sha256sum; two of them while a key is replaced
      recipe: qwen3-next-80b/zero3
      models: {mistralai/Mistral-7B-Instruct-v0.2: mistral-7b-instruct-v0.2/zero3}
      max_usd_per_job: 60
      max_usd_per_month: 400
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Annotated

from pydantic import Field

from recipes.errors import InputError, Problem
from recipes.load import load_recipe, recipe_names
from recipes.recipe import Strict
from recipes.strict_yaml import read_yaml
from recipes.validate import validated
from scripts.job_token import CLIENT_NAME

Url = Annotated[str, Field(pattern=r"^https://[^\s@]+$", max_length=500)]
Variable = Annotated[str, Field(pattern=r"^[A-Z][A-Z0-9_]{2,80}$")]


class Webhook(Strict):
    """Where the end of a job is told, and the environment variable that holds the signing secret."""

    url: Url
    secret_env: Variable


class Supabase(Strict):
    """The database whose row of a job is kept up to date. key_env: the variable with its key."""

    url: Url
    key_env: Variable
    table: Annotated[str, Field(pattern=r"^[a-z_][a-z0-9_]{0,62}$")] = "pipeline_training_jobs"


class Client(Strict):
    """One user of the front door."""

    name: str
    key_sha256: Annotated[
        tuple[Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")], ...], Field(min_length=1, strict=False)
    ]
    recipe: str
    "Taken where a request names no base model."
    models: dict[str, str] = Field(default_factory=dict)
    "base_model as a request says it -> recipe. Other names that recipes know are accepted too."
    max_usd_per_job: Annotated[float, Field(gt=0)] = 25.0
    max_usd_per_month: Annotated[float, Field(gt=0)] = 250.0
    webhook: Webhook | None = None
    supabase: Supabase | None = None


def load_clients(path: Path) -> dict[str, Client]:
    """The clients by name. Raises InputError with every problem of the file at once."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        raise InputError(Problem(str(path), "cannot be read", "LORRY_CLIENTS: the path of a YAML file")) from None
    value, lines = read_yaml(text, str(path))
    if not isinstance(value, dict):
        raise InputError(Problem(str(path), "not a mapping", "client names, each with key_sha256 and recipe"))
    clients, problems = {}, []
    for name, fields in value.items():
        if not CLIENT_NAME.fullmatch(name):
            problems.append(Problem(f"{path}: {name}", "not a client's name", "2 to 32 of a-z, 0-9 and hyphens"))
            continue
        own = {at[1:]: line for at, line in lines.items() if at[:1] == (name,)}
        try:
            clients[name] = validated(Client, {**_mapping(fields), "name": name}, f"{path}: {name}", own)
            for recipe in {clients[name].recipe, *clients[name].models.values()}:
                load_recipe(recipe)
        except InputError as error:
            problems += error.problems
    problems += _shared_keys(clients, path)
    if problems:
        raise InputError(*problems)
    return clients


@cache
def known_models(own: str) -> dict[str, str]:
    """Base model -> the recipe that adapts it: the client's own one, else the first of those that ship."""
    found = {load_recipe(own).recipe.base.id: own}
    for name in recipe_names():
        found.setdefault(load_recipe(name).recipe.base.id, name)
    return found


def _mapping(fields: object) -> dict[str, object]:
    return {str(key): value for key, value in fields.items()} if isinstance(fields, dict) else {}


def _shared_keys(clients: dict[str, Client], path: Path) -> list[Problem]:
    """A key that opens two clients would open the first one's jobs to the other."""
    owners: dict[str, str] = {}
    problems = []
    for client in clients.values():
        for key in client.key_sha256:
            if (owner := owners.setdefault(key, client.name)) != client.name:
                problems.append(Problem(f"{path}: {client.name}", f"the same key as {owner}", "a key of its own"))
    return problems
