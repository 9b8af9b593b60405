"""The front door's own OpenAPI document, made from the models that read the requests."""

from __future__ import annotations

from functools import cache
from typing import Any

from scripts.gateway.openai import CreateJob
from scripts.gateway.queue import PREFIX
from scripts.gateway.understand import RunRequest, TrainingInput
from scripts.serving.outcomes import Told

Json = dict[str, Any]

_ERRORS = ("400", "401", "404", "409", "413", "422", "503")
_PATHS: tuple[tuple[str, str, str, type[Any] | None], ...] = (
    ("post", f"{PREFIX}/run", "start a training", RunRequest),
    ("post", f"{PREFIX}/runsync", "start a training and hold the answer", RunRequest),
    ("get", f"{PREFIX}/status/{{id}}", "how a job stands", None),
    ("get", f"{PREFIX}/status-sync/{{id}}", "how a job stands, held until it ends", None),
    ("get", f"{PREFIX}/stream/{{id}}", "the newest progress", None),
    ("get", f"{PREFIX}/events/{{id}}", "progress as server-sent events", None),
    ("post", f"{PREFIX}/cancel/{{id}}", "end a job and its machine", None),
    ("post", f"{PREFIX}/retry/{{id}}", "start a failed job again", None),
    ("post", f"{PREFIX}/purge-queue", "cancel what is still queued", None),
    ("get", f"{PREFIX}/health", "how many jobs are in which state", None),
    ("post", f"{PREFIX}/quote", "the price before launch", RunRequest),
    ("post", "/training/submit", "start a training (older form)", TrainingInput),
    ("get", "/training/status/{id}", "how a job stands (older form)", None),
    ("post", "/training/cancel/{id}", "end a job (older form)", None),
    ("get", "/training/artifacts/{id}", "links to a finished adapter", None),
    ("post", "/v1/fine_tuning/jobs", "start a training (OpenAI's form)", CreateJob),
    ("get", "/v1/fine_tuning/jobs", "all jobs", None),
    ("get", "/v1/fine_tuning/jobs/{id}", "how a job stands", None),
    ("post", "/v1/fine_tuning/jobs/{id}/cancel", "end a job", None),
    ("get", "/v1/fine_tuning/jobs/{id}/events", "what happened", None),
    ("get", "/v1/fine_tuning/jobs/{id}/checkpoints", "what could be resumed from", None),
    ("get", "/adapters", "finished adapters, and where a chat is to go", None),
    ("post", "/adapters/{id}/promote", "make an adapter live, once it is proven on the server", None),
    ("post", "/adapters/roll-back", "make the adapter live again that was live before", None),
    ("post", "/adapters/outcomes", "how chats ended with the live adapter or the canary, as counts", Told),
    ("get", "/v1/files", "uploaded training sets", None),
    ("get", "/v1/files/{id}", "one uploaded training set", None),
)
EXAMPLE_LINK = "https://project.example/storage/v1/object/sign/sets/bicycle-care.jsonl?token=signed"
_INPUT: Json = {
    "job_id": "5f0c1d7e-58a5-4a3b-9d5e-0c9a54f1e001",
    "dataset_url": EXAMPLE_LINK,
    "hyperparameters": {"base_model": "lorry/smoke", "epochs": 2, "batch_size": 4, "rank": 8, "alpha": 16},
    "gpu_config": {"type": "H100", "count": 1},
}
_EXAMPLES: dict[type[Any], Json] = {
    RunRequest: {"input": _INPUT, "policy": {"executionTimeout": 43_200_000}},
    TrainingInput: _INPUT,
    CreateJob: {
        "model": "lorry/smoke",
        "training_file": EXAMPLE_LINK,
        "method": {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 2, "batch_size": "auto"}}},
    },
    Told: {
        "model": "clients/acme/bicycle-2",
        "reporter": "5f0c1d7e-58a5-4a3b-9d5e-0c9a54f1e002",
        "window": 5983000,
        "answered": 120,
        "failed": 1,
    },
}
_QUERIES = {
    f"{PREFIX}/runsync": ("wait",),
    f"{PREFIX}/status-sync/{{id}}": ("wait",),
    "/v1/fine_tuning/jobs": ("limit", "after"),
    "/v1/fine_tuning/jobs/{id}/events": ("limit", "after"),
    "/v1/fine_tuning/jobs/{id}/checkpoints": ("limit", "after"),
    "/v1/files": ("limit", "after"),
}


@cache
def openapi_document() -> Json:
    """OpenAPI 3.1. Answers are objects; errors are {error, code, problems}."""
    schemas: Json = {"Error": _error_schema()}
    paths: Json = {}
    for method, path, summary, model in _PATHS:
        paths.setdefault(path, {})[method] = _operation(method, path, summary, model, schemas)
    paths["/v1/files"]["post"] = _upload_operation()
    return {
        "openapi": "3.1.0",
        "info": {"title": "Lorry's front door", "version": "1"},
        "components": {
            "schemas": schemas,
            "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer"},
                "header": {"type": "apiKey", "in": "header", "name": "X-Lorry-Key"},
            },
        },
        "security": [{"bearer": []}, {"header": []}],
        "paths": paths,
    }


def _operation(method: str, path: str, summary: str, model: type[Any] | None, schemas: Json) -> Json:
    operation: Json = {"summary": summary, "responses": _responses(path)}
    parameters = (
        [{"name": "id", "in": "path", "required": True, "schema": {"type": "string"}}] if "{id}" in path else []
    )
    if method == "get" or path.endswith("runsync"):
        parameters += [{"name": name, "in": "query", "schema": {"type": "string"}} for name in _QUERIES.get(path, ())]
    if parameters:
        operation["parameters"] = parameters
    if model is not None:
        schema = model.model_json_schema(ref_template="#/components/schemas/{model}")
        schemas |= schema.pop("$defs", {})
        schemas[model.__name__] = schema
        reference = {"$ref": f"#/components/schemas/{model.__name__}"}
        content = {"schema": reference, "example": _EXAMPLES[model]}
        operation["requestBody"] = {"required": True, "content": {"application/json": content}}
    return operation


def _upload_operation() -> Json:
    properties = {"file": {"type": "string", "format": "binary"}, "purpose": {"type": "string", "enum": ["fine-tune"]}}
    form = {"type": "object", "properties": properties, "required": ["file", "purpose"]}
    body = {"required": True, "content": {"multipart/form-data": {"schema": form}}}
    return {"summary": "upload a training set", "requestBody": body, "responses": _responses("/v1/files")}


def _responses(path: str) -> Json:
    kind = "text/event-stream" if "/events/" in path else "application/json"
    well = {"description": "done", "content": {kind: {"schema": {"type": "string"} if "/events/" in path else {}}}}
    error = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
    return {"200": well} | {code: {"description": "refused, with a sentence", "content": error} for code in _ERRORS}


def _error_schema() -> Json:
    text = {"type": "string"}
    problem = {"type": "object", "properties": {"where": text, "got": text, "want": text}}
    return {
        "type": "object",
        "required": ["error", "code", "problems"],
        "properties": {
            "error": {"type": ["string", "object"]},
            "code": text,
            "problems": {"type": "array", "items": problem},
        },
    }
