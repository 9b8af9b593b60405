"""The front door as an ASGI application.

uvicorn.run(create_app(settings, load_clients(path)), host="127.0.0.1", port=8700)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from scripts.gateway import events, files, inference, machines, openai, queue, quote, training
from scripts.gateway.clients import Client
from scripts.gateway.dataset import Fetcher
from scripts.gateway.door import Door
from scripts.gateway.http import http_error
from scripts.gateway.openapi import openapi_document
from scripts.gateway.settings import GatewaySettings

_PROTOCOLS = (queue, training, quote, events, openai, inference, files, machines)


def create_app(settings: GatewaySettings, clients: Mapping[str, Client], **hands: Any) -> Starlette:
    """The front door for these clients. hands: fields of Door that replace the real ones: clock, backends, fetcher."""
    hands.setdefault("fetcher", Fetcher(allows_loopback=settings.allows_loopback))
    door = Door(settings, clients, **hands)
    routes = [route for protocol in _PROTOCOLS for route in protocol.routes(door)]
    routes += [Route("/openapi.json", _document), Route("/healthz", _alive), Route("/ping", _alive)]
    return Starlette(routes=routes, exception_handlers={HTTPException: http_error})


async def _document(request: Request) -> Response:
    return JSONResponse(openapi_document())


async def _alive(request: Request) -> Response:
    """For a container host that asks whether this process lives: no key, no store, no provider. Runpod asks /ping."""
    return JSONResponse({"status": "ok"})
