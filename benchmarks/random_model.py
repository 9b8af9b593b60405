"""A whole model with random weights, made on the device layer by layer in the trainer's own storages.

Nothing of it is ever held in 16 bit but what stays so: the 80B in NF4 takes 42 GB from the first byte to the last.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from transformers import Qwen3NextConfig

from recipes.catalog import Family, Shape
from recipes.recipe import Adapter
from trainer.experts.module import attach_expert_lora
from trainer.experts.quantised import Int8, Nf4
from trainer.staged import install_storages, quantised_layers
from trainer.targets import meta_model

Kind = Literal["int8", "nf4"]


def config_of(shape: Shape) -> Any:
    """The configuration of a model of this shape: one full-attention layer in four, as in the 80B."""
    gdn = shape.linear_attention
    assert gdn is not None
    every = shape.layers // shape.attention_layers if shape.attention_layers else shape.layers + 1
    return Qwen3NextConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        num_hidden_layers=shape.layers,
        full_attention_interval=every,
        layer_types=["full_attention" if (i + 1) % every == 0 else "linear_attention" for i in range(shape.layers)],
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        num_experts=shape.experts,
        num_experts_per_tok=shape.experts_per_token,
        moe_intermediate_size=shape.expert_intermediate,
        shared_expert_intermediate_size=shape.shared_expert_intermediate,
        linear_num_key_heads=gdn.key_heads,
        linear_num_value_heads=gdn.value_heads,
        linear_key_head_dim=gdn.key_head_dim,
        linear_value_head_dim=gdn.value_head_dim,
        linear_conv_kernel_dim=gdn.conv_kernel,
        tie_word_embeddings=shape.tied_embeddings,
        use_cache=False,
    )


def random_model(shape: Shape, family: Family, kind: Kind, dtype: torch.dtype, device: str) -> Any:
    """The model, frozen, its large matrices in storages of `kind`, everything on `device`."""
    torch.manual_seed(0)
    model = meta_model(config_of(shape), dtype).requires_grad_(False)
    stacks, linears = quantised_layers(model, family)
    for name in stacks:
        tensors = _random_storage(kind, tuple(model.get_parameter(name).shape), device)
        install_storages(model, {f"{name}.{part}": tensor for part, tensor in tensors.items()}, dtype)
    for name in linears:
        tensors = _random_storage(kind, (1, *model.get_submodule(name).weight.shape), device)
        install_storages(model, {f"{name}.storage.{part}": tensor for part, tensor in tensors.items()}, dtype)
    for module in model.modules():
        _fill(module, device)
    model.tie_weights()
    return model


def attach_adapter(model: Any, family: Family, adapter: Adapter, dtype: torch.dtype) -> list[nn.Parameter]:
    """LoRA on the adapter's groups in `dtype`, on experts in fp32 with gradients in `dtype`, as engine replica keeps it
    with the 8-bit optimizer; what trains."""
    groups = [family.groups[name] for name in adapter.targets if name != "experts"]
    names = [n for g in groups for n in (*g.linears, *(p.removesuffix(".weight") for p in g.parameters))]
    if names:
        lora = LoraConfig(r=adapter.rank, lora_alpha=adapter.alpha, lora_dropout=0.0, target_modules=names)
        # In a container PEFT finds no configuration of the model, by which it would rewrite names to the experts.
        inject_adapter_in_model(lora, nn.ModuleDict({"model": model}))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
    if "experts" in adapter.targets:
        made = attach_expert_lora(
            model,
            rank=adapter.rank,
            alpha=adapter.alpha,
            layout=adapter.expert_layout,
            summation="accumulator",
        )
        for factor in (factor for lora in made.values() for factor in lora.factors):
            factor.grad_dtype = dtype
    return [p for p in model.parameters() if p.requires_grad]


def _random_storage(kind: Kind, size: tuple[int, ...], device: str) -> dict[str, Tensor]:
    """Random codes for all experts, with the scales of one that was really quantised: Gaussian, of std in^-0.5."""
    experts, rows, width = size
    like = torch.randn(rows, width, device=device).mul_(1 / math.sqrt(width))
    one = (Int8.quantise([like], 1) if kind == "int8" else Nf4.quantise([like], 1)).tensors()
    tensors = {name: tensor.repeat(experts, *(1,) * (tensor.dim() - 1)) for name, tensor in one.items()}
    if kind == "int8":
        tensors["codes"].random_(-127, 128)
    else:
        tensors["codes"].random_(0, 256)
    return tensors


def _fill(module: nn.Module, device: str) -> None:
    """Gives what is still on the meta device numbers in the size of an initialisation, and makes rotary tables."""
    for name, parameter in list(module.named_parameters(recurse=False)):
        if parameter.is_meta:
            fresh = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
            if parameter.dim() > 1:
                fresh.normal_(std=0.02)
            else:  # a zero-centred norm is the identity at 0, a plain one, a decay rate and a bias are harmless at 1
                fresh.fill_(0.0 if type(module).__name__.endswith("NextRMSNorm") else 1.0)
            setattr(module, name, nn.Parameter(fresh, requires_grad=False))
    if any(buffer.is_meta for buffer in module.buffers(recurse=False)):
        made = type(module)(config=module.config)  # type: ignore[operator]
        for name, buffer in made.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))
