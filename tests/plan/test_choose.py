"""Which offer is chosen, why not the others, and what a person is told before paying."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from recipes.catalog import Catalog, load_catalog
from recipes.load import LoadedRecipe, load_recipe, recipe_names, recipe_sha256
from recipes.preparation import OfferPlan, Plan, TrainingSetReport
from scripts.plan import make_plan
from scripts.plan.choose import PLANNED
from scripts.plan.workload import NOMINAL_CONVERSATIONS, workload_of

CATALOG = load_catalog()


def _changed(name: str, **sections: dict[str, object]) -> LoadedRecipe:
    recipe = load_recipe(name).recipe
    for section, values in sections.items():
        recipe = recipe.model_copy(update={section: getattr(recipe, section).model_copy(update=values)})
    return LoadedRecipe(name, recipe, recipe_sha256(recipe))


def _offer(plan: Plan, name: str) -> OfferPlan:
    return next(offer for offer in plan.offers if offer.offer == name)


def test_chosen_is_the_cheapest_that_fits(report: TrainingSetReport) -> None:
    plan = make_plan(load_recipe("qwen3-next-80b/zero3"), report, CATALOG)
    assert plan.chosen is not None
    usable = {offer.offer: offer.usd.likely for offer in plan.offers if offer.fits and offer.usd}
    assert plan.chosen == min(usable, key=usable.__getitem__)
    assert len(usable) > 5


@pytest.mark.parametrize("name", recipe_names())
def test_every_offer_is_judged_and_only_unusable_ones_have_a_reason(name: str, report: TrainingSetReport) -> None:
    plan = make_plan(load_recipe(name), report, CATALOG)
    assert [offer.offer for offer in plan.offers] == list(CATALOG.offers)
    for offer in plan.offers:
        assert bool(offer.reason) != offer.fits
        assert offer.total_gib == pytest.approx(sum(offer.gib.values()), abs=0.002)
        for span in (offer.step_seconds, offer.hours, offer.usd, *offer.minutes.values()):
            assert span is not None
            assert span.low <= span.likely <= span.high
        assert offer.hours is not None
        minutes = sum(span.likely for span in offer.minutes.values())
        assert offer.hours.likely == pytest.approx(minutes / 60, abs=0.002)
    assert plan.chosen is not None


def test_offer_that_lacks_memory_says_how_much() -> None:
    plan = make_plan(load_recipe("qwen3-next-80b/zero3"), None, CATALOG)
    offer = _offer(plan, "runpod-h200-1")
    assert offer.reason == f"needs {offer.total_gib:.1f} GiB a GPU, may take {PLANNED * 139.8:.1f} of 139.8"


def test_two_80_gb_cards_cannot_hold_the_80b_and_four_can(report: TrainingSetReport) -> None:
    plan = make_plan(load_recipe("qwen3-next-80b/zero3"), report, CATALOG)
    assert not _offer(plan, "runpod-h100-sxm-2").fits
    assert _offer(plan, "runpod-h100-sxm-4").fits


def test_one_h200_holds_the_80b_in_int8_and_one_h100_does_not(report: TrainingSetReport) -> None:
    plan = make_plan(load_recipe("qwen3-next-80b/replica-int8"), report, CATALOG)
    assert _offer(plan, "runpod-h200-1").fits
    assert not _offer(plan, "runpod-h100-sxm-1").fits


def test_nvlink_beats_pcie_for_the_80b_under_zero3(report: TrainingSetReport) -> None:
    plan = make_plan(load_recipe("qwen3-next-80b/zero3"), report, CATALOG)
    nvlink, pcie = (_offer(plan, f"runpod-h100-{kind}-8").step_seconds for kind in ("sxm", "pcie"))
    assert nvlink is not None
    assert pcie is not None
    assert pcie.likely > 2 * nvlink.likely


@pytest.mark.parametrize(
    ("section", "values", "offer", "reason"),
    [
        ("training", {"global_batch": 6, "micro_batch": 3}, "runpod-h200-4", "does not divide over 4 GPUs x 3"),
        ("hardware", {"nodes": 2}, "runpod-h200-2", "it is one node; the recipe asks for 2"),
        ("hardware", {"backends": ("ec2",)}, "runpod-h200-1", "its backend is not in hardware.backends"),
        ("hardware", {"gpu": "b200"}, "runpod-h200-1", "the recipe insists on GPU b200"),
        ("hardware", {"gpus": 4}, "runpod-h200-1", "the recipe insists on hardware.gpus 4"),
        ("limits", {"max_usd": 0.5}, "runpod-h200-1", "over limits.max_usd 0.5"),
        ("limits", {"max_hours": 0.2}, "runpod-h200-1", "over limits.max_hours 0.2"),
    ],
)
def test_unusable_offer_says_why(section: str, values: dict[str, object], offer: str, reason: str, report) -> None:
    plan = make_plan(_changed("qwen3-8b/zero3", **{section: values}), report, CATALOG)
    assert reason in _offer(plan, offer).reason


def test_limit_holds_for_the_high_estimate(report: TrainingSetReport) -> None:
    """What is likely under the limit but may pass it is not offered: it would be stopped before its last step."""
    high = _offer(make_plan(load_recipe("qwen3-8b/zero3"), report, CATALOG), "runpod-h200-1").usd
    assert high is not None
    for limit, fits in ((high.high, True), (high.high - 0.01, False)):
        plan = make_plan(_changed("qwen3-8b/zero3", limits={"max_usd": limit}), report, CATALOG)
        assert _offer(plan, "runpod-h200-1").fits is fits


def test_nothing_that_fits_is_no_error_but_a_plan_without_choice() -> None:
    plan = make_plan(_changed("qwen3-next-80b/zero3", limits={"max_usd": 0.01}), None, CATALOG)
    assert plan.chosen is None
    assert "No offer can take this run." in plan.notes


def test_without_a_training_set_a_nominal_one_is_planned_and_said(report: TrainingSetReport) -> None:
    loaded = load_recipe("qwen3-8b/zero3")
    nominal, real = make_plan(loaded, None, CATALOG), make_plan(loaded, report, CATALOG)
    assert nominal.examples == 65 == NOMINAL_CONVERSATIONS - 7
    assert nominal.train_tokens == 65 * 1500
    assert nominal.longest_tokens == loaded.recipe.data.max_tokens
    assert not nominal.tokens_exact
    assert any("No training set was given" in note for note in nominal.notes)
    assert (real.examples, real.longest_tokens, real.tokens_exact) == (240, 980, True)
    assert not any("No training set was given" in note for note in real.notes)


def test_low_share_of_trained_tokens_is_not_believed_for_the_longest_example(report: TrainingSetReport) -> None:
    recipe = load_recipe("qwen3-8b/zero3").recipe
    for trained, share in ((1_000, 0.6), (84_000, 0.6), (151_200, 0.9)):
        counted = report.model_copy(update={"tokens": report.tokens.model_copy(update={"trained": trained})})
        assert workload_of(recipe, counted).supervised == pytest.approx(share)


@pytest.mark.parametrize(
    ("name", "sections", "words"),
    [
        ("qwen3-8b/zero3", {"training": {"learning_rate": 2e-3}}, "0.002 is high for LoRA"),
        ("qwen3-8b/zero3", {"training": {"global_batch": 256}}, "Only 3 optimizer steps"),
        ("qwen3-8b/zero3", {"adapter": {"alpha": 128}}, "adapter.alpha 128 is over 4 x rank 16"),
        ("qwen3-8b/zero3", {"adapter": {"targets": ("attention",)}}, "Attention alone is trained"),
        ("qwen3-30b-a3b/zero3", {}, "161 million parameters, an adapter file of 0.6 GB"),
        ("qwen3.6-35b-a3b/zero3", {}, "thinks before it answers, to answer at once"),
        ("qwen3.6-35b-a3b/zero3", {"data": {"reasoning": "require"}}, "0 of 267 examples hold a thought"),
        ("qwen3-next-80b/replica-int8", {}, "`lorry stage Qwen/Qwen3-Next-80B-A3B-Instruct --quantize int8`"),
        ("qwen3-next-80b/zero3", {"hardware": {"gpu": "h100-pcie"}}, "h100-pcie GPUs talk over PCIe"),
    ],
)
def test_risky_setting_is_told(name: str, sections: dict[str, dict[str, object]], words: str, report) -> None:
    told = " ".join(make_plan(_changed(name, **sections), report, CATALOG).notes)
    assert words in told
    assert words not in " ".join(make_plan(load_recipe("smoke/zero3"), report, CATALOG).notes)


def test_estimated_tokens_and_a_missing_validation_split_are_told(report: TrainingSetReport) -> None:
    guessed = report.model_copy(
        update={"valid_examples": 0, "tokens": report.tokens.model_copy(update={"exact": False})}
    )
    told = " ".join(make_plan(load_recipe("qwen3-8b/zero3"), guessed, CATALOG).notes)
    assert "Token counts are estimates" in told
    assert "Nothing is held out" in told


def test_planning_is_pure(report: TrainingSetReport) -> None:
    """Equal inputs give equal plans, whatever was planned between, and nothing that was handed in has changed."""
    loaded = load_recipe("qwen3-next-80b/zero3")
    before = (loaded.recipe.model_dump_json(), report.model_dump_json(), repr(CATALOG))
    first = make_plan(loaded, report, CATALOG)
    make_plan(load_recipe("smoke/zero3"), None, CATALOG)
    assert make_plan(loaded, report, CATALOG) == first
    assert (loaded.recipe.model_dump_json(), report.model_dump_json(), repr(CATALOG)) == before


def test_planning_and_rendering_load_no_heavy_library() -> None:
    code = (
        "import sys, scripts.plan, scripts.render, scripts.backends.base\n"
        "heavy = {'torch', 'transformers', 'peft', 'deepspeed', 'boto3', 'numpy', 'tokenizers'} & set(sys.modules)\n"
        "sys.exit(f'loaded {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr


def test_prices_are_dated_by_the_oldest(report: TrainingSetReport) -> None:
    plan = make_plan(load_recipe("smoke/zero3"), report, CATALOG)
    assert plan.prices_of == min(offer.date for offer in CATALOG.offers.values()).isoformat()


def test_cheaper_offer_added_to_the_catalog_is_chosen(report: TrainingSetReport) -> None:
    bargain = CATALOG.offers["runpod-h200-2"].model_copy(update={"usd_per_hour": 0.5})
    catalog = Catalog(CATALOG.families, CATALOG.models, CATALOG.gpus, {**CATALOG.offers, "bargain-2": bargain})
    assert make_plan(load_recipe("qwen3-next-80b/zero3"), report, catalog).chosen == "bargain-2"


def test_two_nodes_cost_twice_as_much_an_hour_and_talk_over_the_slower_link(report: TrainingSetReport) -> None:
    def on_p5(nodes: int) -> OfferPlan:
        training = {"micro_tokens": None, "global_batch": 16}
        loaded = _changed("qwen3-next-80b/zero3", hardware={"nodes": nodes, "gpus": 8}, training=training)
        return _offer(make_plan(loaded, report, CATALOG), "ec2-p5-8")

    one, two = on_p5(1), on_p5(2)
    price = CATALOG.offers["ec2-p5-8"].usd_per_hour
    for nodes, plan in ((1, one), (2, two)):
        assert plan.hours is not None
        assert plan.usd is not None
        assert plan.usd.likely == pytest.approx(plan.hours.likely * nodes * price, rel=5e-3)
    assert two.gib["weights"] == pytest.approx(one.gib["weights"] / 2, rel=1e-3)
    per_pass = [plan.step_terms["gathering weights"] / passes for plan, passes in ((one, 2), (two, 1))]
    assert per_pass[1] / per_pass[0] == pytest.approx(460 / 6 * (15 / 16) / (7 / 8), rel=1e-3)


def test_a_plan_for_sagemaker_says_what_it_costs_more_than_ec2(report: TrainingSetReport) -> None:
    """Whatever else were cheaper: it was asked for."""
    loaded = load_recipe("qwen3-8b/zero3")
    notes = make_plan(loaded, report, CATALOG, "sagemaker").notes
    assert any(
        note.startswith("SageMaker asks 15% more than EC2 for the same machine: $7.91 an hour, not $6.88.")
        for note in notes
    ), notes
    assert not any("SageMaker asks" in note for note in make_plan(loaded, report, CATALOG).notes)


def test_several_nodes_on_aws_are_planned_for_tcp_and_say_so(report: TrainingSetReport) -> None:
    """The image holds no EFA plugin, so no figure of EFA may be promised. Clusters of Runpod are another matter."""
    fast = {name: o for name, o in CATALOG.offers.items() if o.backend in ("ec2", "sagemaker")}
    assert all((offer.network_gb_per_second or 0) <= 12 for offer in fast.values()), "0.60 x 16 flows of 10 Gbit/s"
    lock = (Path(__file__).parents[2] / "infra" / "image" / "trainer.lock").read_text()
    assert "ofi" not in lock, "the image has a plugin for EFA now: plan with its speed again"
    two = make_plan(load_recipe("glm-4.5/zero3"), report, CATALOG).notes
    assert any(note.startswith("The nodes talk over TCP, at about 12 GB/s") for note in two), two
    one = make_plan(load_recipe("qwen3-8b/zero3"), report, CATALOG, "ec2").notes
    assert not any("over TCP" in note for note in one)
