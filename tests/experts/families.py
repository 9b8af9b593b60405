"""The three families of fused experts at toy size, with routing weights and experts that are not alike."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForCausalLM, Qwen3_5MoeTextConfig, Qwen3MoeConfig, Qwen3NextConfig

CONFIGS = {"qwen3_next": Qwen3NextConfig, "qwen3_moe": Qwen3MoeConfig, "qwen3_5_moe": Qwen3_5MoeTextConfig}
EXPERTS, HIDDEN, WIDTH, RANK = 8, 64, 32, 4
TOKENS = torch.arange(24).view(2, 12) * 7 % 100


def tiny(family: str, **changes: Any) -> Any:
    """Two layers, the second with full attention; fp32; the same weights every time."""
    sizes = {
        "vocab_size": 100, "hidden_size": HIDDEN, "num_hidden_layers": 2, "intermediate_size": 64,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
        "num_experts": EXPERTS, "num_experts_per_tok": 2, "moe_intermediate_size": WIDTH,
    }  # fmt: skip
    if family != "qwen3_moe":
        sizes |= {
            "shared_expert_intermediate_size": 32, "layer_types": ["linear_attention", "full_attention"],
            "linear_num_key_heads": 2, "linear_num_value_heads": 4,
            "linear_key_head_dim": 16, "linear_value_head_dim": 16,
        }  # fmt: skip
    torch.manual_seed(0)
    config = CONFIGS[family](**(sizes | changes), use_cache=False)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".experts." in name or name.endswith("gate.weight"):
                parameter.normal_(std=0.3)
    return model


def randomise(loras: dict[str, Any]) -> None:
    """B is zero at first: gives every factor numbers."""
    generator = torch.Generator().manual_seed(5)
    for lora in loras.values():
        for factor in lora.parameters():
            factor.data = torch.randn(factor.shape, generator=generator) * 0.2
