"""Facts about base models and rented hardware: models.yaml and hardware.yaml as frozen tables, each row dated.

catalog = load_catalog()
catalog.models["Qwen/Qwen3-Next-80B-A3B-Instruct"].shape.experts   # 512
"""

from __future__ import annotations

import datetime
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator

from recipes.errors import InputError, Problem
from recipes.recipe import BackendName, Strict, TargetGroup
from recipes.strict_yaml import read_yaml
from recipes.validate import validated

FOLDER = Path(__file__).parent

Date = Annotated[datetime.date, BeforeValidator(lambda v: datetime.date.fromisoformat(v) if isinstance(v, str) else v)]
Names = Annotated[tuple[str, ...], Field(strict=False)]


class Fact(Strict):
    """Base of every catalog row: where its figures come from and when they were read."""

    source: str
    date: Date


class Group(Strict):
    """How one target group is reached in a family of models."""

    linears: Names = ()
    "Last names of nn.Linear modules, for PEFT's target_modules; names that PEFT never rewrites."
    parameters: Names = ()
    "Suffixes of parameters inside the MoE block, for PEFT's target_parameters."


class Family(Fact):
    """One modelling class of transformers: the names its layers use."""

    model_type: str
    "config.json's model_type."
    groups: dict[TargetGroup, Group]
    moe_block: str | None = None
    "Full class path of the block that holds router and experts; None in dense families."
    frozen: Names = ()
    "Suffixes of parameters that must never train: router and shared-expert gate."

    @property
    def our_experts(self) -> bool:
        """Whether our expert function computes its experts; where they are no target group, transformers' own does."""
        return "experts" in self.groups


class LinearAttention(Strict):
    """Gated DeltaNet layers."""

    layers: int
    key_heads: int
    value_heads: int
    key_head_dim: int
    value_head_dim: int
    conv_kernel: int
    layout: Literal["qkvz_ba", "qkv_z_b_a"]
    "How the input projections are fused: in_proj_qkvz + in_proj_ba, or in_proj_qkv, _z, _b, _a apart."


class LatentAttention(Strict):
    """Multi-head latent attention: queries, keys and values through narrow projections (DeepSeek-V3)."""

    query_rank: int
    kv_rank: int
    rope_head_dim: int
    value_head_dim: int


class Shape(Strict):
    """The sizes a closed form needs; names as in transformers' configs where they are clear."""

    vocabulary: int
    hidden: int
    layers: int
    attention_layers: int
    "Layers with softmax attention."
    heads: int
    kv_heads: int
    head_dim: int
    gated_attention: bool = False
    "q_proj is doubled: query and output gate."
    qk_norm: bool = False
    attention_bias: bool = False
    "q, k and v have a bias."
    biased_throughout: bool = False
    "So have o, the router and the experts."
    attention_sinks: bool = False
    "Each head may attend to nothing; transformers then holds every score, tokens x tokens."
    linear_attention: LinearAttention | None = None
    latent_attention: LatentAttention | None = None
    "head_dim is then that of queries and keys, the rotated part included."
    intermediate: int = 0
    "Width of a dense MLP; 0 where every layer is a mixture of experts."
    dense_layers: int = 0
    "First layers of a mixture of experts that have a dense MLP all the same."
    experts: int = 0
    experts_per_token: int = 0
    expert_intermediate: int = 0
    shared_expert_intermediate: int = 0
    shared_expert_gate: bool = True
    "The shared expert has a gate; without one its module is called shared_experts."
    tied_embeddings: bool = False

    @property
    def expert_layers(self) -> int:
        """Layers with routed experts."""
        return self.layers - self.dense_layers if self.experts else 0


class BaseModelFacts(Fact):
    """One open-weight model."""

    family: str
    parameters: int
    "Counted on the meta device, without MTP layers."
    shape: Shape
    context_tokens: int
    licence: str
    thinking: bool = False
    "The chat template opens a thought: train it on reasoning traces only."
    checkpoint_gb: float
    "Bytes of the published checkpoint / 1e9."
    staged: bool = True
    "False for the smoke model, which is made on the spot."
    note: str = ""


class Gpu(Fact):
    """One kind of GPU."""

    device: Literal["cuda", "cpu"] = "cuda"
    context_gib: float = 1.4
    "Held by a process before its first tensor: the CUDA context takes 0.5-1.4."
    memory_gib: float
    "What torch can use, less than the label: an '80 GB' card has 79.2 GiB."
    bf16_tflops: float
    "Attainable dense bf16 rate, not the data sheet's."
    hbm_gb_per_second: float
    bus_gb_per_second: float
    "NCCL bus bandwidth between the GPUs of one node."
    layer_seconds: float
    "Fixed cost of one layer in one forward-and-backward pass, however few its tokens."


class Rented(Fact):
    """What a price row and an offer have in common."""

    backend: BackendName
    gpu: str
    provider_type: str
    "What the provider calls it: a Runpod GPU id or pool, an instance type."
    storage_gb_per_second: float
    "Reading staged weights: network volume or local NVMe."
    start_minutes: float
    "From request to first command, image pull included."
    ram_gib: float | None = None
    "Host memory of the node; null where the provider does not say."
    network_gb_per_second: float | None = None
    "NCCL bus bandwidth between several such nodes; null where it is rented as one node only."
    efa_cards: int = 0
    "Network cards of the node that carry EFA."


class Price(Rented):
    """One row of hardware.yaml: a price per GPU, and the numbers of GPUs it can be had with."""

    gpus: Annotated[tuple[int, ...], Field(min_length=1, strict=False)]
    usd_per_gpu_hour: float


class Offer(Rented):
    """One thing that can be rented: GPUs of one node, at a price."""

    gpus: int
    usd_per_hour: float
    "For the whole node."


class Tables(Strict):
    """The two files as written, cross-checked."""

    families: dict[str, Family]
    models: dict[str, BaseModelFacts]
    refused: dict[str, str] = Field(default_factory=dict)
    gpus: dict[str, Gpu]
    offers: dict[str, Price]

    @model_validator(mode="after")
    def _names_exist(self) -> Tables:
        for name, model in self.models.items():
            if model.family not in self.families:
                raise ValueError(f"models.{name}.family is '{model.family}'; one of {', '.join(self.families)}")
        for name, offer in self.offers.items():
            if offer.gpu not in self.gpus:
                raise ValueError(f"offers.{name}.gpu is '{offer.gpu}'; one of {', '.join(self.gpus)}")
        return self


@dataclass(frozen=True)
class Catalog:
    """What can be trained and where. `offers` holds one entry per price and number of GPUs: `runpod-h200-4`."""

    families: dict[str, Family]
    models: dict[str, BaseModelFacts]
    gpus: dict[str, Gpu]
    offers: dict[str, Offer]
    refused: dict[str, str] = field(default_factory=dict)
    "Models that people ask for and that cannot be trained here -> why, and what would be right."

    def family_of(self, model: str) -> Family:
        """The family of a base model of the catalog."""
        return self.families[self.models[model].family]


@lru_cache(maxsize=1)
def load_catalog() -> Catalog:
    """The catalog that ships. Raises InputError when a table is wrong: every test run reads it."""
    tables: dict[str, object] = {}
    for name in ("models.yaml", "hardware.yaml"):
        value, _ = read_yaml((FOLDER / name).read_text(encoding="utf-8"), f"recipes/{name}")
        if not isinstance(value, dict):
            raise InputError(Problem(f"recipes/{name}", "not a mapping", "families, models, gpus or offers"))
        tables |= value
    return catalog_of(validated(Tables, tables, "recipes/models.yaml + hardware.yaml"))


def catalog_of(tables: Tables) -> Catalog:
    """The tables with every price row spread over its numbers of GPUs, named `<row>-<gpus>`.

    Only whole machines are nodes of several: those with the most GPUs of their row.
    """
    offers: dict[str, Offer] = {}
    for name, price in tables.offers.items():
        row = price.model_dump(exclude={"gpus", "usd_per_gpu_hour"})
        for gpus in price.gpus:
            usd = round(price.usd_per_gpu_hour * gpus, 6)
            shared = {} if gpus == max(price.gpus) else {"network_gb_per_second": None}
            offers[f"{name}-{gpus}"] = Offer(**row | shared, gpus=gpus, usd_per_hour=usd)
    return Catalog(tables.families, tables.models, tables.gpus, offers, tables.refused)
