"""A front door in this process on a free port, two clients, a server of training sets, and replay containers."""

from __future__ import annotations

import hashlib
import http.server
import json
import logging
import os
import secrets
import shutil
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn

from recipes.job import LaunchSpec
from recipes.recipe import BackendName
from scripts.backends.base import Backend, Handle, Observation, Owned
from scripts.backends.local import LocalBackend
from scripts.gateway.app import create_app
from scripts.gateway.clients import Client
from scripts.gateway.dataset import Fetcher
from scripts.gateway.settings import GatewaySettings
from scripts.job_lock import lock_owner

REPOSITORY = Path(__file__).resolve().parents[2]
EXAMPLE = REPOSITORY / "examples" / "bicycle-care.jsonl"
KEYS = {"acme": "acme-key-canary-1", "brick": "brick-key-canary-2"}
SECRET = "token-secret-canary-0123456789"
MODULE = "tests.gateway.replay_container"
WAIT_SECONDS = 200.0


@dataclass
class Sets:
    """A web server of training sets: path -> (status, headers, body). `hits` counts requests by path."""

    url: str = ""
    pages: dict[str, tuple[int, dict[str, str], bytes]] = field(default_factory=dict)
    hits: list[str] = field(default_factory=list)

    def put(self, path: str, body: bytes, status: int = 200, **headers: str) -> str:
        self.pages[path] = (status, {k.replace("_", "-"): v for k, v in headers.items()}, body)
        return f"{self.url}{path}"


@dataclass
class Front:
    """A running front door, and what a test does with it."""

    url: str
    root: Path
    sets: Sets
    http: httpx.Client
    hands: dict[str, Any]

    def call(self, method: str, path: str, body: Any = None, key: str | None = KEYS["acme"], **kwargs: Any) -> Any:
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        headers |= kwargs.pop("headers", {})
        return self.http.request(method, self.url + path, json=body, headers=headers, **kwargs)

    def get(self, path: str, key: str | None = KEYS["acme"]) -> Any:
        return self.call("GET", path, key=key)

    def post(self, path: str, body: Any = None, key: str | None = KEYS["acme"], **kwargs: Any) -> Any:
        return self.call("POST", path, body, key, **kwargs)

    def input(self, **changes: Any) -> dict[str, Any]:
        """The `input` that the web app sends today."""
        return {
            "job_id": "5f0c1d7e-58a5-4a3b-9d5e-0c9a54f1e001",
            "dataset_url": f"{self.sets.url}/set.jsonl?token=dataset-canary-3",
            "hyperparameters": {"base_model": "lorry/smoke", "epochs": 2, "batch_size": 4, "rank": 8, "alpha": 16},
            "gpu_config": {"type": "NVIDIA A40", "count": 1},
        } | changes

    def run(self, **changes: Any) -> str:
        answer = self.post("/v2/lorry/run", {"input": self.input(**changes)})
        assert answer.status_code == 200, answer.text
        return str(answer.json()["id"])

    def status(self, job: str, key: str = KEYS["acme"]) -> dict[str, Any]:
        answer = self.get(f"/v2/lorry/status/{job}", key)
        assert answer.status_code == 200, answer.text
        view: dict[str, Any] = answer.json()
        return view

    def wait(self, job: str, until: Callable[[dict[str, Any]], Any], seconds: float = WAIT_SECONDS) -> dict[str, Any]:
        give_up = time.monotonic() + seconds
        while not until(view := self.status(job)):
            assert time.monotonic() < give_up, f"never came: {view}\n{self.log(job)}"
            time.sleep(0.1)
        return view

    def finish(self, job: str) -> dict[str, Any]:
        return self.wait(job, lambda view: view["status"] in ("COMPLETED", "FAILED", "CANCELLED"))

    def folder(self, job: str, client: str = "acme") -> Path:
        return self.root / "clients" / client / "jobs" / job

    def script(self, job: str, **replay: Any) -> None:
        """Tells the replay trainer of a job what to do, before the job is sent."""
        folder = self.folder(job)
        folder.mkdir(parents=True, exist_ok=True)
        standard = {"steps": 4, "step_seconds": 0.02, "checkpoint_steps": 2}
        timing = {"timing": {"grace": 5.0, "no_progress": 20.0}}
        (folder / "replay.json").write_text(json.dumps(standard | timing | replay))

    def log(self, job: str) -> str:
        path = self.folder(job) / "logs" / "container.log"
        return path.read_text() if path.exists() else "no container.log"


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A models folder in which the smoke model looks complete."""
    from tests.container.replay_trainer import tensors

    folder = tmp_path_factory.mktemp("models") / "lorry--smoke"
    shutil.copytree(REPOSITORY / "recipes" / "smoke" / "model", folder)
    (folder / "model.safetensors").write_bytes(tensors(0))
    return folder.parent


@pytest.fixture(scope="session")
def sets_server() -> Iterator[Sets]:
    sets = Sets()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            sets.hits.append(self.path)
            status, headers, body = sets.pages.get(path, (404, {}, b"nothing here"))
            self.send_response(status)
            for name, value in ({"Content-Length": str(len(body))} | headers).items():
                self.send_header(name, value)
            self.end_headers()
            try:
                self.wfile.write(body)
            except OSError:
                return

        def log_message(self, *words: Any) -> None:
            return

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    sets.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield sets
    server.shutdown()


@pytest.fixture
def sets(sets_server: Sets) -> Sets:
    sets_server.pages.clear()
    sets_server.hits.clear()
    sets_server.put("/set.jsonl", EXAMPLE.read_bytes())
    return sets_server


def only_loopback(host: str, port: int) -> list[str]:
    """A resolver that knows this machine and numbers: tests ask no name server."""
    if host in ("localhost", "127.0.0.1"):
        return ["127.0.0.1"]
    return [socket.inet_ntoa(socket.inet_aton(host))]


def a_client(name: str, **changes: Any) -> Client:
    digest = hashlib.sha256(KEYS[name].encode()).hexdigest()
    return Client(**{"name": name, "key_sha256": (digest,), "recipe": "smoke/zero3"} | changes)


@pytest.fixture
def make_front(tmp_path: Path, models: Path, sets: Sets) -> Iterator[Callable[..., Front]]:
    """make_front(clients=None, settings={...}, **hands): a front door on a free port."""
    servers: list[uvicorn.Server] = []
    opened: list[httpx.Client] = []

    def make(clients: Mapping[str, Client] | None = None, settings: Any = None, **hands: Any) -> Front:
        root = tmp_path / "store"
        environment = {**os.environ, "LORRY_MODELS": str(models), "HOME": str(tmp_path)}

        def backend(name: BackendName, given: Mapping[str, str]) -> Backend:
            return LocalBackend(given, MODULE)

        hands = {
            "environment": environment,
            "open_backend": backend,
            "fetcher": Fetcher(allows_loopback=True, max_bytes=2_000_000, max_seconds=120, resolve=only_loopback),
        } | hands
        chosen = GatewaySettings(
            **{"store": root.as_uri(), "tokenizers": (), "token_secret": SECRET} | (settings or {})
        )
        app = create_app(chosen, clients or {name: a_client(name) for name in KEYS}, **hands)
        server, port = serve(app)
        servers.append(server)
        opened.append(httpx.Client(timeout=200, verify=False))
        return Front(f"http://127.0.0.1:{port}", root, sets, opened[-1], hands)

    yield make
    for client in opened:
        client.close()
    for server in servers:
        server.should_exit = True
    end_containers(tmp_path)


def serve(app: Any) -> tuple[uvicorn.Server, int]:
    """The app on a free port of this machine, in a thread of its own."""
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", access_log=False, timeout_graceful_shutdown=1))
    threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True).start()
    give_up = time.monotonic() + 120
    while not server.started:
        assert time.monotonic() < give_up
        time.sleep(0.01)
    return server, listener.getsockname()[1]


def end_containers(folder: Path) -> None:
    """Ends what still runs below the folder: each container by the process its own lock names."""
    for lock in folder.glob("**/.container.lock"):
        owner = lock_owner(lock.parent)
        if owner:
            os.kill(owner.pid, signal.SIGKILL)


@pytest.fixture(scope="session")
def s3_url() -> Iterator[str]:
    """The URL of a server that speaks the S3 and STS APIs."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def bucket(s3_url: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """The URL of an empty bucket, and the environment that leads boto3 to it."""
    import boto3

    for name, value in {
        "AWS_ENDPOINT_URL": s3_url,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "aws-secret-canary-4",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
    }.items():
        monkeypatch.setenv(name, value)
    name = f"lorry-{secrets.token_hex(6)}"
    boto3.client("s3").create_bucket(Bucket=name)
    return f"s3://{name}/work"


class Rented:
    """A provider that starts nothing and remembers what it was asked to start and to end."""

    def __init__(self, name: BackendName = "runpod_pod") -> None:
        self.name: BackendName = name
        self.asked: list[str] = []
        self.ended: list[str] = []
        self.looks = 0

    def request(self, spec: LaunchSpec) -> dict[str, Any]:
        return {"name": spec.job_id}

    def submit(self, spec: LaunchSpec, request: Mapping[str, Any]) -> dict[str, Any]:
        self.asked.append(spec.job_id)
        return {"id": spec.job_id}

    def observe(self, handle: Handle) -> Observation:
        self.looks += 1
        return Observation("gone" if handle["id"] in self.ended else "running")

    def stop(self, handle: Handle) -> None:
        self.ended.append(handle["id"])

    def owned(self) -> list[Owned]:
        return []


@pytest.fixture
def front(make_front: Callable[..., Front]) -> Front:
    """The front door as it is opened by default."""
    return make_front()


@pytest.fixture
def still(make_front: Callable[..., Front]) -> Front:
    """A front door whose machines are asked for and never say a word: quick, where what they do does not matter."""
    provider = Rented("local")
    return make_front(open_backend=lambda name, environment: provider)
