"""The arithmetic of time against figures worked out elsewhere, and what must take longer than what."""

from __future__ import annotations

import pytest

from recipes.catalog import load_catalog
from recipes.load import LoadedRecipe, load_recipe
from recipes.preparation import TrainingSetReport
from recipes.recipe import Adapter
from scripts.plan import explain_text, make_plan
from scripts.plan.parameters import targeted
from scripts.plan.step import flop_per_token
from scripts.plan.time import padded
from scripts.plan.workload import workload_of

CATALOG = load_catalog()
NAME = "Qwen/Qwen3-Next-80B-A3B-Instruct"
SHAPE, FAMILY = CATALOG.models[NAME].shape, CATALOG.family_of(NAME)


def test_the_80b_takes_7_85_gflop_per_token_forward_at_4096_tokens() -> None:
    """Experts 3.02, other linears 3.48, head 0.62, attention 0.40, Gated DeltaNet 0.19, LoRA at rank 16 0.13 GFLOP."""
    trained = targeted(SHAPE, FAMILY, Adapter(targets=tuple(FAMILY.groups)))
    assert flop_per_token(SHAPE, trained, 16, 4096, 1.0) / 1e9 == pytest.approx(7.85, rel=0.02)


def test_padding_goes_from_the_mean_towards_the_longest(report: TrainingSetReport) -> None:
    work = workload_of(load_recipe("qwen3-8b/zero3").recipe, report)
    assert padded(work, 1, 1.0) == work.mean
    assert work.mean < padded(work, 2, 0.5) < padded(work, 2, 1.0) < padded(work, 16, 1.0) < work.longest


def test_five_times_the_tokens_take_longer_but_not_five_times(report: TrainingSetReport) -> None:
    tokens = report.tokens.model_copy(update={"train": 5 * report.tokens.train, "longest": 4000})
    hours = []
    for given in (report, report.model_copy(update={"tokens": tokens})):
        plan = make_plan(load_recipe("qwen3-32b/zero3"), given, CATALOG)
        span = next(offer.hours for offer in plan.offers if offer.offer == "runpod-h200-1")
        assert span is not None
        hours.append(span.likely)
    assert 1.2 * hours[0] < hours[1] < 5 * hours[0]


def test_loading_follows_the_bytes_and_the_storage() -> None:
    """163 GB at 0.3 GB/s are 9.1 minutes, at 1.2 GB/s 2.3; starting the processes comes on top."""
    plan = make_plan(load_recipe("qwen3-next-80b/zero3"), None, CATALOG)
    minutes = {offer.offer: offer.minutes["load"].likely for offer in plan.offers}
    assert minutes["runpod-h200-8"] == pytest.approx(163 / 0.3 / 60 + 0.4, abs=0.01)
    assert minutes["ec2-p5en-8"] == pytest.approx(163 / 1.2 / 60 + 0.4, abs=0.01)


def test_dollars_are_hours_times_the_price_of_the_node() -> None:
    plan = make_plan(load_recipe("qwen3-8b/zero3"), None, CATALOG)
    for offer in plan.offers:
        assert offer.hours is not None
        assert offer.usd is not None
        assert offer.usd.likely == pytest.approx(offer.hours.likely * CATALOG.offers[offer.offer].usd_per_hour, abs=0.1)


def test_a_token_budget_packs_a_step_into_few_passes(report: TrainingSetReport) -> None:
    """16 conversations of 700 tokens: 16 passes of one, or one pass of 11,200 tokens that reads the weights once."""
    packed = load_recipe("qwen3-next-80b/replica-int8")
    training = packed.recipe.training.model_copy(update={"micro_tokens": None, "micro_batch": 1})
    one_by_one = LoadedRecipe("one", packed.recipe.model_copy(update={"training": training}), packed.sha256)
    reading = []
    for loaded in (packed, one_by_one):
        offer = next(o for o in make_plan(loaded, report, CATALOG).offers if o.offer == "runpod-h200-1")
        assert offer.step_seconds is not None
        assert sum(offer.step_terms.values()) == pytest.approx(offer.step_seconds.likely, abs=0.002)
        reading.append(offer.step_terms["reading weights"])
    assert reading[1] == pytest.approx(16 * reading[0], rel=1e-3)


def test_a_staged_model_is_read_instead_of_the_hubs_snapshot() -> None:
    """At most 0.51 of 163 GB as int8, 0.30 as nf4."""
    for name, share in (("qwen3-next-80b/replica-int8", 0.51), ("qwen3-next-80b/replica-nf4", 0.30)):
        for offer in make_plan(load_recipe(name), None, CATALOG).offers:
            assert 0.25 * 163 < offer.read_gb <= share * 163


def test_what_the_other_engine_would_cost_is_said(report: TrainingSetReport) -> None:
    for name, other in (
        ("qwen3-next-80b/zero3", "replica with quantize int8"),
        ("qwen3-next-80b/replica-nf4", "zero3"),
        ("gpt-oss-120b/zero3", "replica cannot hold this model"),
    ):
        loaded = load_recipe(name)
        assert f"engine {other}" in explain_text(make_plan(loaded, report, CATALOG), loaded, report, CATALOG)
