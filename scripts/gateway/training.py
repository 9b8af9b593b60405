"""The web app's older routes: /training/submit status cancel artifacts, at the root and below /v2/lorry.

The app posts its cancels to /training/cancel/{id} below whatever URL it was given, whichever generation submitted.
"""

from __future__ import annotations

from starlette.routing import Route

from scripts.errors import Conflict, Problem
from scripts.gateway.contact import cancel, look
from scripts.gateway.door import Door
from scripts.gateway.http import Call, endpoint
from scripts.gateway.queue import PREFIX, accepted_view, status_view
from scripts.gateway.submission import submit
from scripts.gateway.tick_on_contact import tick_on_contact
from scripts.gateway.understand import understand
from scripts.gateway.views import Json, phase_of, training_status


def routes(door: Door) -> list[Route]:
    """The older paths, twice."""
    return [route for prefix in ("", PREFIX) for route in _routes(door, f"{prefix}/training")]


def _routes(door: Door, base: str) -> list[Route]:
    return [
        Route(f"{base}/submit", endpoint(door, _submit), methods=["POST"]),
        Route(f"{base}/status/{{id}}", endpoint(door, _status, tick_on_contact), methods=["GET"]),
        Route(f"{base}/cancel/{{id}}", endpoint(door, _cancel, tick_on_contact), methods=["POST"]),
        Route(f"{base}/artifacts/{{id}}", endpoint(door, _artifacts, tick_on_contact), methods=["GET"]),
    ]


def _submit(door: Door, call: Call) -> Json:
    """The body is flat, without `input`; one that has it is understood too."""
    body = call.fields()
    inner = body.get("input")
    asked = understand(inner if isinstance(inner, dict) else body, serving_url=door.settings.serving_url)
    view = accepted_view(door, call.client, submit(door, call.client, asked, call.headers.get("idempotency-key")))
    return {"external_job_id": view["id"], "job_id": view["id"]} | view


def _status(door: Door, call: Call) -> Json:
    return training_status(look(door, call.client, call.path["id"]), door.now())


def _cancel(door: Door, call: Call) -> Json:
    return training_status(cancel(door, call.client, call.path["id"]), door.now())


def _artifacts(door: Door, call: Call) -> Json:
    job = look(door, call.client, call.path["id"])
    if (phase := phase_of(job)) != "COMPLETED":
        raise Conflict(
            Problem(f"job {job.client_id[:80]!a}", f"no adapter: it is {phase}", "wait until it is COMPLETED")
        )
    output = status_view(door, call, job)["output"]
    return {"download_urls": output["model_files"], "model_metadata": output["model_metadata"]}
