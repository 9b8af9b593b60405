"""The files of a job: one frozen model per box of the flow, one writer per file. Machine-written JSON, read leniently.

| file | written by | says |
|---|---|---|
| data/report.json | scripts.training_set | what of the training set is used |
| plan.json | scripts.plan | what fits, what it costs |
| launch.json | scripts.render | everything the trainer needs to know |
| submission.json | scripts.launch | what was asked of the provider |
| stop.json | whoever stops it first | why it was stopped |
| nodes/N.json | the container of node N, of 1 and more | why that node failed, or that it is taken back |
| container.json | scripts.container | stage and attempts of the machine |
| status.json, metrics.jsonl, result.json, proof.json | trainer | progress, outcome, proof of the adapter |
| adapter/manifest.json | scripts.store | the adapter is whole and is what the trainer proved |
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from recipes.causes import Cause
from recipes.errors import InputError, Problem
from recipes.recipe import BackendName, Recipe

JOB_ID = re.compile(r"^(?!(?:clients|machines|models)$)(?=.{3,63}$)[a-z0-9]+(?:-[a-z0-9]+)*$")
"3 to 63 characters, lower case, digits and single hyphens: valid as a Pod, training job and object name."

Stage = Literal["fetching", "loading", "evaluating", "training", "saving", "proving", "storing", "done"]


def _job_id(value: str) -> str:
    if not JOB_ID.fullmatch(value):
        raise ValueError(f"job id {value[:80]!r}; 3 to 63 characters: a-z, 0-9 and single hyphens inside")
    return value


JobId = Annotated[str, AfterValidator(_job_id)]


class Record(BaseModel):
    """Base of machine-written files: frozen, unknown keys ignored so that old code reads new files."""

    model_config = ConfigDict(frozen=True, extra="ignore")


File = TypeVar("File", bound=Record)


class LaunchSpec(Record):
    """launch.json: provider-neutral, complete. Nothing downstream reads the YAML again."""

    format: Literal[1] = 1
    job_id: JobId
    recipe_name: str
    recipe_sha256: str
    recipe: Recipe
    backend: BackendName
    offer: str | None
    model_type: str
    gpus: int
    "GPUs, or CPU processes, per node."
    nodes: int
    accumulation_steps: int | None
    "Forward passes per GPU and optimizer step; null where training.micro_tokens decides it in each step."
    total_steps: int
    steps_per_epoch: int
    trainable_parameters: int
    "What the planner counted; the trainer refuses to train another number."
    base_parameters: int | None = None
    "What recipes/models.yaml says the base model has; the trainer refuses another number."
    deadline_seconds: int
    "Of machine time: after it the container ends the machine."
    expected_step_seconds: float | None = None
    "What the plan says an optimizer step takes; the trainer's first steps correct it."
    expected_peak_gib: float | None = None
    "What the plan says the trainer will measure: what torch reserves on a GPU, the resident set of a CPU process."
    capacity_gib: float | None = None
    "What a GPU of the offer holds."
    quote_usd: float
    cap_usd: float
    source: str
    source_sha256: str
    train_sha256: str
    valid_sha256: str
    train_examples: int
    valid_examples: int
    store: str
    "URL of the folder that holds this job's folder: file:///... or s3://bucket/prefix."
    image: str | None = None
    commit: str | None = None


class Submission(Record):
    """submission.json: written before the provider is asked, completed after it answered."""

    format: Literal[1] = 1
    job_id: str
    backend: BackendName
    request_sha256: str
    submitted_at: float
    handle: dict[str, Any] = {}
    "What the backend needs to find the machine again."


class Stop(Record):
    """stop.json: the first stop wins."""

    format: Literal[1] = 1
    by: Literal["user", "operator", "deadline", "cap", "reaper"]
    reason: str
    at: float


class NodeFailure(Record):
    """nodes/N.json: why a node that follows cannot go on.

    attempt: the one it was in, 0 before it joined any. sentence: what is known beside the cause, may be empty.
    """

    format: Literal[1] = 1
    node: int
    attempt: int
    cause: Cause
    sentence: str
    at: float
    is_taken: bool = False
    "No fault: the provider takes its machine back."


class Attempt(Record):
    """One start of the trainer by the supervisor."""

    number: int
    started_at: float
    ended_at: float | None = None
    exit_code: int | None = None
    resumed_from: str | None = None
    last_step: int = 0


class ContainerState(Record):
    """container.json: what the machine is doing; the heartbeat of the supervisor."""

    format: Literal[1] = 1
    job_id: str
    stage: Stage
    updated_at: float
    started_at: float
    waited_seconds: float = 0.0
    "For how long since then it had no machine, where that costs nothing: no limit of the job counts it."
    pid: int
    attempts: tuple[Attempt, ...] = ()
    taken_at: float | None = None
    "When the provider said that it takes this machine, or another node's, back; None once another machine has the job."

    ended: Literal["completed", "failed", "cancelled"] | None = None
    cause: Cause | None = None
    sentence: str = ""


class Status(Record):
    """status.json: the trainer's heartbeat. Loss and learning rate stand together or not at all."""

    format: Literal[1] = 1
    job_id: str
    stage: Stage
    attempt: int
    updated_at: float
    epoch: int = 0
    step: int = 0
    total_steps: int = 0
    progress: Annotated[int, Field(ge=0, le=100)] = 0
    training_loss: float | None = None
    learning_rate: float | None = None
    validation_loss: float | None = None
    gradient_norm: float | None = None
    tokens_per_second: float | None = None
    step_seconds: float | None = None
    "What a step takes, as this attempt measures it."


class Metric(Record):
    """One line of metrics.jsonl: an optimizer step, or an evaluation of the held-out conversations."""

    kind: Literal["train", "eval"]
    at: float
    attempt: int
    epoch: int
    step: int
    training_loss: float | None = None
    learning_rate: float | None = None
    gradient_norm: float | None = None
    tokens_per_second: float | None = None
    step_seconds: float | None = None
    validation_loss: float | None = None


class TrainedGroup(Record):
    """One line of the table of trained parameters."""

    group: str
    matrices: int
    parameters: int


class Result(Record):
    """result.json: how the trainer ended, also on failure."""

    format: Literal[1] = 1
    job_id: str
    outcome: Literal["completed", "failed", "cancelled"]
    cause: Cause | None = None
    sentence: str = ""
    exit_code: int
    attempt: int
    step: int
    total_steps: int
    initial_validation_loss: float | None = None
    final_validation_loss: float | None = None
    first_training_loss: float | None = None
    final_training_loss: float | None = None
    trained: tuple[TrainedGroup, ...] = ()
    trainable_parameters: int = 0
    adapter_sha256: dict[str, str] = {}
    "SHA-256 per file of adapter/, as the trainer wrote them."
    base_sha256: str = ""
    "SHA-256 over the base model's config.json and tensor index: names the exact base."
    base_revision: str | None = None
    versions: dict[str, str] = {}
    world_size: int = 1
    wall_seconds: float = 0.0
    trained_tokens: int = 0
    peak_gib: float | None = None
    "Of the fullest rank: what torch reserved of its GPU, or the process's resident set on a CPU."
    step_seconds: float | None = None
    "As measured after the first steps of the last attempt."
    ended_at: float = 0.0


class Proof(Record):
    """proof.json: a fresh process loaded the adapter on the base model and compared log-probabilities."""

    format: Literal[1] = 1
    job_id: str
    passed: bool
    sentence: str
    adapter_sha256: dict[str, str]
    tensors: int
    tensors_consumed: int
    effect: float
    "RMS difference of log-probabilities, trained model against base, on the probe positions."
    reproduction_error: float
    "RMS difference, reloaded adapter against the trained model, on the same positions."
    positions: int
    seconds: float


class Manifest(Record):
    """adapter/manifest.json: written last. Without it there is no adapter."""

    format: Literal[1] = 1
    job_id: str
    created_at: float
    files: dict[str, str]
    "SHA-256 of every other file of the adapter folder."
    base_model: str
    base_revision: str | None
    base_sha256: str
    recipe_name: str
    recipe_sha256: str
    training_set_sha256: str
    train_sha256: str
    valid_sha256: str
    versions: dict[str, str]
    commit: str | None
    image: str | None
    initial_validation_loss: float | None
    final_validation_loss: float | None
    effect: float
    reproduction_error: float
    trainable_parameters: int
    wall_seconds: float
    cost_usd: float | None


def read_record(model: type[File], path: Path) -> File | None:
    """The file as a record; None when it does not exist. Raises InputError when it is not what it should be."""
    try:
        return model.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except (ValidationError, ValueError) as error:
        first = str(error).splitlines()[0]
        raise InputError(
            Problem(str(path), f"not a {model.__name__} file ({first})", "the file as Lorry wrote it")
        ) from None


def write_record(path: Path, record: Record) -> None:
    """Writes the record beside its place, then renames: a reader sees the old file or the new one, never half."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(record.model_dump_json(indent=2) + "\n", encoding="utf-8")
    os.replace(temporary, path)
