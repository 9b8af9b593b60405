"""The memory form against five published runs of other trainers. No other published figure may set a constant.

What a publisher leaves open (batch, length, dtypes of the adapter) is assumed here and said so. Context and NCCL
buffers, which the driver sees and the publishers mostly do not count, are left out as there.

Errors as of 2026-11-27, nothing fitted: +3.8, -1.3, +0.7, +9.0 and -15.6 % (median 3.8 %). Held out, where rank and
length are not published but assumed: -5.0 and +5.3 %.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import Any

import pytest

from recipes.catalog import Shape, load_catalog
from recipes.recipe import Adapter, TargetGroup
from scripts.plan.memory import ALLOCATOR_GIB, SLACK, Batch, memory_terms
from scripts.plan.parameters import targeted
from scripts.plan.storage import BUCKET_VALUES, Quantised, Storage
from scripts.plan.term import GIB

CATALOG = load_catalog()
NEXT = CATALOG.models["Qwen/Qwen3-Next-80B-A3B-Instruct"].shape
QWEN_35B = CATALOG.models["Qwen/Qwen3.6-35B-A3B"].shape
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
FUSED = 0
"A fused cross-entropy kernel holds about 0.1 GiB of logits, less than one layer's backward: it never shows."


@dataclass(frozen=True)
class Point:
    """One published run: what it took, and the setting as far as it is published or assumed."""

    source: str
    gib: float
    within: float
    "Error that the publisher's rounding and what is not modelled may add."
    shape: Shape
    family: str
    adapter: Adapter
    storage: Storage
    batch: Batch

    def planned(self) -> float:
        trained = targeted(self.shape, CATALOG.families[self.family], self.adapter)
        terms = memory_terms(self.shape, trained, self.adapter.rank, self.storage, self.batch)
        return (1 + SLACK) * sum(term.size for term in terms) / GIB + ALLOCATOR_GIB

    @property
    def error(self) -> float:
        return self.planned() / self.gib - 1


def _storage(quantize: Quantised | None, adapter: float, gradient: float, optimizer: float, **other: Any) -> Storage:
    setting: dict[str, Any] = {"ranks": 1, "experts": "plain", "partitioned": False, "double": False} | other
    return Storage(quantize=quantize, value_bytes=2, adapter_bytes=adapter, gradient_bytes=gradient,
                   optimizer_bytes=optimizer, **setting)  # fmt: skip


# NF4 on every linear layer and expert, fp32 adapter and gradients, 8-bit Adam, one GPU.
AXOLOTL = _storage("nf4", 4, 4, 2)
POINTS = {
    "axolotl-80b": Point(
        "examples/qwen3-next of 2026-07-24: rank 16, micro-batch 2 x 2,048 packed, fused cross-entropy",
        47, 0.05, NEXT, "qwen3_next", Adapter(rank=16, targets=DENSE), AXOLOTL, Batch(4096, FUSED),
    ),
    "axolotl-80b-experts": Point(
        "the same with the routed experts: 2.2 billion more parameters at 10 bytes",
        71, 0.05, NEXT, "qwen3_next", Adapter(rank=16, targets=(*DENSE, "experts")), AXOLOTL, Batch(4096, FUSED),
    ),
    "unsloth-30b": Point(
        "unsloth.ai/docs/basics/faster-moe, unit GB or GiB; assumed rank 16 on all, bf16 adapter, 2,048 tokens",
        63, 0.1, QWEN_30B, "qwen3_moe", Adapter(rank=16, targets=("attention", "experts")),
        _storage(None, 2, 2, 2), Batch(2048, 512),
    ),
    "torchtune-8b": Point(
        "torchtune's README; assumed rank 8 on all linear layers, double-quantised NF4, 2 x 2,048, loss in 8 chunks",
        7.4, 0.1, LLAMA_8B, "mistral", Adapter(rank=8, targets=("attention", "mlp")),
        _storage("nf4", 2, 2, 4, double=True, rows_per_chunk=512, logit_bytes=12), Batch(4096, 4096),
    ),
    "ms-swift-80b": Point(
        "examples/models/qwen3_next/mcore.sh, 8 GPUs: rank 8 everywhere, tensor 2, expert 4, 4,096 packed tokens; "
        "dispatch buffers of expert parallelism are not modelled, and our engines have none",
        56, 0.2, NEXT, "qwen3_next", Adapter(rank=8, targets=(*DENSE, "experts")),
        _storage(None, 2, 4, 6, ranks=8, expert_split=4, dense_split=2, rows_per_chunk=4096, logit_bytes=12),
        Batch(4096, 4096),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", POINTS)
def test_the_memory_form_meets_a_published_run(name: str) -> None:
    point = POINTS[name]
    assert abs(point.error) <= point.within, f"{name}: planned {point.planned():.1f}, published {point.gib}"


def test_the_median_error_over_the_published_runs_is_small() -> None:
    assert statistics.median(abs(point.error) for point in POINTS.values()) <= 0.05


HELD_OUT = {
    "ms-swift-35b": Point(
        "examples/models/qwen3_5/transformers.sh, ZeRO-3, rank 8: 4 x 30 GiB; assumed 2,048 tokens, full logits",
        30,
        0.1,
        QWEN_35B,
        "qwen3_5_moe",
        Adapter(rank=8, targets=DENSE),
        _storage(
            None, 2, 6, 12, ranks=4, partitioned=True, bucket_values=BUCKET_VALUES, rows_per_chunk=2048, logit_bytes=12
        ),
        Batch(2048, 2048),
    ),
    "experts4bit-30b": Point(
        "experts4bit-qlora 0.58.1, QLoRA of Qwen3-30B on one GPU: 26.16 GB; assumed rank 16 on all, 2,048 tokens",
        26.16e9 / GIB,
        0.1,
        QWEN_30B,
        "qwen3_moe",
        Adapter(rank=16, targets=("attention", "experts")),
        _storage("nf4", 4, 4, 2, rows_per_chunk=512, logit_bytes=12),
        Batch(2048, 2048),
    ),
}
"Set no constant. Two points are too few to say more than that nothing is far off."


@pytest.mark.parametrize("name", HELD_OUT)
def test_the_memory_form_meets_a_run_that_set_no_constant(name: str) -> None:
    point = HELD_OUT[name]
    assert abs(point.error) <= point.within, f"{name}: planned {point.planned():.1f}, published {point.gib:.1f}"
