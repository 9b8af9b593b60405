"""Sentences a person should read before paying: assumptions of the plan, and settings that often disappoint."""

from __future__ import annotations

from recipes.catalog import BaseModelFacts, Catalog
from recipes.preparation import OfferPlan
from recipes.recipe import Recipe
from scripts.plan.workload import NOMINAL_CONVERSATIONS, Workload

HIGH_RATE = 1e-3
FEW_STEPS = 10
SLOW_BUS_GB_PER_SECOND = 100


def notes_of(
    recipe: Recipe,
    model: BaseModelFacts,
    work: Workload,
    parameters: int,
    chosen: OfferPlan | None,
    catalog: Catalog,
) -> tuple[str, ...]:
    """The notes of a plan, the most consequential first."""
    return (
        *_about_the_set(work),
        *_about_the_settings(recipe, model, work, parameters),
        *(_about_the_choice(recipe, chosen, catalog) if chosen else ("No offer can take this run.",)),
    )


def _about_the_set(work: Workload) -> list[str]:
    notes = []
    if work.nominal:
        notes.append(
            f"No training set was given: planned for {NOMINAL_CONVERSATIONS} conversations of about "
            f"{work.mean:,.0f} tokens, the longest {work.longest:,}."
        )
    elif not work.exact:
        notes.append("Token counts are estimates: the model's tokenizer is not on this machine.")
    if work.steps < FEW_STEPS:
        notes.append(
            f"Only {work.steps} optimizer steps: too few to learn from. Lower training.global_batch, or raise "
            "training.epochs, or bring more examples."
        )
    if not work.valid_examples:
        notes.append("Nothing is held out: nobody will know whether the adapter generalises.")
    return notes


def _about_the_settings(recipe: Recipe, model: BaseModelFacts, work: Workload, parameters: int) -> list[str]:
    notes = []
    train, adapter = recipe.training, recipe.adapter
    if train.learning_rate >= HIGH_RATE and model.staged:
        notes.append(
            f"training.learning_rate {train.learning_rate:g} is high for LoRA; 2e-4 to 5e-4 is usual, "
            "and too high a rate ends in a useless adapter."
        )
    if adapter.alpha > 4 * adapter.rank:
        notes.append(
            f"adapter.alpha {adapter.alpha} is over 4 x rank {adapter.rank}: it multiplies the effect of the "
            "learning rate."
        )
    if set(adapter.targets) <= {"attention"}:
        notes.append("Attention alone is trained: MLP or linear-attention matrices usually learn more.")
    if "experts" in adapter.targets and model.staged:
        notes.append(
            f"Training the experts makes {parameters / 1e6:,.0f} million parameters, an adapter file of "
            f"{parameters * 4 / 1e9:.1f} GB, and needs far more examples than attention does."
        )
    if model.thinking:
        notes.append(
            "The chat template of this model opens a thought before each answer: train it on examples that hold "
            "reasoning, or it unlearns it."
        )
    if recipe.hardware.engine == "replica":
        notes.append("The trainer has no replica engine: this plan is for comparison, a launch would end at its start.")
    return notes


def _about_the_choice(recipe: Recipe, chosen: OfferPlan, catalog: Catalog) -> list[str]:
    notes = []
    offer = catalog.offers[chosen.offer]
    gpu = catalog.gpus[offer.gpu]
    slow = gpu.bus_gb_per_second < SLOW_BUS_GB_PER_SECOND and gpu.device == "cuda"
    if recipe.hardware.engine == "zero3" and offer.gpus > 1 and slow:
        notes.append(
            f"{offer.gpu} GPUs talk over PCIe: most of each step is spent moving weights. NVLink GPUs cost more "
            "per hour and often less per run."
        )
    if gpu.device == "cuda":
        notes.append(
            "Hours and dollars are arithmetic, not measurements; the run stops at its limits whatever they are."
        )
    return notes
