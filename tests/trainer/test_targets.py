"""What PEFT attaches is exactly what the recipe says, or the training is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, MistralConfig, Qwen3Config, Qwen3NextConfig

from recipes.catalog import Family, Group, load_catalog
from recipes.recipe import Adapter
from trainer.deepspeed_config import deepspeed_config, sizes_of
from trainer.failures import TrainingStopped
from trainer.targets import attach, differences, lora_config, meta_model, plan_targets, table, trained_groups

FAMILY = load_catalog().families["qwen3_next"]
EVERYTHING = ("attention", "linear_attention", "shared_expert", "experts")
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]


@pytest.fixture(scope="module")
def smoke_config(smoke_model: Path) -> Any:
    return AutoConfig.from_pretrained(smoke_model)


@pytest.fixture(scope="module")
def big_model() -> Any:
    """The 80B model without storage; transformers' defaults of this class are its sizes."""
    return meta_model(Qwen3NextConfig(dtype="bfloat16"), torch.bfloat16)


@pytest.mark.parametrize(
    "targets", [EVERYTHING, ("attention",), ("experts",), ("shared_expert",), ("attention", "experts")]
)
def test_peft_attaches_exactly_the_plan(smoke_config: Any, targets: tuple[str, ...]) -> None:
    adapter = Adapter(rank=4, alpha=8, targets=targets)
    plan = plan_targets(meta_model(smoke_config, torch.float32), FAMILY, adapter)
    model = attach(AutoModelForCausalLM.from_config(smoke_config), lora_config(FAMILY, adapter), plan, FAMILY)
    real = {name: tuple(p.shape) for name, p in model.named_parameters() if p.requires_grad}
    assert real == {name: target.shape for name, target in plan.targets.items()}
    assert plan.through_parameters == bool({"shared_expert", "experts"} & set(targets))


def test_counts_of_the_80b_model(big_model: Any) -> None:
    """Attention: 12 layers x 16 x (2048+8192 + 2 x (2048+512) + 4096+2048); shared: 48 x 3 x 16 x (2048+512)."""
    plan = plan_targets(big_model, FAMILY, Adapter(rank=16, targets=EVERYTHING))
    rows = {row.group: (row.matrices, row.parameters) for row in trained_groups(plan)}
    assert rows["attention"] == (48, 4_128_768)
    assert rows["linear_attention"] == (72, 16 * 36 * (2048 + 12288 + 4096 + 2048))
    assert rows["shared_expert"] == (144, 5_898_240)
    assert rows["experts"] == (96, 16 * 138_412_032)
    assert table(trained_groups(plan)).splitlines()[-1].split() == ["total", "360", f"{plan.parameters:,}"]


def test_shared_expert_by_module_name_is_silently_rewritten_to_all_experts_and_refused(smoke_config: Any) -> None:
    adapter = Adapter(rank=4, alpha=8, targets=("attention", "shared_expert"))
    plan = plan_targets(meta_model(smoke_config, torch.float32), FAMILY, adapter)
    names = [f"shared_expert.{part}_proj" for part in ("gate", "up", "down")]
    rewritten = LoraConfig(r=4, lora_alpha=8, target_modules=ATTENTION + names, task_type="CAUSAL_LM")
    with pytest.raises(TrainingStopped, match=r"mlp\.experts.* would train, but is not planned") as refused:
        attach(AutoModelForCausalLM.from_config(smoke_config), rewritten, plan, FAMILY)
    assert refused.value.cause == "bad_targets"


def test_all_linear_reaches_the_router_and_is_refused(smoke_config: Any) -> None:
    plan = plan_targets(meta_model(smoke_config, torch.float32), FAMILY, Adapter(rank=4, targets=EVERYTHING))
    greedy = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(AutoModelForCausalLM.from_config(smoke_config), greedy)
    problems = differences(model, plan, FAMILY)
    assert any("mlp.gate" in problem for problem in problems)
    assert any("rank" in problem for problem in problems)


def test_a_router_that_would_train_is_refused(smoke_config: Any) -> None:
    adapter = Adapter(rank=4, targets=("attention",))
    plan = plan_targets(meta_model(smoke_config, torch.float32), FAMILY, adapter)
    model = get_peft_model(AutoModelForCausalLM.from_config(smoke_config), lora_config(FAMILY, adapter))
    assert differences(model, plan, FAMILY) == []
    model.base_model.model.model.layers[1].mlp.gate.weight.requires_grad_(True)
    problems = differences(model, plan, FAMILY)
    assert "mlp.gate.weight must be there and stay frozen" in problems
    assert "base_model.model.model.layers.1.mlp.gate.weight would train, but is not planned" in problems


def test_a_name_that_matches_nothing_is_refused_by_name(smoke_config: Any) -> None:
    """PEFT ignores one typo among good names."""
    typo = FAMILY.model_copy(update={"groups": {"attention": Group(linears=(*ATTENTION, "g_proj"))}})
    with pytest.raises(TrainingStopped, match=r"'attention': g_proj matches nothing in this model"):
        plan_targets(meta_model(smoke_config, torch.float32), typo, Adapter(targets=("attention",)))
    with pytest.raises(TrainingStopped, match=r"family qwen3_next has no group 'mlp'"):
        plan_targets(meta_model(smoke_config, torch.float32), FAMILY, Adapter(targets=("mlp",)))


@pytest.mark.parametrize("kind", [MistralConfig, Qwen3Config])
def test_dense_families_train_attention_and_mlp(kind: type) -> None:
    config = kind(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, pad_token_id=0,
    )  # fmt: skip
    groups = {"attention": Group(linears=tuple(ATTENTION)), "mlp": Group(linears=("gate_proj", "up_proj", "down_proj"))}
    family = Family(source="test", date="2026-11-22", model_type=config.model_type, groups=groups)
    adapter = Adapter(rank=2, targets=("attention", "mlp"))
    plan = plan_targets(meta_model(config, torch.float32), family, adapter)
    model = attach(AutoModelForCausalLM.from_config(config), lora_config(family, adapter), plan, family)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == plan.parameters
    per_layer = (32 + 32) + 2 * (32 + 16) + (32 + 32) + 3 * (32 + 48)
    assert plan.parameters == 2 * 2 * per_layer
    assert not plan.through_parameters
    assert sizes_of(model, 0).layer > 0


def test_limits_leave_room_for_two_layers_of_the_80b_model(big_model: Any, training: Any) -> None:
    """DeepSpeed's defaults leave min(1e9 - 1.65e9, 5e7) < 0 for prefetching while one layer is live."""
    plan = plan_targets(big_model, FAMILY, Adapter(rank=16, targets=("attention", "linear_attention", "shared_expert")))
    sizes = sizes_of(big_model, plan.parameters)
    zero = deepspeed_config(training(global_batch=8), sizes, FAMILY.moe_block)["zero_optimization"]
    assert sizes.layer >= 1_648_531_648
    assert sizes.outside == 311_164_928
    assert zero["stage3_prefetch_bucket_size"] >= 1.7e9
    assert zero["stage3_max_reuse_distance"] >= 1.7e9
    assert zero["stage3_max_live_parameters"] >= 3.6e9
    room = min(zero["stage3_max_live_parameters"] - sizes.layer, zero["stage3_prefetch_bucket_size"])
    assert room >= sizes.layer, "the next layer must fit while one is live"


def test_clipping_is_always_written_and_only_parameter_targets_need_leaves(big_model: Any, training: Any) -> None:
    """DeepSpeed 0.19.8 clips at 1.0 when nothing is said."""
    sizes = sizes_of(big_model, 0)
    config = deepspeed_config(training(gradient_clipping=7.5, precision="bf16"), sizes, None)
    assert config["gradient_clipping"] == 7.5
    assert config["bf16"] == {"enabled": True}
    assert config["zero_optimization"]["stage3_param_persistence_threshold"] == 0
    assert "leaf_module" not in config["zero_optimization"]
    leaf = deepspeed_config(training(), sizes, FAMILY.moe_block)["zero_optimization"]["leaf_module"]
    assert leaf == {"classes": ["transformers.models.qwen3_next.modeling_qwen3_next.Qwen3NextSparseMoeBlock"]}


@pytest.fixture
def training(jobs: Any) -> Any:
    """A recipe's training section with some fields set."""
    from recipes.recipe import Training

    return lambda **fields: Training(**fields)
