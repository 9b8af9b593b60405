"""Every offer judged, one chosen: the cheapest likely dollars that fits, is allowed and stays under the limits.

plan = make_plan(load_recipe("smoke/zero3"), None, load_catalog())
"""

from __future__ import annotations

from recipes.catalog import BaseModelFacts, Catalog, Gpu, Offer
from recipes.load import LoadedRecipe
from recipes.preparation import OfferPlan, Plan, TrainingSetReport
from recipes.recipe import BackendName, Optimizer, Recipe
from scripts.plan.estimate import Estimate, as_planned, estimate
from scripts.plan.memory import OUTSIDE_TORCH
from scripts.plan.notes import notes_of
from scripts.plan.parameters import adapter_parameters
from scripts.plan.term import in_gib
from scripts.plan.time import Times
from scripts.plan.workload import Workload, workload_of

PLANNED = 0.92
"Share of a GPU's memory that a plan may fill: the estimate errs by a few percent, and running out costs a whole load."


def make_plan(
    loaded: LoadedRecipe, report: TrainingSetReport | None, catalog: Catalog, backend: BackendName | None = None
) -> Plan:
    """What the recipe takes on every offer of the catalog, for the reported training set or a nominal one. Pure.

    backend: the choice is among its offers alone, as in a launch that names it.
    """
    recipe = loaded.recipe
    model = catalog.models[recipe.base.id]
    work = workload_of(recipe, report)
    offers = judge_all(recipe, model, work, catalog)
    chosen = cheapest(tuple(offer for offer in offers if backend in (None, offer.backend)))
    parameters = adapter_parameters(model, catalog.families[model.family], recipe.adapter)
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
        nodes=recipe.hardware.nodes,
        chosen=chosen.offer if chosen else None,
        prices_of=min(offer.date for offer in catalog.offers.values()).isoformat(),
        notes=notes_of(recipe, model, work, parameters, chosen, catalog, report, backend),
    )


def judge_all(recipe: Recipe, model: BaseModelFacts, work: Workload, catalog: Catalog) -> tuple[OfferPlan, ...]:
    """Every offer of the catalog with its estimate and, where it cannot be used, the reason."""
    return tuple(
        _judged(name, recipe, _with_optimizer(recipe, model, work, offer, catalog))
        for name, offer in catalog.offers.items()
    )


def _with_optimizer(
    recipe: Recipe, model: BaseModelFacts, work: Workload, offer: Offer, catalog: Catalog
) -> tuple[Optimizer, Estimate]:
    """The optimizer on this offer, and what the run takes with it: adamw_8bit only where the recipe leaves it open,
    its engine knows it, and adamw does not fit."""
    fixed = recipe.training.optimizer
    found = estimate(recipe, model, work, offer, catalog)
    if fixed is not None or recipe.hardware.engine == "zero3" or _fits(found):
        return fixed or "adamw", found
    smaller = estimate(as_planned(recipe, "adamw_8bit"), model, work, offer, catalog)
    return ("adamw_8bit", smaller) if _fits(smaller) else ("adamw", found)


def _fits(found: Estimate) -> bool:
    return _total_gib(found) <= PLANNED * found.gpu.memory_gib


def _total_gib(found: Estimate) -> float:
    return round(sum(round(size, 3) for size in in_gib(found.memory).values()), 3)


def cheapest(offers: tuple[OfferPlan, ...]) -> OfferPlan | None:
    """The usable offer with the fewest likely dollars; then the fewest hours, then by name."""
    usable = [offer for offer in offers if offer.fits]
    return min(usable, key=_order, default=None)


def _order(offer: OfferPlan) -> tuple[float, float, str]:
    assert offer.usd is not None
    assert offer.hours is not None
    return offer.usd.likely, offer.hours.likely, offer.offer


def _judged(name: str, recipe: Recipe, planned: tuple[Optimizer, Estimate]) -> OfferPlan:
    optimizer, found = planned
    offer, gpu, taken = found.offer, found.gpu, found.times
    gib = {part: round(size, 3) for part, size in in_gib(found.memory).items()}
    total = _total_gib(found)
    reason = (
        _does_not_fit(offer, recipe, total, gpu.memory_gib) or _not_allowed(offer, recipe) or _too_dear(recipe, taken)
    )
    return OfferPlan(
        offer=name,
        backend=offer.backend,
        fits=not reason,
        reason=reason,
        optimizer=optimizer,
        gib=gib,
        total_gib=total,
        expected_peak_gib=_expected_peak(gib, gpu),
        capacity_gib=gpu.memory_gib,
        read_gb=round(taken.read_gb, 1),
        step_seconds=taken.step_seconds,
        step_terms={term.name: round(term.size, 4) for term in taken.step_terms},
        minutes=taken.minutes,
        hours=taken.hours,
        usd=taken.usd,
    )


def _expected_peak(gib: dict[str, float], gpu: Gpu) -> float:
    """What the trainer measures: on a GPU what torch reserves, on a CPU the process's resident set."""
    seen = (size for part, size in gib.items() if gpu.device == "cpu" or part not in OUTSIDE_TORCH)
    return round(sum(seen), 3)


def _does_not_fit(offer: Offer, recipe: Recipe, total: float, capacity: float) -> str:
    """What no recipe could change on this offer but a smaller batch."""
    train = recipe.training
    if total > PLANNED * capacity:
        return f"needs {total:.1f} GiB a GPU, may take {PLANNED * capacity:.1f} of {capacity:g}"
    if train.micro_tokens is None and train.global_batch % (train.micro_batch * offer.gpus * recipe.hardware.nodes):
        return f"batch {train.global_batch} does not divide over {offer.gpus} GPUs x {train.micro_batch}"
    if recipe.hardware.nodes > 1 and offer.network_gb_per_second is None:
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
