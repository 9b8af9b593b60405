"""The files of a job folder that the front door writes: what was asked for, why it was refused, what took its place."""

from __future__ import annotations

from typing import Any, Literal, TypeVar

from pydantic import Field, ValidationError

from recipes.job import Record
from scripts.store import Store

Kind = TypeVar("Kind", bound=Record)


class Understood(Record):
    """What a request was taken to mean: every number that will be used, and what was left aside."""

    recipe: str
    base_model: str
    asked_model: str | None = None
    epochs: int
    learning_rate: float
    batch_size: int
    rank: int
    alpha: int
    gpu_asked: str | None = None
    ignored: tuple[str, ...] = ()
    "What was sent and changes nothing."


class Request(Record):
    """request.json: written by conditional create before anything else happens for a job."""

    format: Literal[1] = 1
    client: str
    job_id: str
    client_job_id: str | None = None
    "The job as the client's own database calls it."
    body_sha256: str
    idempotency_key: str | None = None
    received_at: float
    understood: Understood
    callback_url: str | None = None
    training_file: str | None = None
    metadata: dict[str, str] = Field(default_factory=dict)
    retry_of: str | None = None


class Refusal(Record):
    """refusal.json: why the request of that body became no job. A corrected one may take its place."""

    format: Literal[1] = 1
    body_sha256: str
    at: float
    code: str
    error: str
    problems: tuple[dict[str, Any], ...] = ()


class Successor(Record):
    """retry.json: the job that a retry started in place of this one."""

    format: Literal[1] = 1
    job_id: str
    at: float


def read(store: Store, key: str, model: type[Kind]) -> Kind | None:
    """The record; None where there is none, or where it is damaged."""
    data = store.read(key)
    try:
        return model.model_validate_json(data) if data is not None else None
    except ValidationError:
        return None


def as_bytes(record: Record) -> bytes:
    """The record as it is stored."""
    return record.model_dump_json(indent=2).encode() + b"\n"
