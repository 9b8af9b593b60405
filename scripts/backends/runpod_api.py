"""A thin client of Runpod's REST v2, the control plane: one function asks, the others name what is asked for.

with RunpodApi(key) as runpod:
    runpod.create("pods", {"name": "lorry-job-1", "gpu": {"id": "NVIDIA H200", "count": 1}, ...})
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime
from email.utils import parsedate_to_datetime
from ipaddress import ip_address
from typing import Any, Literal
from urllib.parse import quote, urlsplit

import httpx

from scripts.backends.runpod_errors import NO_ANSWER, RunpodError
from scripts.errors import InputError, Problem

Json = dict[str, Any]
Collection = Literal["pods", "clusters", "templates", "network-volumes", "serverless", "registries", "account/secrets"]
Bill = Literal["pods", "clusters", "serverless", "network-volumes"]

BASE_URL = "https://api.runpod.io/v2"
LONGEST_WAIT_SECONDS = 60
"A Retry-After beyond this is not waited for but told."

_ROWS = {  # collection -> key of its list answer
    "pods": "pods",
    "clusters": "clusters",
    "templates": "templates",
    "network-volumes": "networkVolumes",
    "serverless": "endpoints",
    "registries": "registries",
    "account/secrets": "secrets",
}
_ATTEMPTS = 5
_MAX_PAGES = 1000
_MAX_ANSWER_BYTES = 64 * 2**20
_TIMEOUT = httpx.Timeout(30.0, connect=10.0)
_SILENCE_SECONDS = 30.0  # after so long without a line, a stream of logs is taken to have ended
_HIDDEN = "[hidden]"
_UNSAID = b'{"detail": "its words are not shown, since they may repeat the secret"}'


class RunpodApi:
    """One account of Runpod. Every call raises RunpodError, which says what may be done next.

    A request is asked again, at most 5 times, where that cannot make a second object: after 429, and after a failure of
    anything but a POST. A POST that failed with 5xx or without an answer raises with `maybe_done`.
    """

    def __init__(self, key: str, base_url: str = BASE_URL, *, sleep: Callable[[float], None] = time.sleep) -> None:
        self._key = _checked_key(key)
        self._base = _checked_base(base_url)
        self._sleep = sleep
        headers = {"authorization": f"Bearer {self._key}", "accept": "application/json"}
        self._client = httpx.Client(headers=headers, timeout=_TIMEOUT)

    @classmethod
    def of(cls, environment: Mapping[str, str]) -> RunpodApi:
        """The account of RUNPOD_API_KEY, at RUNPOD_API_BASE_URL where that is set. Raises InputError without a key."""
        return cls(environment.get("RUNPOD_API_KEY", ""), environment.get("RUNPOD_API_BASE_URL") or BASE_URL)

    def __enter__(self) -> RunpodApi:
        return self

    def __exit__(self, *_: object) -> None:
        self._client.close()

    def listed(self, collection: Collection) -> list[Json]:
        """All objects of a kind. The service knows no filters."""
        return self._rows(f"/{collection}", _ROWS[collection])

    def read(self, collection: Collection, object_id: str) -> Json | None:
        """One object; None when there is none of that id."""
        return self._found(lambda: self.ask("GET", f"/{collection}/{quote(object_id, safe='')}"))

    def create(self, collection: Collection, body: Json, *, secret: bool = False) -> Json:
        """A new object. `secret`: the body holds a secret, so no error repeats what Runpod said about it."""
        return self.ask("POST", f"/{collection}", body, secret=secret)

    def change(self, collection: Collection, object_id: str, body: Json, *, secret: bool = False) -> Json:
        """An object after a change of the fields in `body`."""
        return self.ask("PATCH", f"/{collection}/{quote(object_id, safe='')}", body, secret=secret)

    def delete(self, collection: Collection, object_id: str) -> None:
        """Removes an object; done when there is none. Deleting a Pod terminates it."""
        self._found(lambda: self.ask("DELETE", f"/{collection}/{quote(object_id, safe='')}"))

    def act_on_pod(self, pod_id: str, action: Literal["start", "stop", "restart", "terminate"]) -> Json:
        """The Pod after the action; {} after terminate."""
        return self.ask("POST", f"/pods/{quote(pod_id, safe='')}/action", {"action": action})

    def members(self, cluster_id: str) -> list[Json]:
        """The Pods of a cluster, which the list of Pods leaves out; none when there is no such cluster."""
        try:
            return self._rows(f"/clusters/{quote(cluster_id, safe='')}/pods", "pods")
        except RunpodError as error:
            if error.status == 404:
                return []
            raise

    def workers(self, endpoint_id: str) -> Json:
        """The workers of a serverless endpoint and their number by status."""
        return self.ask("GET", f"/serverless/{quote(endpoint_id, safe='')}/workers")

    def gpus(self, *, count: int = 1, product: Literal["POD", "CLUSTER"] = "POD") -> list[Json]:
        """GPU types with USD per GPU-hour and, for Pods of `count` GPUs, their stock in Secure Cloud by datacentre."""
        query = {"include": "AVAILABILITY", "product": product, "count": str(count), "cloud": "SECURE"}
        return self._rows("/catalog/gpus", "gpus", query)

    def serverless_gpus(self) -> list[Json]:
        """GPU types with the price of their serverless pool and their stock for workers."""
        return self._rows("/catalog/gpus", "gpus", {"include": "AVAILABILITY", "product": "SERVERLESS"})

    def datacenters(self) -> list[Json]:
        """Datacentres with their volume types and GPU stock."""
        return self._rows("/catalog/datacenters", "dataCenters", {"include": "GPU_AVAILABILITY"})

    def bill(self, kind: Bill, start: datetime, *, bucket: Literal["hour", "day", "month"] = "hour") -> list[Json]:
        """What was charged since `start` (with a time zone), in USD: one record per object and bucket of time."""
        return self._rows(f"/billing/{kind}", "records", {"startTime": start.isoformat(), "bucketSize": bucket})

    def pod_logs(self, pod_id: str, *, since: str | None = None, tail: int = 100) -> Iterator[Json]:
        """Log lines {"source", "line", "ts"} as they come, the last `tail` or those after `since` (a `ts`) first.

        Ends when Runpod ends the stream or says nothing for 30 seconds; ask again with the `ts` of the last line.
        """
        return self._log_lines(f"/pods/{quote(pod_id, safe='')}/logs", since, tail)

    def worker_logs(
        self, endpoint_id: str, worker_id: str, *, since: str | None = None, tail: int = 100
    ) -> Iterator[Json]:
        """The same of one worker of a serverless endpoint."""
        path = f"/serverless/{quote(endpoint_id, safe='')}/workers/{quote(worker_id, safe='')}/logs"
        return self._log_lines(path, since, tail)

    def _log_lines(self, path: str, since: str | None, tail: int) -> Iterator[Json]:
        query = {"since": since} if since else {"tail": str(tail)}
        where = f"Runpod: GET {path}"
        timeout = httpx.Timeout(_SILENCE_SECONDS, connect=10.0)
        headers = {"accept": "text/event-stream"}
        try:
            with self._client.stream(
                "GET", self._base + path, params=query, headers=headers, timeout=timeout
            ) as response:
                if not response.is_success:
                    raise self._refusal(where, response, _body(response))
                for line in response.iter_lines():
                    if line.startswith("data:") and isinstance(event := _json(line[5:].encode()), dict):
                        yield event
        except httpx.ReadTimeout:
            return
        except httpx.HTTPError as error:
            raise RunpodError(where, NO_ANSWER, self._plain(error)) from None

    def server_time(self) -> datetime | None:
        """Runpod's clock as its answers show it, to the second; None when they do not."""
        response, _ = self._send("GET", "/catalog/datacenters", None, {}, secret=False)
        try:
            return parsedate_to_datetime(response.headers.get("date", ""))
        except ValueError:
            return None

    def ask(
        self,
        method: str,
        path: str,
        body: Json | None = None,
        query: Mapping[str, str] | None = None,
        *,
        secret: bool = False,
    ) -> Json:
        """Any request of REST v2, below the base URL; {} for an answer without a body."""
        response, raw = self._send(method, path, body, query or {}, secret=secret)
        if not raw:
            return {}
        value = _json(raw)
        if not isinstance(value, dict):
            kind = response.headers.get("content-type", "no content type")
            where, said = f"Runpod: {method} {path}", f"the answer is not a JSON object but {kind}"
            raise RunpodError(where, response.status_code, said, maybe_done=method == "POST")
        return value

    def _rows(self, path: str, name: str, query: Mapping[str, str] | None = None) -> list[Json]:
        """All rows of a list, over its pages where the service makes any."""
        rows: list[Json] = []
        asked = dict(query or {})
        for _ in range(_MAX_PAGES):
            answer = self.ask("GET", path, query=asked)
            found = answer.get(name)
            if not isinstance(found, list):
                raise RunpodError(f"Runpod: GET {path}", 200, f"the answer has no list {name}")
            rows += found
            pages = answer.get("pagination") or {}
            if not pages.get("hasNextPage") or not pages.get("nextCursor"):
                return rows
            asked["cursor"] = str(pages["nextCursor"])
        raise RunpodError(f"Runpod: GET {path}", 200, f"more than {_MAX_PAGES} pages")

    def _found(self, request: Callable[[], Json]) -> Json | None:
        try:
            return request()
        except RunpodError as error:
            if error.status == 404:
                return None
            raise

    def _send(
        self, method: str, path: str, body: Json | None, query: Mapping[str, str], *, secret: bool
    ) -> tuple[httpx.Response, bytes]:
        where = f"Runpod: {method} {path}"
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                with self._client.stream(method, self._base + path, params=query, json=body) as response:
                    raw = _body(response)
                if response.is_success:
                    return response, raw
                error = self._refusal(where, response, _UNSAID if secret else raw)
                wait = _retry_after(response) or 2 ** (attempt - 1)
            except httpx.HTTPError as failure:
                unsent = isinstance(failure, httpx.ConnectError | httpx.ConnectTimeout)
                maybe_done = method == "POST" and not unsent
                error = RunpodError(where, NO_ANSWER, self._plain(failure), maybe_done=maybe_done)
                wait = 2 ** (attempt - 1)
            again = error.verdict == "retry" and not error.maybe_done and wait <= LONGEST_WAIT_SECONDS
            if not again or attempt == _ATTEMPTS:
                raise error from None
            self._sleep(wait)
        raise AssertionError("the last attempt returns or raises")

    def _refusal(self, where: str, response: httpx.Response, raw: bytes) -> RunpodError:
        status = response.status_code
        maybe_done = status >= 500 and response.request.method == "POST"
        detail = self._clean(_detail(raw))
        return RunpodError(where, status, detail, maybe_done=maybe_done, wait_seconds=_retry_after(response))

    def _plain(self, error: Exception) -> str:
        return self._clean(f"{type(error).__name__} ({error})" if str(error) else type(error).__name__)

    def _clean(self, text: str) -> str:
        """One line without the key, should an answer repeat it."""
        return " ".join(text.replace(self._key, _HIDDEN).split())[:400]


def _checked_key(key: str) -> str:
    if not key.strip():
        raise InputError(Problem("RUNPOD_API_KEY", "not set", "a Runpod key with read and write access"))
    if not key.strip().isascii() or not key.strip().isprintable() or " " in key.strip():
        raise InputError(Problem("RUNPOD_API_KEY", "it has characters that no key has", "copy the key again"))
    return key.strip()


def _checked_base(url: str) -> str:
    """The base URL with the /v2 that every path needs; only TLS, or this machine."""
    base = url.strip().rstrip("/")
    try:
        parts = urlsplit(base)
        safe = parts.scheme == "https" or (parts.scheme == "http" and ip_address(parts.hostname or "").is_loopback)
    except ValueError:
        safe = False
    if not safe or not parts.hostname or parts.query or parts.username:
        raise InputError(Problem("RUNPOD_API_BASE_URL", repr(url), f"an https URL such as {BASE_URL}"))
    return base + ("" if parts.path else "/v2")


def _body(response: httpx.Response) -> bytes:
    raw = b""
    for chunk in response.iter_bytes():
        raw += chunk
        if len(raw) > _MAX_ANSWER_BYTES:
            raise httpx.ReadError(f"the answer has more than {_MAX_ANSWER_BYTES} bytes")
    return raw


def _json(raw: bytes) -> Any:
    try:
        return json.loads(raw)
    except (ValueError, RecursionError):
        return None


def _detail(raw: bytes) -> str:
    """What an error says: problem+json of v2 with its list of faults, or the shapes of the API before it."""
    value = _json(raw)
    if not isinstance(value, dict):
        return ""
    said = next((str(value[key]) for key in ("detail", "error", "message", "title") if value.get(key)), "")
    faults = value.get("errors")
    rest = [str(fault.get("message", fault) if isinstance(fault, dict) else fault) for fault in faults or ()]
    return "; ".join(dict.fromkeys(text for text in [said, *rest] if text))


def _retry_after(response: httpx.Response) -> int:
    text = response.headers.get("retry-after", "")
    return int(text) if text.isdecimal() and len(text) < 9 else 0
