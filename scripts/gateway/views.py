"""What each protocol says of one job. Pure: a Look, links and the clock go in, a JSON object comes out.

queue_status(job, links)["status"]     # IN_QUEUE IN_PROGRESS COMPLETED FAILED CANCELLED, as the web app reads them

The web app takes COMPLETED for success without a look inside, knows no TIMED_OUT, and acts on no CANCELLED: so every
bad end is FAILED with its sentence in `error`, and CANCELLED follows the user's own cancel alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from recipes.job import Status
from scripts.gateway.contact import Look

Phase = Literal["IN_QUEUE", "IN_PROGRESS", "COMPLETED", "FAILED", "CANCELLED"]
Json = dict[str, Any]

_TRAINING_WORDS: dict[Phase, str] = {
    "IN_QUEUE": "running",
    "IN_PROGRESS": "running",
    "COMPLETED": "completed",
    "FAILED": "failed",
    "CANCELLED": "cancelled",
}
_OPENAI_WORDS: dict[Phase, str] = {
    "IN_QUEUE": "queued",
    "IN_PROGRESS": "running",
    "COMPLETED": "succeeded",
    "FAILED": "failed",
    "CANCELLED": "cancelled",
}


def phase_of(job: Look) -> Phase:
    """The state in the words of Runpod's queue. The user's own cancel counts from the moment it is recorded."""
    if job.files.stop is not None and job.files.stop.by == "user":
        return "CANCELLED"
    if job.state.state == "lost":
        return "FAILED" if job.state.is_final else "IN_PROGRESS"
    phases: dict[str, Phase] = {
        "queued": "IN_QUEUE",
        "starting": "IN_QUEUE",
        "running": "IN_PROGRESS",
        "stopping": "IN_PROGRESS",
        "completed": "COMPLETED",
        "failed": "FAILED",
        "cancelled": "CANCELLED",
    }
    return phases[job.state.state]


def queue_status(job: Look, links: Mapping[str, str], now: float) -> Json:
    """The status object of Runpod's queue, with what was understood and our own cost beside it."""
    phase, container = phase_of(job), job.files.container
    began = container.started_at if container else None
    view: Json = {
        "id": job.client_id,
        "status": phase,
        "delayTime": _milliseconds((began or now) - job.request.received_at),
        "understood": understood(job),
        "cost": cost(job),
    }
    if container is not None:
        view["workerId"] = job.files.job_id
        if job.state.is_final:
            view["executionTime"] = _milliseconds(container.updated_at - container.started_at)
    if phase == "IN_PROGRESS":
        view["output"] = progress(job)
    if phase == "COMPLETED":
        view["output"] = progress(job) | {"status": "completed", "model_files": dict(links)}
        view["output"] |= {"download_urls": dict(links), "model_metadata": metadata(job)}
    if phase == "FAILED":
        view["error"] = job.state.sentence
    return view


def training_status(job: Look, now: float) -> Json:
    """The answer of the older /training/status."""
    phase = phase_of(job)
    view = {
        "external_job_id": job.client_id,
        "job_id": job.client_id,
        "status": _TRAINING_WORDS[phase],
        "error_message": job.state.sentence if phase == "FAILED" else None,
        "cost": cost(job),
        "understood": understood(job),
    }
    return progress(job) | view | ({"stage": "queued"} if phase == "IN_QUEUE" else {})


def openai_job(job: Look) -> Json:
    """A `fine_tuning.job` of OpenAI's API."""
    phase, asked = phase_of(job), job.request.understood
    error = None
    if phase == "FAILED":
        cause = job.files.container.cause if job.files.container else None
        error = {"code": cause or "failed", "message": job.state.sentence, "param": None}
    ended = job.files.container.updated_at if job.files.container and job.state.is_final else None
    numbers = {"n_epochs": asked.epochs, "batch_size": asked.batch_size, "learning_rate_multiplier": 1.0}
    left = job.state.eta_seconds
    return {
        "id": job.client_id,
        "object": "fine_tuning.job",
        "created_at": int(job.request.received_at),
        "model": asked.asked_model or asked.base_model,
        "status": _OPENAI_WORDS[phase],
        "error": error,
        "fine_tuned_model": fine_tuned_model(job) if phase == "COMPLETED" else None,
        "finished_at": int(ended) if ended and phase in ("COMPLETED", "FAILED", "CANCELLED") else None,
        "estimated_finish": int(_heartbeat(job) + left) if left is not None else None,
        "hyperparameters": numbers,
        "method": {"type": "supervised", "supervised": {"hyperparameters": numbers}},
        "organization_id": job.request.client,
        "result_files": [f"{job.files.job_id}/metrics.jsonl"] if phase == "COMPLETED" else [],
        "seed": job.files.launch.recipe.training.seed if job.files.launch else 1,
        "trained_tokens": job.files.result.trained_tokens if job.files.result and phase == "COMPLETED" else None,
        "training_file": job.request.training_file or "",
        "validation_file": None,
        "integrations": [],
        "metadata": job.request.metadata,
        "understood": understood(job),
        "cost": cost(job),
    }


def fine_tuned_model(job: Look) -> str:
    """The name of the adapter: base model and job."""
    return f"{job.request.understood.base_model}:{job.files.job_id}"


def progress(job: Look) -> Json:
    """Progress with whole numbers for epoch and step. Without both a loss and a learning rate there are no metrics:
    a database that wants both would drop the row."""
    status = job.files.status
    view: Json = {
        "progress": job.state.progress,
        "stage": job.files.container.stage if job.files.container else "queued",
        "current_epoch": status.epoch if status else 0,
        "current_step": status.step if status else 0,
        "total_steps": job.files.launch.total_steps if job.files.launch else 0,
        "message": job.state.sentence,
    }
    if job.state.eta_seconds is not None:
        view["eta_seconds"] = round(job.state.eta_seconds)
    if status is not None and (numbers := metrics(status)):
        view["metrics"] = numbers
    return view


def metrics(status: Status) -> Json:
    """Loss and learning rate, and what else is known beside them; empty without these two."""
    if status.training_loss is None or status.learning_rate is None:
        return {}
    known = {
        "training_loss": status.training_loss,
        "learning_rate": status.learning_rate,
        "validation_loss": status.validation_loss,
        "gradient_norm": status.gradient_norm,
        "throughput": status.tokens_per_second,
    }
    return {name: value for name, value in known.items() if value is not None}


def metadata(job: Look) -> Json:
    """What the adapter is, for the artifact's row."""
    manifest, result = job.files.manifest, job.files.result
    if manifest is None:
        return {}
    return {
        "base_model": manifest.base_model,
        "base_revision": manifest.base_revision,
        "recipe": manifest.recipe_name,
        "initial_validation_loss": manifest.initial_validation_loss,
        "final_validation_loss": manifest.final_validation_loss,
        "final_training_loss": result.final_training_loss if result else None,
        "training_time_seconds": round(manifest.wall_seconds),
        "steps": result.total_steps if result else None,
        "trainable_parameters": manifest.trainable_parameters,
        "effect": manifest.effect,
        "sha256": manifest.files,
        "cost_usd": cost(job)["usd"],
    }


def cost(job: Look) -> Json:
    """Our own figure: the settled bill, else what it cost so far by the price it was quoted with."""
    spec = job.files.launch
    settled = job.settled_usd
    manifest = job.files.manifest
    known = manifest.cost_usd if manifest is not None and manifest.cost_usd is not None else job.state.spent_usd
    usd = settled if settled is not None else known
    return {
        "usd": None if usd is None else round(usd, 4),
        "settled": settled is not None,
        "quote_usd": spec.quote_usd if spec else None,
        "cap_usd": spec.cap_usd if spec else None,
    }


def understood(job: Look) -> Json:
    """What the request was taken to mean, and the hardware it got."""
    spec = job.files.launch
    hardware = {"gpu": spec.offer, "gpu_count": spec.gpus * spec.nodes, "backend": spec.backend} if spec else {}
    return job.request.understood.model_dump(mode="json") | hardware


def adapter_files(job: Look) -> tuple[str, ...]:
    """The files of a finished adapter; none before it is whole."""
    manifest = job.files.manifest
    return (*sorted(manifest.files), "manifest.json") if manifest and phase_of(job) == "COMPLETED" else ()


def _heartbeat(job: Look) -> float:
    return job.files.status.updated_at if job.files.status else job.request.received_at


def _milliseconds(seconds: float) -> int:
    return max(0, round(seconds * 1000))
