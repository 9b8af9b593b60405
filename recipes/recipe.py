"""What a run is: the recipe a person writes in YAML. An unknown key is an error, and so is a pair that cannot work.

At most 40 fields. A new one needs a recipe that sets it and a test.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

TargetGroup = Literal["attention", "linear_attention", "shared_expert", "mlp", "experts"]
EngineName = Literal["zero3", "replica"]
Quantize = Literal["int8", "nf4"]
Optimizer = Literal["adamw", "adamw_8bit"]
BackendName = Literal["local", "runpod_pod", "runpod_queue", "sagemaker", "ec2"]


MAX_TOKENS = 262_144


class Strict(BaseModel):
    """Base of everything people write: frozen, unknown keys refused, no coercion of text into numbers."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class Base(Strict):
    """Which open-weight model is adapted."""

    id: Annotated[str, Field(max_length=120)]
    "A key of recipes/models.yaml."
    revision: Annotated[str, Field(pattern=r"^[0-9a-f]{40}$")] | None = None
    "Commit of the model's repository. Null takes what is staged, and the manifest records its hash."


class Adapter(Strict):
    """What is trained: LoRA of one rank on named groups of the model's matrices."""

    rank: Annotated[int, Field(ge=1, le=256)] = 16
    alpha: Annotated[int, Field(ge=1, le=1024)] = 32
    targets: Annotated[tuple[TargetGroup, ...], Field(min_length=1, strict=False)] = ("attention",)
    "Groups, not module names: recipes/models.yaml says which matrices a group holds in each family."
    expert_layout: Literal["per_expert", "shared_outer"] = "per_expert"
    """How target `experts` is trained. per_expert: each expert has factors of its own. shared_outer: the factors on the
    hidden dimension are one for all experts of a layer, about a quarter of the parameters."""

    @model_validator(mode="after")
    def _targets_agree(self) -> Adapter:
        if len(set(self.targets)) != len(self.targets):
            raise ValueError(f"targets {list(self.targets)}; name each group once")
        if self.expert_layout != "per_expert" and "experts" not in self.targets:
            raise ValueError(
                f"expert_layout {self.expert_layout} without target experts; add experts to targets or leave it out"
            )
        return self


class Data(Strict):
    """How the training set is used."""

    validation_fraction: Annotated[float, Field(ge=0.0, le=0.5)] = 0.1
    "Share of the conversations held out; never fewer than one when more than zero."
    max_tokens: Annotated[int, Field(ge=16, le=MAX_TOKENS)] = 4096
    "The longest example in tokens. Nothing is ever truncated."
    too_long: Literal["refuse", "skip"] = "refuse"
    "What happens to an example over max_tokens: refuse the set, or leave that example out and count it."
    reasoning: Literal["require", "empty_think"] = "require"
    """For a base model that thinks before it answers. require: a set without thoughts is refused. empty_think: it is
    trained with the empty thought that the template writes, so that the adapter answers at once."""
    after_training: Literal["keep", "delete"] = "keep"
    """delete: once the adapter is proved and stored, the job's copy of the set is erased, every old version of it; its
    hashes stay on record, and up to 4 conversations as token ids, by which a merged or served adapter is proved. No
    answers are written side by side then."""


class Training(Strict):
    """The optimisation. Every number is explicit: no preset names."""

    epochs: Annotated[int, Field(ge=1, le=100)] = 3
    max_steps: Annotated[int, Field(ge=1, le=1_000_000)] | None = None
    "Ends the run early; null trains all epochs."
    global_batch: Annotated[int, Field(ge=1, le=4096)] = 16
    "Examples per optimizer step, over all GPUs and accumulation steps."
    micro_batch: Annotated[int, Field(ge=1, le=256)] = 1
    "Examples per GPU per forward pass, where micro_tokens is null."
    micro_tokens: Annotated[int, Field(ge=16, le=4 * MAX_TOKENS)] | None = None
    "Tokens per GPU per forward pass, instead of micro_batch: conversations are packed, as many as fit."
    learning_rate: Annotated[float, Field(gt=0.0, le=0.01)] = 2e-4
    schedule: Literal["cosine", "constant"] = "cosine"
    warmup_fraction: Annotated[float, Field(ge=0.0, le=0.5)] = 0.03
    weight_decay: Annotated[float, Field(ge=0.0, le=1.0)] = 0.0
    gradient_clipping: Annotated[float, Field(gt=0.0, le=100.0)] = 1.0
    seed: Annotated[int, Field(ge=0, le=2**31 - 1)] = 1
    precision: Literal["bf16", "fp32"] = "bf16"
    optimizer: Optimizer | None = None
    """adamw: fp32 gradients and moments, 16 bytes per trained value with its fp32 master. adamw_8bit, engine replica:
    bf16 gradients and moments of one byte, 8 bytes. Null: the plan takes adamw where it fits, else adamw_8bit."""
    checkpoint_minutes: Annotated[float, Field(gt=0.0, le=1440.0)] = 10.0
    checkpoint_steps: Annotated[int, Field(ge=1, le=1_000_000)] | None = None
    "Also save every so many steps; null saves by the clock alone."


class Hardware(Strict):
    """Where it may run. The planner chooses within this."""

    engine: EngineName = "zero3"
    "zero3: bf16 weights partitioned over the GPUs. replica: the whole quantised model on each GPU."
    quantize: Quantize | None = None
    "Storage of the frozen weights; replica only."
    backends: Annotated[tuple[BackendName, ...], Field(min_length=1, strict=False)] = ("runpod_pod",)
    gpus: Annotated[int, Field(ge=1, le=64)] | None = None
    "Exactly this many GPUs per node; null lets the planner take the cheapest count that fits."
    nodes: Annotated[int, Field(ge=1, le=16)] = 1
    gpu: Annotated[str, Field(max_length=60)] | None = None
    "Insist on one GPU of recipes/hardware.yaml; null lets the planner choose."

    @model_validator(mode="after")
    def _storage_matches_engine(self) -> Hardware:
        if self.engine == "zero3" and self.quantize:
            raise ValueError(
                f"engine zero3 with quantize {self.quantize}; zero3 partitions bf16 weights: use engine replica"
            )
        return self


class Limits(Strict):
    """Where the money stops."""

    max_usd: Annotated[float, Field(gt=0.0, le=10_000.0)] = 25.0
    max_hours: Annotated[float, Field(gt=0.0, le=336.0)] = 12.0


class Evaluation(Strict):
    """What an adapter must show before it may go live. Losses are nats per answer token."""

    min_gain: Annotated[float, Field(ge=0.0, le=10.0)] = 0.0
    "By more than this must the loss on the held-out conversations fall."
    max_forgetting: Annotated[float, Field(ge=0.0, le=10.0)] = 0.1
    "By at most this may the loss on recipes/general.yaml rise."
    min_win_rate: Annotated[float, Field(ge=0.0, le=1.0)] | None = None
    "Share of held-out questions in which a judge must prefer the adapter's answer; null asks no judge."


class Recipe(Strict):
    """One choice of model, adapter, data, training, hardware, limits and evaluation."""

    base: Base
    adapter: Adapter = Adapter()
    data: Data = Data()
    training: Training = Training()
    hardware: Hardware = Hardware()
    limits: Limits = Limits()
    evaluation: Evaluation = Evaluation()

    @model_validator(mode="after")
    def _batch_divides(self) -> Recipe:
        train, gpus = self.training, self.hardware.gpus
        if train.optimizer == "adamw_8bit" and self.hardware.engine == "zero3":
            raise ValueError(
                "training.optimizer adamw_8bit with engine zero3; zero3 splits the optimizer's state over the GPUs "
                "instead: use adamw, or engine replica"
            )
        if self.data.after_training == "delete" and self.evaluation.min_win_rate is not None:
            raise ValueError(
                f"evaluation.min_win_rate {self.evaluation.min_win_rate:g} with data.after_training delete; a judge "
                "reads answers to conversations, and none is kept: set min_win_rate to null, or keep the set"
            )
        if train.micro_tokens is not None:
            if train.micro_tokens < self.data.max_tokens:
                raise ValueError(
                    f"training.micro_tokens {train.micro_tokens} is less than data.max_tokens {self.data.max_tokens}; "
                    f"make it at least {self.data.max_tokens}: no example is cut in two"
                )
            return self
        if train.global_batch % train.micro_batch:
            raise ValueError(
                f"training.global_batch {train.global_batch} is not a multiple of training.micro_batch "
                f"{train.micro_batch}; make it one"
            )
        ranks = (gpus or 1) * self.hardware.nodes
        if train.global_batch % (train.micro_batch * ranks):
            raise ValueError(
                f"training.global_batch {train.global_batch} does not divide over {ranks} GPUs x micro_batch "
                f"{train.micro_batch}; use a multiple of {train.micro_batch * ranks}"
            )
        return self
