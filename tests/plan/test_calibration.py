"""The memory form against five published runs of other trainers. No other published figure may set a constant.

What a publisher leaves open (batch, length, dtypes of the adapter) is assumed here and said so. Context and NCCL
buffers, which the driver sees and the publishers mostly do not count, are left out as there.
"""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from recipes.catalog import Shape, load_catalog
from recipes.recipe import TargetGroup
from scripts.plan.memory import ALLOCATOR_GIB, GIB, LOGITS_BYTES, SLACK, Batch, Storage, memory_parts
from scripts.plan.parameters import targeted

CATALOG = load_catalog()
NEXT = CATALOG.models["Qwen/Qwen3-Next-80B-A3B-Instruct"].shape
QWEN_30B = CATALOG.models["Qwen/Qwen3-30B-A3B-Instruct-2507"].shape
LLAMA_8B = Shape(
    vocabulary=128256,
    hidden=4096,
    layers=32,
    attention_layers=32,
    heads=32,
    kv_heads=8,
    head_dim=128,
    intermediate=14336,
)
DENSE: tuple[TargetGroup, ...] = ("attention", "linear_attention", "shared_expert")
FUSED_LOSS = 0.1 * GIB / (NEXT.vocabulary * LOGITS_BYTES)
"Positions whose full logits weigh what a fused cross-entropy kernel takes: about 0.1 GiB."


def _axolotl() -> Storage:
    """NF4 on every linear layer and expert, fp32 adapter and gradients, 8-bit Adam, one GPU."""
    return Storage(1, 0.5625, 2, 4, 4, 2, "plain", partitioned=False)


def _peak_gib(
    shape: Shape, family: str, targets: Sequence[TargetGroup], rank: int, storage: Storage, batch: Batch
) -> float:
    trained = targeted(shape, CATALOG.families[family], targets)
    return (1 + SLACK) * sum(memory_parts(shape, trained, rank, storage, batch).values()) + ALLOCATOR_GIB


def test_axolotl_80b_qlora_without_experts_takes_47_gib() -> None:
    """examples/qwen3-next of 2026-07-24: rank 16, micro-batch 2 x 2,048 packed, fused cross-entropy."""
    peak = _peak_gib(NEXT, "qwen3_next", DENSE, 16, _axolotl(), Batch(4096, FUSED_LOSS))
    assert peak == pytest.approx(47, rel=0.05)


def test_axolotl_80b_qlora_with_experts_takes_71_gib() -> None:
    """The same run with the routed experts: 2.2 billion more parameters at 10 bytes."""
    peak = _peak_gib(NEXT, "qwen3_next", (*DENSE, "experts"), 16, _axolotl(), Batch(4096, FUSED_LOSS))
    assert peak == pytest.approx(71, rel=0.05)


def test_unsloth_30b_16_bit_lora_takes_63() -> None:
    """unsloth.ai/docs/basics/faster-moe, unit GB or GiB; assumed rank 16 on all, bf16 adapter, 2,048 tokens."""
    storage = Storage(1, 2, 2, 2, 2, 2, "plain", partitioned=False)
    peak = _peak_gib(QWEN_30B, "qwen3_moe", ("attention", "experts"), 16, storage, Batch(2048, 256))
    assert peak == pytest.approx(63, rel=0.1)


def test_torchtune_8b_qlora_takes_7_4_gib() -> None:
    """torchtune's README; assumed rank 8 on all linear layers, double-quantised NF4, 2 x 2,048, loss in 8 chunks."""
    storage = Storage(1, 0.516, 2, 2, 2, 4, "plain", partitioned=False)
    peak = _peak_gib(LLAMA_8B, "mistral", ("attention", "mlp"), 8, storage, Batch(4096, 4096 / 8))
    assert peak == pytest.approx(7.4, rel=0.1)


def test_ms_swift_80b_on_eight_gpus_takes_56_gib_each() -> None:
    """examples/models/qwen3_next/mcore.sh: rank 8 everywhere, tensor 2, expert 4, 4,096 packed tokens.

    Within 20 %: dispatch buffers of expert parallelism are not modelled, and our engines have none.
    """
    storage = Storage(8, 2, 2, 2, 4, 6, "plain", partitioned=False, expert_split=4, dense_split=2)
    peak = _peak_gib(NEXT, "qwen3_next", (*DENSE, "experts"), 8, storage, Batch(4096, 4096))
    assert peak == pytest.approx(56, rel=0.2)
