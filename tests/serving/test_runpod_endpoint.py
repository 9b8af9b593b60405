"""A Runpod endpoint changes its list of adapters by drain and restore, whoever dies meanwhile; it never stays empty."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from recipes.serving import Place
from scripts.backends.runpod_api import RunpodApi
from scripts.errors import Problem, ProviderError
from scripts.fake_runpod.server import LocalRunpod, serve
from scripts.machine import trainer_environment
from scripts.serving.publish import Desk, publish, roll_back
from scripts.serving.runpod_endpoint import RunpodVllm, endpoint_ids, modules_of, restore
from scripts.serving.worker import Worker, answer_command
from scripts.store import open_store
from tests.serving.conftest import renamed
from tests.serving.fake_vllm import FakeVllm, served

ROOT = Path(__file__).resolve().parents[2]
KEY = "rpa_CANARY_serving_key"
OPENAPI = Path(os.environ["RUNPOD_OPENAPI"]) if "RUNPOD_OPENAPI" in os.environ else None
BASE = "lorry/smoke"
ENDPOINT = {
    "name": "lorry-serving",
    "type": "QUEUE",
    "image": "registry.example/vllm@sha256:" + "a" * 64,
    "gpu": {"pools": ["AMPERE_80"], "count": 1},
    "scaling": {"type": "QUEUE_DELAY", "queueDelay": 4},
    "workers": {"min": 0, "max": 2, "idleTimeout": 300},
    "timeout": 4_200_000,
    "env": {"ENABLE_LORA": "true", "MAX_LORA_RANK": "16", "HF_TOKEN": "{{ RUNPOD_SECRET_hf }}", "LORA_MODULES": "[]"},
}


class Endpoint:
    """One endpoint of a local Runpod, and who changes it. Old workers take `leaving` looks to go."""

    def __init__(self, local: LocalRunpod, folder: Path) -> None:
        self.local, self.api = local, RunpodApi(KEY, local.url, sleep=lambda seconds: None)
        self.id = str(self.api.create("serverless", ENDPOINT)["id"])
        self.store = open_store((folder / "store").as_uri())
        self.clock = 1000.0
        self.url = "http://127.0.0.1:9"

    def worker(self) -> None:
        row = {"id": "w1", "endpoint": self.id, "status": "RUNNING", "gpuCount": 1, "isStale": True}
        self.local.account.workers["w1"] = row | {"startedAt": "2026-11-27T00:00:00Z", "gone": False}

    def sleep(self, seconds: float) -> None:
        self.clock += seconds
        if self.clock > 1030:
            self.local.account.workers.clear()

    def hand(self, store: Any = None) -> RunpodVllm:
        return RunpodVllm(
            self.api, self.id, store or self.store, self.url, KEY, "ann", lambda: self.clock, self.sleep
        )  # fmt: skip

    @property
    def shown(self) -> dict[str, Any]:
        found = self.api.read("serverless", self.id)
        assert found is not None
        return found

    def stands(self) -> tuple[dict[str, str], int]:
        """(the list, the most workers)."""
        return modules_of(self.shown), self.shown["workers"]["max"]


@pytest.fixture
def endpoint(tmp_path: Path) -> Iterator[Endpoint]:
    with serve(KEY, OPENAPI) as local:
        yield Endpoint(local, tmp_path)
        assert local.drift == []


def test_the_list_changes_when_the_old_workers_are_gone_and_everything_else_stays(endpoint: Endpoint) -> None:
    endpoint.worker()
    endpoint.hand().load("one", "/runpod-volume/adapters/one")
    assert endpoint.stands() == ({"one": "/runpod-volume/adapters/one"}, 2)
    assert endpoint.clock > 1030  # it waited for the worker that had read the old list
    assert endpoint.shown["env"] == ENDPOINT["env"] | {"LORA_MODULES": endpoint.shown["env"]["LORA_MODULES"]}
    assert endpoint.shown["workers"] == {"min": 0, "max": 2, "idleTimeout": 300}
    endpoint.hand(open_store(f"{endpoint.store.url}/clients/acme/jobs")).load("clients/acme/two", "/two")
    endpoint.hand().unload("one")
    assert endpoint.stands() == ({"clients/acme/two": "/two"}, 2)
    assert endpoint_ids(endpoint.store) == [endpoint.id]
    endpoint.hand().forget(["clients/acme/two"])
    assert endpoint.stands() == ({}, 2)
    assert "acme" not in str([endpoint.store.read(key) for key in endpoint.store.keys("_endpoints")])


@pytest.mark.parametrize("patch", [1, 2])
@pytest.mark.parametrize("reaches", [True, False])
def test_a_change_that_was_cut_off_is_finished_by_the_next(endpoint: Endpoint, patch: int, reaches: bool) -> None:
    """The first or the second PATCH is the last thing that happens; whoever sent it never knows what came of it."""
    endpoint.hand().load("one", "/one")
    sent: list[int] = []
    real = endpoint.api.change

    class Killed(BaseException):
        pass

    def dies(*words: Any, **more: Any) -> Any:
        sent.append(1)
        if len(sent) == patch:
            if reaches:
                real(*words, **more)
            raise Killed
        return real(*words, **more)

    endpoint.api.change = dies  # type: ignore[method-assign]
    with pytest.raises(Killed):
        endpoint.hand().load("two", "/two")
    endpoint.api.change = real  # type: ignore[method-assign]
    assert restore(endpoint.api, endpoint.store, endpoint.id, endpoint.clock)  # the tick of a cron job
    assert endpoint.stands()[1] == 2
    for _ in range(2):
        endpoint.hand().load("two", "/two")
        assert endpoint.stands() == ({"one": "/one", "two": "/two"}, 2)


def test_a_worker_that_does_not_go_keeps_nobody_from_being_served(endpoint: Endpoint) -> None:
    endpoint.worker()
    endpoint.sleep = lambda seconds: setattr(endpoint, "clock", endpoint.clock + seconds)  # type: ignore[method-assign]
    endpoint.hand().load("one", "/one")
    assert endpoint.stands() == ({"one": "/one"}, 2)


def test_an_endpoint_found_at_zero_comes_back_with_a_worker(endpoint: Endpoint) -> None:
    endpoint.api.change("serverless", endpoint.id, {"workers": {"min": 0, "max": 0}})
    endpoint.hand().load("one", "/one")
    assert endpoint.stands() == ({"one": "/one"}, 1)


def test_a_tick_at_a_terminal_gives_a_drained_endpoint_its_workers_back(endpoint: Endpoint) -> None:
    endpoint.hand().load("one", "/one")
    endpoint.api.change("serverless", endpoint.id, {"workers": {"min": 0, "max": 0}})
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "LORRY_STORE": endpoint.store.url}
    environment |= {"RUNPOD_API_KEY": KEY, "RUNPOD_API_BASE_URL": endpoint.local.url}
    ticked = subprocess.run(
        [sys.executable, "-m", "scripts.cli", "tick"], env=environment, capture_output=True, text=True, timeout=120
    )
    assert ticked.returncode == 0, ticked.stderr
    assert endpoint.stands() == ({"one": "/one"}, 2)


class ListReader(FakeVllm):
    """The worker of an endpoint: it reads LORA_MODULES at its start, and is gone while the endpoint has no workers."""

    def __init__(self, endpoint: Endpoint, worker: Worker, scratch: Path) -> None:
        super().__init__(worker, BASE, scratch)
        self.endpoint, self.life = endpoint, 0

    def models(self) -> dict[str, Any]:
        self._start()
        return super().models()

    def complete(self, body: dict[str, Any]) -> dict[str, Any]:
        self._start()
        return super().complete(body)

    def _start(self) -> None:
        shown = self.endpoint.local.account.held["serverless"][self.endpoint.id]
        if shown["workers"]["max"] == 0:
            raise ProviderError(Problem("endpoint", "no worker", "wait"))
        lives = 1 + sum(m == "PATCH" and '"max":0' in body.replace(" ", "") for m, _, body in self.endpoint.local.log)
        if lives > self.life:
            self.life, self.adapters = lives, {}
            for name, path in modules_of(shown).items():
                self.load({"lora_name": name, "lora_path": path})


@pytest.mark.slow
def test_an_adapter_is_proven_through_the_endpoint_and_the_way_back_needs_no_drain(
    endpoint: Endpoint, made: Any, tmp_path: Path
) -> None:
    worker = Worker(answer_command(made.models / "lorry--smoke"), trainer_environment(os.environ, on_cpu=True))
    store = tmp_path / "jobs"
    for name in ("one", "two"):
        store.mkdir(exist_ok=True)
        renamed(made.store, "good-1", name).rename(store / name)
    with served(ListReader(endpoint, worker, tmp_path)) as endpoint.url:
        folder = tmp_path / "adapters"
        place = Place(url=endpoint.url, base=BASE, adapters=folder.as_uri(), mounted=str(folder), form="peft",
                      endpoint=endpoint.id)  # fmt: skip
        jobs = open_store(store.as_uri())
        desk = Desk(jobs, "main", endpoint.hand(jobs), os.environ, "ann", lambda: endpoint.clock, endpoint.sleep)
        for name in ("one", "two"):
            state = publish(desk, name, place, override="the endpoint is what is tested")
            assert (state.live, state.outcome) == (name, "done")
        assert set(endpoint.stands()[0]) == {"one", "two"}
        patches = len(endpoint.local.log)
        assert roll_back(desk).live == "one"
        drains = [body for method, _, body in endpoint.local.log[patches:] if method == "PATCH" and "workers" in body]
        assert drains == []
        assert endpoint.stands()[1] == 2
    worker.close()


def test_an_endpoint_without_lora_or_memory_for_it_is_seen_before_anything_is_touched(endpoint: Endpoint) -> None:
    hand = endpoint.hand()
    assert hand.offer().lora is True
    assert (hand.offer().max_lora_rank, hand.offer().max_loras, hand.offer().gpu_gib) == (16, 1, 80)
    endpoint.api.change("serverless", endpoint.id, {"env": {"MAX_LORA_RANK": "64", "MAX_LORAS": "4"}})
    assert hand.offer().lora is False
    assert (hand.offer().max_lora_rank, hand.offer().max_loras) == (64, 4)
