"""What PEFT attaches is exactly what the recipe says, or the training is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM, MistralConfig, Qwen3Config, Qwen3NextConfig

from recipes.catalog import Family, Group, load_catalog
from recipes.recipe import Adapter, Base, TargetGroup
from trainer.deepspeed_config import deepspeed_config, sizes_of
from trainer.export import read_adapter, write_adapter
from trainer.failures import TrainingStopped
from trainer.targets import (
    TargetPlan,
    attach,
    base_only,
    differences,
    is_b,
    lora_config,
    meta_model,
    named_trainable,
    plan_targets,
    table,
    trained_groups,
)

FAMILY = load_catalog().families["qwen3_next"]
EVERYTHING: tuple[TargetGroup, ...] = ("attention", "linear_attention", "shared_expert", "experts")
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
def test_exactly_the_plan_is_attached(smoke_config: Any, targets: tuple[TargetGroup, ...]) -> None:
    model, plan = attached(smoke_config, Adapter(rank=4, alpha=8, targets=targets))
    real = {name: tuple(p.shape) for name, p in named_trainable(model).items()}
    assert real == {name: target.shape for name, target in plan.targets.items()}


@pytest.mark.parametrize("layout", ["per_expert", "shared_outer"])
def test_plain_peft_makes_the_same_function_of_the_exported_file(
    smoke_config: Any, tmp_path: Path, layout: Any
) -> None:
    """Shared factors are written once per expert: PEFT has no other room for them."""
    adapter = Adapter(rank=4, alpha=8, targets=EVERYTHING, expert_layout=layout)
    model, plan = attached(smoke_config, adapter)
    generator = torch.Generator().manual_seed(3)
    for parameter in named_trainable(model).values():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
    weights = {name: p.detach().clone() for name, p in named_trainable(model).items()}
    write_adapter(tmp_path / "adapter", lora_config(FAMILY, adapter), Base(id="lorry/smoke"), weights, plan)
    torch.manual_seed(0)
    plain = AutoModelForCausalLM.from_config(smoke_config).eval()
    before, after = logits(plain), logits(model)
    peft_model = PeftModel.from_pretrained(plain, tmp_path / "adapter")
    assert (after - before).norm() > 0.1 * before.norm()
    assert (logits(peft_model) - after).norm() < 1e-5 * after.norm()
    with base_only(model):
        assert torch.allclose(logits(model), before, atol=1e-5)
    again = read_adapter(tmp_path / "adapter" / "adapter_model.safetensors", plan)
    assert again.keys() == weights.keys()
    assert all(torch.equal(again[name], weights[name]) for name in weights)


def test_counts_of_the_80b_model(big_model: Any) -> None:
    """Attention: 12 layers x 16 x (2048+8192 + 2 x (2048+512) + 4096+2048); shared: 48 x 3 x 16 x (2048+512)."""
    plan = plan_targets(big_model, FAMILY, Adapter(rank=16, targets=EVERYTHING))
    rows = {row.group: (row.matrices, row.parameters) for row in trained_groups(plan)}
    assert rows["attention"] == (48, 4_128_768)
    assert rows["linear_attention"] == (72, 16 * 36 * (2048 + 12288 + 4096 + 2048))
    assert rows["shared_expert"] == (144, 5_898_240)
    assert rows["experts"] == (96, 16 * 138_412_032)
    assert table(trained_groups(plan)).splitlines()[-1].split() == ["total", "360", f"{plan.parameters:,}"]


def test_what_is_wrong_with_an_attached_adapter_is_said_by_name(smoke_config: Any) -> None:
    model, plan = attached(smoke_config, Adapter(rank=4, targets=("attention", "shared_expert")))
    assert differences(model, plan, FAMILY) == []
    layer = model.model.layers[1]
    layer.mlp.gate.weight.requires_grad_(True)
    layer.mlp.shared_expert.up_proj.lora_A.default.weight.requires_grad_(False)
    layer.mlp.shared_expert.up_proj.lora_B.default.weight = torch.nn.Parameter(torch.zeros(32, 8))
    prefix = "model.layers.1.mlp"
    assert differences(model, plan, FAMILY) == [
        f"{prefix}.gate.weight would train, but is not planned",
        f"{prefix}.shared_expert.up_proj.lora_A.default.weight is planned, but would not train",
        f"{prefix}.shared_expert.up_proj.lora_B.default.weight has shape (32, 8), planned (32, 4)",
        "mlp.gate.weight must be there and stay frozen",
    ]


def test_an_adapter_that_is_not_the_plan_is_refused(smoke_config: Any) -> None:
    plan = plan_targets(meta_model(smoke_config, torch.float32), FAMILY, Adapter(rank=4))
    model = AutoModelForCausalLM.from_config(smoke_config)
    with pytest.raises(TrainingStopped, match=r"lora_A\.default\.weight has shape \(8, 64\), planned \(4, 64\)") as bad:
        attach(model, FAMILY, Adapter(rank=8), plan, seed=1, dtype=torch.float32)
    assert bad.value.cause == "bad_targets"


def test_seeds_decide_the_first_matrices_of_linears_and_experts(smoke_config: Any) -> None:
    adapter = Adapter(rank=4, targets=("attention", "experts"))
    first, same, other = (named_trainable(attached(smoke_config, adapter, seed)[0]) for seed in (1, 1, 2))
    for name, matrix in first.items():
        assert torch.equal(matrix, same[name])
        assert torch.equal(matrix, other[name]) == is_b(name), name


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
    model = AutoModelForCausalLM.from_config(config)
    attach(model, family, adapter, plan, seed=1, dtype=torch.float32)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == plan.parameters
    per_layer = (32 + 32) + 2 * (32 + 16) + (32 + 32) + 3 * (32 + 48)
    assert plan.parameters == 2 * 2 * per_layer
    assert sizes_of(model, 0).layer > 0


def test_limits_leave_room_for_two_layers_of_the_80b_model(big_model: Any, training: Any) -> None:
    """DeepSpeed's defaults leave min(1e9 - 1.65e9, 5e7) < 0 for prefetching while one layer is live."""
    plan = plan_targets(big_model, FAMILY, Adapter(rank=16, targets=("attention", "linear_attention", "shared_expert")))
    sizes = sizes_of(big_model, plan.parameters)
    zero = deepspeed_config(training(global_batch=8), sizes)["zero_optimization"]
    assert sizes.layer >= 1_648_531_648
    assert sizes.outside == 311_164_928
    assert zero["stage3_prefetch_bucket_size"] >= 1.7e9
    assert zero["stage3_max_reuse_distance"] >= 1.7e9
    assert zero["stage3_max_live_parameters"] >= 3.6e9
    room = min(zero["stage3_max_live_parameters"] - sizes.layer, zero["stage3_prefetch_bucket_size"])
    assert room >= sizes.layer, "the next layer must fit while one is live"


def test_clipping_is_always_written_and_no_block_is_a_leaf(big_model: Any, training: Any) -> None:
    """DeepSpeed 0.19.8 clips at 1.0 when nothing is said."""
    config = deepspeed_config(training(gradient_clipping=7.5, precision="bf16"), sizes_of(big_model, 0))
    assert config["gradient_clipping"] == 7.5
    assert config["bf16"] == {"enabled": True}
    assert config["zero_optimization"]["stage3_param_persistence_threshold"] == 0
    assert "leaf_module" not in config["zero_optimization"]


def attached(config: Any, adapter: Adapter, seed: int = 1) -> tuple[Any, TargetPlan]:
    """The smoke model, always of the same weights, with a new adapter."""
    plan = plan_targets(meta_model(config, torch.float32), FAMILY, adapter)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    attach(model, FAMILY, adapter, plan, seed=seed, dtype=torch.float32)
    return model, plan


def logits(model: Any) -> Any:
    with torch.no_grad():
        return model(input_ids=torch.arange(3, 40)[None]).logits


@pytest.fixture
def training(jobs: Any) -> Any:
    """A recipe's training section with some fields set."""
    from recipes.recipe import Training

    return lambda **fields: Training(**fields)
