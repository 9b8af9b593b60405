"""Serves the control plane of the local Runpod over HTTP.

with serve(key="local") as runpod: ...   # runpod.url, .account, .faults, .log, .drift

With a host, Pods and serverless workers run: `serve(key, host=Host(folder, ProcessRunner()))`. Without one Pods only
change their status, and a queue hands its jobs to the workers that a test brings.
"""

from __future__ import annotations

import json
import re
import secrets
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from scripts.fake_runpod.account import Account, Rejected, cluster_of
from scripts.fake_runpod.clock import Clock
from scripts.fake_runpod.contract import Contract, problem
from scripts.fake_runpod.fleet import Fleet
from scripts.fake_runpod.host import Host
from scripts.fake_runpod.operations import answer
from scripts.fake_runpod.queue import Queue
from scripts.fake_runpod.queue_routes import Asked, QueueRoutes, asked_of

Json = dict[str, Any]
_MAX_BODY_BYTES = 20_000_000
_TICK_SECONDS = 0.05
_TITLES = {
    400: "Bad Request",
    401: "Unauthorized",
    402: "Payment Required",
    403: "Forbidden",
    404: "Not Found",
    409: "Conflict",
    422: "Unprocessable Entity",
    429: "Too Many Requests",
    500: "Internal Server Error",
    502: "Bad Gateway",
    503: "Service Unavailable",
}


@dataclass
class Fault:
    """A scripted failure: the next `times` requests of this method whose path matches `path` fail with `status`.

    status 0 never answers: the create whose reply is lost. `carried_out`: the request has its effect all the same; that
    is the rule for status 0 and must be asked for otherwise. `wait_seconds`: so long nothing comes.
    """

    method: str
    path: str
    status: int
    detail: str = "scripted fault"
    headers: Mapping[str, str] = field(default_factory=dict)
    times: int = 1
    carried_out: bool | None = None
    wait_seconds: float = 0.0


@dataclass
class LocalRunpod:
    """A running local Runpod. `log` lists (method, path, body text); `drift` lists own answers off the contract."""

    url: str
    key: str
    contract: Contract
    account: Account
    fleet: Fleet
    faults: list[Fault] = field(default_factory=list)
    log: list[tuple[str, str, str]] = field(default_factory=list)
    drift: list[str] = field(default_factory=list)
    host: Host | None = None
    pod_keys_work: bool = True
    "Whether the key that a Pod gets may end that Pod."
    cluster_keys_work: bool = False
    "Whether it may also end the cluster that the Pod is in: nothing says so."
    lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self.changed = threading.Condition(self.lock)
        "Of the queues: whoever waits for a job, a stop or a result."

    def reset(self) -> None:
        """Forget everything but the address and the key."""
        old = self.account
        self.account = Account(queue_base=old.queue_base, pod_life=_first_life(self.host), hosted=old.hosted)
        self.fleet = _fleet(self.host, self.account.clock, self.url)
        for kept in (self.faults, self.log, self.drift):
            kept.clear()

    def advance(self) -> None:
        """Brings the machines behind the Pods to where they are by now."""
        with self.lock:
            if self.host is not None:
                self.host.advance(self.account)
                self.fleet.advance(self.account)
                self.changed.notify_all()

    def may(self, key: str, method: str, path: str, body: Any) -> int:
        """200 when this key may do this, else the status of the refusal."""
        if secrets.compare_digest(key.encode(), self.key.encode()):
            return 200
        pod_id = self.host.pod_of_key(key) if self.host is not None else None
        if pod_id is None:
            return 401
        own = f"/v2/pods/{pod_id}"
        ends = (method, path) == ("DELETE", own)
        ends = ends or ((method, path) == ("POST", f"{own}/action") and body == {"action": "terminate"})
        cluster = cluster_of(self.account.held["pods"].get(pod_id, {}))
        ends = ends or (self.cluster_keys_work and (method, path) == ("DELETE", f"/v2/clusters/{cluster}"))
        return 200 if self.pod_keys_work and (ends or (method, path) == ("GET", own)) else 403

    def take_fault(self, method: str, path: str) -> Fault | None:
        """The fault that is due for this request, used up by one."""
        for fault in self.faults:
            if fault.method == method and re.search(fault.path, path) and fault.times > 0:
                fault.times -= 1
                return fault
        return None


@contextmanager
def serve(
    key: str, openapi: Path | None = None, port: int = 0, host: Host | None = None, clock: Clock | None = None
) -> Iterator[LocalRunpod]:
    """Run until the block ends. Port 0 takes a free one; `openapi` is the published document for the full check.

    `host`: the machines behind the Pods; by real time they move by themselves, on a frozen clock with `advance`.
    """
    server = _Server(("127.0.0.1", port), _Handler)
    url = f"http://127.0.0.1:{server.server_port}/v2"
    clock = clock or Clock()
    account = Account(queue_base=url, pod_life=_first_life(host), hosted=host is not None, clock=clock)
    local = LocalRunpod(url, key, Contract.load(openapi), account, _fleet(host, clock, url), host=host)
    server.runpod = local  # type: ignore[attr-defined]
    ended = threading.Event()
    threads = [threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)]
    if host is not None:
        host.url = url
        if not clock.is_frozen:
            threads.append(threading.Thread(target=_keep, args=(local, host, ended), daemon=True))
    for thread in threads:
        thread.start()
    try:
        yield local
    finally:
        server.shutdown()
        server.server_close()
        ended.set()
        for thread in threads:
            thread.join()


def _keep(local: LocalRunpod, host: Host, ended: threading.Event) -> None:
    """Moves the machines until the end. All containers are children of this thread and end with it."""
    while not ended.wait(_TICK_SECONDS):
        local.advance()
    host.close()
    local.fleet.close()


def _fleet(host: Host | None, clock: Clock, url: str) -> Fleet:
    """Workers run where Pods run, and find the same volumes."""
    return Fleet(host.folder if host else Path(), host.runner if host else None, Queue(clock), url)


def _first_life(host: Host | None) -> tuple[str, ...]:
    return ("PROVISIONING",) if host is not None else ("RUNNING",)


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A killed container breaks its connections; that is no fault of ours."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # head and body go in two packets; the second would wait 40 ms for an answer

    def _go(self) -> None:
        local: LocalRunpod = self.server.runpod  # type: ignore[attr-defined]
        split = urlsplit(self.path)
        path = unquote(split.path)
        length = min(int(self.headers.get("content-length") or 0), _MAX_BODY_BYTES)
        raw = self.rfile.read(length)
        with local.lock:
            local.log.append((self.command, path, raw.decode("utf-8", "replace")))
            asked = asked_of(local.account.held["serverless"], self.command, path, **self._about(split.query, raw))
            fault = local.take_fault(self.command, path)
            if fault is None or (fault.status == 0 if fault.carried_out is None else fault.carried_out):
                try:
                    if asked is not None:
                        status, reply = QueueRoutes(local.fleet, local.changed, local.key).answer(asked)
                    else:
                        status, reply = self._perform(local, path, parse_qs(split.query), raw)
                except Rejected as refused:
                    self._refuse(refused.status, refused.detail)
                    return
        if fault is None and asked is not None:
            self._send_queue(local, asked, status, reply)
            return
        if fault is None:
            self._send(status, reply)
            return
        time.sleep(fault.wait_seconds)
        if fault.status:
            self._refuse(fault.status, fault.detail, headers=fault.headers)
        else:
            self.close_connection = True

    do_GET = do_POST = do_PATCH = do_DELETE = _go  # noqa: N815

    def _perform(self, local: LocalRunpod, path: str, query: dict[str, list[str]], raw: bytes) -> tuple[int, Any]:
        route = local.contract.find(self.command, path)
        if route is None:
            raise Rejected(404, f"no such route: {self.command} {path}")
        try:
            body: Any = json.loads(raw) if raw else None
        except ValueError as error:
            raise Rejected(400, f"the body is not JSON: {error}") from None
        allowed = local.may(self.headers.get("authorization", "").removeprefix("Bearer "), self.command, path, body)
        if allowed != 200:
            raise Rejected(allowed, "invalid API key" if allowed == 401 else "this key may not do that")
        if faults := route.request_errors(body):
            raise Rejected(422, "; ".join(faults))
        status, reply = answer(local.account, self.command, path, query, body, self.headers.get("last-event-id"))
        if reply is not None and not isinstance(reply, list):
            local.drift += [f"{self.command} {route.template}: {f}" for f in route.answer_errors(status, reply)]
        return status, reply

    def _about(self, query: str, raw: bytes) -> dict[str, Any]:
        authorization = self.headers.get("authorization", "")
        return {"query": parse_qs(query), "raw": raw, "authorization": authorization, "is_gone": self._has_hung_up}

    def _has_hung_up(self) -> bool:
        """Whether the other side is dead: a killed worker leaves its question open."""
        try:
            return not self.connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except BlockingIOError:
            return False
        except OSError:
            return True

    def _send_queue(self, local: LocalRunpod, asked: Asked, status: int, reply: Any) -> None:
        try:
            self._write(status, b"" if reply is None else json.dumps(reply).encode(), "application/json")
        except OSError:
            self.close_connection = True
            with local.lock:
                QueueRoutes(local.fleet, local.changed, local.key).unsent(asked, reply)

    def _refuse(self, status: int, detail: str, headers: Mapping[str, str] = {}) -> None:
        body = problem(status, _TITLES.get(status, "Error"), detail)
        self._write(status, json.dumps(body).encode(), "application/problem+json", headers)

    def _send(self, status: int, reply: Any) -> None:
        if isinstance(reply, list):
            events = "".join(f"id: {line['ts']}\ndata: {json.dumps(line)}\n\n" for line in reply)
            self._write(status, events.encode(), "text/event-stream")
        else:
            self._write(status, b"" if reply is None else json.dumps(reply).encode(), "application/json")

    def _write(self, status: int, raw: bytes, content_type: str, headers: Mapping[str, str] = {}) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        if status != 204:
            self.send_header("content-type", content_type)
            self.send_header("content-length", str(len(raw)))
        self.end_headers()
        self.wfile.write(raw)

    def log_message(self, format: str, *args: object) -> None:
        """Requests are in LocalRunpod.log; stderr stays quiet."""
