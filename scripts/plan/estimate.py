"""One recipe on one offer: every term of its memory and its time, before anything is judged."""

from __future__ import annotations

from dataclasses import dataclass, replace

from recipes.catalog import BaseModelFacts, Catalog, Gpu, Offer
from recipes.recipe import Optimizer, Recipe
from scripts.plan.memory import Batch, memory_terms, peak_terms
from scripts.plan.parameters import targeted
from scripts.plan.storage import storage_of
from scripts.plan.term import Term
from scripts.plan.time import Times, times
from scripts.plan.workload import Workload


@dataclass(frozen=True)
class Estimate:
    """What a run would take of this offer."""

    offer: Offer
    gpu: Gpu
    memory: tuple[Term, ...]
    "Bytes per GPU; they sum to the peak."
    times: Times


def as_planned(recipe: Recipe, optimizer: Optimizer) -> Recipe:
    """The recipe with the optimizer that the plan took for an offer, so that nothing is left open."""
    return recipe.model_copy(update={"training": recipe.training.model_copy(update={"optimizer": optimizer})})


def estimate(recipe: Recipe, model: BaseModelFacts, work: Workload, offer: Offer, catalog: Catalog) -> Estimate:
    """The arithmetic of this recipe on this offer. Pure."""
    gpu, ranks = catalog.gpus[offer.gpu], offer.gpus * recipe.hardware.nodes
    if recipe.hardware.nodes > 1 and offer.network_gb_per_second is not None:  # the slower of the two links decides
        bus = min(gpu.bus_gb_per_second, offer.network_gb_per_second)
        gpu = gpu.model_copy(update={"bus_gb_per_second": bus})
    family = catalog.families[model.family]
    trained = targeted(model.shape, family, recipe.adapter)
    storage = storage_of(recipe, ranks, gpu)
    if not family.our_experts:
        storage = replace(storage, experts="plain")
    parts = memory_terms(model.shape, trained, recipe.adapter.rank, storage, largest_batch(recipe, work))
    return Estimate(offer, gpu, peak_terms(parts, gpu, ranks), times(model, trained, recipe, storage, work, offer, gpu))


def largest_batch(recipe: Recipe, work: Workload) -> Batch:
    """A micro-batch of longest examples. Logits are made at every position that any of its examples trains."""
    if recipe.training.micro_tokens is not None:
        return Batch(recipe.training.micro_tokens, recipe.training.micro_tokens * work.supervised)
    tokens = recipe.training.micro_batch * work.longest
    trained_somewhere = 1 - (1 - work.supervised) ** recipe.training.micro_batch
    return Batch(tokens, tokens * trained_somewhere)
