"""The front door and inference: adapters are listed, promoted and rolled back here; a chat is sent on with a sentence.

GET /adapters      POST /adapters/{id}/promote      POST /adapters/roll-back      POST /adapters/outcomes

The answer of the first three says under `inference` where the web app's chat is to go, and by which model's name; the
last takes the web app's counts of how its chats ended. All of them stand below /v2/lorry too.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from recipes.serving import Serving
from recipes.validate import validated
from scripts.errors import NotFound, Problem, Refused, VerificationFailed
from scripts.evaluate import read_assessment
from scripts.gateway.contact import Look, look, looks
from scripts.gateway.door import Door
from scripts.gateway.http import Call, Endpoint, endpoint, guarded
from scripts.gateway.queue import PREFIX
from scripts.gateway.views import Json
from scripts.serving.connect import connect
from scripts.serving.history import last_state, served_name
from scripts.serving.outcomes import Told, keep
from scripts.serving.publish import Desk, publish, roll_back

PLACE = "main"
"A client has one serving place. Whoever runs the front door opens it, with the first `lorry serve` in its store."
_CHATS = ("chat/completions", "completions")
_WRONG_DOORS = ("/v1", f"{PREFIX}/v1", f"{PREFIX}/openai/v1")


def routes(door: Door) -> list[Route]:
    """The paths of adapters, and a word for those who ask a chat of the URL that trains."""
    wrong = [f"{base}/{chat}" for base in _WRONG_DOORS for chat in _CHATS]
    return [
        *[route for prefix in ("", PREFIX) for route in _routes(door, f"{prefix}/adapters")],
        *[Route(path, guarded(_not_here(door)), methods=["POST"]) for path in wrong],
    ]


def _routes(door: Door, base: str) -> list[Route]:
    return [
        Route(base, endpoint(door, _list), methods=["GET"]),
        Route(f"{base}/{{id}}/promote", endpoint(door, _promote), methods=["POST"]),
        Route(f"{base}/roll-back", endpoint(door, _roll_back), methods=["POST"]),
        Route(f"{base}/outcomes", endpoint(door, _outcomes), methods=["POST"]),
    ]


def _list(door: Door, call: Call) -> Json:
    state = _state(door, call)
    finished = [job for job in looks(door, call.client) if job.files.manifest is not None]
    return {"adapters": [_adapter(job, state) for job in finished], "inference": _inference(door, call, state)}


def _promote(door: Door, call: Call) -> Json:
    """Held until the adapter is proven on the server, or not: minutes, where many experts are loaded."""
    job = look(door, call.client, call.path["id"])
    if job.files.manifest is None:
        raise NotFound(Problem(f"job {job.client_id[:80]!a}", "no finished adapter", "wait until it is COMPLETED"))
    state = _required(door, call)
    with _desk(door, call, state) as desk:
        return _told(door, call, publish(desk, job.files.job_id, state.place))


def _roll_back(door: Door, call: Call) -> Json:
    with _desk(door, call, _required(door, call)) as desk:
        return _told(door, call, roll_back(desk, "asked for by the client"))


def _outcomes(door: Door, call: Call) -> Json:
    """Counts for another model than the live one and the canary are late, or the base's: nothing hangs on them."""
    told = validated(Told, call.fields(), "body")
    jobs, state = door.room(call.client).jobs, _state(door, call)
    at_work = [job for job in (state.live, state.canary) if job] if state else []
    named = next((job for job in at_work if served_name(jobs, job) == told.model), None)
    if named:
        keep(jobs, PLACE, named, told, door.now())
    return {"counted": named is not None}


@contextmanager
def _desk(door: Door, call: Call, state: Serving) -> Iterator[Desk]:
    """What is published with. A failed proof is the server's word against the adapter: refused, the old one stays."""
    try:
        jobs, who = door.room(call.client).jobs, f"client {call.client.name}"
        with connect(state.place, jobs, door.environment, who, door.now, time.sleep) as vllm:
            yield Desk(jobs, PLACE, vllm, door.environment, who, door.now, time.sleep)
    except VerificationFailed as error:
        raise Refused(*error.problems) from None


def _state(door: Door, call: Call) -> Serving | None:
    return last_state(door.room(call.client).jobs, PLACE)


def _required(door: Door, call: Call) -> Serving:
    state = _state(door, call)
    if state is None:
        want = "whoever runs this front door opens it: `lorry serve JOB --at URL` in this client's store"
        raise Refused(Problem("adapters", "no serving place yet", want))
    return state


def _told(door: Door, call: Call, state: Serving) -> Json:
    return {"deed": state.deed, "sentence": state.sentence, "inference": _inference(door, call, state)}


def _adapter(job: Look, state: Serving | None) -> Json:
    name, manifest = job.files.job_id, job.files.manifest
    assert manifest is not None
    assessment = read_assessment(job.room.jobs, name)
    return {
        "id": job.client_id,
        "model": served_name(job.room.jobs, name),
        "base_model": manifest.base_model,
        "evaluation": "none" if assessment is None else "passed" if assessment.passed else "not passed",
        "live": state is not None and state.live == name,
        "canary": state is not None and state.canary == name,
    }


def _inference(door: Door, call: Call, state: Serving | None) -> Json:
    """Where a chat goes, and which model it names: `canary` for a share of the conversations, else `model`."""
    jobs = door.room(call.client).jobs
    if state is None:
        return {"url": door.settings.serving_url or None, "model": None, "canary": None}
    canary = {"model": served_name(jobs, state.canary), "share": state.canary_share} if state.canary else None
    model = served_name(jobs, state.live) if state.live else state.place.base
    return {"url": state.place.url, "model": model, "canary": canary}


def _not_here(door: Door) -> Endpoint:
    where = f" ({door.settings.serving_url})" if door.settings.serving_url else ""

    async def answer(request: Request) -> Response:
        want = f"send it to INFERENCE_API_URL{where}, the serving endpoint"
        raise NotFound(Problem(request.url.path, "inference; this URL trains", want))

    return answer
