"""GiB per GPU by part, in closed form. Calibrated on five published runs (tests/plan/test_calibration.py).

peak = 1.03 x [weights + adapter + gradients + optimizer + checkpoints + buffers + max(one layer, loss)] + runtime
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from recipes.catalog import Gpu, Shape
from scripts.plan.layer import layer_terms
from scripts.plan.parameters import (
    Matrix,
    embedding_parameters,
    layer_parameters,
    matrices,
    small_parameters,
)
from scripts.plan.storage import Storage
from scripts.plan.term import GIB, Term, number, present

SLACK = 0.03
"Fragmentation and small tensors, as a share of everything that is counted."
ALLOCATOR_GIB = 0.3
COLLECTIVES_GIB = 1.0
"Buffers of NCCL between the GPUs of a node: an allowance, not measured."
PREFETCH_ROOM = 1.05
"The trainer's limits leave room for two layers of this many layers' size, and for the largest matrix outside them."
OUTSIDE_TORCH = ("context", "collectives")
"Parts that torch's allocator does not see."


@dataclass(frozen=True)
class Batch:
    """One micro-batch of one GPU: tokens with their padding, and those that carry loss."""

    tokens: int
    supervised: float


def memory_terms(
    shape: Shape, trained: tuple[Matrix, ...], rank: int, storage: Storage, batch: Batch
) -> tuple[Term, ...]:
    """Bytes per GPU by part, at the moment of the peak; their sum x (1 + SLACK) is what tensors take.

    "never at once" is negative: one layer's backward and the loss follow each other, so the smaller does not count.
    """
    layer = layer_terms(shape, trained, rank, storage, batch.tokens)
    loss = loss_term(shape, storage, batch)
    smaller = min(sum(term.size for term in layer), loss.size)
    overlap = Term(
        "never at once", -smaller, "one layer's backward and the loss follow each other: the smaller of both"
    )
    return present(
        (
            frozen_term(shape, storage),
            *_state_terms(trained, rank, storage),
            _checkpoints(shape, storage, batch.tokens),
            _gather_buffer(shape, trained, rank, storage),
            *layer,
            loss,
            overlap,
        )
    )


def peak_terms(terms: tuple[Term, ...], gpu: Gpu, ranks: int) -> tuple[Term, ...]:
    """The parts with slack and runtime added: their sum is the peak as the driver sees it."""
    counted = sum(term.size for term in terms)
    collectives = COLLECTIVES_GIB if ranks > 1 and gpu.device == "cuda" else 0.0
    return present(
        (
            *terms,
            Term("slack 3 %", SLACK * counted, f"fragmentation and small tensors: 3 % of {counted / GIB:.2f} GiB"),
            Term("allocator", ALLOCATOR_GIB * GIB, "rounding of torch's allocator: an allowance"),
            Term("context", gpu.context_gib * GIB, f"held by a process on {gpu.device} before its first tensor"),
            Term("collectives", collectives * GIB, "buffers of NCCL: an allowance"),
        )
    )


def memory_parts(
    shape: Shape, trained: tuple[Matrix, ...], rank: int, storage: Storage, batch: Batch
) -> dict[str, float]:
    """The parts in GiB by name."""
    return {term.name: term.size / GIB for term in memory_terms(shape, trained, rank, storage, batch)}


@lru_cache(maxsize=256)
def frozen_term(shape: Shape, storage: Storage) -> Term:
    """The frozen weights of one whole model; per GPU where they are split without gathering, or partitioned."""
    groups = matrices(shape)
    found = [(name, matrix) for name, group in groups.items() for matrix in group]
    stored = sum(
        storage.matrix_bytes(m) / (storage.expert_split if name == "experts" else storage.dense_split)
        for name, m in found
    )
    large = sum(m.parameters for _, m in found)
    small = embedding_parameters(shape) + small_parameters(shape)
    ranks = storage.ranks if storage.partitioned else 1
    kind = storage.quantize or f"{8 * storage.value_bytes}-bit"
    each = sum(storage.matrix_bytes(m) for _, m in found) / large
    says = (
        f"{number(large)} weights of large matrices x {each:.4g} bytes ({kind})"
        f" + {number(small)} of embeddings, router and norms x {storage.value_bytes}"
    )
    whole = stored + small * storage.value_bytes / storage.dense_split
    return Term("weights", whole / ranks, says + _over(ranks))


def loss_term(shape: Shape, storage: Storage, batch: Batch) -> Term:
    """Chunked cross-entropy: logits in the values' precision and in fp32 for one chunk of supervised positions, the
    gradient of their hidden states, and the hidden states with their gradient."""
    value = storage.value_bytes
    rows, per_logit = min(float(storage.rows_per_chunk), batch.supervised), storage.logit_bytes
    kept = (batch.supervised + 2 * batch.tokens) * shape.hidden * value
    says = (
        f"{rows:,.0f} positions at a time x {shape.vocabulary:,} words x {per_logit} bytes"
        f" + hidden states and gradients, {number(kept)} bytes"
    )
    return Term("loss", (rows * shape.vocabulary * per_logit + kept) / storage.dense_split, says)


def _state_terms(trained: tuple[Matrix, ...], rank: int, storage: Storage) -> tuple[Term, ...]:
    """Adapter, gradients with the buffer they are reduced in, and the optimizer's state."""
    ranks = storage.ranks if storage.partitioned else 1
    parameters = sum(matrix.lora(rank) for matrix in trained) / storage.expert_split
    bucket = storage.bucket_values * storage.value_bytes
    terms = [
        Term(name, parameters / ranks * size, f"{number(parameters)} trained values x {size:g} bytes" + _over(ranks))
        for name, size in (
            ("adapter", storage.adapter_bytes),
            ("gradients", storage.gradient_bytes),
            ("optimizer", storage.optimizer_bytes),
        )
    ]
    reduced = f"{number(storage.bucket_values)} values x {storage.value_bytes} bytes, allocated whole"
    linear = sum(matrix.lora(rank) for matrix in trained if not matrix.is_expert) * storage.copy_bytes
    copied = f"{number(linear)} bytes of the linears' LoRA in the values' precision"
    return (*terms, Term("adapter copy", linear, copied), Term("reduction buffer", bucket, reduced))


def _checkpoints(shape: Shape, storage: Storage, tokens: int) -> Term:
    size = shape.layers * tokens * shape.hidden * storage.value_bytes
    says = f"{shape.layers} layers x {tokens:,} tokens x {shape.hidden:,} x {storage.value_bytes} bytes"
    return Term("checkpoints", size, says + "; all else is made again in backward")


def _gather_buffer(shape: Shape, trained: tuple[Matrix, ...], rank: int, storage: Storage) -> Term:
    """What ZeRO-3 may hold gathered (stage3_max_live_parameters): two layers, and the embedding or the head."""
    if not storage.partitioned:
        return Term("gather buffer", 0, "")
    layer = layer_parameters(shape) + sum(matrix.lora(rank) for matrix in trained) / shape.layers
    outside = shape.vocabulary * shape.hidden
    says = (
        f"(2 x {PREFETCH_ROOM} layers x {number(layer)} + {number(outside)} of the embedding) values x "
        f"{storage.value_bytes} bytes"
    )
    return Term("gather buffer", storage.value_bytes * (2 * PREFETCH_ROOM * layer + outside), says)


def _over(ranks: int) -> str:
    return f", over {ranks} GPUs" if ranks > 1 else ""
