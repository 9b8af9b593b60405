"""The whole way on the queue with a bucket: front door, backend, worker, trainer; and the endpoint on its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from scripts.backends.runpod_api import RunpodApi
from scripts.fake_runpod.host import Host
from scripts.fake_runpod.processes import ProcessRunner
from scripts.fake_runpod.server import LocalRunpod, serve
from scripts.fake_runpod.store import serve_store
from scripts.gateway.app import create_app
from scripts.gateway.dataset import Fetcher
from scripts.gateway.settings import GatewaySettings
from scripts.pull import pull
from scripts.store import open_store
from tests.gateway.conftest import EXAMPLE, KEYS, SECRET, Sets, a_client, only_loopback, sets, sets_server
from tests.gateway.conftest import serve as serve_app
from tests.queue.conftest import QUEUE, Queue
from tests.runpod.conftest import KEY, OPENAPI

__all__ = ["sets", "sets_server"]
ROOT = "s3://bucket/lorry"
SECRETS = {"store_id": "CANARYACCESSKEY", "store_key": "CANARY-secret-access-key"}
MakeQueue = Callable[..., Queue]


@pytest.fixture
def make_queue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[MakeQueue]:
    """make_queue({"scripts.worker": ...}): an endpoint whose workers find a bucket, with keys from Runpod's secrets."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    opened: list[Any] = []

    def make(modules: dict[str, str] | None = None) -> Queue:
        host = Host(tmp_path / "host", ProcessRunner(modules))
        opened.append(serve(KEY, OPENAPI, host=host))
        local: LocalRunpod = opened[-1].__enter__()
        env = {"LORRY_STORE": ROOT, "LORRY_RECIPE": "smoke/queue", "LORRY_ALLOW_LOOPBACK": "yes", **plain}
        env |= {"AWS_ACCESS_KEY_ID": "{{ RUNPOD_SECRET_store_id }}"}
        env |= {"AWS_SECRET_ACCESS_KEY": "{{ RUNPOD_SECRET_store_key }}"}
        with RunpodApi(KEY, local.url) as api:
            for name, value in SECRETS.items():
                api.create("account/secrets", {"name": name, "value": value}, secret=True)
            gpu = {"pools": ["ADA_48_PRO"], "count": 1}
            endpoint = api.create("serverless", QUEUE | {"env": env, "gpu": gpu})["id"]
        local.log.clear()
        return Queue(local, endpoint)

    with serve_store("bucket", limited=False) as url:
        plain = {"AWS_ENDPOINT_URL": url, "AWS_DEFAULT_REGION": "us-east-1", "AWS_EC2_METADATA_DISABLED": "true"}
        for name, value in (plain | {"AWS_ACCESS_KEY_ID": "mine", "AWS_SECRET_ACCESS_KEY": "mine"}).items():
            monkeypatch.setenv(name, value)
        yield make
        drift = [fault for one in opened for fault in one.gen.gi_frame.f_locals["local"].drift]
        for one in opened:
            one.__exit__(None, None, None)
        assert drift == []


def leaks(queue: Queue, folder: Path) -> list[str]:
    """Where a secret shows: requests, workers' logs, job folders in the bucket, workers' disks."""
    secrets = [value.encode() for value in (SECRETS["store_key"], KEY)]
    store = open_store(ROOT)
    seen = [(f"{method} {path}", (path + body).encode()) for method, path, body in queue.runpod.log]
    seen += [(key, store.read(key) or b"") for key in store.keys("clients")]
    seen += [(str(path), path.read_bytes()) for path in folder.rglob("*") if path.is_file()]
    seen.append(("the workers' logs", queue.said().encode()))
    assert len(seen) > 30
    assert "X-Amz-Signature" not in queue.said(), "a signed link is a key for an hour"
    return [where for where, data in seen if any(secret in data for secret in secrets)]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_client_of_the_front_door_gets_an_adapter_that_a_worker_trained_and_keeps_it(
    make_queue: MakeQueue, sets: Sets, tmp_path: Path
) -> None:
    queue = make_queue()
    environment = {
        **os.environ,
        "RUNPOD_API_KEY": KEY,
        "RUNPOD_API_BASE_URL": queue.runpod.url,
        "RUNPOD_TRAINING_ENDPOINT_ID": queue.endpoint,
    }
    settings = GatewaySettings(store=ROOT, tokenizers=(), token_secret=SECRET, backend="runpod_queue")
    fetcher = Fetcher(allows_loopback=True, resolve=only_loopback)
    clients = {"acme": a_client("acme", recipe="smoke/queue")}
    server, port = serve_app(create_app(settings, clients, environment=environment, fetcher=fetcher))
    body = {"job_id": "real-1", "dataset_url": f"{sets.url}/set.jsonl", "hyperparameters": {"epochs": 1}}
    url, headers = f"http://127.0.0.1:{port}/v2/lorry", {"authorization": f"Bearer {KEYS['acme']}"}
    try:
        with httpx.Client(headers=headers, timeout=60) as http:
            sent = http.post(f"{url}/run", json={"input": body}).json()
            assert sent["understood"]["backend"] == "runpod_queue", sent
            give_up = time.monotonic() + 600
            while (view := http.get(f"{url}/status/real-1").json())["status"] in ("IN_QUEUE", "IN_PROGRESS"):
                assert time.monotonic() < give_up, f"{view}\n{queue.said()}"
                time.sleep(1)
            assert view["status"] == "COMPLETED", f"{view}\n{queue.said()}"
            queue.wait(next(iter(queue.runpod.fleet.queue.jobs)), "COMPLETED", seconds=300)
            queue.runpod.account.clock.jump(1900)
            assert queue.ask("GET", "health").json()["jobs"]["completed"] == 0, "Runpod has forgotten it"
            late = http.get(f"{url}/status/real-1").json()
            link = late["output"]["model_files"]["adapter_model.safetensors"]
            assert httpx.get(link).status_code == 200
            assert 0 < late["cost"]["usd"] < late["cost"]["cap_usd"]
    finally:
        server.should_exit = True
    manifest = pull(open_store(f"{ROOT}/clients/acme/jobs"), "real-1", tmp_path / "adapter")
    assert (manifest.effect > 0, manifest.recipe_name) == (True, "smoke/queue")
    assert leaks(queue, tmp_path / "host") == []


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_unmodified_client_sends_the_web_apps_body_to_the_endpoint_itself(
    make_queue: MakeQueue, sets: Sets, tmp_path: Path
) -> None:
    queue = make_queue({"scripts.worker": "tests.queue.replay_worker"})
    store = open_store(f"{ROOT}/clients/endpoint/jobs")
    models = tmp_path / "host" / "models"
    models.mkdir(parents=True)
    script = {"steps": 4, "step_seconds": 0.02, "checkpoint_steps": 2, "timing": {"grace": 5.0, "no_progress": 60.0}}
    store.write("direct-1/replay.json", json.dumps(script).encode())
    body = {
        "job_id": "direct-1",
        "dataset_url": f"{sets.url}/set.jsonl",
        "hyperparameters": {"base_model": "lorry/smoke", "epochs": 2, "batch_size": 4, "rank": 8, "icon": "x"},
        "gpu_config": {"type": "NVIDIA A40", "count": 1},
    }
    code = (
        "import json, sys, runpod; runpod.api_key = sys.argv[2]; e = runpod.Endpoint(sys.argv[1]);"
        "j = e.run({'input': json.loads(sys.argv[3])}); print(json.dumps([j.job_id, j.output(timeout=250)]))"
    )
    environment = {**os.environ, "RUNPOD_ENDPOINT_BASE_URL": queue.runpod.url, "HOME": str(tmp_path)}
    command = [sys.executable, "-c", code, queue.endpoint, KEY, json.dumps(body)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr + queue.said()
    first, output = json.loads(done.stdout.splitlines()[-1])
    assert output is not None, f"{queue.status(first)}\n{queue.said()}"
    assert (output["status"], output["progress"], output["current_step"]) == ("completed", 100, 4)
    for link in output["model_files"].values():
        assert httpx.get(link).status_code == 200
    again = queue.run(body)
    assert queue.wait(again, "COMPLETED", "FAILED")["output"]["model_files"].keys() == output["model_files"].keys()
    other = queue.run(body | {"hyperparameters": {"base_model": "lorry/smoke", "epochs": 3}})
    assert "stands for another request" in queue.wait(other, "FAILED")["error"]
    foreign = queue.run({"openai_route": "/v1/chat/completions", "openai_input": {}})
    assert "a request for inference; this URL trains" in queue.wait(foreign, "FAILED")["error"]
    bad = queue.run(body | {"job_id": "bad-1", "dataset_url": sets.put("/bad.jsonl", b"not a set")})
    assert "traceback" not in queue.wait(bad, "FAILED")["error"].lower()
    elsewhere = queue.run({"job_id": "direct-1", "store": "s3://of-somebody-else/jobs", "number": 1})
    assert "a store of this endpoint" in queue.wait(elsewhere, "FAILED")["error"]
    assert EXAMPLE.exists()
