"""Every offer judged, one chosen: the cheapest likely dollars that fits, is allowed and stays under the limits.

plan = make_plan(load_recipe("smoke/zero3"), None, load_catalog())
"""

from __future__ import annotations

from recipes.catalog import BaseModelFacts, Catalog, Offer
from recipes.load import LoadedRecipe
from recipes.preparation import OfferPlan, Plan, TrainingSetReport
from recipes.recipe import Recipe
from scripts.plan.memory import Batch, memory_parts, peak_gib, storage_of
from scripts.plan.notes import notes_of
from scripts.plan.parameters import Matrix, targeted
from scripts.plan.time import Times, times
from scripts.plan.workload import Workload, workload_of

PLANNED = 0.92
"Share of a GPU's memory that a plan may fill: the estimate errs by a few percent, and running out costs a whole load."


def make_plan(loaded: LoadedRecipe, report: TrainingSetReport | None, catalog: Catalog) -> Plan:
    """What the recipe takes on every offer of the catalog, for the reported training set or a nominal one. Pure."""
    recipe = loaded.recipe
    model = catalog.models[recipe.base.id]
    trained = targeted(model.shape, catalog.families[model.family], recipe.adapter.targets)
    work = workload_of(recipe, report)
    offers = tuple(
        _judged(name, offer, recipe, model, trained, work, catalog) for name, offer in catalog.offers.items()
    )
    chosen = cheapest(offers)
    parameters = sum(matrix.lora(recipe.adapter.rank) for matrix in trained)
    return Plan(
        recipe=loaded.name,
        recipe_sha256=loaded.sha256,
        model=recipe.base.id,
        trainable_parameters=parameters,
        examples=work.examples,
        train_tokens=work.train_tokens,
        longest_tokens=work.longest,
        tokens_exact=work.exact,
        steps=work.steps,
        steps_per_epoch=work.steps_per_epoch,
        offers=offers,
        chosen=chosen.offer if chosen else None,
        prices_of=min(offer.date for offer in catalog.offers.values()).isoformat(),
        notes=notes_of(recipe, model, work, parameters, chosen, catalog),
    )


def cheapest(offers: tuple[OfferPlan, ...]) -> OfferPlan | None:
    """The usable offer with the fewest likely dollars; then the fewest hours, then by name."""
    usable = [offer for offer in offers if offer.fits]
    return min(usable, key=_order, default=None)


def _order(offer: OfferPlan) -> tuple[float, float, str]:
    assert offer.usd is not None
    assert offer.hours is not None
    return offer.usd.likely, offer.hours.likely, offer.offer


def _judged(
    name: str,
    offer: Offer,
    recipe: Recipe,
    model: BaseModelFacts,
    trained: tuple[Matrix, ...],
    work: Workload,
    catalog: Catalog,
) -> OfferPlan:
    gpu, ranks = catalog.gpus[offer.gpu], offer.gpus * recipe.hardware.nodes
    storage = storage_of(recipe, ranks, gpu)
    parts = memory_parts(model.shape, trained, recipe.adapter.rank, storage, _largest_batch(recipe, work))
    gib = {part: round(size, 3) for part, size in peak_gib(parts, gpu, ranks).items()}
    total = round(sum(gib.values()), 3)
    taken = times(model, trained, recipe, storage, work, offer, gpu)
    reason = (
        _does_not_fit(offer, recipe, total, gpu.memory_gib) or _not_allowed(offer, recipe) or _too_dear(recipe, taken)
    )
    return OfferPlan(
        offer=name,
        backend=offer.backend,
        fits=not reason,
        reason=reason,
        gib=gib,
        total_gib=total,
        capacity_gib=gpu.memory_gib,
        step_seconds=taken.step_seconds,
        minutes=taken.minutes,
        hours=taken.hours,
        usd=taken.usd,
    )


def _largest_batch(recipe: Recipe, work: Workload) -> Batch:
    """A micro-batch of longest examples. Logits are made at every position that any of its examples trains."""
    tokens = recipe.training.micro_batch * work.longest
    trained_somewhere = 1 - (1 - work.supervised) ** recipe.training.micro_batch
    return Batch(tokens, tokens * trained_somewhere)


def _does_not_fit(offer: Offer, recipe: Recipe, total: float, capacity: float) -> str:
    """What no recipe could change on this offer but a smaller batch."""
    train = recipe.training
    if total > PLANNED * capacity:
        return f"needs {total:.1f} GiB a GPU, may take {PLANNED * capacity:.1f} of {capacity:g}"
    if train.global_batch % (train.micro_batch * offer.gpus * recipe.hardware.nodes):
        return f"batch {train.global_batch} does not divide over {offer.gpus} GPUs x {train.micro_batch}"
    if recipe.hardware.nodes > 1:
        return f"it is one node; the recipe asks for {recipe.hardware.nodes}"
    return ""


def _not_allowed(offer: Offer, recipe: Recipe) -> str:
    """What the recipe's hardware section rules out."""
    hardware = recipe.hardware
    if offer.backend not in hardware.backends:
        return "its backend is not in hardware.backends"
    if hardware.gpu not in (None, offer.gpu):
        return f"the recipe insists on GPU {hardware.gpu}"
    if hardware.gpus not in (None, offer.gpus):
        return f"the recipe insists on hardware.gpus {hardware.gpus}"
    return ""


def _too_dear(recipe: Recipe, taken: Times) -> str:
    """A run is refused when its high estimate passes a limit: it would be stopped before its last step."""
    limits = recipe.limits
    if taken.usd.high > limits.max_usd:
        return f"up to ${taken.usd.high:,.2f}, over limits.max_usd {limits.max_usd:g}"
    if taken.hours.high > limits.max_hours:
        return f"up to {taken.hours.high:.1f} h, over limits.max_hours {limits.max_hours:g}"
    return ""
