"""What the backward pass of one decoder layer holds: everything in it is recomputed from the layer's checkpoint.

With our own expert function that is, beside attention and shared expert: the tokens and two narrow products per route
(and the first wide product, unless it is made again), the rows of the routes while they are worked on, and one
projection in the values' precision where it is stored quantised.
"""

from __future__ import annotations

from recipes.catalog import Shape
from scripts.plan.parameters import Matrix, matrices
from scripts.plan.storage import GROUP, Storage
from scripts.plan.term import Term, number

LOOKUPS = 2**25
"Bytes of NF4 decoded at a time."
SCORES = 6
"Copies of all attention scores alive at once where no kernel fuses them: counted in transformers 5.23.0 gpt_oss."
UNEVEN = 2
"Rows of the busiest block of experts over those of an average one."


def layer_terms(shape: Shape, trained: tuple[Matrix, ...], rank: int, storage: Storage, tokens: int) -> list[Term]:
    """Bytes by part while one layer goes backward with `tokens` tokens."""
    if not shape.experts:
        return [_dense_layer(shape, storage, tokens), *_quantised_terms(shape, 0, storage)]
    experts = [matrix for matrix in trained if matrix.is_expert]
    expert_rank = rank if experts else 0
    return [
        _mixer(shape, storage, tokens),
        _scores(shape, storage, tokens),
        *_expert_terms(shape, expert_rank, storage, tokens),
        _factor_copies(shape, experts, rank, storage),
        *_quantised_terms(shape, expert_rank, storage),
    ]


def saved_bytes_per_token(shape: Shape, rank: int, storage: Storage) -> int:
    """Bytes that one layer's experts keep for backward per token: 25,216 for the 80B at rank 16 in bf16, 4,736 when the
    first product is made again, and 174,080 under autograd."""
    hidden, width, active = shape.hidden, shape.expert_intermediate, shape.experts_per_token
    if storage.experts == "plain":
        return storage.value_bytes * active * (3 * hidden + 5 * width)
    product = 2 * width if storage.keep_gate_up else 0
    return storage.value_bytes * (hidden + active * (2 * rank + product))


def _dense_layer(shape: Shape, storage: Storage, tokens: int) -> Term:
    values = 8 * shape.hidden + 4 * shape.intermediate + _query(shape) + _kv(shape)
    says = f"{tokens:,} tokens x {values:,} values kept by one layer x {storage.value_bytes} bytes"
    return Term("layer work", tokens * values * storage.value_bytes, says)


def _mixer(shape: Shape, storage: Storage, tokens: int) -> Term:
    """Attention or Gated DeltaNet, norms, residuals and the shared expert."""
    inner = shape.heads * shape.head_dim
    values = 4 * shape.shared_expert_intermediate + 6 * shape.hidden + 2 * _query(shape) + _kv(shape) + inner
    if shape.linear_attention:
        linear = matrices(shape)["linear_attention"]
        values += 3 * sum(matrix.outputs for matrix in linear if matrix.name != "out_proj")
    says = f"{tokens:,} tokens x {values:,} values of attention, norms and shared expert x {storage.value_bytes} bytes"
    return Term("layer work", tokens * values * storage.value_bytes, says)


def _scores(shape: Shape, storage: Storage, tokens: int) -> Term:
    """Attention with sinks has no fused kernel that we use: it holds tokens x tokens scores for every head."""
    if not shape.attention_sinks:
        return Term("attention scores", 0, "")
    says = f"{SCORES} x {shape.heads} heads x {tokens:,} x {tokens:,} scores x {storage.value_bytes} bytes"
    return Term("attention scores", SCORES * shape.heads * tokens**2 * storage.value_bytes, says)


def _expert_terms(shape: Shape, rank: int, storage: Storage, tokens: int) -> list[Term]:
    """What the experts keep, and the rows alive at once in their backward."""
    saved = saved_bytes_per_token(shape, rank, storage)
    how = {
        "plain": "by autograd",
        "lean": "by our function" if storage.keep_gate_up else "by our function, recomputing",
    }
    terms = [
        Term("experts, kept", tokens * saved, f"{tokens:,} tokens x {saved:,} bytes kept {how[storage.experts]}"),
    ]
    if storage.experts == "lean":
        hidden, width = shape.hidden, shape.expert_intermediate
        # Two of (rows, their gradient, its LoRA part); act, h, dh, dg. Recomputing also holds g and x.
        values = 2 * hidden + 5 * width if storage.keep_gate_up else 3 * hidden + 7 * width
        rows = float(tokens * shape.experts_per_token)
        share = ""
        if storage.experts_at_once:
            rows *= min(1.0, UNEVEN * storage.experts_at_once / shape.experts)
            share = f" ({storage.experts_at_once} of {shape.experts} experts at a time)"
        says = (
            f"{rows:,.0f} rows{share} x {values:,} values x {storage.value_bytes} bytes, while one layer is worked on"
        )
        terms.append(Term("experts, rows", rows * values * storage.value_bytes, says))
    return terms


def _factor_copies(shape: Shape, experts: list[Matrix], rank: int, storage: Storage) -> Term:
    """One layer's expert factors cast to the values' precision, and their gradients before they are added up."""
    parameters = sum(matrix.lora(rank) for matrix in experts) / shape.expert_layers
    if storage.experts != "lean":
        return Term("factor copies", 0, "")
    cast = storage.value_bytes if storage.adapter_bytes != storage.value_bytes else 0
    size = parameters * (cast + storage.value_bytes + (storage.adapter_bytes if cast else 0))
    says = f"{number(parameters)} values of one layer's factors: in the tokens' precision, and their gradients"
    return Term("factor copies", size, says)


def _quantised_terms(shape: Shape, rank: int, storage: Storage) -> list[Term]:
    """One projection of one layer as it is used: the largest, with its LoRA columns, its scales, and NF4's lookup."""
    if not storage.quantize:
        return []
    found = [matrix for group in matrices(shape).values() for matrix in group]
    largest = max(found, key=lambda m: m.inputs * m.outputs * m.per_layer)
    at_once = min(storage.experts_at_once or largest.per_layer, largest.per_layer)
    weights = largest.outputs * largest.inputs * at_once / storage.expert_split
    columns = largest.outputs * (rank if largest.is_expert else 0) * at_once
    scales = weights / GROUP * 2 * 4 if storage.double else 0
    lookup = 0.0
    if storage.quantize == "nf4":
        lookup = min(LOOKUPS, weights / 2) * (4 + 2 * storage.value_bytes) + weights / GROUP * storage.value_bytes
    size = storage.value_bytes * (weights + columns) + scales + lookup
    says = f"{number(weights)} weights of {at_once:,} x {largest.name} x {storage.value_bytes} bytes, and their scales"
    return [Term("dequantisation buffer", size, says + (" and lookups" if lookup else ""))]


def _query(shape: Shape) -> int:
    inner = shape.heads * shape.head_dim
    return inner * 2 if shape.gated_attention else inner


def _kv(shape: Shape) -> int:
    return 2 * shape.kv_heads * shape.head_dim
