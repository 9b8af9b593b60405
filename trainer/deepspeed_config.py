"""The DeepSpeed configuration, rendered from the recipe and the sizes of the model: no presets, no "auto"."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers.modeling_layers import GradientCheckpointingLayer

from recipes.recipe import Training


@dataclass(frozen=True)
class Sizes:
    """Parameters of the largest decoder layer (its LoRA included), and of the largest matrix outside the layers."""

    layer: int
    outside: int


def sizes_of(model: Any, trainable: int) -> Sizes:
    """Sizes of a (meta) model; `trainable` LoRA parameters are taken as spread evenly over its layers."""
    layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    inside = {id(p) for layer in layers for p in layer.parameters()}
    return Sizes(
        layer=max(sum(p.numel() for p in layer.parameters()) for layer in layers) + -(-trainable // len(layers)),
        outside=max((p.numel() for p in model.parameters() if id(p) not in inside), default=0),
    )


def deepspeed_config(training: Training, sizes: Sizes) -> dict[str, Any]:
    """The configuration for ZeRO-3.

    DeepSpeed's own limits (max_live 1e9, prefetch 5e7) are smaller than one layer of the 80B model (1.65e9): while a
    layer is live the prefetch cap min(max_live - live, bucket) is negative and nothing is prefetched. So there is room
    for one live layer, the next one, and the embedding.

    No block is a leaf: only PEFT's parametrised weights need that, and nothing is trained through them here. Every
    other LoRA, ours on the experts included, lets the ranks fetch in one order at any of these limits.
    """
    bucket = sizes.layer + sizes.layer // 20
    zero = {
        "stage": 3,
        "overlap_comm": False,
        "contiguous_gradients": True,
        # Small parameters that stay gathered have drifted apart over the ranks, up to a hang.
        "stage3_param_persistence_threshold": 0,
        "stage3_max_live_parameters": 2 * bucket + sizes.outside,
        "stage3_max_reuse_distance": bucket,
        "stage3_prefetch_bucket_size": bucket,
    }
    return {
        # Names without effect here: the loop says itself where a step ends, and how much each pass weighs.
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": training.gradient_clipping,  # DeepSpeed clips at 1.0 when it is left out
        "bf16": {"enabled": training.precision == "bf16"},
        "zero_allow_untested_optimizer": True,  # torch's AdamW: no DeepSpeed op is compiled
        "steps_per_print": 10**9,
        "zero_optimization": zero,
    }
