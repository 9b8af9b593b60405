"""A local Runpod with one serverless endpoint: a queue, workers that really run, and jobs launched into it."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from recipes.job import LaunchSpec, Submission
from scripts.backends.runpod_api import RunpodApi
from scripts.backends.runpod_queue import RunpodQueueBackend
from scripts.fake_runpod.host import Host
from scripts.fake_runpod.processes import ProcessRunner
from scripts.fake_runpod.server import LocalRunpod, serve
from scripts.job_folder import JobFiles, read_job
from scripts.launch import launch
from scripts.store import FileStore, open_store
from tests.runpod.conftest import IMAGE, KEY, LIMIT_SECONDS, OPENAPI, REPOSITORY, data_in, spec_of

OFFER = "runpod-flex-a100-1"
QUEUE = {
    "name": "lorry-training",
    "type": "QUEUE",
    "scaling": {"type": "REQUEST_COUNT", "requestCount": 1},
    "gpu": {"pools": ["AMPERE_80"], "count": 1},
    "workers": {"min": 0, "max": 1},
    "timeout": 3_600_000,
    "image": IMAGE,
}


@dataclass
class Queue:
    """One endpoint of the local Runpod, and what a client of it does."""

    runpod: LocalRunpod
    endpoint: str

    @property
    def url(self) -> str:
        return f"{self.runpod.url}/{self.endpoint}"

    def ask(self, method: str, path: str, body: Any = None, key: str = KEY) -> httpx.Response:
        headers = {"authorization": f"Bearer {key}"}
        return httpx.request(method, f"{self.url}/{path}", json=body, headers=headers, timeout=60)

    def run(self, value: dict[str, Any], **extra: Any) -> str:
        answer = self.ask("POST", "run", {"input": value, **extra})
        assert answer.status_code == 200, answer.text
        return str(answer.json()["id"])

    def status(self, job: str) -> dict[str, Any]:
        view: dict[str, Any] = self.ask("GET", f"status/{job}").json()
        return view

    def wait(self, job: str, *statuses: str, seconds: float = LIMIT_SECONDS) -> dict[str, Any]:
        """The status object, once the job is in one of these states."""
        give_up = time.monotonic() + seconds
        while (view := self.status(job)).get("status") not in statuses:
            assert time.monotonic() < give_up, f"{view}\n{self.said()}"
            time.sleep(0.05)
        return view

    def said(self) -> str:
        """What all workers printed."""
        with self.runpod.lock:
            return "\n".join(f"{i}: {line['line']}" for i, lines in self.runpod.account.said.items() for line in lines)

    def set(self, **changes: Any) -> None:
        """Changes the endpoint, as its owner may."""
        with RunpodApi(KEY, self.runpod.url) as api:
            api.change("serverless", self.endpoint, changes)


@dataclass
class QueueRoom:
    """A job that is not launched yet, and the queue it will go to."""

    queue: Queue
    store: FileStore
    data: Path
    environment: dict[str, str]
    spec: LaunchSpec

    def backend(self, **clock: Any) -> RunpodQueueBackend:
        return RunpodQueueBackend(self.environment, **clock)

    def launch(self, **clock: Any) -> Submission:
        return launch(self.store, self.spec, None, self.data, self.backend(**clock), time.time())

    def files(self) -> JobFiles:
        return read_job(self.store, self.spec.job_id)

    def wait(self, for_what: Callable[[], Any], seconds: float = LIMIT_SECONDS) -> None:
        give_up = time.monotonic() + seconds
        while not for_what():
            assert time.monotonic() < give_up, f"never came: {self.files().container}\n{self.queue.said()}"
            time.sleep(0.05)

    def reach(self, step: int) -> None:
        self.wait(lambda: (status := self.files().status) and status.step >= step)

    def trainings(self) -> int:
        """How many containers took this job."""
        log = self.store.root / self.spec.job_id / "logs" / "container.log"
        return log.read_text().count("takes the job") if log.exists() else 0


@pytest.fixture
def runpod(tmp_path: Path) -> Iterator[LocalRunpod]:
    """A local Runpod whose workers are the real one with the replay trainer; its answers keep to the contract."""
    host = Host(tmp_path / "host", ProcessRunner({"scripts.worker": "tests.queue.replay_worker"}))
    with serve(KEY, OPENAPI, host=host) as local:
        yield local
        assert local.drift == []


@pytest.fixture
def make_room(runpod: LocalRunpod, tmp_path: Path) -> Callable[..., QueueRoom]:
    """make_room("job-1", workers={...}, **replay): a job, not launched, and an endpoint with the base model."""
    from tests.container.replay_trainer import tensors

    store = open_store((tmp_path / "store").as_uri())
    assert isinstance(store, FileStore)
    with RunpodApi(KEY, runpod.url) as api:
        volume = api.create("network-volumes", {"name": "models", "size": 10, "dataCenter": "US-MO-1"})["id"]
        env = {"LORRY_MODELS": "/runpod-volume/models", "LORRY_STORE": store.url, "LORRY_RECIPE": "smoke/queue"}
        body = QUEUE | {"networkVolumes": [volume], "env": env | {"LORRY_ALLOW_LOOPBACK": "yes"}}
        endpoint = api.create("serverless", body)["id"]
    models = tmp_path / "host" / "volumes" / volume / "models" / "lorry--smoke"
    shutil.copytree(REPOSITORY / "recipes" / "smoke" / "model", models)
    (models / "model.safetensors").write_bytes(tensors(0))
    runpod.log.clear()

    def make(job_id: str = "job-1", deadline_seconds: int = 3600, **replay: Any) -> QueueRoom:
        script = {"steps": 8, "step_seconds": 0.02, "checkpoint_steps": 3} | replay
        script["timing"] = {"grace": 5.0, "no_progress": 20.0} | script.get("timing", {})
        store.write(f"{job_id}/replay.json", json.dumps(script).encode())
        environment = {
            "RUNPOD_API_KEY": KEY,
            "RUNPOD_API_BASE_URL": runpod.url,
            "RUNPOD_TRAINING_ENDPOINT_ID": endpoint,
            "LORRY_STORE": store.url,
        }
        spec = spec_of(job_id, store.url, deadline_seconds=deadline_seconds, steps=int(script["steps"]))
        hardware = spec.recipe.hardware.model_copy(update={"backends": ("runpod_queue",)})
        recipe = spec.recipe.model_copy(update={"hardware": hardware})
        spec = spec.model_copy(update={"backend": "runpod_queue", "offer": OFFER, "recipe": recipe})
        return QueueRoom(Queue(runpod, endpoint), store, data_in(tmp_path / "data"), environment, spec)

    return make
