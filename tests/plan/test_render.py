"""Rendering: recipe x backend is total, and what is rendered keeps its promises."""

from __future__ import annotations

from typing import Any, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from recipes.catalog import load_catalog
from recipes.errors import InputError
from recipes.job import LaunchSpec
from recipes.load import LoadedRecipe, load_recipe, recipe_names, recipe_sha256
from recipes.preparation import Span, TrainingSetReport
from recipes.recipe import BackendName, Recipe
from recipes.schedule import steps_in
from scripts.errors import Refused
from scripts.plan import make_plan
from scripts.render import accumulation_steps, render

CATALOG = load_catalog()
BACKENDS = get_args(BackendName)


def _render(loaded: LoadedRecipe, report: TrainingSetReport | None, backend: BackendName = "local") -> LaunchSpec:
    store = "file:///jobs" if backend == "local" else "s3://a-bucket/jobs"
    plan = make_plan(loaded, report, CATALOG)
    return render(loaded, plan, report, CATALOG, job_id="a-job", backend=backend, store=store, commit=None)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", recipe_names())
@pytest.mark.parametrize("with_report", [True, False], ids=["report", "nominal"])
def test_recipe_on_a_backend_is_a_spec_or_a_sentence(name: str, backend, with_report: bool, report) -> None:
    loaded = load_recipe(name)
    if backend in loaded.recipe.hardware.backends:
        assert _render(loaded, report if with_report else None, backend).backend == backend
    else:
        with pytest.raises(Refused, match=f"{name} on {backend}: the recipe allows .* only; add {backend}"):
            _render(loaded, report if with_report else None, backend)


_RECIPES = st.sampled_from([load_recipe(name).recipe for name in recipe_names()])


@settings(max_examples=150, deadline=None)
@given(
    recipe=_RECIPES,
    training=st.fixed_dictionaries(
        {
            "global_batch": st.sampled_from([1, 2, 6, 8, 16, 48, 256]),
            "micro_batch": st.sampled_from([1, 2, 3, 8]),
            "epochs": st.integers(1, 5),
            "max_steps": st.none() | st.integers(1, 50),
        }
    ),
    hardware=st.fixed_dictionaries(
        {
            "gpus": st.none() | st.sampled_from([1, 2, 3, 4, 8, 16]),
            "nodes": st.sampled_from([1, 1, 1, 2]),
            "backends": st.lists(st.sampled_from(BACKENDS), min_size=1, unique=True).map(tuple),
        }
    ),
    limits=st.fixed_dictionaries(
        {"max_usd": st.sampled_from([0.5, 5.0, 500.0]), "max_hours": st.sampled_from([0.3, 9.0])}
    ),
    backend=st.sampled_from(BACKENDS),
)
def test_whatever_a_recipe_asks_the_spec_keeps_its_promises(recipe, training, hardware, limits, backend) -> None:
    asked = recipe.model_dump(mode="python")
    for section, values in (("training", training), ("hardware", hardware), ("limits", limits)):
        asked[section] |= values
    try:
        varied = Recipe.model_validate(asked)
    except ValidationError:
        return  # the schema itself refuses the batch; test_bad_recipes.py has the sentences
    try:
        spec = _render(LoadedRecipe("varied", varied, recipe_sha256(varied)), None, backend)
    except Refused:
        return
    train = varied.training
    if train.micro_tokens is None:
        assert spec.accumulation_steps is not None
        assert spec.accumulation_steps * train.micro_batch * spec.gpus * spec.nodes == train.global_batch
    else:
        assert spec.accumulation_steps is None
    assert spec.total_steps == steps_in(spec.train_examples, train.epochs, train.global_batch, train.max_steps)
    assert 0 < spec.deadline_seconds <= varied.limits.max_hours * 3600
    assert spec.quote_usd <= varied.limits.max_usd
    assert spec.quote_usd <= spec.cap_usd <= varied.limits.max_usd or spec.quote_usd == 0
    assert spec.offer is not None
    price = CATALOG.offers[spec.offer].usd_per_hour * spec.nodes
    assert spec.deadline_seconds / 3600 * price <= spec.cap_usd + 0.01


def test_spec_is_rendered_from_the_report(report: TrainingSetReport) -> None:
    spec = _render(load_recipe("smoke/zero3"), report)
    assert (spec.train_sha256, spec.valid_sha256) == (report.train_sha256, report.valid_sha256)
    assert (spec.source, spec.source_sha256) == (report.source, report.source_sha256)
    assert (spec.train_examples, spec.valid_examples) == (240, 27)
    assert (spec.offer, spec.gpus, spec.nodes, spec.accumulation_steps) == ("local-2", 2, 1, 1)
    assert (spec.total_steps, spec.steps_per_epoch) == (240, 60)
    assert spec.trainable_parameters == 79_872
    assert spec.model_type == "qwen3_next"


def test_launch_json_reads_back_as_it_was(report: TrainingSetReport) -> None:
    spec = _render(load_recipe("qwen3-next-80b/zero3"), report, "runpod_pod")
    assert LaunchSpec.model_validate_json(spec.model_dump_json()) == spec


def test_free_machine_has_the_time_the_recipe_allows(report: TrainingSetReport) -> None:
    loaded = load_recipe("smoke/zero3")
    spec = _render(loaded, report)
    assert spec.deadline_seconds == loaded.recipe.limits.max_hours * 3600
    assert (spec.quote_usd, spec.cap_usd) == (0, 0)


def test_rented_machine_ends_a_quarter_after_its_high_estimate(report: TrainingSetReport) -> None:
    loaded = load_recipe("qwen3-next-80b/zero3")
    plan = make_plan(loaded, report, CATALOG)
    chosen = next(offer for offer in plan.offers if offer.offer == plan.chosen)
    spec = _render(loaded, report, "runpod_pod")
    assert chosen.hours is not None
    assert chosen.usd is not None
    assert spec.deadline_seconds == pytest.approx(1.25 * chosen.hours.high * 3600, abs=2)
    assert spec.quote_usd == chosen.usd.high
    assert spec.cap_usd == pytest.approx(1.25 * chosen.usd.high, abs=0.03)


@pytest.mark.parametrize(
    ("store", "steps", "deadline"),
    [
        ("s3://a-bucket/jobs", 1, 43_200),
        ("s3://a-bucket/clients/acme/jobs", 1, 45_000),  # its keys are renewed
        ("s3://a-bucket/jobs", 2, None),
        ("s3://a-bucket/clients/acme/jobs", 2, 90_000),
    ],
)
def test_a_pod_without_a_front_door_ends_when_its_keys_do(
    report: TrainingSetReport, store: str, steps: int, deadline: int | None
) -> None:
    """10 hours are planned, or twice as many."""
    loaded = load_recipe("qwen3-next-80b/zero3")
    value = loaded.recipe.model_dump()
    value["limits"] |= {"max_hours": 99, "max_usd": 9999.0}
    recipe = Recipe.model_validate(value)
    loaded = LoadedRecipe(loaded.name, recipe, recipe_sha256(recipe))
    plan = make_plan(loaded, report, CATALOG)
    hours = Span(low=5.0 * steps, likely=8.0 * steps, high=10.0 * steps)
    offers = tuple(offer.model_copy(update={"hours": hours}) for offer in plan.offers)
    given: dict[str, Any] = {"job_id": "a-job", "backend": "runpod_pod", "store": store, "commit": None}

    def deadline_of() -> int:
        return render(loaded, plan.model_copy(update={"offers": offers}), report, CATALOG, **given).deadline_seconds

    if deadline is None:
        with pytest.raises(
            Refused, match=r"likely 16.0 h, and without the front door its keys last 12; launch through"
        ):
            deadline_of()
    else:
        assert deadline_of() == deadline


def test_backend_takes_its_own_cheapest_offer(report: TrainingSetReport) -> None:
    spec = _render(load_recipe("qwen3-next-80b/zero3"), report, "ec2")
    assert spec.offer is not None
    assert CATALOG.offers[spec.offer].backend == "ec2"


def test_refusal_names_every_offer_of_the_backend_and_its_reason(report: TrainingSetReport) -> None:
    loaded = load_recipe("qwen3-next-80b/zero3")
    limits = loaded.recipe.limits.model_copy(update={"max_usd": 0.1})
    poor = LoadedRecipe("poor", loaded.recipe.model_copy(update={"limits": limits}), loaded.sha256)
    with pytest.raises(Refused) as caught:
        _render(poor, report, "ec2")
    sentences = [str(problem) for problem in caught.value.problems]
    assert len(sentences) == sum(offer.backend == "ec2" for offer in CATALOG.offers.values())
    assert all("GiB a GPU" in sentence or "over limits.max_usd 0.1" in sentence for sentence in sentences)


def test_batch_that_does_not_divide_is_a_sentence() -> None:
    recipe = load_recipe("qwen3-8b/zero3").recipe
    with pytest.raises(Refused, match="8 does not divide over 3 GPUs x micro_batch 1; a multiple of 3"):
        accumulation_steps(recipe, 3)


@pytest.mark.parametrize(
    ("job_id", "backend", "store", "sentence"),
    [
        ("Bad_Id", "local", "file:///jobs", "job id: 'Bad_Id'"),
        ("a--b", "local", "file:///jobs", "job id: 'a--b'"),
        ("a-job", "local", "/jobs", "a URL: file:///folder or s3://bucket/prefix"),
        ("a-job", "runpod_pod", "file:///jobs", "a rented machine cannot see this disk"),
    ],
)
def test_bad_job_id_or_store_is_refused(job_id: str, backend, store: str, sentence: str) -> None:
    loaded = load_recipe("smoke/zero3")
    plan = make_plan(loaded, None, CATALOG)
    with pytest.raises(InputError) as caught:
        render(loaded, plan, None, CATALOG, job_id=job_id, backend=backend, store=store, commit=None)
    assert sentence in str(caught.value)
