"""GiB per GPU by part, in closed form. Calibrated on five published runs (tests/plan/test_calibration.py).

peak = 1.03 x [weights + adapter + gradients + optimizer + checkpoints + buffers + max(layer work, logits)] + runtime
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from recipes.catalog import Gpu, Shape
from recipes.recipe import Recipe
from scripts.plan.parameters import Matrix, embedding_parameters, layer_parameters, matrices, small_parameters

GIB = 2**30
SLACK = 0.03
"Fragmentation and small tensors, as a share of everything that is counted."
ALLOCATOR_GIB = 0.3
COLLECTIVES_GIB = 1.0
"Buffers of NCCL between the GPUs of a node: an allowance, not measured."
LOGITS_BYTES = 12
"Per supervised token and word of the vocabulary: bf16 logits, fp32 copy, fp32 gradient, bf16 gradient."
BUCKET_VALUES = 500_000_000
"DeepSpeed 0.19.8's gradient bucket, allocated whole on a GPU; on a CPU untouched pages take nothing."
PREFETCH_ROOM = 1.05
"The trainer's limits leave room for two layers of this many layers' size, and for the largest matrix outside them."
STORED_BYTES = {"int8": 1.002, "nf4": 0.5625}
"Per quantised weight with its scales: one fp32 scale per row of 2048; 4 bits + fp32 scale per block of 64."


@dataclass(frozen=True)
class Storage:
    """What an engine keeps in memory, in bytes per value, and how it computes the experts."""

    ranks: int
    "GPUs that share one copy of what is partitioned."
    matrix_bytes: float
    "Per frozen weight that a quantiser may take: every large matrix."
    value_bytes: int
    "Of activations, router, embeddings and norms."
    adapter_bytes: float
    gradient_bytes: float
    optimizer_bytes: float
    experts: Literal["fold", "plain", "lean"]
    "fold: PEFT makes W + delta of all experts. plain: grouped GEMMs under autograd. lean: own backward, little saved."
    partitioned: bool
    "Weights, adapter and its states are split over the ranks and gathered layer by layer."
    expert_split: int = 1
    "Ways in which experts are split without gathering (expert parallelism)."
    dense_split: int = 1
    "Ways in which all other weights are split without gathering (tensor parallelism)."
    bucket_values: int = 0
    "Of the buffer in which gradients are reduced."

    @property
    def quantised(self) -> bool:
        """Whether frozen weights must be dequantised before they are used."""
        return self.matrix_bytes < 2


def storage_of(recipe: Recipe, ranks: int, gpu: Gpu) -> Storage:
    """What our engines keep.

    zero3: adapter and gradients as the weights, fp32 gradients for the step, fp32 masters and Adam moments; all
    partitioned. replica: the whole model on each GPU; fp32 adapter, gradients and Adam moments.
    """
    value = 4 if recipe.training.precision == "fp32" else 2
    if recipe.hardware.engine == "zero3":
        bucket = BUCKET_VALUES if gpu.device == "cuda" else 0
        return Storage(ranks, value, value, value, 2 * value + 4, 12, "fold", partitioned=True, bucket_values=bucket)
    stored = STORED_BYTES[recipe.hardware.quantize] if recipe.hardware.quantize else value
    return Storage(ranks, stored, value, 4, 4, 8, "lean", partitioned=False)


@dataclass(frozen=True)
class Batch:
    """One micro-batch of one GPU: padded tokens, and those whose logits are computed."""

    tokens: int
    logits: float


def memory_parts(
    shape: Shape, trained: tuple[Matrix, ...], rank: int, storage: Storage, batch: Batch
) -> dict[str, float]:
    """GiB per GPU by part, at the moment of the peak; their sum x (1 + SLACK) is what tensors take.

    "never at once" is negative: layer work and logits follow each other, so the smaller of the two does not count.
    """
    ranks = storage.ranks if storage.partitioned else 1
    adapter = sum(matrix.lora(rank) for matrix in trained) / storage.expert_split / ranks
    bucket = storage.bucket_values * storage.value_bytes
    work = layer_work(shape, trained, rank, storage, batch.tokens)
    logits = batch.logits * shape.vocabulary * LOGITS_BYTES / storage.dense_split
    parts = {
        "weights": frozen_bytes(shape, storage) / ranks,
        "adapter": adapter * storage.adapter_bytes,
        "gradients": adapter * storage.gradient_bytes + bucket,
        "optimizer": adapter * storage.optimizer_bytes,
        "checkpoints": shape.layers * batch.tokens * shape.hidden * storage.value_bytes,
        "gather buffer": gather_bytes(shape, trained, rank, storage),
        "layer work": work,
        "fold buffer": fold_bytes(shape, trained, storage),
        "dequantisation buffer": dequantised_bytes(shape, storage),
        "logits": logits,
    }
    layer = parts["layer work"] + parts["fold buffer"] + parts["dequantisation buffer"]
    parts["never at once"] = -min(layer, logits)
    return {name: size / GIB for name, size in parts.items() if size}


def peak_gib(parts: dict[str, float], gpu: Gpu, ranks: int) -> dict[str, float]:
    """The parts with slack and runtime added: their sum is the peak as the driver sees it."""
    runtime = ALLOCATOR_GIB + gpu.context_gib + (COLLECTIVES_GIB if ranks > 1 and gpu.device == "cuda" else 0)
    return parts | {"slack 3 %": SLACK * sum(parts.values()), "runtime": runtime}


def frozen_bytes(shape: Shape, storage: Storage) -> float:
    """Bytes of the frozen weights of one whole model; per GPU where they are split without gathering."""
    groups = matrices(shape)
    experts = sum(m.parameters for m in groups.get("experts", ()))
    dense = sum(m.parameters for name, group in groups.items() if name != "experts" for m in group)
    small = embedding_parameters(shape) + small_parameters(shape)
    split = experts / storage.expert_split + dense / storage.dense_split
    return split * storage.matrix_bytes + small * storage.value_bytes / storage.dense_split


def layer_work(shape: Shape, trained: tuple[Matrix, ...], rank: int, storage: Storage, tokens: int) -> float:
    """Bytes that one layer's backward holds: everything is recomputed from its checkpoint, one layer at a time."""
    hidden, kv = shape.hidden, 2 * shape.kv_heads * shape.head_dim
    inner = shape.heads * shape.head_dim
    query = inner * 2 if shape.gated_attention else inner
    if not shape.experts:
        return storage.value_bytes * tokens * (8 * hidden + 4 * shape.intermediate + query + kv)
    active, width = shape.experts_per_token, shape.expert_intermediate
    if storage.experts == "lean":
        expert_rank = rank if any(m.name.startswith("mlp.experts.") for m in trained) else 0
        saved = hidden + 2 * active * expert_rank + 2 * active * width
    else:
        saved = active * (3 * hidden + (5 if storage.experts == "fold" else 3) * width)
    values = saved + 4 * shape.shared_expert_intermediate + 6 * hidden + 2 * query + kv + inner
    if shape.linear_attention:
        values += 3 * _linear_inputs(shape)
    return storage.value_bytes * tokens * values


def fold_bytes(shape: Shape, trained: tuple[Matrix, ...], storage: Storage) -> float:
    """W + delta of every parametrised matrix of one layer, and the weight gradient of the largest."""
    if storage.experts != "fold":
        return 0
    sizes = [matrix.parameters / shape.layers for matrix in trained if matrix.parametrised]
    return storage.value_bytes * (sum(sizes) + max(sizes, default=0))


def gather_bytes(shape: Shape, trained: tuple[Matrix, ...], rank: int, storage: Storage) -> float:
    """What ZeRO-3 may hold gathered (stage3_max_live_parameters): two layers, and the embedding or the head."""
    if not storage.partitioned:
        return 0
    layer = layer_parameters(shape) + sum(matrix.lora(rank) for matrix in trained) / shape.layers
    return storage.value_bytes * (2 * PREFETCH_ROOM * layer + shape.vocabulary * shape.hidden)


def dequantised_bytes(shape: Shape, storage: Storage) -> float:
    """One projection of one layer in bf16: the largest."""
    if not storage.quantised:
        return 0
    found = [matrix for group in matrices(shape).values() for matrix in group]
    per_layer = max(m.parameters / (shape.layers if m.parametrised else m.copies) for m in found)
    return per_layer * storage.value_bytes / storage.expert_split


def _linear_inputs(shape: Shape) -> int:
    linear = matrices(shape)["linear_attention"]
    return sum(matrix.outputs for matrix in linear if matrix.name != "out_proj")
