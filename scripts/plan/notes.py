"""Sentences a person should read before paying: assumptions of the plan, and settings that often disappoint."""

from __future__ import annotations

from recipes.catalog import BaseModelFacts, Catalog, Offer
from recipes.preparation import OfferPlan, TrainingSetReport
from recipes.recipe import BackendName, Recipe
from scripts.plan.storage import MOMENT_BLOCK
from scripts.plan.workload import NOMINAL_CONVERSATIONS, Workload

HIGH_RATE = 1e-3
FEW_STEPS = 10
ENOUGH_THOUGHTS = 0.75
"Share of examples with thoughts that keeps a model thinking, as Unsloth advises."
SAVED_BYTES = 2 + 2 * (3 - 4 / MOMENT_BLOCK)
"Per trained value, by the 8-bit optimizer: a gradient of 2 bytes for one of 4, two moments of 1.02 for two of 4."
SLOW_BUS_GB_PER_SECOND = 100


def notes_of(
    recipe: Recipe,
    model: BaseModelFacts,
    work: Workload,
    parameters: int,
    chosen: OfferPlan | None,
    catalog: Catalog,
    report: TrainingSetReport | None,
    backend: BackendName | None,
) -> tuple[str, ...]:
    """The notes of a plan, the most consequential first."""
    none = f"No offer of {backend} can take this run." if backend else "No offer can take this run."
    return (
        *_about_the_set(work),
        *_about_the_settings(recipe, model, parameters, report),
        *_about_the_optimizer(recipe, parameters, chosen),
        *(_about_the_choice(recipe, chosen, catalog) if chosen else (none,)),
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


def _about_the_settings(
    recipe: Recipe, model: BaseModelFacts, parameters: int, report: TrainingSetReport | None
) -> list[str]:
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
        notes.append(_about_thinking(recipe, report))
    if recipe.hardware.quantize:
        notes.append(
            f"It reads the model as staged in {recipe.hardware.quantize}: `lorry stage {recipe.base.id} --quantize "
            f"{recipe.hardware.quantize}`, once."
        )
    return notes


def _about_the_optimizer(recipe: Recipe, parameters: int, chosen: OfferPlan | None) -> list[str]:
    """What the plan chose where the recipe leaves it open, or what the recipe's own choice costs."""
    saved = parameters * SAVED_BYTES / 2**30
    fixed = recipe.training.optimizer
    if fixed is None and chosen is not None and chosen.optimizer == "adamw_8bit":
        return [
            f"The plan takes optimizer adamw_8bit there: adamw needs {saved:.1f} GiB more of each GPU, which that "
            "offer does not have. Set training.optimizer to insist on one."
        ]
    if recipe.hardware.engine == "replica" and fixed == "adamw" and saved >= 1:
        return [f"training.optimizer adamw_8bit would take {saved:.1f} GiB less of each GPU."]
    return []


def _about_thinking(recipe: Recipe, report: TrainingSetReport | None) -> str:
    if recipe.data.reasoning == "empty_think":
        return "The recipe trains this model, which thinks before it answers, to answer at once (data.reasoning)."
    if report is None:
        return "This model thinks before it answers: a training set without a thought will be refused (data.reasoning)."
    examples = report.train_examples + report.valid_examples
    return (
        f"This model thinks before it answers, and {report.thoughts} of {examples} examples hold a thought: below "
        f"{ENOUGH_THOUGHTS:.0%} it unlearns to think."
    )


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
    if recipe.hardware.nodes > 1 and offer.efa_cards:
        notes.append(
            f"The nodes talk over TCP, at about {offer.network_gb_per_second:g} GB/s: the trainer's image holds no "
            "EFA plugin of NCCL. Most of each step is spent moving weights between them."
        )
    if offer.backend == "sagemaker" and (plain := _on_ec2(offer, catalog)) is not None:
        share = offer.usd_per_hour / plain.usd_per_hour - 1
        notes.append(
            f"SageMaker asks {share:.0%} more than EC2 for the same machine: ${offer.usd_per_hour:.2f} an hour, not "
            f"${plain.usd_per_hour:.2f}. It starts and ends machines for that."
        )
    if gpu.device == "cuda":
        notes.append(
            "Hours and dollars are arithmetic, not measurements; the run stops at its limits whatever they are."
        )
    return notes


def _on_ec2(offer: Offer, catalog: Catalog) -> Offer | None:
    """The same machine rented from EC2 itself."""
    kind = offer.provider_type.removeprefix("ml.")
    return next((o for o in catalog.offers.values() if o.backend == "ec2" and o.provider_type == kind), None)
