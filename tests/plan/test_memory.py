"""Memory by part: the arithmetic of the facts it stands on, and what must grow or shrink with what."""

from __future__ import annotations

import pytest

from recipes.catalog import load_catalog
from recipes.load import LoadedRecipe, load_recipe, recipe_sha256
from scripts.plan.memory import GIB, Batch, fold_bytes, gather_bytes, layer_work, memory_parts, peak_gib, storage_of
from scripts.plan.parameters import layer_parameters, targeted

CATALOG = load_catalog()
NAME = "Qwen/Qwen3-Next-80B-A3B-Instruct"
SHAPE, FAMILY = CATALOG.models[NAME].shape, CATALOG.family_of(NAME)
H100 = CATALOG.gpus["h100-sxm"]
DENSE = targeted(SHAPE, FAMILY, ("attention", "linear_attention", "shared_expert"))
EXPERTS = targeted(SHAPE, FAMILY, ("experts",))


def _recipe(**hardware: object) -> LoadedRecipe:
    loaded = load_recipe("qwen3-next-80b/zero3")
    recipe = loaded.recipe.model_copy(update={"hardware": loaded.recipe.hardware.model_copy(update=hardware)})
    return LoadedRecipe(loaded.name, recipe, recipe_sha256(recipe))


ZERO3, REPLICA = _recipe().recipe, _recipe(engine="replica", quantize="int8").recipe


def test_the_80b_weighs_148_4_gib_in_bf16_and_an_eighth_of_it_on_eight_gpus() -> None:
    for ranks in (1, 8):
        parts = memory_parts(SHAPE, DENSE, 32, storage_of(ZERO3, ranks, H100), Batch(4096, 0))
        assert parts["weights"] == pytest.approx(148.4 / ranks, rel=1e-3)


def test_int8_keeps_router_embeddings_and_norms_in_bf16() -> None:
    parts = memory_parts(SHAPE, DENSE, 32, storage_of(REPLICA, 1, H100), Batch(4096, 0))
    small = 2 * 151936 * 2048 + 50_331_648
    assert parts["weights"] * GIB == pytest.approx(1.002 * (79_674_391_296 - small) + 2 * small, rel=1e-3)


def test_folding_the_experts_takes_five_thirds_of_a_layer_of_them() -> None:
    one_layer = 512 * 3 * 2048 * 512 * 2
    assert fold_bytes(SHAPE, EXPERTS, storage_of(ZERO3, 8, H100)) == pytest.approx(one_layer * 5 / 3)


def test_attention_and_linear_attention_fold_nothing() -> None:
    trained = targeted(SHAPE, FAMILY, ("attention", "linear_attention"))
    assert fold_bytes(SHAPE, trained, storage_of(ZERO3, 8, H100)) == 0


def test_the_expert_path_saves_174_080_bytes_a_token() -> None:
    storage = storage_of(ZERO3, 8, H100)
    others = 6 * 2048 + 2 * 8192 + 1024 + 4096 + 3 * 12_352 + 4 * 512
    assert layer_work(SHAPE, DENSE, 32, storage, 1) == 174_080 + 2 * others


def test_zero3_may_hold_two_layers_and_an_embedding() -> None:
    gathered = gather_bytes(SHAPE, (), 1, storage_of(ZERO3, 8, H100)) / 2
    assert 2 * layer_parameters(SHAPE) < gathered < 2.2 * layer_parameters(SHAPE) + 151936 * 2048


def test_a_replica_gathers_nothing_and_dequantises_one_projection() -> None:
    parts = memory_parts(SHAPE, DENSE, 32, storage_of(REPLICA, 1, H100), Batch(4096, 0))
    assert "gather buffer" not in parts
    assert parts["dequantisation buffer"] * GIB == 512 * 1024 * 2048 * 2


def test_logits_take_twelve_bytes_per_word_of_the_vocabulary_at_supervised_positions_only() -> None:
    parts = memory_parts(SHAPE, DENSE, 32, storage_of(ZERO3, 8, H100), Batch(8192, 1000))
    assert parts["logits"] * GIB == 1000 * 151936 * 12


def test_layer_work_and_logits_are_never_counted_at_once() -> None:
    storage = storage_of(ZERO3, 8, H100)
    for supervised in (10, 8000):
        parts = memory_parts(SHAPE, DENSE, 32, storage, Batch(8192, supervised))
        work = parts["layer work"] + parts["fold buffer"]
        assert work + parts["logits"] + parts["never at once"] == pytest.approx(max(work, parts["logits"]))


def test_more_gpus_never_need_more_memory_each_under_zero3() -> None:
    totals = []
    for ranks in (2, 4, 8, 16):
        parts = memory_parts(SHAPE, DENSE, 32, storage_of(ZERO3, ranks, H100), Batch(4096, 2458))
        totals.append(sum(peak_gib(parts, H100, ranks).values()))
    assert totals == sorted(totals, reverse=True)


def test_training_the_experts_at_rank_16_costs_what_its_states_weigh() -> None:
    """2.2 billion parameters x (2 + 8 + 12 bytes), over 8 GPUs."""
    storage, batch = storage_of(ZERO3, 8, H100), Batch(4096, 0)
    without = memory_parts(SHAPE, DENSE, 16, storage, batch)
    with_experts = memory_parts(SHAPE, (*DENSE, *EXPERTS), 16, storage, batch)
    states = ("adapter", "gradients", "optimizer")
    grown = sum(with_experts[part] - without[part] for part in states) * GIB
    assert grown == pytest.approx(2_214_592_512 * 22 / 8)


def test_a_cpu_process_needs_no_cuda_context() -> None:
    cpu = CATALOG.gpus["cpu"]
    assert peak_gib({}, cpu, 2)["runtime"] < peak_gib({}, H100, 1)["runtime"] < peak_gib({}, H100, 2)["runtime"]
