"""An OpenAI-compatible server of the base model and its adapters on this machine, with vLLM's routes for adapters.

uvicorn.run(create_server(worker, "lorry/smoke"), host="127.0.0.1", port=8800)

It speaks the part of vLLM 0.33 that publishing needs, so that the whole loop runs without a GPU.
"""

from __future__ import annotations

import time
from typing import Any, Protocol
from uuid import uuid4

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from scripts.errors import InputError, LorryError, NotFound, Problem, ProviderError

Json = dict[str, Any]
_MOST_TOKENS = 4096
_STATUS = {InputError: 400, NotFound: 404, ProviderError: 503}


class Asked(Protocol):
    """What answers: a Worker, or a double of one."""

    def ask(self, asked: Json) -> Json:
        """The answer to one request."""


class LocalServer:
    """The routes, and the adapters that are loaded: name -> path."""

    has_lora = True

    def __init__(self, worker: Asked, base: str) -> None:
        self.worker, self.base = worker, base
        self.adapters: dict[str, str] = {}

    def models(self) -> Json:
        """GET /v1/models: the base, then the adapters with their parent, as vLLM lists them."""
        adapters = [{"id": n, "object": "model", "root": p, "parent": self.base} for n, p in self.adapters.items()]
        return {"object": "list", "data": [{"id": self.base, "object": "model", "root": self.base}, *adapters]}

    def load(self, body: Json) -> Json:
        """POST /v1/load_lora_adapter {lora_name, lora_path, load_inplace}."""
        name, path = _text(body, "lora_name"), _text(body, "lora_path")
        if name in self.adapters and not body.get("load_inplace"):
            raise InputError(Problem("lora_name", f"{name} is loaded already", "load_inplace: true, or another name"))
        self.worker.ask({"op": "load", "name": name, "path": path})
        self.adapters[name] = path
        return {"ok": True}

    def unload(self, body: Json) -> Json:
        """POST /v1/unload_lora_adapter {lora_name}."""
        name = _text(body, "lora_name")
        if name not in self.adapters:
            raise NotFound(Problem("lora_name", f"{name} is not loaded", f"one of {', '.join(self.adapters)}"))
        self.worker.ask({"op": "unload", "name": name})
        del self.adapters[name]
        return {"ok": True}

    def complete(self, body: Json) -> Json:
        """POST /v1/completions: one prompt, text or token ids; prompt_logprobs as vLLM gives them."""
        done = self._completed(body, body.get("prompt"))
        choice: Json = {"index": 0, "text": done["text"], "finish_reason": done["finish_reason"], "logprobs": None}
        if done["prompt_logprobs"] is not None:
            pairs = zip(done["prompt_ids"], done["prompt_logprobs"], strict=True)
            choice["prompt_logprobs"] = [None if p is None else {str(t): {"logprob": p}} for t, p in pairs]
        return _envelope("text_completion", body, done, choice)

    def chat(self, body: Json) -> Json:
        """POST /v1/chat/completions."""
        done = self._completed(body, body.get("messages"))
        message = {"role": "assistant", "content": done["text"]}
        return _envelope(
            "chat.completion", body, done, {"index": 0, "message": message, "finish_reason": done["finish_reason"]}
        )

    def _completed(self, body: Json, prompt: Any) -> Json:
        model = body.get("model") or self.base
        if model != self.base and model not in self.adapters:
            known = ", ".join([self.base, *self.adapters])
            raise NotFound(Problem("model", f"there is no {str(model)[:80]!r}", f"one of {known}"))
        if not prompt or body.get("stream"):
            raise InputError(Problem("body", "no prompt, or stream: true", "a prompt or messages, not streamed"))
        count = body.get("max_tokens") or body.get("max_completion_tokens") or 16
        if not (isinstance(count, int) and 1 <= count <= _MOST_TOKENS):
            raise InputError(Problem("max_tokens", repr(count)[:40], f"1 to {_MOST_TOKENS}"))
        asked = {"op": "complete", "adapter": None if model == self.base else model, "prompt": prompt}
        heat = float(body.get("temperature", 1.0))
        probe = body.get("prompt_logprobs") is not None
        return self.worker.ask(asked | {"max_tokens": count, "temperature": heat, "probe": probe})


def create_server(worker: Asked, base: str, server: LocalServer | None = None) -> Starlette:
    """The ASGI application. server: one that behaves otherwise, for tests."""
    serving = server or LocalServer(worker, base)

    def post(path: str, handler: Any) -> Route:
        async def answer(request: Request) -> Response:
            try:
                body = await request.json()
                if not isinstance(body, dict):
                    raise InputError(Problem("body", "not a JSON object", "a JSON object"))
                return JSONResponse(await run_in_threadpool(handler, body))
            except ValueError:
                return JSONResponse({"error": {"message": "body: not JSON"}}, 400)
            except LorryError as error:
                return JSONResponse({"error": {"message": str(error)}}, _STATUS.get(type(error), 400))

        return Route(path, answer, methods=["POST"])

    async def health(request: Request) -> Response:
        return Response()

    async def models(request: Request) -> Response:
        return JSONResponse(serving.models())

    handlers = {"completions": serving.complete, "chat/completions": serving.chat}
    if serving.has_lora:
        handlers |= {"load_lora_adapter": serving.load, "unload_lora_adapter": serving.unload}

    async def document(request: Request) -> Response:
        return JSONResponse({"openapi": "3.1.0", "paths": {f"/v1/{name}": {"post": {}} for name in handlers}})

    asked = [Route("/health", health), Route("/v1/models", models), Route("/openapi.json", document)]
    return Starlette(routes=[*asked, *(post(f"/v1/{name}", handler) for name, handler in handlers.items())])


def _text(body: Json, name: str) -> str:
    value = body.get(name)
    if not isinstance(value, str) or not value:
        raise InputError(Problem(name, repr(value)[:60], "text"))
    return value


def _envelope(kind: str, body: Json, done: Json, choice: Json) -> Json:
    asked, made = len(done["prompt_ids"]), len(done["ids"])
    usage = {"prompt_tokens": asked, "completion_tokens": made, "total_tokens": asked + made}
    return {
        "id": f"cmpl-{uuid4().hex[:12]}",
        "object": kind,
        "created": int(time.time()),
        "model": body.get("model"),
        "choices": [choice],
        "usage": usage,
    }
