"""A recipe, its plan and a backend become a LaunchSpec: everything the machine needs to know. Pure.

spec = render(loaded, plan, report, catalog, job_id="smoke-1", backend="local", store="file:///jobs", commit=None)
"""

from __future__ import annotations

import math

from recipes.catalog import Catalog
from recipes.job import JOB_ID, LaunchSpec
from recipes.load import LoadedRecipe
from recipes.preparation import OfferPlan, Plan, TrainingSetReport
from recipes.recipe import BackendName, Recipe
from scripts.errors import InputError, Problem, Refused
from scripts.job_token import KEYS_SECONDS, client_of
from scripts.plan.choose import cheapest
from scripts.plan.estimate import as_planned
from scripts.plan.workload import workload_of

HOUR = 3600
MARGIN = 1.25
"The deadline is the high estimate with this margin: reached only when something is wrong."
SHORTEST_DEADLINE_SECONDS = 900


def render(
    loaded: LoadedRecipe,
    plan: Plan,
    report: TrainingSetReport | None,
    catalog: Catalog,
    *,
    job_id: str,
    backend: BackendName,
    store: str,
    commit: str | None,
) -> LaunchSpec:
    """The LaunchSpec of this run on the cheapest usable offer of `backend`.

    Without a report it describes a nominal training set, to look at. Raises InputError for a bad job id or store, and
    Refused, with the reason, when the recipe cannot run there.
    """
    assert plan.recipe_sha256 == loaded.sha256, "the plan is of another recipe"
    _check_names(job_id, backend, store)
    recipe, work = loaded.recipe, workload_of(loaded.recipe, report)
    offer = _usable(plan, recipe, backend)
    facts = catalog.offers[offer.offer]
    usd_per_hour = facts.usd_per_hour * recipe.hardware.nodes
    deadline = deadline_seconds(offer, recipe, usd_per_hour)
    assert offer.usd is not None
    if backend in ("runpod_pod", "ec2") and client_of(store) is None:  # no front door will renew its keys
        _require_keys_to_last(offer)
        deadline = min(deadline, KEYS_SECONDS)
    return LaunchSpec(
        job_id=job_id,
        recipe_name=loaded.name,
        recipe_sha256=loaded.sha256,
        recipe=as_planned(recipe, offer.optimizer),
        backend=backend,
        offer=offer.offer,
        model_type=catalog.family_of(recipe.base.id).model_type,
        gpus=facts.gpus,
        nodes=recipe.hardware.nodes,
        accumulation_steps=accumulation_steps(recipe, facts.gpus),
        total_steps=work.steps,
        steps_per_epoch=work.steps_per_epoch,
        trainable_parameters=plan.trainable_parameters,
        base_parameters=catalog.models[recipe.base.id].parameters,
        deadline_seconds=deadline,
        expected_step_seconds=offer.step_seconds.likely if offer.step_seconds else None,
        expected_peak_gib=offer.expected_peak_gib,
        capacity_gib=offer.capacity_gib,
        quote_usd=offer.usd.high,
        cap_usd=min(recipe.limits.max_usd, _cents_up(deadline / HOUR * usd_per_hour)),
        source=report.source if report else "a nominal training set",
        source_sha256=report.source_sha256 if report else "",
        train_sha256=report.train_sha256 if report else "",
        valid_sha256=report.valid_sha256 if report else "",
        train_examples=work.examples,
        valid_examples=work.valid_examples,
        store=store.rstrip("/"),
        commit=commit,
    )


def accumulation_steps(recipe: Recipe, gpus: int) -> int | None:
    """Forward passes per GPU and optimizer step: global_batch / (micro_batch x gpus x nodes). Raises Refused.

    None where a token budget decides it anew in each step.
    """
    train, nodes = recipe.training, recipe.hardware.nodes
    if train.micro_tokens is not None:
        return None
    steps, rest = divmod(train.global_batch, train.micro_batch * gpus * nodes)
    if rest or not steps:
        raise Refused(
            Problem(
                "training.global_batch",
                f"{train.global_batch} does not divide over {gpus * nodes} GPUs x micro_batch {train.micro_batch}",
                f"a multiple of {train.micro_batch * gpus * nodes}",
            )
        )
    return steps


def deadline_seconds(offer: OfferPlan, recipe: Recipe, usd_per_hour: float) -> int:
    """Seconds after which the machine ends itself: the high estimate x MARGIN, within limits.max_hours and max_usd.

    On a machine that costs nothing it is limits.max_hours alone: a slow laptop may take its time.
    """
    limit = math.floor(recipe.limits.max_hours * HOUR)
    if not usd_per_hour:
        return limit
    assert offer.hours is not None
    wanted = max(SHORTEST_DEADLINE_SECONDS, math.ceil(offer.hours.high * MARGIN * HOUR))
    return min(wanted, limit, math.floor(recipe.limits.max_usd / usd_per_hour * HOUR))


def _require_keys_to_last(offer: OfferPlan) -> None:
    assert offer.hours is not None
    if offer.hours.likely * HOUR > KEYS_SECONDS:
        got = f"likely {offer.hours.likely:.1f} h, and without the front door its keys last {KEYS_SECONDS // HOUR}"
        raise Refused(
            Problem(offer.offer, got, "launch through the front door, which renews them, or plan fewer steps")
        )


def _check_names(job_id: str, backend: BackendName, store: str) -> None:
    problems = []
    if not JOB_ID.match(job_id):
        problems.append(Problem("job id", repr(job_id), "3 to 63 lower-case letters, digits and single hyphens"))
    if not store.startswith(("file:///", "s3://")):
        problems.append(Problem("store", repr(store), "a URL: file:///folder or s3://bucket/prefix"))
    elif backend != "local" and not store.startswith("s3://"):
        problems.append(
            Problem("store", f"{store} with backend {backend}", "an s3:// URL: a rented machine cannot see this disk")
        )
    if problems:
        raise InputError(*problems)


def _usable(plan: Plan, recipe: Recipe, backend: BackendName) -> OfferPlan:
    """The cheapest usable offer of the backend, or a Refused that says why there is none."""
    where = f"{plan.recipe} on {backend}"
    if backend not in recipe.hardware.backends:
        allowed = ", ".join(recipe.hardware.backends)
        raise Refused(Problem(where, f"the recipe allows {allowed} only", f"add {backend} to hardware.backends"))
    offers = tuple(offer for offer in plan.offers if offer.backend == backend)
    if not offers:
        raise Refused(
            Problem(where, "no offer of this backend is known", "recipes/hardware.yaml lists what can be had")
        )
    best = cheapest(offers)
    if best is None:
        raise Refused(*(Problem(f"{where}: {offer.offer}", offer.reason) for offer in offers))
    return best


def _cents_up(usd: float) -> float:
    return math.ceil(round(usd * 100, 6)) / 100
