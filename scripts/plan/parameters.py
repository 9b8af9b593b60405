"""Parameter counts in closed form from the shapes in models.yaml: the base model's, and what LoRA adds to it.

adapter_parameters(model, family, Adapter(rank=16))   # 4_128_768 for the 80B
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from types import MappingProxyType
from typing import Literal

from recipes.catalog import BaseModelFacts, Family, LatentAttention, Shape
from recipes.recipe import Adapter, TargetGroup


@dataclass(frozen=True)
class Matrix:
    """A kind of weight matrix: `copies` of (outputs x inputs) in the whole model; `active` of them see each token."""

    name: str
    "The name by which a family's group lists it."
    inputs: int
    outputs: int
    copies: int
    active: int
    parametrised: bool = False
    "Reached as a bare parameter, not as a linear layer."
    per_layer: int = 1
    "Copies in one layer: its experts."
    shared: Literal["", "inputs", "outputs"] = ""
    "The side whose LoRA factor all copies of a layer share."

    @property
    def parameters(self) -> int:
        """Weights of all copies."""
        return self.inputs * self.outputs * self.copies

    @property
    def is_expert(self) -> bool:
        """A routed expert's matrix."""
        return self.name.startswith("mlp.experts.")

    def lora(self, rank: int) -> int:
        """Trainable values of LoRA at this rank: rank x (inputs + outputs) per copy; a shared factor once a layer."""
        layers = self.copies // self.per_layer
        inputs = self.inputs * (layers if self.shared == "inputs" else self.copies)
        outputs = self.outputs * (layers if self.shared == "outputs" else self.copies)
        return rank * (inputs + outputs)


@lru_cache(maxsize=64)
def matrices(shape: Shape) -> Mapping[TargetGroup, tuple[Matrix, ...]]:
    """Every matrix that LoRA may reach, by target group, trained or not."""
    groups: dict[TargetGroup, tuple[Matrix, ...]] = {"attention": _attention(shape)}
    if shape.linear_attention:
        groups["linear_attention"] = _linear_attention(shape)
    if shape.intermediate:
        groups["mlp"] = _mlp("", shape.hidden, shape.intermediate, shape.layers - shape.expert_layers)
    if shape.shared_expert_intermediate:
        width = shape.shared_expert_intermediate
        name = "mlp.shared_expert." if shape.shared_expert_gate else "mlp.shared_experts."
        groups["shared_expert"] = _mlp(name, shape.hidden, width, shape.expert_layers)
    if shape.experts:
        groups["experts"] = _experts(shape)
    return MappingProxyType(groups)


def targeted(shape: Shape, family: Family, adapter: Adapter) -> tuple[Matrix, ...]:
    """The matrices a recipe's adapter trains: those that the family's groups list.

    With expert layout shared_outer the factors on the hidden dimension are one for all experts of a layer: A of
    gate_up and B of down.
    """
    found: list[Matrix] = []
    for target in adapter.targets:
        group = family.groups[target]
        listed = {*group.linears, *group.parameters}
        found += [matrix for matrix in matrices(shape)[target] if matrix.name in listed]
    if adapter.expert_layout == "per_expert":
        return tuple(found)
    return tuple(
        replace(m, shared="inputs" if m.name.endswith("gate_up_proj") else "outputs") if m.is_expert else m
        for m in found
    )


def adapter_parameters(model: BaseModelFacts, family: Family, adapter: Adapter) -> int:
    """Trainable parameters of the adapter: exactly what the trainer makes, checked on the meta device by the tests."""
    return sum(matrix.lora(adapter.rank) for matrix in targeted(model.shape, family, adapter))


def embedding_parameters(shape: Shape) -> int:
    """Input embedding and output head; one matrix where they are tied."""
    return shape.vocabulary * shape.hidden * (1 if shape.tied_embeddings else 2)


def small_parameters(shape: Shape) -> int:
    """Router, norms, convolutions, gates and biases: never quantised, never trained."""
    hidden, layers = shape.hidden, shape.layers
    total = 2 * hidden * layers + hidden  # two norms a layer, one at the end
    total += hidden * shape.experts * shape.expert_layers
    if shape.shared_expert_intermediate and shape.shared_expert_gate:
        total += hidden * shape.expert_layers
    if shape.qk_norm:
        total += 2 * shape.head_dim * shape.attention_layers
    if shape.attention_bias:
        total += (shape.heads + 2 * shape.kv_heads) * shape.head_dim * shape.attention_layers
    if shape.biased_throughout:
        total += hidden * shape.attention_layers
        total += shape.experts * (1 + 2 * shape.expert_intermediate + hidden) * shape.expert_layers
    if shape.attention_sinks:
        total += shape.heads * shape.attention_layers
    if latent := shape.latent_attention:
        total += (latent.query_rank + latent.kv_rank) * layers  # their norms
    if linear := shape.linear_attention:
        channels = 2 * linear.key_heads * linear.key_head_dim + linear.value_heads * linear.value_head_dim
        # convolution, A_log, dt_bias, gated norm
        total += (channels * linear.conv_kernel + 2 * linear.value_heads + linear.value_head_dim) * linear.layers
    return total


def base_parameters(shape: Shape) -> int:
    """All parameters of the base model, without multi-token-prediction layers."""
    large = sum(matrix.parameters for group in matrices(shape).values() for matrix in group)
    return large + embedding_parameters(shape) + small_parameters(shape)


def layer_parameters(shape: Shape) -> int:
    """Parameters of the largest decoder layer: what ZeRO-3 gathers at once. Small ones are spread evenly."""
    per_layer = small_parameters(shape) // shape.layers
    mixers = []
    for group, found in matrices(shape).items():
        size = sum(matrix.parameters for matrix in found)
        if group == "attention":
            mixers.append(size // shape.attention_layers)
        elif group == "linear_attention" and shape.linear_attention:
            mixers.append(size // shape.linear_attention.layers)
        elif not (group == "mlp" and shape.experts):  # a dense layer is smaller than one with all its experts
            per_layer += size // (shape.expert_layers or shape.layers)
    return per_layer + max(mixers)


def _attention(shape: Shape) -> tuple[Matrix, ...]:
    hidden, layers = shape.hidden, shape.attention_layers
    if shape.latent_attention:
        return _latent_attention(shape, shape.latent_attention)
    inner, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    query = inner * 2 if shape.gated_attention else inner
    return (
        Matrix("q_proj", hidden, query, layers, layers),
        Matrix("k_proj", hidden, kv, layers, layers),
        Matrix("v_proj", hidden, kv, layers, layers),
        Matrix("o_proj", inner, hidden, layers, layers),
    )


def _latent_attention(shape: Shape, latent: LatentAttention) -> tuple[Matrix, ...]:
    heads, layers = shape.heads, shape.attention_layers
    keys = shape.head_dim - latent.rope_head_dim
    sizes = {
        "q_a_proj": (shape.hidden, latent.query_rank),
        "q_b_proj": (latent.query_rank, heads * shape.head_dim),
        "kv_a_proj_with_mqa": (shape.hidden, latent.kv_rank + latent.rope_head_dim),
        "kv_b_proj": (latent.kv_rank, heads * (keys + latent.value_head_dim)),
        "o_proj": (heads * latent.value_head_dim, shape.hidden),
    }
    return tuple(Matrix(name, inputs, outputs, layers, layers) for name, (inputs, outputs) in sizes.items())


def _linear_attention(shape: Shape) -> tuple[Matrix, ...]:
    linear = shape.linear_attention
    assert linear is not None
    key, value = linear.key_heads * linear.key_head_dim, linear.value_heads * linear.value_head_dim
    if linear.layout == "qkvz_ba":
        inputs = {"in_proj_qkvz": 2 * key + 2 * value, "in_proj_ba": 2 * linear.value_heads}
    else:
        heads = linear.value_heads
        inputs = {"in_proj_qkv": 2 * key + value, "in_proj_z": value, "in_proj_b": heads, "in_proj_a": heads}
    layers = linear.layers
    projections = [Matrix(name, shape.hidden, outputs, layers, layers) for name, outputs in inputs.items()]
    return (*projections, Matrix("out_proj", value, shape.hidden, layers, layers))


def _mlp(prefix: str, hidden: int, width: int, layers: int) -> tuple[Matrix, ...]:
    """A gated MLP. With a prefix it is a shared expert, whose matrices are reached as parameters."""
    suffix = ".weight" if prefix else ""
    return tuple(
        Matrix(f"{prefix}{name}{suffix}", inputs, outputs, layers, layers, bool(prefix))
        for name, inputs, outputs in (
            ("gate_proj", hidden, width),
            ("up_proj", hidden, width),
            ("down_proj", width, hidden),
        )
    )


def _experts(shape: Shape) -> tuple[Matrix, ...]:
    hidden, width = shape.hidden, shape.expert_intermediate
    copies, active = shape.expert_layers * shape.experts, shape.expert_layers * shape.experts_per_token
    return (
        Matrix("mlp.experts.gate_up_proj", hidden, 2 * width, copies, active, True, shape.experts),
        Matrix("mlp.experts.down_proj", width, hidden, copies, active, True, shape.experts),
    )
