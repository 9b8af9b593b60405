"""From a recipe and a training set to everything a launch needs: checked, planned, priced, rendered. Nothing is rented.

job = prepare_job("smoke/zero3", Path("set.jsonl"), backend="local", settings=settings, folder=tmp, stamp=stamp, ...)
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from recipes.catalog import Catalog, load_catalog
from recipes.job import LaunchSpec
from recipes.load import LoadedRecipe, load_recipe
from recipes.preparation import Plan, TrainingSetReport
from recipes.recipe import BackendName
from scripts.job_token import KEYS_SECONDS
from scripts.plan import make_plan
from scripts.render import render
from scripts.settings import Settings

Say = Callable[[str, str], None]
"(stage, sentence): one line of progress for a person."


@dataclass(frozen=True)
class PreparedJob:
    """A job that could be launched: its spec, the plan behind it, and the folder that holds its data files."""

    spec: LaunchSpec
    plan: Plan
    report: TrainingSetReport
    data: Path


def prepare_job(
    recipe: str,
    training_set: Path,
    *,
    backend: BackendName | None,
    settings: Settings,
    folder: Path,
    job_id: str | None,
    now: float,
    token: str,
    commit: str | None,
    say: Say,
) -> PreparedJob:
    """Checks the training set into `folder`, plans and renders. `now` (seconds since 1970) and `token` (four letters or
    digits) name the job where no job id is given.

    Raises InputError for what is wrong with the recipe or the set, Refused when nothing fits or is allowed.
    """
    catalog = load_catalog()
    loaded = load_recipe(recipe, catalog)
    report = check_set(loaded, training_set, settings, folder)
    tokens = f"{report.tokens.train:,} tokens" + ("" if report.tokens.exact else " (estimated)")
    say("check", f"{report.train_examples} examples to train on, {report.valid_examples} held out, {tokens}")
    plan = make_plan(loaded, report, catalog, backend)
    spec = render(
        loaded,
        plan,
        report,
        catalog,
        job_id=job_id or new_job_id(loaded.name, now, token),
        backend=backend or _backend_of(plan, loaded, catalog),
        store=settings.store,
        commit=commit,
    )
    hours = f"{spec.deadline_seconds / 3600:.1f} h"
    keys = spec.backend == "runpod_pod" and spec.deadline_seconds == KEYS_SECONDS
    also = ", since its keys last no longer; a job sent to the front door renews them" if keys else ""
    say(
        "plan",
        f"{spec.offer}: {spec.total_steps} steps, at most ${spec.quote_usd:.2f}; ended after {hours} at most{also}",
    )
    return PreparedJob(spec, plan, report, folder)


def check_set(loaded: LoadedRecipe, training_set: Path, settings: Settings, folder: Path) -> TrainingSetReport:
    """The training set in canonical form in `folder`, counted with the recipe's tokenizer where that is at hand."""
    from scripts.tokenizer import find_tokenizer  # jinja2 and tokenizers take a tenth of a second
    from scripts.training_set import prepare
    from scripts.training_set.reasoning import require_reasoning

    recipe = loaded.recipe
    tokenizer = find_tokenizer(recipe.base.id, settings.tokenizers)
    report = prepare(training_set, folder, recipe.data, recipe.training.seed, tokenizer)
    require_reasoning(report, recipe, load_catalog().models[recipe.base.id])
    return report


def new_job_id(recipe: str, now: float, token: str) -> str:
    """A readable id that sorts by time: smoke-zero3-20261122-201501-k3f9 (UTC)."""
    name = re.sub(r"[^a-z0-9]+", "-", recipe.lower()).strip("-")[:38].rstrip("-")
    return f"{name}-{time.strftime('%Y%m%d-%H%M%S', time.gmtime(now))}-{token}"


def _backend_of(plan: Plan, loaded: LoadedRecipe, catalog: Catalog) -> BackendName:
    """The backend of the planner's choice; without one, the recipe's first, so that the refusal names its reasons."""
    return catalog.offers[plan.chosen].backend if plan.chosen else loaded.recipe.hardware.backends[0]
