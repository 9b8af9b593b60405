"""The wire of the local SageMaker: the published model of a request, and an HTTP server that speaks its protocol.

with serve(SageMaker(folder, runner)) as url: ...  # AWS_ENDPOINT_URL_SAGEMAKER=url AWS_ENDPOINT_URL_CLOUDWATCH_LOGS=url
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Protocol

import botocore.session

Json = dict[str, Any]


class Broken(Exception):
    """The connection breaks."""


class Refusal(Exception):
    """What the service answers to a request that it does not carry out."""

    def __init__(self, code: str, said: str) -> None:
        super().__init__(said)
        self.code = code


class Account(Protocol):
    """What answers, and goes on by itself."""

    def answer(self, target: str, body: Json) -> tuple[int, Json]: ...

    def advance(self) -> None: ...

    def close(self) -> None: ...


def require_model(body: Json) -> None:
    """The patterns, lengths and choices of the published request. Raises Refusal."""
    if said := _faults_of(_request_shape(), body, ""):
        raise Refusal("ValidationException", f"{len(said)} validation error detected: {said[0]}")


@lru_cache(maxsize=1)
def _request_shape() -> Any:
    return (
        botocore.session.get_session().get_service_model("sagemaker").operation_model("CreateTrainingJob").input_shape
    )


def _faults_of(shape: Any, value: Any, where: str) -> list[str]:
    limits, found = shape.metadata, []
    if shape.type_name == "structure":
        unknown = sorted(set(value) - set(shape.members))
        missing = sorted(set(shape.required_members) - set(value))
        found += [f"{where}.{name}: unknown" for name in unknown] + [f"{where}.{name}: missing" for name in missing]
        for name in set(value) & set(shape.members):
            found += _faults_of(shape.members[name], value[name], f"{where}.{name}")
        return found
    if shape.type_name == "list":
        found += [fault for item in value for fault in _faults_of(shape.member, item, where)]
    if shape.type_name == "map":
        for key, item in value.items():
            found += _faults_of(shape.key, key, where) + _faults_of(shape.value, item, where)
    size = value if isinstance(value, int | float) else len(value)
    if not limits.get("min", size) <= size <= limits.get("max", size):
        found.append(f"Value {value!r} at {where}: from {limits.get('min')} to {limits.get('max')}")
    if shape.type_name == "string":
        pattern = limits.get("pattern", "")
        if pattern and "\\p{" not in pattern and not re.fullmatch(pattern, value):
            found.append(f"Value {value!r} at {where}: pattern {pattern}")
        if getattr(shape, "enum", None) and value not in shape.enum:
            found.append(f"Value {value!r} at {where}: not one of the values")
    return found


@contextmanager
def serve(account: Account) -> Iterator[str]:
    """Answers on a free port until the block ends; training jobs go on by themselves."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(account))
    server.daemon_threads = True
    over = threading.Event()

    def tick() -> None:
        while not over.wait(0.05):
            account.advance()
        account.close()

    threads = [threading.Thread(target=server.serve_forever, args=(0.05,)), threading.Thread(target=tick)]
    for thread in threads:
        thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        over.set()
        server.shutdown()
        for thread in threads:
            thread.join()
        server.server_close()


def _handler(account: Account) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            data = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            try:
                status, answer = account.answer(self.headers["X-Amz-Target"], json.loads(data))
            except Broken:
                self.close_connection = True
                self.connection.close()
                return
            body = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/x-amz-json-1.1")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            return

    return Handler
