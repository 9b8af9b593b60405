"""Our implementation in transformers' experts interface, on the real classes at toy size."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, Qwen3Config

from tests.experts.families import CONFIGS, EXPERTS, HIDDEN, RANK, TOKENS, WIDTH, randomise, tiny
from tests.experts.layer import SCALE, Layer, make_layer, outcome, reference, worst_error
from trainer.experts.lora_function import expert_mlp
from trainer.experts.module import (
    ExpertLora,
    attach_expert_lora,
    base_model_only,
    expert_layers,
    quantise_experts,
    use_storage,
    working_factors,
)
from trainer.experts.projection import Call
from trainer.experts.quantised import Int8, Nf4
from trainer.experts.storage import Dense

NAMES = ["model.layers.0.mlp.experts", "model.layers.1.mlp.experts"]


def _logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(TOKENS).logits


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("layout", ["per_expert", "shared_outer"])
@pytest.mark.parametrize("summation", ["split", "accumulator"])
def test_a_new_lora_changes_nothing_and_a_filled_one_does(family, layout, summation) -> None:
    model = tiny(family)
    before = _logits(model)
    loras = attach_expert_lora(model, rank=RANK, alpha=8, layout=layout, summation=summation)
    assert list(loras) == NAMES
    assert torch.allclose(_logits(model), before, atol=1e-5)
    randomise(loras)
    assert not torch.allclose(_logits(model), before, atol=1e-2)
    with base_model_only(model):
        assert torch.allclose(_logits(model), before, atol=1e-5)
    assert not torch.allclose(_logits(model), before, atol=1e-2)


def _gradients(family: str, checkpointing: bool, **settings) -> dict[str, torch.Tensor]:
    model = tiny(family)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    randomise(attach_expert_lora(model, rank=RANK, alpha=8, **settings))
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    model.train()
    model(TOKENS, labels=TOKENS).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("family", CONFIGS)
def test_gradients_are_the_same_under_non_reentrant_checkpointing(family) -> None:
    plain = _gradients(family, False, summation="accumulator")
    again = _gradients(family, True, summation="accumulator", keep_gate_up=False)
    assert sorted(plain) == sorted(
        f"{name}.lora.{f}" for name in NAMES for f in ("gate_up_a", "gate_up_b", "down_a", "down_b")
    )
    for name, gradient in plain.items():
        assert gradient.abs().sum() > 0, name
        assert torch.allclose(gradient, again[name], rtol=1e-4, atol=1e-7), name


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_quantised_experts_train_and_stay_near_the_dense_model(kind) -> None:
    # Every expert gets every token: no token may change its experts because a hidden state moved a little.
    model = tiny("qwen3_next", num_experts_per_tok=EXPERTS)
    before = _logits(model)
    quantise_experts(model, kind)
    after = _logits(model)
    assert 0 < (after - before).norm() / before.norm() < {"int8": 0.02, "nf4": 0.3}[kind]
    assert not any(name.endswith("gate_up_proj") for name, _ in model.named_parameters())
    loras = attach_expert_lora(model, rank=RANK, alpha=8, summation="accumulator")
    assert torch.allclose(_logits(model), after, atol=1e-5)
    model(TOKENS, labels=TOKENS).loss.backward()
    assert all(lora.gate_up_b.grad.abs().sum() > 0 for lora in loras.values())


def test_factors_in_fp32_train_a_bf16_model() -> None:
    model = tiny("qwen3_moe").to(torch.bfloat16)
    loras = attach_expert_lora(model, rank=RANK, alpha=8, dtype=torch.float32)
    model(TOKENS, labels=TOKENS).loss.backward()
    assert {lora.gate_up_b.grad.dtype for lora in loras.values()} == {torch.float32}


def test_an_optimizer_step_lowers_the_loss() -> None:
    model = tiny("qwen3_moe")
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    loras = attach_expert_lora(model, rank=RANK, alpha=8, summation="accumulator")
    optimizer = torch.optim.AdamW([p for lora in loras.values() for p in lora.parameters()], lr=1e-2)
    losses = []
    for _ in range(6):
        loss = model(TOKENS, labels=TOKENS).loss
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0] - 0.05


def test_it_trains_beside_lora_of_peft() -> None:
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(tiny("qwen3_moe"), config)
    loras = attach_expert_lora(model, rank=RANK, alpha=8)
    assert list(loras) == NAMES
    model(input_ids=TOKENS, labels=TOKENS).loss.backward()
    trained = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert trained == {
        *(f"base_model.model.{name}.lora.{factor}" for name in NAMES for factor in ("gate_up_b", "down_b")),
        *(f"base_model.model.model.layers.{i}.self_attn.q_proj.lora_B.default.weight" for i in (0, 1)),
    }


@pytest.mark.parametrize("layout", ["per_expert", "shared_outer"])
@pytest.mark.parametrize("summation", ["split", "accumulator"])
def test_a_rank_padded_for_the_gpu_gives_the_same_output_and_gradients(layout, summation) -> None:
    layer = make_layer(rank=3, shared=layout == "shared_outer")
    call = Call(Dense(layer.gate_up, 8), Dense(layer.down, 8), SCALE, summation, experts_per_block=1)

    def padded(this: Layer) -> torch.Tensor:
        factors = working_factors(this.factors, torch.float64, 8)
        assert factors.down_a.shape[1] == 8
        return expert_mlp(this.x, this.index, this.weight, factors, call)

    assert worst_error(outcome(padded, layer), outcome(reference, layer)) < 1e-14


def test_the_seed_decides_the_first_factors() -> None:
    first, same, other = (attach_expert_lora(tiny("qwen3_moe"), rank=RANK, alpha=8, seed=s) for s in (1, 1, 2))
    name = NAMES[1]
    assert torch.equal(first[name].gate_up_a, same[name].gate_up_a)
    assert not torch.equal(first[name].gate_up_a, other[name].gate_up_a)
    assert first[name].gate_up_a.abs().max() <= HIDDEN**-0.5
    assert first[name].down_a.abs().max() <= WIDTH**-0.5
    assert not first[name].gate_up_b.any()


def test_shared_outer_factors_have_no_expert_dimension() -> None:
    lora = ExpertLora((EXPERTS, HIDDEN, WIDTH), RANK, 8, layout="shared_outer")
    assert {name: tuple(p.shape) for name, p in lora.named_parameters()} == {
        "gate_up_a": (RANK, HIDDEN), "gate_up_b": (EXPERTS, 2 * WIDTH, RANK),
        "down_a": (EXPERTS, RANK, WIDTH), "down_b": (HIDDEN, RANK),
    }  # fmt: skip


def test_a_dense_model_is_refused() -> None:
    config = Qwen3Config(
        vocab_size=50, hidden_size=32, num_hidden_layers=1, intermediate_size=32, num_attention_heads=2
    )
    model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(ValueError, match="Qwen3ForCausalLM has no fused experts"):
        attach_expert_lora(model, rank=4, alpha=8)


def test_experts_with_another_activation_are_refused_by_name() -> None:
    model = tiny("qwen3_next", hidden_act="gelu")
    with pytest.raises(ValueError, match=r"model\.layers\.0\.mlp\.experts: experts with activation GELU"):
        expert_layers(model)


def test_a_partitioned_stack_takes_split_summation_only() -> None:
    model = tiny("qwen3_moe")
    model.model.layers[0].mlp.experts.gate_up_proj.ds_id = 7
    with pytest.raises(ValueError, match="accumulator summation of a stack that ZeRO-3 partitions; use split"):
        attach_expert_lora(model, rank=4, alpha=8, summation="accumulator")


def test_storage_of_another_shape_is_refused() -> None:
    experts = tiny("qwen3_moe").model.layers[0].mlp.experts
    wrong = Int8.quantise(torch.ones(EXPERTS, 2 * WIDTH, 16), EXPERTS)
    with pytest.raises(
        ValueError, match=r"gate_up_proj: storage of shape \(8, 64, 16\); the model wants \(8, 64, 64\)"
    ):
        use_storage(experts, wrong, Nf4.quantise(experts.down_proj, EXPERTS))


def test_the_experts_class_itself_is_unchanged() -> None:
    changed, untouched = tiny("qwen3_moe"), tiny("qwen3_moe")
    attach_expert_lora(changed, rank=RANK, alpha=8)
    experts = untouched.model.layers[0].mlp.experts
    assert isinstance(experts.gate_up_proj, nn.Parameter)
    assert experts.config._experts_implementation == "grouped_mm"
