"""Memory by part: the arithmetic of the facts it stands on, and what must grow or shrink with what."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import pytest

from recipes.catalog import load_catalog
from recipes.load import load_recipe
from recipes.recipe import Adapter, Recipe, TargetGroup
from scripts.plan.layer import saved_bytes_per_token
from scripts.plan.memory import OUTSIDE_TORCH, Batch, memory_terms, peak_terms
from scripts.plan.parameters import layer_parameters, targeted
from scripts.plan.storage import Quantised, Storage, quantised_bytes, storage_of
from scripts.plan.term import GIB, in_gib

CATALOG = load_catalog()
NAME = "Qwen/Qwen3-Next-80B-A3B-Instruct"
SHAPE, FAMILY = CATALOG.models[NAME].shape, CATALOG.family_of(NAME)
H100 = CATALOG.gpus["h100-sxm"]
DENSE_GROUPS: tuple[TargetGroup, ...] = ("attention", "linear_attention", "shared_expert")
DENSE = targeted(SHAPE, FAMILY, Adapter(targets=DENSE_GROUPS))
EXPERTS = targeted(SHAPE, FAMILY, Adapter(targets=("experts",)))


def _recipe(**hardware: object) -> Recipe:
    recipe = load_recipe("qwen3-next-80b/zero3").recipe
    return recipe.model_copy(update={"hardware": recipe.hardware.model_copy(update=hardware)})


ZERO3, REPLICA = _recipe(), _recipe(engine="replica", quantize="int8")


def _parts(storage: Storage, batch: Batch, trained: tuple = DENSE, rank: int = 32) -> dict[str, float]:
    return in_gib(memory_terms(SHAPE, trained, rank, storage, batch))


def test_the_80b_weighs_148_4_gib_in_bf16_and_an_eighth_of_it_on_eight_gpus() -> None:
    for ranks in (1, 8):
        parts = _parts(storage_of(ZERO3, ranks, H100), Batch(4096, 0))
        assert parts["weights"] == pytest.approx(148.4 / ranks, rel=1e-3)


@pytest.mark.parametrize(("quantize", "per_weight"), [("int8", 1.016), ("nf4", 0.516)])
def test_a_quantised_model_keeps_router_embeddings_and_norms_in_bf16(quantize: Quantised, per_weight: float) -> None:
    parts = _parts(storage_of(_recipe(engine="replica", quantize=quantize), 1, H100), Batch(4096, 0))
    small = 2 * 151936 * 2048 + 50_331_648
    assert parts["weights"] * GIB == pytest.approx(per_weight * (79_674_391_296 - small) + 2 * small, rel=1e-3)


@pytest.mark.parametrize(
    ("kind", "scales"), [("int8", "double"), ("int8", "row"), ("nf4", "double"), ("nf4", "single")]
)
@pytest.mark.parametrize("shape", [(2, 1024, 2048), (3, 2048, 512), (1, 48, 96), (2, 7, 34), (1, 1, 64)])
def test_stored_bytes_are_exactly_those_of_the_trainers_storages(
    kind: Literal["int8", "nf4"], shape: tuple[int, int, int], scales: str
) -> None:
    import torch

    from trainer.experts.quantised import Int8, Nf4

    experts, rows, width = shape
    weights = (torch.randn(rows, width) for _ in range(experts))
    made = (
        Int8.quantise(weights, experts, grouped=scales == "double")
        if kind == "int8"
        else Nf4.quantise(weights, experts, double=scales == "double")
    )
    held = sum(tensor.numel() * tensor.element_size() for tensor in made.tensors().values())
    closed = quantised_bytes(rows, width, kind, double=scales == "double", per_row=scales == "row")
    assert experts * closed == held


def test_zero3_never_quantises_and_keeps_bf16() -> None:
    assert storage_of(ZERO3, 4, H100).quantize is None


@pytest.mark.parametrize(
    ("changes", "saved"),
    [({}, 25_216), ({"keep_gate_up": False}, 4_736), ({"experts": "plain"}, 174_080)],
)
def test_the_experts_keep_as_many_bytes_a_token_as_the_function_says(changes: dict[str, object], saved: int) -> None:
    for recipe in (ZERO3, REPLICA):
        storage = replace(storage_of(recipe, 1, H100), **changes)  # type: ignore[arg-type]
        assert saved_bytes_per_token(SHAPE, 16, storage) == saved


def test_our_function_keeps_for_backward_what_the_closed_form_says() -> None:
    """Counted on the tensors that autograd really holds, in both modes, beside the order of the routes."""
    import torch

    from trainer.experts.module import ExpertLora
    from trainer.experts.storage import Dense

    experts, hidden, width, active, rank, tokens = 4, 32, 16, 2, 8, 10
    small = SHAPE.model_copy(
        update={"experts": experts, "hidden": hidden, "expert_intermediate": width, "experts_per_token": active}
    )
    for keep in (True, False):
        lora = ExpertLora((experts, hidden, width), rank, 8, keep_gate_up=keep)
        stacks = Dense(torch.randn(experts, 2 * width, hidden)), Dense(torch.randn(experts, hidden, width))
        held: dict[int, int] = {}
        factors = {p.data_ptr() for p in lora.parameters()}

        def keeps(tensor: torch.Tensor, held: dict[int, int] = held, factors: set[int] = factors) -> torch.Tensor:
            if tensor.data_ptr() not in factors and tensor.dtype == torch.float32:
                held[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
            return tensor

        x = torch.randn(tokens, hidden, requires_grad=True)
        index = torch.rand(tokens, experts).topk(active).indices
        with torch.autograd.graph.saved_tensors_hooks(keeps, lambda tensor: tensor):
            lora(x, index, torch.rand(tokens, active), *stacks)
        storage = replace(storage_of(ZERO3, 1, H100), value_bytes=4, keep_gate_up=keep)
        weights = tokens * active * 4
        assert sum(held.values()) - weights == tokens * saved_bytes_per_token(small, rank, storage)


def test_zero3_may_hold_two_layers_and_an_embedding() -> None:
    gathered = _parts(storage_of(ZERO3, 8, H100), Batch(4096, 0), ())["gather buffer"] * GIB / 2
    assert 2 * layer_parameters(SHAPE) < gathered < 2.2 * layer_parameters(SHAPE) + 151936 * 2048


def test_a_replica_gathers_nothing_and_dequantises_one_projection() -> None:
    projection = 512 * 1024 * 2048 * 2
    for quantize, more in (("int8", 0.07), ("nf4", 0.25)):
        storage = storage_of(_recipe(engine="replica", quantize=quantize), 1, H100)
        parts = _parts(storage, Batch(4096, 0))
        assert "gather buffer" not in parts
        assert projection < parts["dequantisation buffer"] * GIB < (1 + more) * projection
        one = replace(storage, experts_at_once=1)
        assert _parts(one, Batch(4096, 0))["dequantisation buffer"] * GIB < 0.02 * projection


def test_the_loss_holds_the_logits_of_one_chunk() -> None:
    hidden = 2048 * 2
    for supervised, rows in ((1000, 1000), (8000, 1024)):
        parts = _parts(storage_of(ZERO3, 8, H100), Batch(8192, supervised))
        expected = rows * 151936 * 6 + (supervised + 2 * 8192) * hidden
        assert parts["loss"] * GIB == pytest.approx(expected)


def test_layer_work_and_loss_are_never_counted_at_once() -> None:
    named = ("layer work", "experts, kept", "experts, rows", "factor copies")
    for tokens in (16, 8192):
        parts = _parts(storage_of(ZERO3, 8, H100), Batch(tokens, tokens))
        work = sum(parts.get(name, 0.0) for name in named)
        assert work + parts["loss"] + parts["never at once"] == pytest.approx(max(work, parts["loss"]))


def test_more_gpus_never_need_more_memory_each_under_zero3() -> None:
    totals = []
    for ranks in (2, 4, 8, 16):
        terms = memory_terms(SHAPE, DENSE, 32, storage_of(ZERO3, ranks, H100), Batch(4096, 2458))
        totals.append(sum(term.size for term in peak_terms(terms, H100, ranks)))
    assert totals == sorted(totals, reverse=True)


def test_a_replica_needs_the_same_on_each_gpu_but_for_the_collectives() -> None:
    found = []
    for ranks in (1, 8):
        terms = memory_terms(SHAPE, DENSE, 32, storage_of(REPLICA, ranks, H100), Batch(4096, 0))
        found.append({term.name: term.size for term in peak_terms(terms, H100, ranks)})
    one, eight = found
    assert eight.pop("collectives") == GIB
    assert one == eight


def test_training_the_experts_at_rank_16_costs_what_its_states_weigh() -> None:
    """2.2 billion parameters x (2 + 8 + 12 bytes), over 8 GPUs."""
    storage, batch = storage_of(ZERO3, 8, H100), Batch(4096, 0)
    without = _parts(storage, batch, rank=16)
    with_experts = _parts(storage, batch, (*DENSE, *EXPERTS), 16)
    states = ("adapter", "gradients", "optimizer")
    grown = sum(with_experts[part] - without[part] for part in states) * GIB
    assert grown == pytest.approx(2_214_592_512 * 22 / 8)


@pytest.mark.parametrize(
    ("quantize", "before_gib", "after_gib", "goal_gib"), [("nf4", 85.8, 68.7, 70), ("int8", 123.4, 106.3, 108)]
)
def test_the_8_bit_optimizer_brings_every_expert_at_rank_16_under_its_goal(
    quantize: Quantised, before_gib: float, after_gib: float, goal_gib: float
) -> None:
    """What torch reserves at 16,384 tokens a pass: 16 bytes per trained value become 8.03."""
    found = []
    for optimizer in ("adamw", "adamw_8bit"):
        recipe = load_recipe("qwen3-next-80b/experts-nf4").recipe
        recipe = recipe.model_copy(
            update={
                "training": recipe.training.model_copy(update={"optimizer": optimizer}),
                "hardware": recipe.hardware.model_copy(update={"quantize": quantize}),
            }
        )
        trained = targeted(SHAPE, FAMILY, recipe.adapter)
        terms = memory_terms(SHAPE, trained, 16, storage_of(recipe, 1, H100), Batch(16_384, 16_384))
        parts = in_gib(peak_terms(terms, H100, 1))
        found.append(sum(size for name, size in parts.items() if name not in OUTSIDE_TORCH))
    assert found == pytest.approx([before_gib, after_gib], abs=0.05)
    assert found[1] <= goal_gib


def test_factors_shared_by_all_experts_cost_a_quarter() -> None:
    shared = targeted(SHAPE, FAMILY, Adapter(targets=("experts",), expert_layout="shared_outer"))
    storage, batch = storage_of(REPLICA, 1, H100), Batch(4096, 0)
    each, outer = (_parts(storage, batch, trained, 16)["optimizer"] for trained in (EXPERTS, shared))
    assert outer / each == pytest.approx(38.0 / 138.4, rel=2e-3)


def test_a_cpu_process_needs_no_cuda_context_and_no_collectives() -> None:
    cpu = CATALOG.gpus["cpu"]
    names = [{term.name for term in peak_terms((), gpu, ranks)} for gpu, ranks in ((cpu, 2), (H100, 1), (H100, 2))]
    assert names == [{"allocator", "context"}, {"allocator", "context"}, {"allocator", "context", "collectives"}]


def test_every_term_says_its_formula_with_numbers() -> None:
    for recipe, ranks in ((ZERO3, 8), (REPLICA, 2)):
        terms = memory_terms(SHAPE, (*DENSE, *EXPERTS), 16, storage_of(recipe, ranks, H100), Batch(4096, 2458))
        for term in peak_terms(terms, H100, ranks):
            assert any(c.isdigit() for c in term.says) or term.name in (
                "never at once",
                "allocator",
                "collectives",
                "context",
            )
            assert term.says
