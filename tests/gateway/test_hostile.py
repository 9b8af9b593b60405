"""Whatever is sent, the answer is a sentence and a 4xx: no traceback, no 5xx, no secret."""

from __future__ import annotations

import gzip
import json
import socket
from collections import Counter
from typing import Any
from urllib.parse import urlsplit

import pytest
import schemathesis
from hypothesis import HealthCheck, settings

from scripts.backends.base import Handle, Observation
from scripts.gateway.openapi import EXAMPLE_LINK, openapi_document
from tests.gateway.conftest import EXAMPLE, KEYS, Front, Rented

RUN = "/v2/lorry/run"
JSON = {"Content-Type": "application/json", "Authorization": f"Bearer {KEYS['acme']}"}
DEEP = b'{"input":' + b'{"a":' * 60 + b"1" + b"}" * 61
URL = "https://training.example/set.jsonl"


def sentence(answer: Any) -> str:
    """The error of a refused request, which has the shape every error has."""
    assert 400 <= answer.status_code < 500, (answer.status_code, answer.text)
    told = answer.json()
    assert told.keys() == {"error", "code", "problems"}
    assert "Traceback" not in answer.text
    assert 'File "' not in answer.text
    return str(told["error"]["message"] if isinstance(told["error"], dict) else told["error"])


BODIES = [
    (b"", "not a JSON object"),
    (b"   ", "not a JSON object"),
    (b"{", "not JSON"),
    (b"null", "not a JSON object"),
    (b"[]", "not a JSON object"),
    (b'"run"', "not a JSON object"),
    (b"{'input': 1}", "not JSON"),
    (b'{"input": NaN}', "NaN is not JSON"),
    (b'{"input": {"x": 1e999}}', "not JSON"),
    (b'{"input": {"x": ' + b"9" * 5000 + b"}}", "not JSON"),
    (b'{"input": {"job_id": "\\ud800"}}', "not UTF-8"),
    (b'{"input": {"job_id": "\xff"}}', "not UTF-8"),
    (b"\x1f\x8b\x08\x00", "not UTF-8"),
    (b"<xml/>", "not JSON"),
    (b"a=1&b=2", "not JSON"),
    (DEEP, "levels deep"),
    (b"[" * 200_000, "levels deep"),
    (b"{}", "input: missing"),
    (b'{"input": null}', "input: missing"),
    (b'{"input": "x"}', "input: not an object"),
    (b'{"input": {}}', "input.dataset_url: missing"),
    (b'{"input": {"dataset_url": 5}}', "input: dataset_url: 5; text"),
    (b'{"input": {"dataset_url": "x", "hyperparameters": []}}', "hyperparameters"),
    (b'{"input": {"dataset_url": "x", "hyperparameters": {"epochs": 0}}}', "epochs: 0; 1 or more"),
    (b'{"input": {"dataset_url": "x", "hyperparameters": {"num_epochs": 1e9}}}', "100 or less"),
    (b'{"input": {"dataset_url": "x", "hyperparameters": {"epochs": 1.5}}}', "a whole number"),
    (b'{"input": {"dataset_url": "x", "hyperparameters": {"epochs": true}}}', "a number"),
    (b'{"input": {"dataset_url": "x", "hyperparameters": {"learning_rate": "fast"}}}', "learning_rate"),
    (b'{"input": {"dataset_url": "x", "hyperparameters": {"lora_rank": -4}}}', "1 or more"),
    (b'{"input": {"dataset_url": "x", "base_model": "gpt-7"}}', "unknown model 'gpt-7'; one of"),
    (b'{"input": {"dataset_url": "x", "hyperparameters": {"batch_size": 3}}}', "does not divide over 2 GPUs"),
    (b'{"input": {"dataset_url": "x", "job_id": ""}}', "at least 1 characters"),
    (b'{"input": {"dataset_url": "x"}, "policy": {"executionTimeout": 1}}', "policy: executionTimeout"),
    (b'{"input": {"dataset_url": "x"}, "policy": []}', "https://"),
    (b'{"input": {"dataset_url": "x"}, "webhook": {}}', "webhook"),
    (b'{"input": {"openai_route": "/v1/chat/completions", "openai_input": {}}}', "INFERENCE_API_URL"),
    (b'{"input": {"messages": [], "max_tokens": 5}}', "this URL trains"),
    (b'{"input": {"prompt": "hello"}}', "a request for inference"),
]  # fmt: skip


def test_a_body_that_cannot_be_used_is_refused_in_a_sentence(front: Front) -> None:
    for body, said in BODIES:
        answer = front.http.post(front.url + RUN, content=body, headers=JSON)
        assert said in sentence(answer), body[:200]
    assert not front.folder("").exists() or list(front.folder("").iterdir()) == []


TYPES = (
    "text/plain",
    "application/xml",
    "multipart/form-data; boundary=x",
    "application/json; charset=utf-16",
    "\u00e9",
    "",
)


def test_a_body_is_judged_by_itself_and_not_by_its_content_type(still: Front) -> None:
    for number, kind in enumerate(TYPES):
        headers = [(b"authorization", JSON["Authorization"].encode()), (b"content-type", kind.encode())]
        body = json.dumps({"input": still.input(job_id=f"job-{number}")}).encode()
        assert still.http.post(still.url + RUN, content=body, headers=headers).status_code == 200, kind
        assert "not JSON" in sentence(still.http.post(still.url + RUN, content=b"--x\r\n", headers=headers)), kind
        for encoding in (b"gzip", b"br", b"x"):
            packed = [*headers, (b"content-encoding", encoding)]
            sentence(still.http.post(still.url + RUN, content=gzip.compress(b"0" * 9_000_000), headers=packed))
    upload = still.http.post(f"{still.url}/v1/files", content=b"{}", headers=JSON)
    assert "not a form" in sentence(upload) or "missing" in sentence(upload)


def test_ten_megabytes_are_refused_before_they_are_read_as_json(front: Front) -> None:
    for body in (b'{"input": "' + b"a" * 10_000_001 + b'"}', b"[" * 10_000_001):
        answer = front.http.post(front.url + RUN, content=body, headers=JSON)
        assert answer.status_code == 413
        assert "at most 10000000 bytes" in sentence(answer)
    almost = b'{"input": "' + b"a" * 9_999_000 + b'"}'
    assert "not an object" in sentence(front.http.post(front.url + RUN, content=almost, headers=JSON))


@pytest.mark.parametrize("path", ["/v2/lorry/status/{}", "/v1/fine_tuning/jobs/{}", "/v1/files/{}", "/files/acme/{}"])
def test_an_odd_id_in_a_path_is_not_found(front: Front, path: str) -> None:
    names = ["..", "%2e%2e", "..%2f..%2fetc%2fpasswd", "%00", "a%0d%0aX: y", "-", "x" * 3000, "%ff%fe", "a/b"]
    for name in names:
        answer = raw(front, f"GET {path.format(name)} HTTP/1.1")
        assert answer.startswith(("HTTP/1.1 404", "HTTP/1.1 400")), (name, answer)
        assert "Traceback" not in answer


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", RUN, 405), ("DELETE", "/v2/lorry/status/x", 405), ("PUT", "/v1/files", 405),
        ("POST", "/v2/other/run", 404), ("GET", "/", 404), ("POST", "/v1/chat/completions", 404),
        ("GET", "/v2/lorry/status/", 404),
    ],
)  # fmt: skip
def test_what_is_not_served_is_said_in_json(front: Front, method: str, path: str, status: int) -> None:
    answer = front.call(method, path)
    assert answer.status_code == status
    assert sentence(answer)


def test_inference_at_the_wrong_door_is_told_where_to_go(make_front: Any) -> None:
    front = make_front(settings={"serving_url": "https://serving.example/v2/abc"})
    body = {"input": {"openai_route": "/v1/chat/completions", "openai_input": {"messages": []}}}
    assert "https://serving.example/v2/abc" in sentence(front.post("/v2/lorry/runsync", body))
    for path in ("/v1/chat/completions", "/v1/completions", "/v2/lorry/v1/chat/completions"):
        assert "INFERENCE_API_URL (https://serving.example/v2/abc)" in sentence(front.post(path, {}, key=None))


FINE_TUNING: list[tuple[dict[str, Any], str]] = [
    ({}, "model: missing"),
    ({"model": "lorry/smoke", "training_file": "file-../../x"}, "no file"),
    ({"model": "lorry/smoke", "training_file": "file-0"}, "no file 'file-0'"),
    ({"model": "lorry/smoke", "training_file": URL, "validation_file": "file-1"}, "is held out"),
    ({"model": "lorry/smoke", "training_file": URL, "method": {"type": "dpo"}}, "supervised"),
    ({"model": "lorry/smoke", "training_file": URL, "hyperparameters": {"n_epochs": "many"}}, "epochs"),
    ({"model": "lorry/smoke", "training_file": URL, "metadata": {"a": 1}}, "metadata"),
    ({"model": "gpt-4.1", "training_file": URL}, "unknown model 'gpt-4.1'"),
]  # fmt: skip


def test_a_fine_tuning_job_that_cannot_be_is_refused(front: Front) -> None:
    for body, said in FINE_TUNING:
        assert said in sentence(front.post("/v1/fine_tuning/jobs", body)), body


def raw(front: Front, first_line: str) -> str:
    """The answer to a request that no well-behaved client would send."""
    parts = urlsplit(front.url)
    with socket.create_connection((parts.hostname or "", parts.port or 0), timeout=120) as connection:
        head = f"{first_line}\r\nHost: x\r\nAuthorization: Bearer {KEYS['acme']}\r\nConnection: close\r\n\r\n"
        connection.sendall(head.encode())
        data = b""
        while chunk := connection.recv(65536):
            data += chunk
    return data.decode("utf-8", "replace")


class Vanishing(Rented):
    """A provider whose machines are gone as soon as anybody looks, so that nothing is waited for."""

    def observe(self, handle: Handle) -> Observation:
        return Observation("gone", "it vanished")


def reaching(front: Front, done: str, failed: str, file_id: str) -> Any:
    """The front door's own document, its texts narrowed to what is there: a training set, a model, jobs, a file.

    A link from the document alone leads nowhere, and an id from it alone is nobody's: all else would go untried.
    """
    document = json.loads(json.dumps(openapi_document()))
    schemas = document["components"]["schemas"]
    links = [f"{front.sets.url}/set.jsonl", f"{front.sets.url}/set.jsonl?token=x", f"{front.sets.url}/page.html"]
    training = schemas["TrainingInput"]
    training["properties"]["dataset_url"] = {"enum": links}
    training["properties"]["job_id"] = {"enum": [*(f"job-{n}" for n in range(9)), done, failed, "../x", "\u00e9"]}
    training["properties"]["base_model"] = {"enum": ["lorry/smoke", "LORRY/smoke"]}
    training["required"] = ["dataset_url", "base_model"]
    schemas["Hyperparameters"]["properties"]["batch_size"] = {"enum": [2, 4, "8", 6.0]}
    schemas["CreateJob"]["properties"] |= {
        "model": {"enum": ["lorry/smoke"]},
        "training_file": {"enum": [file_id, *links]},
        "validation_file": {"type": "null"},
        "hyperparameters": {"type": "object", "properties": {"n_epochs": {"type": "integer", "minimum": 1}}},
        "method": {"enum": [{"type": "supervised"}, {"type": "dpo"}]},
    }
    for path, operations in document["paths"].items():
        for parameter in [p for o in operations.values() for p in o.get("parameters", ())]:
            if parameter["name"] == "id":
                known = [file_id] if "/files/" in path else [failed] if "/retry/" in path else [done, "job-1"]
                parameter["schema"] = {"enum": known}
            else:
                parameter["schema"] = {
                    "enum": {"wait": ["1", "1000"], "limit": ["1", "20"]}.get(parameter["name"], [""])
                }
    return document


@pytest.mark.parametrize("examples", [8, pytest.param(40, marks=[pytest.mark.slow, pytest.mark.timeout(1200)])])
def test_no_request_that_the_document_allows_or_forbids_breaks_the_front_door(make_front: Any, examples: int) -> None:
    """schemathesis makes requests from the front door's own OpenAPI document, right ones and wrong ones."""
    real = make_front()
    real.run(job_id="done-1")
    assert real.finish("done-1")["status"] == "COMPLETED"
    front = make_front(open_backend=lambda name, environment: Vanishing("local"))
    front.sets.put("/page.html", b"<html>sign in</html>")
    front.run(job_id="failed-1")
    assert front.status("failed-1")["status"] == "FAILED"
    form = {"file": ("set.jsonl", EXAMPLE.read_bytes())}
    key = {"Authorization": f"Bearer {KEYS['acme']}"}
    uploaded = front.http.post(f"{front.url}/v1/files", headers=key, files=form, data={"purpose": "fine-tune"}).json()
    document = reaching(front, "done-1", "failed-1", uploaded["id"])
    schema = schemathesis.openapi.from_dict(document)
    schema.config.update(base_url=front.url)
    bad: list[str] = []
    seen: Counter[tuple[str, bool]] = Counter()

    for made in schema.get_all_operations():
        operation = made.ok()

        @settings(
            max_examples=examples, deadline=None, database=None, derandomize=True,
            suppress_health_check=list(HealthCheck),
        )  # fmt: skip
        @schemathesis_given(operation)
        def check(case: Any) -> None:
            case.headers = {**(case.headers or {}), "Authorization": f"Bearer {KEYS['acme']}"}
            answer = case.call(timeout=120)
            told = answer.text[:2000]
            seen[f"{case.method} {case.path}", answer.status_code < 400] += 1
            if answer.status_code >= 500 or "Traceback" in told:
                bad.append(f"{case.method} {case.formatted_path}: {answer.status_code} {told}")
            elif answer.status_code >= 400 and answer.headers.get("content-type") == "application/json":
                assert answer.json().keys() == {"error", "code", "problems"}, told

        check()
    assert not bad, bad[:3]
    names = {label for label, _ in seen}
    assert len(names) == 28
    unserved = {"POST /adapters/{id}/promote", "POST /adapters/roll-back"}  # there is no server of the model here
    never = {name for name in names if not seen[name, True]} - unserved
    assert never <= (set() if examples > 20 else {f"POST /v2/lorry/{name}" for name in ("run", "runsync", "quote")})
    assert sum(count for (_, well), count in seen.items() if not well) > examples * 3


def test_the_examples_of_the_document_are_accepted(still: Front) -> None:
    examples = {
        path: operation["requestBody"]["content"]["application/json"]["example"]
        for path, operations in openapi_document()["paths"].items()
        for operation in operations.values()
        if "application/json" in operation.get("requestBody", {}).get("content", {})
    }
    assert len(examples) == 6
    for number, (path, example) in enumerate(examples.items()):
        text = json.dumps(example).replace(EXAMPLE_LINK, f"{still.sets.url}/set.jsonl")
        body = json.loads(text.replace("5f0c1d7e", f"5f0c1d{number}e"))
        answer = still.post(f"{path}?wait=1000", body)
        assert answer.status_code == 200, (path, answer.text)


def schemathesis_given(operation: Any) -> Any:
    """Hypothesis' `given` over right and wrong requests of one operation."""
    from hypothesis import given, strategies
    from schemathesis import GenerationMode

    modes = [GenerationMode.POSITIVE, GenerationMode.NEGATIVE]
    return given(strategies.one_of([operation.as_strategy(generation_mode=mode) for mode in modes]))
