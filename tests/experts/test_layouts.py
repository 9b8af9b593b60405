"""Adapter files: exact both ways, and what PEFT and a per-expert reader compute from them."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from tests.experts.families import CONFIGS, EXPERTS, HIDDEN, RANK, TOKENS, WIDTH, randomise, tiny
from tests.experts.layer import SCALE, make_layer, reference
from trainer.experts.layouts import from_peft, from_shared, from_vllm, to_peft, to_shared, to_vllm
from trainer.experts.module import attach_expert_lora
from trainer.experts.projection import Factors

NAME = "model.layers.1.mlp.experts"


def _adapted(family: str, layout: str = "per_expert"):
    model = tiny(family)
    loras = attach_expert_lora(model, rank=RANK, alpha=8, layout=layout)
    randomise(loras)
    with torch.no_grad():
        return model(TOKENS).logits, {name: lora.factors for name, lora in loras.items()}


def _peft_logits(family: str, tensors: dict[str, torch.Tensor], folder) -> torch.Tensor:
    """The logits of PEFT's own module, from files."""
    parameters = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    config = LoraConfig(r=RANK, lora_alpha=8, target_modules=[], target_parameters=parameters, task_type="CAUSAL_LM")
    get_peft_model(tiny(family), config).save_pretrained(folder)
    assert set(load_file(folder / "adapter_model.safetensors")) == set(tensors)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    with torch.no_grad():
        return PeftModel.from_pretrained(tiny(family), folder)(TOKENS).logits


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("layout", ["per_expert", "shared_outer"])
def test_peft_computes_the_same_function_from_the_exported_file(family, layout, tmp_path) -> None:
    logits, factors = _adapted(family, layout)
    theirs = _peft_logits(family, to_peft(factors), tmp_path)
    assert torch.allclose(theirs, logits, atol=2e-5)
    with torch.no_grad():
        assert not torch.allclose(tiny(family)(TOKENS).logits, logits, atol=1e-2)


def test_b_read_with_the_expert_slowest_is_another_adapter(tmp_path) -> None:
    logits, factors = _adapted("qwen3_next")
    tensors = {
        key: tensor.unflatten(1, (RANK, EXPERTS)).transpose(1, 2).flatten(1).contiguous() if "lora_B" in key else tensor
        for key, tensor in to_peft(factors).items()
    }
    theirs = _peft_logits("qwen3_next", tensors, tmp_path)
    assert (theirs - logits).norm() / logits.norm() > 0.1


@pytest.mark.parametrize("shared", [False, True], ids=["per expert", "shared outer"])
@pytest.mark.parametrize(("write", "read"), [(to_peft, from_peft), (to_vllm, from_vllm)], ids=["peft", "vllm"])
def test_export_and_import_are_exact_inverses(write, read, shared, tmp_path) -> None:
    layers = {
        name: make_layer(EXPERTS, HIDDEN, WIDTH, rank=RANK, shared=shared).factors for name in (NAME, "model.other")
    }
    layers = {name: Factors(*(f.float() for f in factors)) for name, factors in layers.items()}
    save_file(write(layers), tmp_path / "adapter.safetensors")
    tensors = load_file(tmp_path / "adapter.safetensors")
    back = read(tensors, EXPERTS, shared=shared)
    assert set(back) == set(layers)
    for name, factors in layers.items():
        for mine, theirs in zip(factors, back[name], strict=True):
            assert torch.equal(mine, theirs)
    again = write(back)
    assert set(again) == set(tensors)
    assert all(torch.equal(again[key], tensor) for key, tensor in tensors.items())


def test_the_shared_file_is_an_exact_inverse_and_refuses_factors_that_differ(tmp_path) -> None:
    layers = {NAME: make_layer(EXPERTS, HIDDEN, WIDTH, rank=RANK, shared=True).factors}
    layers = {name: Factors(*(f.float() for f in factors)) for name, factors in layers.items()}
    save_file(to_shared(layers), tmp_path / "adapter.safetensors")
    tensors = load_file(tmp_path / "adapter.safetensors")
    shapes = {key.removeprefix(f"base_model.model.{NAME}."): tuple(tensor.shape) for key, tensor in tensors.items()}
    assert shapes["w1.lora_A.weight"] == shapes["w3.lora_A.weight"] == (1, RANK, HIDDEN)
    assert (shapes["w2.lora_A.weight"], shapes["w2.lora_B.weight"]) == ((EXPERTS, RANK, WIDTH), (1, HIDDEN, RANK))
    for mine, theirs in zip(layers[NAME], from_shared(tensors)[NAME], strict=True):
        assert torch.equal(mine, theirs)
    with pytest.raises(ValueError, match="differs between experts"):
        to_shared({NAME: make_layer(EXPERTS, HIDDEN, WIDTH, rank=RANK, shared=False).factors})


def test_the_per_expert_file_holds_plain_lora_of_gate_up_and_down() -> None:
    layer = make_layer()
    tensors = to_vllm({NAME: layer.factors})
    width = layer.down.shape[2]

    def delta(e: int, projection: str) -> torch.Tensor:
        key = f"base_model.model.{NAME}.{e}.{projection}_proj.lora"
        return SCALE * tensors[f"{key}_B.weight"] @ tensors[f"{key}_A.weight"]

    gate_up = torch.stack([torch.cat([delta(e, "gate"), delta(e, "up")]) for e in range(16)])
    assert torch.allclose(gate_up[:, width:], SCALE * layer.factors.gate_up_b[:, width:] @ layer.factors.gate_up_a)
    merged = layer.with_leaves((layer.x, layer.weight, *(torch.zeros_like(f) for f in layer.factors)))
    down = torch.stack([delta(e, "down") for e in range(16)])
    merged = type(layer)(**(vars(merged) | {"gate_up": layer.gate_up + gate_up, "down": layer.down + down}))
    assert torch.allclose(reference(merged), reference(layer), rtol=1e-10)
    assert len(tensors) == 16 * 6


def test_a_missing_expert_is_named() -> None:
    tensors = to_vllm({NAME: make_layer(experts=4, k=2).factors})
    del tensors[f"base_model.model.{NAME}.2.up_proj.lora_B.weight"]
    with pytest.raises(ValueError, match=r"experts\.2\.up_proj\.lora_B\.weight is missing"):
        from_vllm(tensors, 4)


def test_different_a_of_gate_and_up_cannot_be_fused() -> None:
    tensors = to_vllm({NAME: make_layer(experts=4, k=2).factors})
    tensors[f"base_model.model.{NAME}.1.up_proj.lora_A.weight"] += 1
    with pytest.raises(ValueError, match="gate_proj and up_proj have different lora_A"):
        from_vllm(tensors, 4)


def test_another_number_of_experts_is_refused_where_it_does_not_divide() -> None:
    with pytest.raises(ValueError, match=r"base_layer\.lora_A: shape \(32, 64\); dimension 0 must divide by 5"):
        from_peft(to_peft({NAME: make_layer(experts=4, k=2).factors}), 5)


def test_factors_that_differ_between_experts_are_not_read_as_shared() -> None:
    with pytest.raises(ValueError, match="differs between experts; read it as per expert"):
        from_peft(to_peft({NAME: make_layer(experts=4, k=2).factors}), 4, shared=True)


def test_other_tensors_of_the_adapter_are_left_alone() -> None:
    tensors = to_peft({NAME: make_layer(experts=4, k=2).factors})
    tensors["base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"] = torch.zeros(2, 2)
    assert list(from_peft(tensors, 4)) == [NAME]
