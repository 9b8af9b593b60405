"""Finds and reads recipe files, and reports all errors of a file at once.

loaded = load_recipe("smoke/zero3")     # by name, or by path to a YAML file
"""

from __future__ import annotations

import difflib
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from recipes.catalog import Catalog, load_catalog
from recipes.errors import InputError, Problem
from recipes.recipe import Recipe
from recipes.strict_yaml import read_yaml
from recipes.validate import validated

FOLDER = Path(__file__).parent


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
    recipe = validated(Recipe, value, shown, lines)
    problems = catalog_problems(recipe, catalog or load_catalog(), shown)
    if problems:
        raise InputError(*problems)
    label = path.relative_to(FOLDER).with_suffix("").as_posix() if path.is_relative_to(FOLDER) else path.stem
    return LoadedRecipe(label, recipe, recipe_sha256(recipe))


def recipe_sha256(recipe: Recipe) -> str:
    """SHA-256 of the resolved recipe as sorted JSON: equal choices hash alike however they were written."""
    return hashlib.sha256(json.dumps(recipe.model_dump(mode="json"), sort_keys=True).encode()).hexdigest()


def catalog_problems(recipe: Recipe, catalog: Catalog, shown: str) -> list[Problem]:
    """What the recipe asks of the catalog and the catalog does not have."""
    problems = []
    model = catalog.models.get(recipe.base.id)
    if model is None:
        problems.append(
            Problem(f"{shown}: base.id", f"unknown model '{recipe.base.id}'", _near(recipe.base.id, catalog.models))
        )
    else:
        groups = catalog.families[model.family].groups
        for target in recipe.adapter.targets:
            if target not in groups:
                problems.append(
                    Problem(
                        f"{shown}: adapter.targets",
                        f"'{target}' matches nothing in {recipe.base.id}",
                        f"it has {', '.join(groups)}",
                    )
                )
        if recipe.data.max_tokens > model.context_tokens:
            problems.append(
                Problem(
                    f"{shown}: data.max_tokens",
                    f"{recipe.data.max_tokens}",
                    f"{recipe.base.id} reads at most {model.context_tokens}",
                )
            )
    gpu = recipe.hardware.gpu
    if gpu is not None and gpu not in catalog.gpus:
        problems.append(Problem(f"{shown}: hardware.gpu", f"unknown GPU '{gpu}'", _near(gpu, catalog.gpus)))
    return problems


def _find(name: str) -> Path:
    known = recipe_names()
    if name in known:
        return FOLDER / f"{name}.yaml"
    path = Path(name)
    if path.suffix in (".yaml", ".yml") and path.is_file():
        return path.resolve() if path.resolve().is_relative_to(FOLDER) else path
    hint = "the path of a .yaml file, or one of: " + ", ".join(known)
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    raise InputError(Problem("recipe", f"no recipe '{name}'", f"did you mean '{near[0]}'?" if near else hint))


def _near(word: str, known: object) -> str:
    names = sorted(known)  # type: ignore[call-overload]
    near = difflib.get_close_matches(word, names, n=1, cutoff=0.5)
    return f"did you mean '{near[0]}'?" if near else "one of: " + ", ".join(names)
