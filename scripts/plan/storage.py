"""What an engine keeps in memory, in bytes per value: weights as stored, adapter, gradients, optimizer, and how it
computes the experts."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from recipes.catalog import Gpu
from recipes.recipe import Recipe
from scripts.plan.parameters import Matrix

Quantised = Literal["int8", "nf4"]

BUCKET_VALUES = 500_000_000
"DeepSpeed 0.19.8's gradient bucket, allocated whole on a GPU; on a CPU untouched pages take nothing."
GROUP = 64
"Inputs that share a scale; their greatest common divisor with a row that 64 does not divide (trainer/experts)."
SCALE_GROUP = 256
"Scales that share a step, being quantised themselves."
MOMENT_BLOCK = 256
"Moments of the 8-bit optimizer that share a scale (trainer/adamw_8bit.py)."
CODES_PER_BYTE = {"int8": 1, "nf4": 2}


@dataclass(frozen=True)
class Storage:
    """What an engine keeps, and how it computes the experts."""

    ranks: int
    "GPUs that share one copy of what is partitioned."
    quantize: Quantised | None
    "How every large matrix is stored; None keeps it as the values are."
    value_bytes: int
    "Of activations, router, embeddings and norms."
    adapter_bytes: float
    gradient_bytes: float
    optimizer_bytes: float
    experts: Literal["plain", "lean"]
    "plain: grouped products under autograd, which keeps every product. lean: our own backward, little kept."
    partitioned: bool
    "Weights, adapter and its states are split over the ranks and gathered layer by layer."
    double: bool = True
    "Whether the scales are quantised too."
    keep_gate_up: bool = True
    "Lean: whether the first product is kept for backward, or made again."
    experts_at_once: int | None = None
    "Lean: experts whose rows are worked on at a time; None takes all."
    expert_split: int = 1
    "Ways in which experts are split without gathering (expert parallelism)."
    dense_split: int = 1
    "Ways in which all other weights are split without gathering (tensor parallelism)."
    bucket_values: int = 0
    "Of the buffer in which gradients are reduced."
    copy_bytes: float = 0
    "Of a working copy of each LoRA value of a linear layer, in the values' precision, beside its fp32 master."
    rows_per_chunk: int = 1024
    "Supervised positions whose logits the cross-entropy holds at a time."
    logit_bytes: int = 6
    "Of one logit in a chunk: bf16 and an fp32 copy."

    def matrix_bytes(self, matrix: Matrix) -> float:
        """Bytes of all copies of a large frozen matrix as they are stored."""
        if self.quantize is None:
            return matrix.parameters * self.value_bytes
        one = quantised_bytes(matrix.outputs, matrix.inputs, self.quantize, self.double)
        return matrix.copies * one

    @property
    def state_bytes(self) -> float:
        """Of one trained value: itself, its gradient and its optimizer state."""
        return self.adapter_bytes + self.gradient_bytes + self.optimizer_bytes


def storage_of(recipe: Recipe, ranks: int, gpu: Gpu) -> Storage:
    """What our engines keep.

    zero3: adapter and gradients as the weights, fp32 gradients for the step, fp32 masters and Adam moments; all
    partitioned. replica: the whole model on each GPU; fp32 adapter, gradients and Adam moments, and a copy of the
    linears' LoRA in bf16; gradients are summed over the GPUs in place. adamw_8bit: bf16 gradients, and two moments of a
    byte and a share of an fp32 scale each. Both compute the experts by our own function; on a CPU it takes them one at
    a time.
    """
    value = 4 if recipe.training.precision == "fp32" else 2
    on_gpu = gpu.device == "cuda"
    at_once = None if on_gpu else 1
    logit = 4 if value == 4 else 6
    if recipe.hardware.engine == "zero3":
        return Storage(
            ranks,
            None,
            value,
            value,
            2 * value + 4,
            12,
            "lean",
            partitioned=True,
            experts_at_once=at_once,
            bucket_values=BUCKET_VALUES if on_gpu else 0,
            logit_bytes=logit,
        )
    quantize = recipe.hardware.quantize
    gradient, moments = (2, 2 * (1 + 4 / MOMENT_BLOCK)) if recipe.training.optimizer == "adamw_8bit" else (4, 8)
    return Storage(
        ranks,
        quantize,
        value,
        4,
        gradient,
        moments,
        "lean",
        partitioned=False,
        experts_at_once=at_once,
        copy_bytes=2 if value == 2 else 0,
        logit_bytes=logit,
    )


def quantised_bytes(outputs: int, inputs: int, kind: Quantised, double: bool = True, *, per_row: bool = False) -> int:
    """Bytes of one matrix as trainer/experts/quantised.py stores it, exactly.

    | | bytes per weight, where 64 divides the row |
    |---|---|
    | int8, scales doubly quantised | 1 + 1/64 + 4/(64 x 256) = 1.016 |
    | int8, one fp32 scale per row | 1 + 4/inputs |
    | nf4, scales doubly quantised | 0.5 + 1/64 + 4/(64 x 256) = 0.516 |
    | nf4, fp32 scales | 0.5 + 4/64 = 0.5625 |
    """
    group = inputs if per_row else math.gcd(GROUP, inputs)
    scales = outputs * inputs // group
    codes = outputs * inputs // CODES_PER_BYTE[kind]
    if not double or per_row:
        return codes + 4 * scales
    steps = -(-scales // SCALE_GROUP)
    return codes + steps * min(SCALE_GROUP, scales) + 4 * steps + 4  # codes of scales, steps, the mean
