"""The front door's adapters: each client sees, promotes and rolls back its own, and is told where a chat goes."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from recipes.job import write_record
from recipes.serving import Place
from scripts import audit
from scripts.evaluate import evaluate
from scripts.gateway.app import create_app
from scripts.gateway.records import Request, Understood
from scripts.gateway.settings import GatewaySettings
from scripts.machine import trainer_environment
from scripts.serving.history import following
from scripts.serving.worker import Worker, answer_command
from scripts.store import open_store
from tests.gateway.conftest import KEYS, SECRET, a_client, serve
from tests.serving.fake_vllm import FakeVllm, served

BASE = "lorry/smoke"


def asked(client: str) -> Request:
    """What the front door wrote when the client sent job good-1."""
    understood = Understood(
        recipe="smoke/zero3", base_model=BASE, epochs=1, learning_rate=0.01, batch_size=4, rank=8, alpha=16
    )
    return Request(
        client=client, job_id="good-1", body_sha256="0" * 64, received_at=1.0, understood=understood
    )  # fmt: skip


class Front:
    """A front door with two clients of which acme has a job good-1, beside a server of the model."""

    def __init__(self, url: str, store: Path, server: FakeVllm, at: str) -> None:
        self.url, self.store, self.server, self.at = url, store, server, at

    def __call__(self, method: str, path: str, client: str = "acme", body: Any = None) -> httpx.Response:
        headers = {"Authorization": f"Bearer {KEYS[client]}"}
        return httpx.request(method, self.url + path, headers=headers, json=body, timeout=280)

    def jobs(self, client: str) -> Any:
        return open_store((self.store / "clients" / client / "jobs").as_uri())


@pytest.fixture
def front(made: Any, tmp_path: Path) -> Iterator[Front]:
    store = tmp_path / "store"
    worker = Worker(answer_command(made.models / "lorry--smoke"), trainer_environment(os.environ, on_cpu=True))
    server = FakeVllm(worker, BASE, tmp_path)
    with served(server) as at:
        job = Path(shutil.copytree(made.store / "good-1", store / "clients" / "acme" / "jobs" / "good-1"))
        write_record(job / "request.json", asked("acme"))
        jobs = open_store((store / "clients" / "acme" / "jobs").as_uri())
        folder = tmp_path / "adapters"
        place = Place(url=at, base=BASE, adapters=folder.as_uri(), mounted=str(folder), form="peft")
        following(jobs, "main", None, place=place, live=None, deed="publish", job_id="good-0", by="ann", at=1.0,
                  outcome="failed")  # fmt: skip
        settings = GatewaySettings(store.as_uri(), (), SECRET, serving_url="https://api.example/v2/s1")
        running, port = serve(create_app(settings, {name: a_client(name) for name in KEYS}))
        yield Front(f"http://127.0.0.1:{port}", store, server, at)
        running.should_exit = True
    worker.close()


@pytest.mark.slow
def test_a_client_promotes_its_own_adapter_alone_and_hears_where_its_chat_goes(front: Front, made: Any) -> None:
    listed = front("GET", "/adapters").json()
    assert [(a["id"], a["evaluation"], a["live"]) for a in listed["adapters"]] == [("good-1", "none", False)]
    assert listed["inference"] == {"url": front.at, "model": BASE, "canary": None}
    unproven = front("POST", "/adapters/good-1/promote")
    assert (unproven.status_code, "not evaluated" in unproven.text) == (422, True)

    assert evaluate(front.jobs("acme"), "good-1", made.models, os.environ, now=2.0).passed
    done = front("POST", "/adapters/good-1/promote")
    assert done.status_code == 200, done.text
    assert done.json()["inference"]["model"] == "clients/acme/good-1"
    assert list(front.server.adapters) == ["clients/acme/good-1"]
    assert front("GET", "/adapters").json()["adapters"][0]["live"]
    entry = audit.verify(front.jobs("acme")).entries[-1]
    assert (entry.who, entry.what, entry.subject) == ("client acme", "promote", "good-1")
    assert audit.verify(front.jobs("brick")).entries == ()

    assert front("GET", "/adapters", "brick").json()["inference"]["model"] is None
    assert "no serving place yet" in front("POST", "/adapters/roll-back", "brick").text
    assert front("POST", "/adapters/good-1/promote", "brick").status_code == 404
    assert front("GET", "/adapters", "brick").json()["adapters"] == []
    back = front("POST", "/adapters/roll-back")
    assert (back.status_code, "no adapter was live there before" in back.text) == (422, True)


@pytest.mark.slow
def test_a_server_that_ignores_the_adapter_is_a_refusal_and_the_old_one_stays(front: Front, made: Any) -> None:
    assert evaluate(front.jobs("acme"), "good-1", made.models, os.environ, now=2.0).passed
    front.server.fault = "ignores"
    refused = front("POST", "/adapters/good-1/promote")
    assert (refused.status_code, "the adapter is ignored" in refused.text) == (422, True)
    assert front("GET", "/adapters").json()["inference"]["model"] == BASE
    assert front.server.adapters == {}


def test_a_client_hears_the_url_of_its_own_place_and_another_one_the_front_doors(tmp_path: Path) -> None:
    jobs = open_store((tmp_path / "clients" / "acme" / "jobs").as_uri())
    place = Place(url="https://llm.example/v2/s1/openai/v1", base=BASE, adapters="file:///a", mounted="/a")
    following(jobs, "main", None, place=place, live="good-1", deed="publish", job_id="good-1", by="ann", at=1.0,
              outcome="done")  # fmt: skip
    settings = GatewaySettings(tmp_path.as_uri(), (), SECRET, serving_url="https://api.example/v2/s1")
    running, port = serve(create_app(settings, {name: a_client(name) for name in KEYS}))
    said = {
        client: httpx.get(f"http://127.0.0.1:{port}/adapters", headers={"X-Lorry-Key": KEYS[client]}, timeout=60).json()
        for client in ("acme", "brick")
    }
    running.should_exit = True
    assert said["acme"]["inference"]["url"] == "https://llm.example/v2/s1/openai"  # the route adds the /v1
    assert said["brick"]["inference"] == {"url": "https://api.example/v2/s1", "model": None, "canary": None}
