"""Between HTTP and a handler: key, size and shape of the body on the way in; JSON, never a traceback, on the way out.

Route("/v2/lorry/run", endpoint(door, run), methods=["POST"])     # run(door, call) -> dict
"""

from __future__ import annotations

import json
import logging
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

from starlette.background import BackgroundTask
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

from scripts.errors import Conflict, InputError, LorryError, NotFound, Problem, ProviderError, Refused
from scripts.gateway.auth import Unauthorized, authenticated
from scripts.gateway.clients import Client
from scripts.gateway.door import Door
from scripts.training_set.findings import Unusable
from scripts.training_set.syntax import check_depth

MAX_BODY_BYTES = 10_000_000
_DRAINED_BYTES = 4 * MAX_BODY_BYTES  # read on after a refusal, so that a client that still sends hears of it

STATUS: dict[type[LorryError], int] = {
    InputError: 400,
    Unauthorized: 401,
    NotFound: 404,
    Conflict: 409,
    Refused: 422,
    ProviderError: 503,
}
log = logging.getLogger("lorry.gateway")


class TooLarge(InputError):
    """More bytes than a request may have."""

    code = "too_large"


@dataclass(frozen=True)
class Call:
    """One request of a known client. body: the JSON value, None where there is none."""

    client: Client
    path: Mapping[str, str]
    query: Mapping[str, str]
    headers: Mapping[str, str]
    body: Any
    base_url: str
    "Scheme and host that the request came to."

    def fields(self) -> dict[str, Any]:
        """The body as an object. Raises InputError."""
        if not isinstance(self.body, dict):
            raise InputError(Problem("body", "not a JSON object", 'a JSON object such as {"input": {...}}'))
        return self.body


Handler = Callable[[Door, Call], Any]
"Returns a JSON value, or a Response. Runs in a thread."
Endpoint = Callable[[Request], Awaitable[Response]]


def endpoint(door: Door, handler: Handler, after: Callable[[Door, Call], None] | None = None) -> Endpoint:
    """The handler as an endpoint for clients with a key; `after` runs when the answer has been sent."""

    async def answer(request: Request) -> Response:
        call = await call_of(door, request)
        value = await run_in_threadpool(handler, door, call)
        response = value if isinstance(value, Response) else JSONResponse(value)
        if after is not None:
            response.background = BackgroundTask(after, door, call)
        return response

    return guarded(answer)


async def call_of(door: Door, request: Request) -> Call:
    """The request, its client known and its body read. Raises Unauthorized, InputError."""
    client = authenticated(request.headers, door.clients)
    body = await read_json(request) if request.method == "POST" else None
    base_url = door.settings.public_url or str(request.base_url).rstrip("/")
    return Call(client, request.path_params, dict(request.query_params), request.headers, body, base_url)


def guarded(handler: Endpoint) -> Endpoint:
    """The endpoint, with every error as a JSON answer; what nobody foresaw is logged by its kind and place alone."""

    async def answer(request: Request) -> Response:
        try:
            return await handler(request)
        except LorryError as error:
            return error_response(error, request)
        except ClientDisconnect:
            return Response(status_code=400)
        except HTTPException:
            raise
        except Exception as error:
            trace = error.__traceback__
            while trace is not None and trace.tb_next is not None:
                trace = trace.tb_next
            place = f"{trace.tb_frame.f_code.co_filename}:{trace.tb_lineno}" if trace else "an unknown place"
            log.error("%s %s: %s at %s", request.method, request.url.path, type(error).__name__, place)
            problem = Problem("lorry", "an error nobody foresaw", "the front door's log names its place")
            return JSONResponse(told(LorryError(problem), request), 500)

    return answer


def error_response(error: LorryError, request: Request) -> JSONResponse:
    """{error, code, problems} under the status of the error's kind."""
    status = next((code for kind, code in STATUS.items() if isinstance(error, kind)), 500)
    if isinstance(error, TooLarge):
        status = 413
    headers = {"WWW-Authenticate": "Bearer"} if status == 401 else {"Retry-After": "10"} if status == 503 else None
    return JSONResponse(told(error, request), status, headers)


def told(error: LorryError, request: Request) -> dict[str, Any]:
    """The error as JSON. Below /v1 `error` is an object with `message`, where OpenAI's clients look for it."""
    answer: dict[str, Any] = error.as_json()
    if request.url.path.startswith("/v1/"):
        answer["error"] = {"message": answer["error"], "type": error.code, "code": error.code, "param": None}
    return answer


async def http_error(request: Request, error: Exception) -> Response:
    """Answers of the router itself: an unknown path, a method that a path does not have."""
    assert isinstance(error, HTTPException)
    want = {404: "see docs/web-app.md for the paths", 405: "another method"}.get(error.status_code, "")
    problem = Problem(f"{request.method} {request.url.path[:200]!a}", error.detail.lower(), want)
    kind = NotFound if error.status_code == 404 else InputError
    return JSONResponse(told(kind(problem), request), error.status_code, error.headers)


async def read_json(request: Request) -> Any:
    """The body as JSON; None when it is empty. Raises InputError before anything of a hostile body is built."""
    data = await _read(request)
    if not data.strip():
        return None
    try:
        check_depth(data)
        value = json.loads(data.decode("utf-8"), parse_constant=_refuse_constant)
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode("utf-8")  # no half pair, no 1e999
    except Unusable as error:
        raise InputError(Problem("body", error.got, "a flatter object")) from None
    except UnicodeError:
        raise InputError(Problem("body", "a character that is not UTF-8", "JSON in UTF-8")) from None
    except (ValueError, RecursionError) as error:
        got = f"not JSON ({str(error)[:80]})"
        raise InputError(Problem("body", got, "JSON with Content-Type: application/json")) from None
    return value


async def _read(request: Request) -> bytes:
    data, size = bytearray(), 0
    async for chunk in request.stream():
        size += len(chunk)
        if size <= MAX_BODY_BYTES:
            data += chunk
        elif size > _DRAINED_BYTES:
            break
    if size > MAX_BODY_BYTES:
        raise TooLarge(Problem("body", "too large", f"at most {MAX_BODY_BYTES} bytes; send training sets by URL"))
    return bytes(data)


def _refuse_constant(word: str) -> None:
    raise ValueError(f"{word} is not JSON")
