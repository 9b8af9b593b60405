"""The proof that packed conversations do not see each other: it passes what is right and stops what leaks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from recipes.catalog import load_catalog
from tests.trainer.test_batches import EXAMPLES, example, tiny
from trainer.base_files import loading
from trainer.batches import packed
from trainer.data import Example
from trainer.failures import TrainingStopped
from trainer.loss import WithLoss
from trainer.packing import can_pack, prove_packing


@pytest.fixture(scope="module")
def linear(smoke_model: Any) -> WithLoss:
    found = loading(load_catalog().families["qwen3_next"])
    return WithLoss(AutoModelForCausalLM.from_pretrained(smoke_model, dtype=torch.float32, **found)[0])


def positions_only(examples: Sequence[Example], device: Any) -> dict[str, Any]:
    """What many trainers pack with: enough for full attention, not for linear attention."""
    whole = packed(examples, device)
    return {key: whole[key] for key in ("input_ids", "labels", "position_ids")}


def one_long_row(examples: Sequence[Example], device: Any) -> dict[str, Any]:
    """Packing that forgets even the positions."""
    whole = packed(examples, device)
    return {key: whole[key] for key in ("input_ids", "labels")}


@pytest.mark.parametrize("family", ["mistral", "qwen3", "qwen3_moe"])
def test_full_attention_is_proven_packed_and_left_in_training_mode(family: str) -> None:
    model = WithLoss(tiny(family))
    assert "moves log p by" in prove_packing(model, EXAMPLES, 200, "fp32", "cpu")
    assert model.training
    with pytest.raises(TrainingStopped, match="packed conversations see each other"):
        prove_packing(model, EXAMPLES, 200, "fp32", "cpu", one_long_row)


def test_a_leak_through_the_state_of_linear_attention_is_caught(linear: WithLoss) -> None:
    with pytest.raises(TrainingStopped, match=r"leave training\.micro_tokens out") as stopped:
        prove_packing(linear, EXAMPLES, 200, "fp32", "cpu", positions_only)
    assert stopped.value.cause == "cannot_run_here"
    linear.to(torch.bfloat16).head.weight.data.mul_(8)  # a trained model is surer of itself than a random one
    with pytest.raises(TrainingStopped, match="packed conversations see each other"):
        prove_packing(linear, EXAMPLES, 200, "bf16", "cpu", positions_only)
    linear.float().head.weight.data.div_(8)


def test_the_slow_kernels_of_linear_attention_refuse_boundaries_so_it_is_not_packed_here(linear: WithLoss) -> None:
    assert not can_pack(["linear_attention", "full_attention"])
    assert can_pack(["full_attention"])
    with pytest.raises((ValueError, NotImplementedError, RuntimeError)):
        linear(**packed(EXAMPLES, "cpu"))


def test_masks_made_without_positions_leak_so_sliding_attention_is_never_packed() -> None:
    assert not can_pack(["sliding_attention", "full_attention"])
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "head_dim": 16, "num_attention_heads": 4, "num_key_value_heads": 2}
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 32}
    config = AutoConfig.for_model("gpt_oss", vocab_size=400, num_hidden_layers=2, sliding_window=8, **sizes, **experts)
    model = WithLoss(AutoModelForCausalLM.from_config(config, dtype=torch.float32))
    model.head.weight.data.mul_(8)
    with pytest.raises(TrainingStopped, match="packed conversations see each other"):
        prove_packing(model, EXAMPLES, 200, "fp32", "cpu")


def test_nothing_is_proven_where_nothing_can_be_packed(linear: WithLoss) -> None:
    said = prove_packing(linear, [example(1, 30), example(2, 30)], 59, "fp32", "cpu")
    assert said == "no two conversations fit one micro-batch, so nothing is packed"
