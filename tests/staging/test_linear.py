"""A quantised linear layer computes with its decoded weight; PEFT's LoRA learns on it what it would on a dense one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from torch import nn

from tests.experts.families import TOKENS
from tests.staging.conftest import logits, toy
from tests.staging.test_staged import CPU, rounded, staged
from trainer.experts.quantised import Int8, Nf4
from trainer.quantised_linear import QuantisedLinear, attach_lora
from trainer.staged import load_staged


@pytest.mark.parametrize("kind", [Int8, Nf4])
@pytest.mark.parametrize("biased", [False, True])
def test_it_is_the_linear_layer_of_its_decoded_weight(kind: Any, biased: bool) -> None:
    torch.manual_seed(0)
    dense = nn.Linear(64, 48, bias=biased)
    layer = QuantisedLinear(kind.quantise([dense.weight], 1), dense.bias, torch.float32)
    dense.weight.data = layer.weight
    x = torch.randn(2, 5, 64)
    outputs, gradients = [], []
    for one in (dense, layer):
        given = x.clone().requires_grad_()
        y = one(given)
        y.square().sum().backward()
        outputs.append(y)
        gradients.append(given.grad)
    torch.testing.assert_close(outputs[1], outputs[0])
    torch.testing.assert_close(gradients[1], gradients[0])
    assert [name for name, _ in layer.named_parameters()] == (["bias"] if biased else [])


def test_it_keeps_nothing_of_the_size_of_a_weight_for_backward() -> None:
    layer = QuantisedLinear(Int8.quantise([torch.randn(256, 256)], 1), None, torch.float32)
    kept: list[int] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = layer(torch.randn(1, 256, requires_grad=True)).sum()
    y.backward()
    assert max(kept, default=0) <= 256


def test_a_move_to_another_dtype_leaves_codes_and_scales_alone() -> None:
    layer = QuantisedLinear(Int8.quantise([torch.randn(8, 64)], 1), None, torch.float32)
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    for name, tensor in layer.to(torch.bfloat16).state_dict().items():
        assert torch.equal(tensor, before[name]), name


TARGETS = ["q_proj", "v_proj", "o_proj", "in_proj_qkvz", "out_proj"]
SHARED = [f"model.layers.{n}.mlp.shared_expert.{m}_proj" for n in range(2) for m in ("gate", "up", "down")]


def adapted(model: Any) -> tuple[Any, dict[str, torch.Tensor]]:
    """(model with LoRA on attention, linear attention and shared expert, gradients of one pass)."""
    attach_lora(model.requires_grad_(False), SHARED, rank=4, alpha=8)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS, task_type="CAUSAL_LM")
    model = get_peft_model(model, config)
    generator = torch.Generator().manual_seed(1)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for _, parameter in sorted(trained.items()):
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
    model.train()
    model(input_ids=TOKENS, labels=TOKENS, use_cache=False).loss.backward()
    return model, {name: p.grad for name, p in trained.items()}


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_peft_learns_on_it_what_it_learns_on_the_dense_reference(kind: str, base: Any, tmp_path: Path) -> None:
    folder = base("qwen3_next")
    staged(folder, tmp_path, kind)
    model, gradients = adapted(load_staged(tmp_path, torch.float32, CPU)[0])
    reference, wanted = adapted(rounded(folder, kind))
    assert gradients.keys() == wanted.keys()
    assert len(gradients) == 2 * (3 + 2 + len(SHARED)), "three linears of attention, two of linear attention"
    for name, gradient in gradients.items():
        assert wanted[name].abs().max() > 0, name
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-3, atol=1e-6, msg=name)
    assert set(get_peft_model_state_dict(model)) == set(get_peft_model_state_dict(reference))
    with model.disable_adapter():
        torch.testing.assert_close(logits(model), logits(rounded(folder, kind)), rtol=1e-4, atol=1e-4)


def test_peft_alone_would_have_put_the_shared_experts_lora_on_the_routed_ones() -> None:
    config = LoraConfig(r=4, target_modules=SHARED, task_type="CAUSAL_LM")
    model = get_peft_model(toy("qwen3_next"), config)
    assert all(".mlp.experts." in name for name, p in model.named_parameters() if p.requires_grad)
