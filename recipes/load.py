"""Finds and reads recipe files, and reports all errors of a file at once.

loaded = load_recipe("smoke/zero3")     # by name, or by path to a YAML file
"""

from __future__ import annotations

import difflib
import hashlib
import json
import pathlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, get_args

from recipes.catalog import BaseModelFacts, Catalog, load_catalog
from recipes.errors import InputError, Problem
from recipes.recipe import MAX_TOKENS, Data, Recipe, TargetGroup
from recipes.strict_yaml import Path, read_yaml
from recipes.validate import place, validated

FOLDER = pathlib.Path(__file__).parent


@dataclass(frozen=True)
class LoadedRecipe:
    """A recipe with its name (`smoke/zero3`) and the SHA-256 of its resolved JSON, which the manifest records."""

    name: str
    recipe: Recipe
    sha256: str


def recipe_names() -> list[str]:
    """The names of the recipes that ship, in order: `<model>/<name>`."""
    return sorted(path.relative_to(FOLDER).with_suffix("").as_posix() for path in FOLDER.glob("*/*.yaml"))


def load_recipe(name: str, catalog: Catalog | None = None) -> LoadedRecipe:
    """The recipe of that name or path. Raises InputError with every problem of the file at once."""
    path = _find(name)
    shown = str(path.relative_to(FOLDER.parent)) if path.is_relative_to(FOLDER) else name
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(Problem(shown, f"not UTF-8 text at byte {error.start}", "save the file as UTF-8")) from None
    except OSError as error:
        raise InputError(Problem(shown, f"cannot be read ({error.strerror})", "a readable YAML file")) from None
    value, lines = read_yaml(text, shown)
    problems = catalog_problems(value, catalog or load_catalog(), shown, lines)
    try:
        recipe = validated(Recipe, value, shown, lines)
    except InputError as error:
        raise InputError(*error.problems, *problems) from None
    if problems:
        raise InputError(*problems)
    label = path.relative_to(FOLDER).with_suffix("").as_posix() if path.is_relative_to(FOLDER) else path.stem
    return LoadedRecipe(label, recipe, recipe_sha256(recipe))


def recipe_sha256(recipe: Recipe) -> str:
    """SHA-256 of the resolved recipe as sorted JSON: equal choices hash alike however they were written."""
    return hashlib.sha256(json.dumps(recipe.model_dump(mode="json"), sort_keys=True).encode()).hexdigest()


def catalog_problems(value: Any, catalog: Catalog, shown: str, lines: Mapping[Path, int]) -> list[Problem]:
    """What a recipe, as read from YAML, asks of the catalog and the catalog does not have.

    It looks at the raw values, so that a recipe with other faults hears of these too; what is of the wrong type is
    left to the schema.
    """
    problems: list[Problem] = []
    name, gpu = _at(value, "base", "id"), _at(value, "hardware", "gpu")
    model = catalog.models.get(name) if isinstance(name, str) else None
    if model is not None:
        problems += _problems_with(model, str(name), value, catalog, shown, lines)
    elif isinstance(name, str) and name in catalog.refused:
        reason, _, step = catalog.refused[name].rpartition("; ")
        problems.append(Problem(place(shown, ("base", "id"), lines), f"'{name}' cannot be trained: {reason}", step))
    elif isinstance(name, str):
        where = place(shown, ("base", "id"), lines)
        problems.append(Problem(where, f"unknown model '{name}'", _near(name, catalog.models)))
    if isinstance(gpu, str) and gpu not in catalog.gpus:
        where = place(shown, ("hardware", "gpu"), lines)
        problems.append(Problem(where, f"unknown GPU '{gpu}'", _near(gpu, catalog.gpus)))
    return problems


def _problems_with(
    model: BaseModelFacts, name: str, value: Any, catalog: Catalog, shown: str, lines: Mapping[Path, int]
) -> Iterator[Problem]:
    family = catalog.families[model.family]
    groups, quantize = family.groups, _at(value, "hardware", "quantize")
    targets, tokens = _at(value, "adapter", "targets"), _at(value, "data", "max_tokens")
    for target in targets if isinstance(targets, list) else ():
        if target in get_args(TargetGroup) and target not in groups:
            where = place(shown, ("adapter", "targets"), lines)
            got = f"'{target}' matches nothing in {name}"
            if target == "experts" and family.moe_block:
                got = f"the experts of {name} cannot be trained: our expert function does not compute them"
            yield Problem(where, got, f"it has {', '.join(groups)}")
    if quantize is not None and family.moe_block and not family.our_experts:
        got = f"{quantize}: the experts of {name} cannot be quantised here"
        yield Problem(place(shown, ("hardware", "quantize"), lines), got, "leave it out, with engine zero3")
    tokens = Data().max_tokens if tokens is None else tokens
    if type(tokens) is int and model.context_tokens < tokens <= MAX_TOKENS:
        where = place(shown, ("data", "max_tokens"), lines)
        yield Problem(where, str(tokens), f"{name} reads at most {model.context_tokens}")


def _at(value: Any, section: str, key: str) -> Any:
    """value[section][key] of what YAML gave; None where there is no such thing."""
    inner = value.get(section) if isinstance(value, dict) else None
    return inner.get(key) if isinstance(inner, dict) else None


def _find(name: str) -> pathlib.Path:
    known = recipe_names()
    if name in known:
        return FOLDER / f"{name}.yaml"
    path = pathlib.Path(name)
    if path.suffix in (".yaml", ".yml") and path.is_file():
        return path.resolve() if path.resolve().is_relative_to(FOLDER) else path
    hint = "the path of a .yaml file, or one of: " + ", ".join(known)
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    raise InputError(Problem("recipe", f"no recipe '{name}'", f"did you mean '{near[0]}'?" if near else hint))


def _near(word: str, known: Iterable[str]) -> str:
    """The nearest of the known names, without regard to case; all that begin alike where there are several."""
    names = {name.lower(): name for name in sorted(known)}
    alike = [name for lower, name in names.items() if lower.startswith(word.lower())]
    if len(alike) > 1:
        return "one of: " + ", ".join(alike)
    near = difflib.get_close_matches(word.lower(), names, n=1, cutoff=0.5)
    return f"did you mean '{names[near[0]]}'?" if near else "one of: " + ", ".join(names.values())
