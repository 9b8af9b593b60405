"""OpenAI's fine-tuning routes: /v1/fine_tuning/jobs create list retrieve cancel events checkpoints.

OpenAI(base_url="https://front-door/v1", api_key=KEY).fine_tuning.jobs.create(model="...", training_file="file-...")
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Field
from starlette.routing import Route

from recipes.validate import validated
from scripts.errors import InputError, NotFound, Problem
from scripts.gateway.contact import Look, cancel, look, looks
from scripts.gateway.door import Door
from scripts.gateway.events import metrics_of
from scripts.gateway.http import Call, endpoint
from scripts.gateway.submission import submit
from scripts.gateway.tick_on_contact import tick_on_contact
from scripts.gateway.understand import Lenient, understand
from scripts.gateway.views import Json, fine_tuned_model, openai_job, phase_of

_JOBS = "/v1/fine_tuning/jobs"
_MOST = 100


class Method(Lenient):
    """How to train; supervised is what we do."""

    type: str = "supervised"
    supervised: dict[str, Any] | None = None


class CreateJob(Lenient):
    """The body of a new fine-tuning job."""

    model: Annotated[str, Field(min_length=1, max_length=200)]
    training_file: Annotated[str, Field(min_length=1, max_length=4096)]
    "The id of an uploaded file, or an https link."
    validation_file: str | None = None
    hyperparameters: dict[str, Any] | None = None
    method: Method = Method()
    seed: int | None = None
    metadata: dict[str, str] | None = None


def routes(door: Door) -> list[Route]:
    """The fine-tuning paths."""
    return [
        Route(_JOBS, endpoint(door, _create), methods=["POST"]),
        Route(_JOBS, endpoint(door, _list), methods=["GET"]),
        Route(f"{_JOBS}/{{id}}", endpoint(door, _retrieve, tick_on_contact), methods=["GET"]),
        Route(f"{_JOBS}/{{id}}/cancel", endpoint(door, _cancel, tick_on_contact), methods=["POST"]),
        Route(f"{_JOBS}/{{id}}/events", endpoint(door, _events, tick_on_contact), methods=["GET"]),
        Route(f"{_JOBS}/{{id}}/checkpoints", endpoint(door, _checkpoints), methods=["GET"]),
    ]


def page(items: Sequence[Json], call: Call, default: int = 20) -> Json:
    """One page of a list, as OpenAI's cursors work: `after` is the id of the last item seen."""
    text, after = call.query.get("limit") or str(default), call.query.get("after")
    if not (text.isascii() and text.isdigit() and 1 <= int(text[:6]) <= _MOST):
        raise InputError(Problem("limit", ascii(text[:40]), f"1 to {_MOST}"))
    ids = [item["id"] for item in items]
    if after and after not in ids:
        raise InputError(Problem("after", ascii(after[:80]), "the id of an item of this list"))
    start = ids.index(after) + 1 if after else 0
    shown = list(items[start : start + int(text)])
    return {
        "object": "list",
        "data": shown,
        "has_more": start + len(shown) < len(items),
        "first_id": shown[0]["id"] if shown else None,
        "last_id": shown[-1]["id"] if shown else None,
    }


def _create(door: Door, call: Call) -> Json:
    body = validated(CreateJob, call.fields(), "body")
    if body.method.type != "supervised":
        raise InputError(Problem("method.type", ascii(body.method.type[:40]), "supervised: LoRA on given answers"))
    if body.validation_file:
        want = "leave it out: a part of the training set is held out, as the recipe says"
        raise InputError(Problem("validation_file", "not supported", want))
    inner = (body.method.supervised or {}).get("hyperparameters") or body.hyperparameters or {}
    numbers = {{"n_epochs": "epochs"}.get(name, name): value for name, value in dict(inner).items()}
    is_link = body.training_file.startswith(("https://", "http://"))
    value = {
        "base_model": body.model,
        "hyperparameters": numbers | ({"seed": body.seed} if body.seed is not None else {}),
    }
    if is_link:
        value["dataset_url"] = body.training_file
    file_id = None if is_link else required_file_id(body.training_file)
    asked = understand(value, file_id=file_id, metadata=body.metadata)
    accepted = submit(door, call.client, asked, call.headers.get("idempotency-key"))
    return openai_job(look(door, call.client, accepted.request.job_id))


def _list(door: Door, call: Call) -> Json:
    return page([openai_job(job) for job in looks(door, call.client)], call)


def _retrieve(door: Door, call: Call) -> Json:
    return openai_job(look(door, call.client, call.path["id"]))


def _cancel(door: Door, call: Call) -> Json:
    return openai_job(cancel(door, call.client, call.path["id"]))


def _events(door: Door, call: Call) -> Json:
    job = look(door, call.client, call.path["id"])
    return page(list(reversed(_told(job))), call)


def _told(job: Look) -> list[Json]:
    """The story of a job, oldest first: created, each step's numbers, how it stands or ended."""
    told = [_event(job, "created", job.request.received_at, "info", "Created fine-tuning job")]
    for number, metric in enumerate(metrics_of(job), 1):
        numbers = {"step": metric.step, "train_loss": metric.training_loss, "valid_loss": metric.validation_loss}
        data = {name: value for name, value in numbers.items() if value is not None}
        loss = metric.training_loss if metric.kind == "train" else metric.validation_loss
        kind = "training" if metric.kind == "train" else "validation"
        shown = f"{loss:.4f}" if loss is not None else "unknown"
        message = f"Step {metric.step}: {kind} loss={shown}"
        told.append(_event(job, f"m{number}", metric.at, "info", message, "metrics", data))
    phase, level = phase_of(job), "error" if phase_of(job) == "FAILED" else "info"
    at = job.files.container.updated_at if job.files.container else job.request.received_at
    told.append(_event(job, f"now-{phase.lower()}", at, level, job.state.sentence))
    return told


def _event(
    job: Look,
    key: str,
    at: float,
    level: str,
    message: str,
    kind: Literal["message", "metrics"] = "message",
    data: Json | None = None,
) -> Json:
    return {
        "id": f"ftevent-{job.files.job_id}-{key}",
        "object": "fine_tuning.job.event",
        "created_at": int(at),
        "level": level,
        "message": message,
        "type": kind,
        "data": data or {},
    }


def _checkpoints(door: Door, call: Call) -> Json:
    """Complete checkpoints, newest first."""
    job = look(door, call.client, call.path["id"])
    job_id, by_step = job.files.job_id, {m.step: m for m in metrics_of(job) if m.kind == "train"}
    names = {key.split("/")[2] for key in job.room.jobs.keys(f"{job_id}/checkpoints") if key.endswith("/COMPLETE")}
    found = []
    for name in sorted(names, reverse=True):
        step = int(name.rpartition("-")[2])
        metric = by_step.get(step)
        found.append(
            {
                "id": f"ftckpt-{job_id}-{step}",
                "object": "fine_tuning.job.checkpoint",
                "created_at": int(metric.at if metric else job.request.received_at),
                "fine_tuning_job_id": job.client_id,
                "fine_tuned_model_checkpoint": f"{fine_tuned_model(job)}:step-{step}",
                "step_number": step,
                "metrics": {"step": step} | ({"train_loss": metric.training_loss} if metric else {}),
            }
        )
    return page(found, call, default=10)


def required_file_id(text: str) -> str:
    """The id of an uploaded file. Raises NotFound for what cannot be one."""
    if not (text.startswith("file-") and text[5:].isalnum() and text.isascii() and len(text) <= 60):
        raise NotFound(Problem("training_file", f"no file {text[:80]!a}", "upload it to /v1/files"))
    return text
