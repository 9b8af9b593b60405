"""A client's numbers and wishes put into its recipe: the recipe stays the frame, the planner keeps the last word.

loaded = tailored(load_recipe("smoke/zero3"), asked, max_usd=5.0)
"""

from __future__ import annotations

import re
from typing import Any

from recipes.catalog import Catalog
from recipes.load import LoadedRecipe, recipe_sha256
from recipes.preparation import OfferPlan, Plan
from recipes.recipe import BackendName, Recipe
from recipes.validate import validated
from scripts.errors import InputError, Problem
from scripts.gateway.clients import Client
from scripts.gateway.understand import Asked, GpuConfig

_GPUS = (  # what people write -> GPUs of recipes/hardware.yaml, most specific first
    ("a100 40", ("a100-40-sxm",)),
    ("a100 80", ("a100-pcie", "a100-sxm")),
    ("a100 pcie", ("a100-pcie",)),
    ("a100 sxm", ("a100-sxm",)),
    ("a100", ("a100-pcie", "a100-sxm")),
    ("h100 pcie", ("h100-pcie",)),
    ("h100 nvl", ("h100-nvl",)),
    ("h100", ("h100-pcie", "h100-nvl", "h100-sxm")),
    ("h200", ("h200",)),
    ("b200", ("b200",)),
    ("l40s", ("l40s",)),
    ("rtx pro 6000", ("rtx-pro-6000",)),
)


def recipe_name(asked: Asked, client: Client, models: dict[str, str]) -> str:
    """The recipe for the base model of a request, whatever the letter case; without one, the client's own recipe."""
    if asked.base_model is None:
        return client.recipe
    known = {name.lower(): recipe for name, recipe in {**models, **client.models}.items()}
    found = known.get(asked.base_model.lower())
    if found is None:
        accepted = ", ".join(sorted({*models, *client.models}))
        raise InputError(Problem("input.base_model", f"unknown model {asked.base_model[:80]!a}", f"one of {accepted}"))
    return found


def tailored(loaded: LoadedRecipe, asked: Asked, max_usd: float) -> LoadedRecipe:
    """The recipe with the client's numbers, never above `max_usd`. Raises InputError."""
    value, numbers = loaded.recipe.model_dump(mode="json"), asked.numbers
    train, adapter, limits = value["training"], value["adapter"], value["limits"]
    _put(train, "epochs", numbers.epochs)
    _put(train, "learning_rate", numbers.learning_rate)
    if numbers.learning_rate is None and numbers.learning_rate_multiplier is not None:
        train["learning_rate"] = loaded.recipe.training.learning_rate * numbers.learning_rate_multiplier
    _put(train, "weight_decay", numbers.weight_decay)
    _put(train, "seed", numbers.seed)
    if numbers.batch_size is not None:
        train["global_batch"] = numbers.batch_size
        ranks = (loaded.recipe.hardware.gpus or 1) * loaded.recipe.hardware.nodes
        train["micro_batch"] = _micro_batch(numbers.batch_size, train["micro_batch"], ranks)
    if numbers.rank is not None:
        # without an alpha of its own the update keeps the recipe's scale, alpha / rank
        adapter["alpha"] = max(1, min(1024, round(adapter["alpha"] / adapter["rank"] * numbers.rank)))
        adapter["rank"] = numbers.rank
    _put(adapter, "alpha", None if numbers.alpha is None else round(numbers.alpha))
    limits["max_usd"] = min(limits["max_usd"], max_usd)
    limits["max_hours"] = min(limits["max_hours"], asked.max_hours or limits["max_hours"])
    return _loaded(loaded.name, value)


def with_gpu(loaded: LoadedRecipe, offer: OfferPlan, catalog: Catalog) -> LoadedRecipe:
    """The recipe, insisting on the hardware of that offer."""
    facts = catalog.offers[offer.offer]
    value = loaded.recipe.model_dump(mode="json")
    value["hardware"] |= {"gpu": facts.gpu, "gpus": facts.gpus}
    return _loaded(loaded.name, value)


def wished_offer(plan: Plan, wish: GpuConfig, backend: BackendName | None, catalog: Catalog) -> OfferPlan | None:
    """The cheapest usable offer that is what the client wished for; None where there is none."""
    wanted = gpus_named(wish.type) if wish.type else tuple(catalog.gpus)
    fitting = [
        offer
        for offer in plan.offers
        if offer.fits
        and offer.usd is not None
        and backend in (None, offer.backend)
        and catalog.offers[offer.offer].gpu in wanted
        and wish.count in (None, catalog.offers[offer.offer].gpus)
    ]
    return min(fitting, key=lambda offer: (offer.usd.likely if offer.usd else 0.0, offer.offer), default=None)


def gpus_named(text: str) -> tuple[str, ...]:
    """The GPUs a friendly name may mean: `A100-80GB`, `NVIDIA H100 PCIe`, `h200`. Empty for one nobody offers."""
    words = re.sub(r"[^a-z0-9]+", " ", text.lower().replace("nvidia", "").replace("gb", "")).strip()
    return next((gpus for name, gpus in _GPUS if words.startswith(name)), ())


def wish_text(wish: GpuConfig) -> str | None:
    """The wish as a person reads it: `2 x A100-80GB`."""
    if wish.type is None and wish.count is None:
        return None
    return f"{wish.count or 1} x {wish.type or 'any GPU'}"


def _put(section: dict[str, Any], key: str, value: object) -> None:
    if value is not None:
        section[key] = value


def _micro_batch(batch: int, most: int, ranks: int) -> int:
    """The largest number of examples per GPU and pass, at most the recipe's, that divides the batch."""
    return next((micro for micro in range(most, 0, -1) if batch % (micro * ranks) == 0), 1)


def _loaded(name: str, value: dict[str, Any]) -> LoadedRecipe:
    recipe = validated(Recipe, value, "input")
    return LoadedRecipe(name, recipe, recipe_sha256(recipe))
