"""What a request asks for, in any spelling the web app has used, as one plain value; what is ignored is said.

asked = understand({"base_model": "...", "hyperparameters": {"num_epochs": 3}, "gpu_config": {...}}); asked.epochs
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass, field
from typing import Annotated, Any

from pydantic import AliasChoices, BaseModel, BeforeValidator, ConfigDict, Field, JsonValue

from recipes.job import JOB_ID
from recipes.validate import validated
from scripts.errors import InputError, Problem

_FOREIGN = ("openai_input", "openai_route", "messages", "prompt", "sampling_params")
_LINK: dict[str, JsonValue] = {"pattern": "^https://[!-~]+$"}  # said in the OpenAPI document; dataset.py checks more
_PRESET = ("name", "icon", "description", "details", "preset")


def _number(value: Any) -> Any:
    """Text and booleans are no numbers, but `3.0` is a whole one and forms send text: `"3"`."""
    if isinstance(value, bool):
        raise ValueError("true or false; a number")
    return value


Whole = Annotated[int, BeforeValidator(_number)]
Real = Annotated[float, BeforeValidator(_number), Field(allow_inf_nan=False)]


class Lenient(BaseModel):
    """Base of what clients send: unknown keys are ignored, and both spellings are read."""

    model_config = ConfigDict(frozen=True, extra="ignore", populate_by_name=True, protected_namespaces=())


class Hyperparameters(Lenient):
    """The numbers a client may choose; what it leaves out is the recipe's."""

    base_model: Annotated[str, Field(max_length=200)] | None = None
    epochs: Annotated[Whole, Field(ge=1, le=100)] | None = Field(
        None, validation_alias=AliasChoices("epochs", "num_epochs")
    )
    learning_rate: Annotated[Real, Field(gt=0, le=0.01)] | None = None
    learning_rate_multiplier: Annotated[Real, Field(gt=0, le=100)] | None = None
    batch_size: Annotated[Whole, Field(ge=1, le=4096)] | None = None
    rank: Annotated[Whole, Field(ge=1, le=256)] | None = Field(None, validation_alias=AliasChoices("rank", "lora_rank"))
    alpha: Annotated[Real, Field(ge=1, le=1024)] | None = Field(
        None, validation_alias=AliasChoices("alpha", "lora_alpha")
    )
    weight_decay: Annotated[Real, Field(ge=0, le=1)] | None = None
    seed: Annotated[Whole, Field(ge=0, le=2**31 - 1)] | None = None


class GpuConfig(Lenient):
    """The GPU a client wishes for: a wish, since the planner knows what fits."""

    type: Annotated[str, Field(max_length=60)] | None = Field(None, validation_alias=AliasChoices("type", "gpu_type"))
    count: Annotated[Whole, Field(ge=1, le=64)] | None = Field(None, validation_alias=AliasChoices("count", "num_gpus"))


class TrainingInput(Lenient):
    """The `input` of a training request."""

    job_id: Annotated[str, Field(min_length=1, max_length=200)] | None = None
    dataset_url: Annotated[str, Field(max_length=4096, json_schema_extra=_LINK)] | None = None
    base_model: Annotated[str, Field(max_length=200)] | None = None
    hyperparameters: Hyperparameters = Hyperparameters()
    gpu_config: GpuConfig = GpuConfig()
    callback_url: Annotated[str, Field(max_length=2000)] | None = None


class Policy(Lenient):
    """Runpod's execution policy, in milliseconds."""

    executionTimeout: Annotated[Whole, Field(ge=5000, le=14 * 86_400_000)] | None = None  # noqa: N815


class RunRequest(Lenient):
    """The body of /run: `input`, and what Runpod's queue knows beside it."""

    input: TrainingInput
    policy: Policy = Policy()
    webhook: Annotated[str, Field(max_length=2000)] | None = None


@dataclass(frozen=True)
class Asked:
    """One request for a training, whatever protocol it came by."""

    job_id: str | None
    "As the client wrote it."
    dataset_url: str | None
    file_id: str | None
    base_model: str | None
    numbers: Hyperparameters
    gpu: GpuConfig
    max_hours: float | None
    callback_url: str | None
    body_sha256: str
    ignored: tuple[str, ...] = ()
    metadata: dict[str, str] = field(default_factory=dict)


def understand(
    value: dict[str, Any],
    *,
    policy: Policy | None = None,
    webhook: str | None = None,
    file_id: str | None = None,
    metadata: dict[str, str] | None = None,
    serving_url: str = "",
) -> Asked:
    """The request as one value. Raises InputError with every problem of it, or when it is no training at all."""
    _refuse_foreign(value, serving_url)
    given = {key: part for key, part in value.items() if part is not None}
    # The older pages store lists of settings as null where nothing was chosen.
    asked = validated(TrainingInput, _without_nulls(given), "input")
    numbers = asked.hyperparameters
    milliseconds = policy.executionTimeout if policy else None
    return Asked(
        job_id=asked.job_id,
        dataset_url=asked.dataset_url,
        file_id=file_id,
        base_model=asked.base_model or numbers.base_model,
        numbers=numbers,
        gpu=asked.gpu_config,
        max_hours=milliseconds / 3_600_000 if milliseconds else None,
        callback_url=webhook or asked.callback_url,
        body_sha256=body_sha256(given, webhook, milliseconds, file_id),
        ignored=tuple(_ignored(given)),
        metadata=metadata or {},
    )


def body_sha256(value: dict[str, Any], *extras: object) -> str:
    """SHA-256 of what is asked for. A link counts without its query: the same file signed anew is the same request."""
    same = {**value, "dataset_url": str(value.get("dataset_url", "")).partition("?")[0]}
    return hashlib.sha256(json.dumps([same, *map(str, extras)], sort_keys=True).encode()).hexdigest()


def job_id_of(client_id: str) -> str:
    """The job id that stands for what a client calls a job: the same where it can be one, else a hash of it."""
    return client_id if JOB_ID.fullmatch(client_id) else "j" + hashlib.sha256(client_id.encode()).hexdigest()[:31]


def _refuse_foreign(value: dict[str, Any], serving_url: str) -> None:
    """Requests meant for inference end here when an environment falls back to the training URL."""
    foreign = [key for key in _FOREIGN if key in value]
    if foreign and not ("dataset_url" in value or "hyperparameters" in value):
        where = f"INFERENCE_API_URL ({serving_url})" if serving_url else "INFERENCE_API_URL, the serving endpoint"
        raise InputError(
            Problem(f"input.{foreign[0]}", "a request for inference; this URL trains", f"send it to {where}")
        )


def _without_nulls(value: dict[str, Any]) -> dict[str, Any]:
    inner = {
        key: {name: part for name, part in section.items() if part not in (None, "auto")}
        for key, section in value.items()
        if key in ("hyperparameters", "gpu_config") and isinstance(section, dict)
    }
    return value | inner


def _ignored(value: dict[str, Any]) -> list[str]:
    """What was sent and changes nothing, in words: dropout and warm-up steps matter to people, a preset's icon not."""
    notes = []
    section = value.get("hyperparameters")
    numbers = section if isinstance(section, dict) else {}
    known = {"base_model", "num_epochs", "lora_rank", "lora_alpha", *Hyperparameters.model_fields}
    for key in sorted(set(numbers) - known - set(_PRESET)):
        shown = re.sub(r"[^\w.-]", "?", str(key))[:40]
        reason = {
            "dropout": "LoRA without dropout is what is trained",
            "lora_dropout": "LoRA without dropout is what is trained",
            "warmup_steps": "the recipe's warmup_fraction is used",
        }.get(key, "unknown")
        notes.append(f"hyperparameters.{shown}: {reason}")
    return notes[:20]
