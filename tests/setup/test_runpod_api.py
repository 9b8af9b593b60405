"""The client of REST v2 against the local Runpod over real HTTP: what it asks, what it asks again, what it says."""

from __future__ import annotations

import json
import threading
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qsl, unquote, urlsplit

import pytest

from scripts.backends.runpod_api import RunpodApi
from scripts.backends.runpod_errors import RunpodError, verdict
from scripts.errors import InputError
from scripts.fake_runpod.contract import Contract
from scripts.fake_runpod.pods import NO_CAPACITY
from scripts.fake_runpod.server import Fault
from tests.setup.conftest import KEY, OPENAPI

POD = {"name": "p", "image": "i", "gpu": {"id": "NVIDIA H200", "count": 1}}
VOLUME = {"name": "v", "size": 10, "dataCenter": "US-KS-2"}


def refusal(action, *arguments, **named):
    with pytest.raises(RunpodError) as caught:
        action(*arguments, **named)
    return caught.value


@pytest.mark.parametrize(
    ("status", "detail", "expected"),
    [
        (400, NO_CAPACITY, "next_candidate"),
        (400, "exactly one of gpu and cpu must be given", "next_candidate"),
        (500, "create pod: There are no instances currently available", "next_candidate"),
        (403, "pool not available to this account", "next_candidate"),
        (401, "invalid API key", "stop"),
        (402, "insufficient balance", "stop"),
        (400, "Not enough credit to rent this Pod", "stop"),
        (404, "template not found", "stop"),
        (409, "action not valid", "refresh"),
        (410, "gone", "stop"),
        (422, "additional properties", "stop"),
        (429, "rate limit", "retry"),
        (500, "internal", "retry"),
        (503, "", "retry"),
        (0, "ConnectError", "retry"),
        (302, "", "stop"),
    ],
)
def test_the_status_decides_what_may_be_done(status, detail, expected):
    assert verdict(status, detail) == expected


def test_an_object_is_made_read_changed_listed_and_removed(api):
    made = api.create("network-volumes", VOLUME)
    assert api.read("network-volumes", made["id"]) == made
    assert api.change("network-volumes", made["id"], {"size": 20})["size"] == 20
    assert [row["size"] for row in api.listed("network-volumes")] == [20]
    api.delete("network-volumes", made["id"])
    api.delete("network-volumes", made["id"])
    assert api.read("network-volumes", made["id"]) is None
    assert api.listed("network-volumes") == []


def test_a_pod_is_watched_and_terminated(api, runpod):
    pod = api.create("pods", POD)
    runpod.account.pod_logs[pod["id"]] = ["one", "two"]
    assert [event["line"] for event in api.pod_logs(pod["id"])] == ["one", "two"]
    assert api.act_on_pod(pod["id"], "terminate") == {}
    assert runpod.account.is_empty()
    assert refusal(lambda: list(api.pod_logs(pod["id"]))).status == 404


def test_stock_and_prices_come_with_the_catalogue(api, runpod):
    runpod.account.catalog.stock["US-KS-2"]["NVIDIA H200"] = "NONE"
    h200 = next(gpu for gpu in api.gpus(count=4) if gpu["id"] == "NVIDIA H200")
    levels = {row["id"]: row["availability"] for row in h200["dataCenters"]}
    assert (levels["US-KS-2"], levels["US-CA-2"], h200["price"]["secure"]) == ("NONE", "LOW", 4.59)
    home = next(row for row in api.datacenters() if row["id"] == "US-TX-1")
    assert home["networkVolumeTypes"] == []
    assert home["gpuAvailability"]


def test_all_pages_of_a_list_are_read(api, runpod):
    names = [f"v{number}" for number in range(7)]
    for name in names:
        api.create("network-volumes", VOLUME | {"name": name})
    runpod.account.page_rows = 3
    assert [row["name"] for row in api.listed("network-volumes")] == names


def test_retry_after_is_obeyed(api, runpod, waits):
    runpod.faults.append(Fault("GET", "/pods", 429, headers={"Retry-After": "7"}, times=2))
    assert api.listed("pods") == []
    assert waits == [7, 7]


def test_a_create_is_asked_again_after_429_because_nothing_was_made(api, runpod, waits):
    runpod.faults.append(Fault("POST", "/pods", 429))
    assert api.create("pods", POD)["name"] == "p"
    assert waits == [1]
    assert len(runpod.account.held["pods"]) == 1


def test_a_wait_that_is_too_long_is_told_instead(api, runpod, waits):
    runpod.faults.append(Fault("GET", "/pods", 429, "slow down", headers={"Retry-After": "3600"}))
    error = refusal(api.listed, "pods")
    assert str(error) == "Runpod: GET /pods: status 429: slow down; wait 3600 seconds, then run the same command again"
    assert waits == []


def test_trouble_is_outwaited_a_bounded_number_of_times(api, runpod, waits):
    runpod.faults.append(Fault("GET", "/pods", 500, "boom", times=4))
    assert api.listed("pods") == []
    assert waits == [1, 2, 4, 8]
    runpod.faults.append(Fault("GET", "/pods", 500, "boom", times=99))
    error = refusal(api.listed, "pods")
    assert str(error) == "Runpod: GET /pods: status 500: boom; Runpod has trouble: run the same command again later"
    assert len(waits) == 8


@pytest.mark.parametrize("status", [0, 500, 502, 503])
def test_a_create_without_a_clear_answer_is_never_repeated(status, api, runpod, waits):
    runpod.faults.append(Fault("POST", "/pods", status))
    error = refusal(api.create, "pods", POD)
    assert error.maybe_done
    assert error.verdict == "retry"
    assert "it may have been carried out: look before you repeat it" in str(error)
    assert [entry[0] for entry in runpod.log] == ["POST"]
    assert waits == []
    assert len(api.listed("pods")) == (1 if status == 0 else 0)


def test_a_read_whose_answer_is_lost_is_asked_again(api, runpod):
    runpod.faults.append(Fault("GET", "/pods", 0))
    assert api.listed("pods") == []


def test_nobody_at_the_address_is_one_sentence(waits):
    error = refusal(RunpodApi(KEY, "http://127.0.0.1:9/v2", sleep=waits.append).create, "pods", POD)
    assert str(error).startswith("Runpod: POST /pods: no answer: ConnectError")
    assert str(error).endswith("; check the network and RUNPOD_API_BASE_URL")
    assert not error.maybe_done, "it never left this machine"
    assert waits == [1, 2, 4, 8]


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (POD | {"gpu": {"id": "H201", "count": 1}}, "status 400: unknown GPU type H201; correct the value it names"),
        (POD | {"dataCenterIds": ["EU-RO-1"]}, "choose another datacentre or GPU: see `lorry capacity`"),
        (POD | {"interruptible": True}, "status 422"),
    ],
)
def test_bad_input_is_named_with_the_next_step(body, said, api, waits):
    error = refusal(api.create, "pods", body)
    assert said in str(error)
    assert len(str(error).splitlines()) == 1
    assert error.exit_code == 8
    assert waits == []


@pytest.mark.parametrize(
    ("status", "step"),
    [
        (402, "add credit to the Runpod account"),
        (403, "give the key of RUNPOD_API_KEY read and write access to this, or choose another GPU"),
        (409, "look at what is there now; it does not allow this"),
        (410, "this address has been retired; set RUNPOD_API_BASE_URL to the address of REST v2, or unset it"),
        (302, "check RUNPOD_API_BASE_URL; this answer is not one of REST v2, so run the same command again after that"),
    ],
)
def test_each_refusal_says_what_to_do(status, step, api, runpod):
    runpod.faults.append(Fault("POST", "/pods", status, "scripted"))
    assert str(refusal(api.create, "pods", POD)) == f"Runpod: POST /pods: status {status}: scripted; {step}"


def test_a_wrong_key_is_refused_without_being_shown(runpod, seen):
    other = "rpa_" + KEY
    error = refusal(RunpodApi(other, runpod.url).listed, "pods")
    seen.append(repr(error) + repr(vars(error)))
    assert str(error) == "Runpod: GET /pods: status 401: invalid API key; set RUNPOD_API_KEY to a key that is live"


def test_the_key_is_hidden_even_where_runpod_repeats_it(api, runpod, seen):
    runpod.faults.append(Fault("GET", "/pods", 403, f"key {KEY} may not read this"))
    error = refusal(api.listed, "pods")
    seen += [str(error), json.dumps(error.as_json()), repr(vars(error)), repr(api)]
    assert "key [hidden] may not read this" in str(error)


def test_a_secret_in_a_body_is_never_repeated(api, runpod):
    runpod.faults.append(Fault("POST", "/account/secrets", 422, "value: 'canary-value' is too weak"))
    body = {"name": "hf", "value": "canary-value"}
    error = refusal(api.create, "account/secrets", body, secret=True)
    assert "canary" not in json.dumps(error.as_json())
    assert error.status == 422


@pytest.mark.parametrize("key", ["", "  ", "rpa_\u00e9", "two words", "line\nbreak"])
def test_what_cannot_be_a_key_is_refused_before_anything_is_sent(key):
    with pytest.raises(InputError, match=r"^RUNPOD_API_KEY: ") as caught:
        RunpodApi(key)
    assert not key.strip() or key not in str(caught.value)


@pytest.mark.parametrize("url", ["http://api.runpod.io/v2", "api.runpod.io", "ftp://x", "https://u:p@h/v2", "http://["])
def test_the_key_travels_only_over_tls_or_on_this_machine(url):
    with pytest.raises(InputError, match="RUNPOD_API_BASE_URL"):
        RunpodApi(KEY, url)


def test_the_base_url_may_lack_its_version(runpod):
    assert RunpodApi(KEY, runpod.url.removesuffix("/v2")).listed("pods") == []


def test_the_clock_of_runpod_is_read_from_its_answers(api):
    assert abs(api.server_time() - datetime.now(UTC)) < timedelta(seconds=5)


@pytest.mark.parametrize(("after", "ends"), [("silence", "quietly"), ("a broken connection", "with an error")])
def test_a_stream_of_logs_ends_when_runpod_says_no_more(after, ends, monkeypatch):
    monkeypatch.setattr("scripts.backends.runpod_api._SILENCE_SECONDS", 0.3)
    done = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header("content-type", "text/event-stream")
            self.send_header("content-length", "1000")
            self.end_headers()
            self.wfile.write(b': hello\nid: 1\ndata: {"line": "one", "ts": "t"}\n\ndata: not json\n\n')
            self.wfile.flush()
            if after == "silence":
                done.wait(20)

        def log_message(self, *_):
            pass

    with served(Handler) as url:
        lines = RunpodApi(KEY, url).pod_logs("p1")
        assert next(lines) == {"line": "one", "ts": "t"}
        if ends == "quietly":
            assert list(lines) == []
        else:
            assert refusal(list, lines).status == 0
        done.set()


@contextmanager
def served(handler):
    """A server of this machine on a free port; yields its base URL."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v2"
    finally:
        server.shutdown()
        server.server_close()


@contextmanager
def recorder(raw=b"{}", content_type="application/json"):
    """A server that gives each request the same answer; yields its base URL and (method, path, query, body)."""
    requests = []

    class Handler(BaseHTTPRequestHandler):
        def _go(self):
            parts = urlsplit(self.path)
            body = self.rfile.read(int(self.headers.get("content-length") or 0))
            query = dict(parse_qsl(parts.query))
            requests.append((self.command, unquote(parts.path), query, json.loads(body) if body else None))
            self.send_response(200)
            self.send_header("content-type", content_type)
            self.send_header("content-length", str(len(raw)))
            self.end_headers()
            self.wfile.write(raw)

        do_GET = do_POST = do_PATCH = do_DELETE = _go  # noqa: N815

        def log_message(self, *_):
            pass

    with served(Handler) as url:
        yield url, requests


@pytest.mark.parametrize("raw", [b"<html>", b"[]", b"[" * 100_000, b'{"pods": 3}'])
def test_an_answer_that_is_no_rest_v2_is_one_sentence(raw):
    with recorder(raw) as (url, _):
        error = refusal(RunpodApi(KEY, url).listed, "pods")
    assert len(str(error)) < 300
    assert "RUNPOD_API_BASE_URL" in str(error)


def test_an_answer_too_large_is_refused(monkeypatch, waits):
    monkeypatch.setattr("scripts.backends.runpod_api._MAX_ANSWER_BYTES", 1000)
    with recorder(b'{"pods": []}' + b" " * 2000) as (url, _):
        assert "more than 1000 bytes" in str(refusal(RunpodApi(KEY, url, sleep=waits.append).listed, "pods"))


def test_every_request_keeps_to_the_published_document():
    if OPENAPI is None:
        pytest.skip("RUNPOD_OPENAPI is not set: no OpenAPI document of REST v2 to compare with")
    from jsonschema import Draft202012Validator

    contract = Contract.load(OPENAPI)
    lists = ["pods", "templates", "networkVolumes", "endpoints", "registries", "secrets", "gpus", "dataCenters"]
    with recorder(json.dumps({name: [] for name in [*lists, "records"]}).encode()) as (url, requests):
        _ask_for_everything(RunpodApi(KEY, url))
    assert len(requests) == 26
    for method, path, query, body in requests:
        route = contract.find(method, path)
        assert route is not None, f"{method} {path}"
        assert route.request_errors(body) == [], path
        known = {p["name"]: p for p in (route._follow(p) for p in route.operation.get("parameters", []))}
        for name, value in query.items():
            schema = {**known[name]["schema"], "components": route.document["components"]}
            typed = [value] if schema.get("type") == "array" else int(value) if value.isdecimal() else value
            assert list(Draft202012Validator(schema).iter_errors(typed)) == [], f"{path}?{name}={value}"


def _ask_for_everything(api):
    bodies = {
        "pods": (POD, {"name": "q"}),
        "templates": ({"name": "t", "image": "i"}, {"image": "j"}),
        "network-volumes": (VOLUME, {"size": 20}),
        "serverless": (None, {"workers": {"max": 3}}),
        "registries": ({"name": "r", "username": "u", "password": "p"}, None),
        "account/secrets": ({"name": "s", "value": "v"}, {"value": "w"}),
    }
    for collection, (new, change) in bodies.items():
        api.listed(collection)
        if new:
            api.create(collection, new)
        if change:
            api.change(collection, "x1", change)
    api.read("templates", "x1")
    api.delete("pods", "x1")
    api.act_on_pod("x1", "terminate")
    api.workers("x1")
    list(api.pod_logs("x1"))
    list(api.pod_logs("x1", since="2026-06-01T12:02:03Z"))
    api.gpus(count=2, product="CLUSTER")
    api.datacenters()
    api.server_time()
    api.bill("pods", datetime(2026, 6, 1, tzinfo=UTC))
