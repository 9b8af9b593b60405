"""Micro-batches and their loss: every example once, nothing leaks between neighbours, the loss is the plain one."""

from __future__ import annotations

import random
from array import array
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from recipes.catalog import load_catalog
from trainer.base_files import loading
from trainer.batches import Layout, pack, packed, padded, passes, share, token_count, trained_count
from trainer.cross_entropy import IGNORED
from trainer.data import Example
from trainer.first_steps import Pace
from trainer.loss import WithLoss

LOADING = loading(load_catalog().families["qwen3_next"])
DENSE = {"intermediate_size": 96}
MOE = {"moe_intermediate_size": 32, "num_experts": 8, "num_experts_per_tok": 2}
SHAPES = {"mistral": DENSE, "qwen3": DENSE | {"tie_word_embeddings": True}, "qwen3_moe": MOE}


@pytest.fixture(scope="module")
def linear(smoke_model: Path) -> Any:
    """The smoke model: linear attention in three layers of four."""
    return (
        AutoModelForCausalLM.from_pretrained(smoke_model, dtype=torch.float32, **LOADING)[0]
        .eval()
        .requires_grad_(False)
    )


def tiny(family: str) -> Any:
    """A model of the family with full attention in two layers, untrained."""
    torch.manual_seed(0)
    shape = {"vocab_size": 400, "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    config = AutoConfig.for_model(family, num_hidden_layers=2, pad_token_id=0, **shape, **SHAPES[family])
    return AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)


def example(number: int, length: int) -> Example:
    """Random tokens, the second half trained."""
    pick = random.Random(number)
    ids = array("i", [pick.randrange(3, 400) for _ in range(length)])
    return Example(f"c{number}", number, ids, bytes(i >= length // 2 for i in range(length)))


EXAMPLES = [example(i, length) for i, length in enumerate((9, 2, 27, 13, 8, 41, 5, 6))]


def layout(**fields: Any) -> Layout:
    return Layout(**({"examples": 2, "tokens": None, "packed": False, "pad_id": 0} | fields))


def plain_loss(model: Any, examples: list[Example]) -> float:
    """Each example alone, full logits, by hand."""
    total = 0.0
    for e in examples:
        log_p = torch.log_softmax(model(input_ids=torch.tensor([list(e.ids)])).logits[0].double(), -1)
        total -= sum(float(log_p[i - 1, e.ids[i]]) for i in e.predicted)
    return total


def test_micro_batches_by_count_hold_every_example_once_and_lengths_lie_close() -> None:
    planned = passes(EXAMPLES, layout(), 2)
    lengths = [[[len(e.ids) for e in group] for group in groups] for groups in planned]
    assert lengths == [[[2, 5], [6, 8]], [[9, 13], [27, 41]]]
    assert passes(list(reversed(EXAMPLES)), layout(), 2) == planned, "the order of the rows does not matter"


@pytest.mark.parametrize("is_packed", [True, False])
@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_micro_batches_by_tokens_keep_the_budget_and_are_the_same_on_any_number_of_ranks(
    is_packed: bool, world: int
) -> None:
    plan = layout(tokens=50, packed=is_packed)
    planned = passes(EXAMPLES, plan, world)
    assert [group for groups in planned for group in groups] == plan.groups(EXAMPLES)
    assert sorted(e.id for group in plan.groups(EXAMPLES) for e in group) == sorted(e.id for e in EXAMPLES)
    for group in plan.groups(EXAMPLES):
        assert (token_count(group) if is_packed else len(group) * max(len(e.ids) for e in group)) <= 50
    counted = [share(groups, rank) for groups in planned for rank in range(world)]
    assert sum(trained_count(group) for group, counts in counted if counts) == trained_count(EXAMPLES)
    assert len(plan.groups(EXAMPLES)) == (3 if is_packed else 4)


def test_the_largest_micro_batch_is_as_large_as_any_step_can_have() -> None:
    assert sorted(len(e.ids) for e in layout().largest(EXAMPLES)) == [27, 41]
    assert [len(e.ids) for e in layout(tokens=50).largest(EXAMPLES)] == [2, 5, 6, 8, 9], "45 with its padding"
    assert token_count(layout(tokens=50, packed=True).largest(EXAMPLES)) == 50


def test_pace_leaves_out_the_first_step_and_goes_by_tokens() -> None:
    pace = Pace(tokens_per_step=200)
    pace.add(60, 100)
    assert pace.step_seconds is None
    pace.add(3, 300)
    pace.add(1, 100)
    assert pace.step_seconds == pytest.approx(2)


@pytest.mark.parametrize("seed", range(5))
def test_packing_is_best_fit_decreasing(seed: int) -> None:
    """Against the same rule written the slow way; and its fill against the bound nobody can pass."""
    pick = random.Random(seed)
    lengths = [min(4096, int(pick.lognormvariate(6, 1)) + 8) for _ in range(2000)]
    bins = pack(lengths, 4096)
    assert sorted(i for inside in bins for i in inside) == list(range(len(lengths)))
    rooms: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [room for room in rooms if room >= length]
        rooms.append((rooms.pop(rooms.index(min(fitting))) if fitting else 4096) - length)
    assert sorted(4096 - sum(lengths[i] for i in inside) for inside in bins) == sorted(rooms)
    assert sum(lengths) / (4096 * len(bins)) > 0.99


def test_an_example_over_the_budget_has_a_bin_of_its_own() -> None:
    assert pack([3, 99, 4], 7) == [[1], [2, 0]]


@pytest.mark.parametrize("family", SHAPES)
@torch.no_grad()
def test_packed_conversations_equal_single_ones_under_full_attention(family: str) -> None:
    model = tiny(family)
    batch = packed(EXAMPLES, "cpu")
    assert float(WithLoss(model)(**batch)) == pytest.approx(plain_loss(model, EXAMPLES), rel=1e-5)
    together = WithLoss(model)(**{key: value for key, value in batch.items() if key != "labels"}).logits[0]
    ends = batch["cu_seq_lens_q"].tolist()
    for number, e in enumerate(EXAMPLES):
        alone = model(input_ids=torch.tensor([list(e.ids)])).logits[0]
        assert torch.allclose(together[ends[number] : ends[number + 1]], alone, atol=2e-5)
        assert batch["seq_idx"][0, ends[number] : ends[number + 1]].unique().tolist() == [number]


@torch.no_grad()
def test_padding_and_neighbours_change_no_row_of_linear_attention(linear: Any) -> None:
    batch = padded(EXAMPLES, 0, "cpu")
    together = linear(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    for number, e in enumerate(EXAMPLES):
        alone = linear(input_ids=torch.tensor([list(e.ids)])).logits[0]
        assert torch.allclose(together[number, : len(e.ids)], alone, atol=2e-5)


@pytest.mark.parametrize("family", [*SHAPES, "smoke"])
@torch.no_grad()
def test_the_loss_is_the_plain_one_over_trained_tokens_alone(family: str, linear: Any) -> None:
    model = linear if family == "smoke" else tiny(family)
    batch = padded(EXAMPLES, 0, "cpu")
    assert int((batch["labels"] != IGNORED).sum()) == sum(len(e.predicted) for e in EXAMPLES) == trained_count(EXAMPLES)
    assert float(WithLoss(model)(**batch)) == pytest.approx(plain_loss(model, EXAMPLES), rel=1e-6)
    nothing = batch | {"labels": torch.full_like(batch["labels"], IGNORED)}
    assert float(WithLoss(model)(**nothing)) == 0.0, "a micro-batch without trained tokens is harmless"


def test_gradients_are_those_of_the_plain_loss_with_tied_heads_too() -> None:
    model = tiny("qwen3")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    batch = padded(EXAMPLES[:3], 0, "cpu")
    leaf = model.model.layers[0].self_attn.q_proj.weight.requires_grad_()
    (ours,) = torch.autograd.grad(WithLoss(model)(**batch), leaf)
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten(), reduction="sum")
    (plain,) = torch.autograd.grad(loss, leaf)
    assert float((ours - plain).norm() / plain.norm()) < 1e-5
