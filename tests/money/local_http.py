"""Real HTTP servers on free ports of this machine: one that takes webhooks, one that is a Supabase project."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

Json = dict[str, Any]
Headers = dict[str, str]
Reply = tuple[int, Any]
INTEGERS = {"progress", "current_epoch", "current_step", "total_steps", "training_time_seconds"}
TEXTS = {"id", "status", "adapter_file_path", "error_message", "started_at", "completed_at", "updated_at"}
NUMBERS = {"final_loss", "current_loss", "current_learning_rate", "tokens_per_second", "actual_cost"}
COLUMNS = INTEGERS | TEXTS | NUMBERS


@contextmanager
def listening(answer: Callable[[str, str, Headers, bytes], Reply]) -> Iterator[str]:
    """Serves until the block ends; yields the URL. `answer(method, target, headers, body)`, names in lower case."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def go(self) -> None:
            body = self.rfile.read(int(self.headers.get("content-length") or 0))
            headers = {name.lower(): value for name, value in self.headers.items()}
            status, value = answer(self.command, self.path, headers, body)
            raw = json.dumps(value).encode()
            self.send_response(status)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(raw)))
            self.end_headers()
            self.wfile.write(raw)

        do_GET = do_POST = do_PATCH = do_DELETE = go  # noqa: N815

        def log_message(self, format: str, *args: object) -> None:
            """Quiet."""

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, request: Any, client_address: Any) -> None:
            """A client that was killed."""

    server = Server(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@dataclass
class Receiver:
    """The client's webhook. `got`: (headers, body) of every request; `status`: what it answers."""

    status: int = 200
    got: list[tuple[Headers, bytes]] = field(default_factory=list)

    def answer(self, method: str, target: str, headers: Headers, body: bytes) -> Reply:
        self.got.append((headers, body))
        return self.status, {}


@dataclass
class Supabase:
    """One table by PostgREST's rules, one storage. `fired`: every UPDATE that would start the client's next step."""

    table: str = "pipeline_training_jobs"
    key: str = "service-role-key"
    rows: dict[str, Json] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    updates: list[Json] = field(default_factory=list)
    fired: list[Json] = field(default_factory=list)
    good: int | None = None
    "So many requests are answered well, and then one with 503."
    lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, row_id: str, status: str = "queued", **columns: Any) -> None:
        self.rows[row_id] = {**dict.fromkeys(sorted(COLUMNS)), "id": row_id, "status": status, **columns}

    def fail_after(self, good: int) -> None:
        self.good = good

    def answer(self, method: str, target: str, headers: Headers, body: bytes) -> Reply:
        parts = urlsplit(target)
        with self.lock:
            if self.good is not None:
                self.good -= 1
                if self.good < 0:
                    self.good = None
                    return 503, {"message": "scripted failure"}
            if headers.get("apikey") != self.key or headers.get("authorization") != f"Bearer {self.key}":
                return 401, {"message": "Invalid API key"}
            if method == "POST" and parts.path.startswith("/storage/v1/object/"):
                return self._put(unquote(parts.path.removeprefix("/storage/v1/object/")), headers, body)
            if parts.path != f"/rest/v1/{self.table}":
                return 404, {"code": "PGRST205", "message": f"Could not find the table {parts.path}"}
            return self._rest(method, dict(parse_qsl(parts.query)), headers, body)

    def _rest(self, method: str, query: dict[str, str], headers: Headers, body: bytes) -> Reply:
        wanted = query.pop("select", "*")
        for name in query:
            if name not in COLUMNS:
                return 400, {"code": "42703", "message": f"column {self.table}.{name} does not exist"}
        found = [row for row in self.rows.values() if all(_holds(row[n], text) for n, text in query.items())]
        if method == "PATCH":
            values = json.loads(body)
            if problem := _wrong(values):
                return 400, problem
            for row in found:
                row.update(values)
                self.updates.append(dict(values))
                if row["status"] == "completed" and row["adapter_file_path"]:
                    self.fired.append(dict(row))
            if headers.get("prefer") != "return=representation":
                return 204, None
        names = sorted(COLUMNS) if wanted == "*" else wanted.split(",")
        return 200, [{name: row[name] for name in names} for row in found]

    def _put(self, name: str, headers: Headers, body: bytes) -> Reply:
        if name in self.objects and headers.get("x-upsert") != "true":
            return 409, {"message": "The resource already exists"}
        self.objects[name] = body
        return 200, {"Key": name}


def _holds(value: Any, condition: str) -> bool:
    """PostgREST's eq., in.(...) and not.in.(...); NULL meets none of them."""
    if value is None:
        return False
    if found := re.fullmatch(r"(not\.)?in\.\((.*)\)", condition):
        return (str(value) in found[2].split(",")) != bool(found[1])
    operator, _, wanted = condition.partition(".")
    assert operator == "eq", condition
    return str(value) == wanted


def _wrong(values: Json) -> Json | None:
    for name, value in values.items():
        if name not in COLUMNS:
            return {"code": "PGRST204", "message": f"Could not find the '{name}' column"}
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        good = isinstance(value, int) if name in INTEGERS else is_number if name in NUMBERS else isinstance(value, str)
        if value is not None and not good:
            return {"code": "22P02", "message": f"invalid input syntax for {name}: {value!r}"}
    return None
