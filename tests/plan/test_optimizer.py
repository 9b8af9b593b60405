"""Where a recipe leaves the optimizer open, the plan takes adamw where it fits, the 8-bit one where only that does."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recipes.catalog import Catalog, load_catalog
from recipes.load import LoadedRecipe, load_recipe, recipe_sha256
from recipes.preparation import Plan
from recipes.recipe import Optimizer, TargetGroup
from scripts.plan import explain_text, make_plan, plan_text
from scripts.render import render

CATALOG = load_catalog()
FEW = ("runpod-a100-pcie-1", "runpod-h100-nvl-2", "runpod-h200-1", "runpod-b200-1", "ec2-p5en-8", "ec2-g6e-12xlarge-4")
ADAMW_BYTES, ADAMW_8BIT_BYTES = 4 + 4 + 8, 4 + 2 + 2 * (1 + 4 / 256)
"Of one trained value: master, gradient, two moments."


def _loaded(name: str, optimizer: Optimizer | None, **sections: dict[str, Any]) -> LoadedRecipe:
    value = load_recipe(name).recipe.model_dump(mode="json")
    for section, changes in sections.items():
        value[section] |= changes
    value["training"]["optimizer"] = optimizer
    recipe = type(load_recipe(name).recipe).model_validate(value)
    return LoadedRecipe(name, recipe, recipe_sha256(recipe))


def _plan(loaded: LoadedRecipe, catalog: Catalog = CATALOG) -> Plan:
    return make_plan(loaded, None, catalog)


@settings(max_examples=40, deadline=None)
@given(
    name=st.sampled_from(["qwen3-next-80b/experts-nf4", "qwen3-next-80b/experts-int8", "qwen3-next-80b/zero3"]),
    rank=st.sampled_from([1, 8, 16, 32, 64, 256]),
    targets=st.sets(st.sampled_from(["attention", "linear_attention", "shared_expert"]), min_size=1),
    experts=st.booleans(),
    tokens=st.sampled_from([1024, 4096, 16384]),
)
def test_the_choice_never_makes_an_offer_fit_worse_than_either_optimizer_by_itself(
    name: str, rank: int, targets: set[TargetGroup], experts: bool, tokens: int
) -> None:
    groups = sorted(targets) + (["experts"] if experts else [])
    adapter = {"rank": rank, "targets": groups, "expert_layout": "per_expert"}
    data, training = {"max_tokens": tokens}, {"micro_tokens": tokens}
    changes = {"adapter": adapter, "data": data, "training": training}
    few = replace(CATALOG, offers={offer: CATALOG.offers[offer] for offer in FEW})
    chosen, plain = (_plan(_loaded(name, optimizer, **changes), few) for optimizer in (None, "adamw"))
    engine = load_recipe(name).recipe.hardware.engine
    small = plain if engine == "zero3" else _plan(_loaded(name, "adamw_8bit", **changes), few)
    for ours, with_adamw, with_8bit in zip(chosen.offers, plain.offers, small.offers, strict=True):
        lacks_memory = with_adamw.reason.startswith("needs ")
        has_room_at_8_bits = not with_8bit.reason.startswith("needs ")
        expected = with_8bit if lacks_memory and has_room_at_8_bits and engine == "replica" else with_adamw
        assert ours == expected
        assert ours.fits >= with_adamw.fits
        assert ours.fits or not with_8bit.fits or not lacks_memory


def test_an_80_gb_card_trains_every_expert_with_the_8_bit_optimizer_and_the_launch_says_so() -> None:
    loaded = load_recipe("qwen3-next-80b/experts-nf4")
    assert loaded.recipe.training.optimizer is None
    plan = _plan(loaded)
    chosen = next(offer for offer in plan.offers if offer.offer == plan.chosen)
    assert (chosen.capacity_gib, chosen.optimizer) == (79.2, "adamw_8bit")
    assert next(offer for offer in plan.offers if offer.offer == "runpod-h200-1").optimizer == "adamw"
    saved = plan.trainable_parameters * (ADAMW_BYTES - ADAMW_8BIT_BYTES) / 2**30
    text = " ".join(plan_text(plan, CATALOG).split())
    assert f"takes optimizer adamw_8bit there: adamw needs {saved:.1f} GiB more of each GPU" in text
    assert "fits, but costs more" in text
    explained = explain_text(plan, loaded, None, CATALOG)
    assert explained.startswith(f"The arithmetic of {plan.chosen} with optimizer adamw_8bit")
    assert f"{chosen.gib['optimizer']:.2f}" in explained
    where: dict[str, Any] = {"backend": "runpod_pod", "store": "s3://b/jobs", "commit": None}
    spec = render(loaded, plan, None, CATALOG, job_id="j-1", **where)
    assert spec.recipe.training.optimizer == "adamw_8bit"
    assert spec.recipe_sha256 == loaded.sha256


@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit"])
def test_a_recipe_that_names_its_optimizer_gets_it_everywhere(optimizer: Optimizer) -> None:
    plan = _plan(_loaded("qwen3-next-80b/experts-nf4", optimizer))
    assert {offer.optimizer for offer in plan.offers} == {optimizer}
    assert any(note.startswith("training.optimizer adamw_8bit would take") for note in plan.notes) == (
        optimizer == "adamw"
    )
