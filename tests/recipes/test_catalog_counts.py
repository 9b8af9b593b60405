"""Every shape and every target group of models.yaml against transformers and PEFT, on the meta device: exact counts."""

from __future__ import annotations

import re
from functools import cache
from typing import Any

import pytest

from recipes.catalog import BaseModelFacts, Family, Shape, load_catalog
from recipes.load import load_recipe, recipe_names
from recipes.recipe import Adapter, TargetGroup
from scripts.plan.parameters import adapter_parameters, base_parameters, layer_parameters, matrices

CATALOG = load_catalog()
RANK = 16
# Models of one shape and family are built once.
DISTINCT = list({(m.family, m.shape): name for name, m in reversed(CATALOG.models.items())}.values())


def _config(family: Family, shape: Shape) -> Any:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    sizes: dict[str, Any] = {
        "vocab_size": shape.vocabulary,
        "hidden_size": shape.hidden,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "tie_word_embeddings": shape.tied_embeddings,
    }
    if shape.intermediate:
        sizes["intermediate_size"] = shape.intermediate
    if shape.attention_bias:
        sizes["attention_bias"] = True
    if shape.dense_layers:
        shared = shape.shared_expert_intermediate // shape.expert_intermediate
        sizes |= {"first_k_dense_replace": shape.dense_layers, "n_shared_experts": shared, "use_qk_norm": shape.qk_norm}
    if latent := shape.latent_attention:
        del sizes["head_dim"]
        sizes |= {
            "q_lora_rank": latent.query_rank,
            "kv_lora_rank": latent.kv_rank,
            "qk_rope_head_dim": latent.rope_head_dim,
            "qk_nope_head_dim": shape.head_dim - latent.rope_head_dim,
            "v_head_dim": latent.value_head_dim,
        }
    if shape.experts:
        sizes |= {
            "n_routed_experts" if shape.dense_layers else "num_experts": shape.experts,
            "num_experts_per_tok": shape.experts_per_token,
            "moe_intermediate_size": shape.expert_intermediate,
        }
    if shape.attention_sinks:
        sizes |= {"num_local_experts": shape.experts, "intermediate_size": shape.expert_intermediate}
        del sizes["num_experts"], sizes["moe_intermediate_size"]
    if shape.shared_expert_intermediate and shape.shared_expert_gate:
        sizes["shared_expert_intermediate_size"] = shape.shared_expert_intermediate
    if linear := shape.linear_attention:
        sizes |= {
            "linear_num_key_heads": linear.key_heads,
            "linear_num_value_heads": linear.value_heads,
            "linear_key_head_dim": linear.key_head_dim,
            "linear_value_head_dim": linear.value_head_dim,
            "linear_conv_kernel_dim": linear.conv_kernel,
        }
    config_class = CONFIG_MAPPING[family.model_type]
    wrapped = "text_config" in getattr(config_class, "sub_configs_defaults", {})  # a vision tower beside the text
    return config_class(text_config=sizes) if wrapped else config_class(**sizes)


@cache
def _model(name: str) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    facts = CATALOG.models[name]
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(_config(CATALOG.families[facts.family], facts.shape))


@cache
def _with_every_group(name: str) -> Any:
    """The model with LoRA on every group of its family, as PEFT makes it from the catalog's names."""
    import torch
    from peft import LoraConfig, get_peft_model

    groups = CATALOG.family_of(name).groups.values()
    config = LoraConfig(
        r=RANK,
        target_modules=[linear for group in groups for linear in group.linears],
        target_parameters=[parameter for group in groups for parameter in group.parameters] or None,
    )
    with torch.device("meta"):
        return get_peft_model(_model(name), config, low_cpu_mem_usage=True)


def _group_of(parameter: str, family: Family) -> str:
    for name, group in family.groups.items():
        if any(f".{linear}.lora_" in parameter for linear in group.linears):
            if not re.search(r"\.(shared_experts?|experts)\.", parameter):
                return name
        elif any(f".{'.'.join(p.split('.')[:2])}." in parameter for p in group.parameters):
            return name
    return f"none: {parameter}"


@pytest.mark.parametrize("name", DISTINCT)
def test_closed_form_counts_the_base_model_exactly(name: str) -> None:
    facts = CATALOG.models[name]
    real = sum(parameter.numel() for parameter in _model(name).parameters())
    assert base_parameters(facts.shape) == facts.parameters == real


@pytest.mark.parametrize("name", CATALOG.models)
def test_every_row_states_the_count_of_its_shape(name: str) -> None:
    facts = CATALOG.models[name]
    assert facts.parameters == base_parameters(facts.shape)


@pytest.mark.parametrize("name", DISTINCT)
def test_closed_form_counts_every_group_as_peft_makes_it(name: str) -> None:
    facts, family = CATALOG.models[name], CATALOG.family_of(name)
    counted: dict[str, int] = {}
    for parameter_name, parameter in _with_every_group(name).named_parameters():
        if parameter.requires_grad:
            group = _group_of(parameter_name, family)
            counted[group] = counted.get(group, 0) + parameter.numel()
    assert counted == {group: adapter_parameters(facts, family, _adapter(group)) for group in family.groups}


@pytest.mark.parametrize("name", DISTINCT)
def test_peft_keeps_the_targets_as_the_catalog_names_them(name: str) -> None:
    """PEFT 0.21.2 rewrites some module names to all routed experts, with twice the rank."""
    groups = CATALOG.family_of(name).groups.values()
    config = _with_every_group(name).peft_config["default"]
    assert set(config.target_modules) == {linear for group in groups for linear in group.linears}
    assert set(config.target_parameters or ()) == {p for group in groups for p in group.parameters}
    assert config.r == RANK
    assert not config.rank_pattern


@pytest.mark.parametrize("name", DISTINCT)
def test_router_and_gates_exist_and_stay_frozen(name: str) -> None:
    family = CATALOG.family_of(name)
    parameters = dict(_with_every_group(name).named_parameters())
    assert bool(family.frozen) == bool(CATALOG.models[name].shape.experts)
    for suffix in family.frozen:
        found = [parameter for key, parameter in parameters.items() if key.endswith(suffix)]
        assert len(found) == CATALOG.models[name].shape.expert_layers
        assert not any(parameter.requires_grad for parameter in found)


@pytest.mark.parametrize("name", DISTINCT)
def test_moe_block_is_the_class_that_holds_the_experts(name: str) -> None:
    family = CATALOG.family_of(name)
    classes = {
        f"{type(module).__module__}.{type(module).__qualname__}"
        for key, module in _model(name).named_modules()
        if key.endswith(".mlp") and hasattr(module, "experts")
    }
    assert classes == ({family.moe_block} if family.moe_block else set())


@pytest.mark.parametrize("name", DISTINCT)
def test_largest_layer_is_within_a_thousandth(name: str) -> None:
    """Small parameters are spread evenly over the layers in the closed form, so this one is not exact."""
    facts = CATALOG.models[name]
    real = max(sum(p.numel() for p in layer.parameters()) for layer in _base_layers(name))
    assert layer_parameters(facts.shape) == pytest.approx(real, rel=2e-3 if facts.staged else 2e-2)


def _base_layers(name: str) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    facts = CATALOG.models[name]
    with torch.device("meta"):  # _model(name) carries LoRA once a test has attached it
        return AutoModelForCausalLM.from_config(_config(CATALOG.family_of(name), facts.shape)).model.layers


@pytest.mark.parametrize("name", CATALOG.families)
def test_mixture_of_experts_never_lists_names_that_peft_rewrites(name: str) -> None:
    family = CATALOG.families[name]
    listed = {linear for group in family.groups.values() for linear in group.linears}
    assert not (family.moe_block and listed & {"gate_proj", "up_proj", "down_proj"})


@pytest.mark.parametrize(
    ("group", "parameters"),
    [
        ("attention", 4_128_768),
        ("linear_attention", 11_796_480),
        ("shared_expert", 5_898_240),
        ("experts", 2_214_592_512),
    ],
)
def test_the_80b_adapter_has_the_known_size_at_rank_16(group: TargetGroup, parameters: int) -> None:
    facts, family = _the_80b()
    assert adapter_parameters(facts, family, _adapter(group)) == parameters


def test_the_80b_has_the_known_size() -> None:
    facts, _ = _the_80b()
    groups = matrices(facts.shape)
    assert facts.parameters == 79_674_391_296
    assert sum(matrix.parameters for matrix in groups["experts"]) == 77_309_411_328
    assert sum(matrix.parameters for matrix in groups["attention"]) == 327_161_856 - 12 * 512  # without its norms


def test_the_80b_experts_with_shared_outer_factors_have_38_million_per_unit_of_rank() -> None:
    """trainer.experts' own module makes this many, at the true shape, on the meta device."""
    import torch

    from trainer.experts.module import ExpertLora

    facts, family = _the_80b()
    adapter = Adapter(rank=RANK, targets=("experts",), expert_layout="shared_outer")
    shape = (facts.shape.experts, facts.shape.hidden, facts.shape.expert_intermediate)
    with torch.device("meta"):
        layer = ExpertLora(shape, RANK, 16, layout="shared_outer")
    real = facts.shape.layers * sum(parameter.numel() for parameter in layer.parameters())
    assert adapter_parameters(facts, family, adapter) == real == 37_945_344 * RANK


def _adapter(group: TargetGroup) -> Adapter:
    return Adapter(rank=RANK, targets=(group,))


def _the_80b() -> tuple[BaseModelFacts, Family]:
    name = "Qwen/Qwen3-Next-80B-A3B-Instruct"
    return CATALOG.models[name], CATALOG.family_of(name)


@pytest.mark.parametrize("name", [n for n in recipe_names() if load_recipe(n).recipe.hardware.engine == "zero3"])
def test_the_next_layer_is_always_prefetched_under_zero3(name: str) -> None:
    """While a layer is live DeepSpeed may fetch min(max_live - live, bucket) values ahead: with its own limits none for
    a layer of 1.65e9."""
    from trainer.deepspeed_config import deepspeed_config, sizes_of

    recipe = load_recipe(name).recipe
    facts = CATALOG.models[recipe.base.id]
    trained = adapter_parameters(facts, CATALOG.family_of(recipe.base.id), recipe.adapter)
    zero = deepspeed_config(recipe.training, sizes_of(_model(recipe.base.id), trained))["zero_optimization"]
    layer = layer_parameters(facts.shape) + -(-trained // facts.shape.layers)
    for live in (layer, facts.shape.vocabulary * facts.shape.hidden):
        ahead = min(zero["stage3_max_live_parameters"] - live, zero["stage3_prefetch_bucket_size"])
        assert ahead >= layer > 0, f"{ahead:,} values ahead of {live:,}"
    assert zero["stage3_max_reuse_distance"] >= layer, "what backward needs again at once is not dropped"
