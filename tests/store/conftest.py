"""Real stores for the tests: a folder, and moto's S3 server behind a wire that counts, holds and damages requests."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote

import boto3
import pytest

from recipes.job import LaunchSpec, Proof, Record, Result
from recipes.recipe import Base, Recipe
from scripts.adapter import write_manifest
from scripts.store import Store, open_store

REPOSITORY = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Request:
    """One request as it went over the wire. `part` is the number of an uploaded part, 0 otherwise."""

    method: str
    path: str
    part: int
    size: int


@dataclass
class Wire:
    """Stands between a client and the server: keeps a log; a test may change bodies or answers, or hold a request."""

    app: Any
    log: list[Request] = field(default_factory=list)
    stored: list[Request] = field(default_factory=list)
    on_body: Callable[[Request, bytes], bytes] = lambda request, body: body
    on_answer: Callable[[Request, bytes], bytes | None] = lambda request, body: body
    "None: the answer is lost and the client sees a 500."
    hold: Callable[[Request], None] = lambda request: None
    _conditional: threading.Lock = field(default_factory=threading.Lock)

    def reset(self) -> None:
        self.log, self.stored = [], []
        self.on_body, self.on_answer = (lambda request, body: body), (lambda request, body: body)
        self.hold = lambda request: None

    def parts(self) -> list[int]:
        """The numbers of the parts that reached the server, in order of arrival."""
        return [request.part for request in self.stored if request.part]

    def __call__(self, environ: dict[str, Any], start_response: Any) -> list[bytes]:
        hold = self.hold  # as it was when the request began: its sender may be dead by the time it is read
        length = int(environ.get("CONTENT_LENGTH") or 0)
        body = environ["wsgi.input"].read(length)
        part = int(parse_qs(environ["QUERY_STRING"]).get("partNumber", ["0"])[0])
        request = Request(environ["REQUEST_METHOD"], unquote(environ["PATH_INFO"]), part, length)
        self.log.append(request)
        if len(body) != length:  # the client died while it was sending: S3 drops such a request
            start_response("400 Bad Request", [("Content-Length", "0")])
            return []
        hold(request)
        environ["wsgi.input"] = BytesIO(self.on_body(request, body))
        answer: list[Any] = []

        def remember(status: str, headers: Any, *_: Any) -> None:
            answer[:] = [status, headers]

        if environ.get("HTTP_IF_NONE_MATCH"):
            with self._conditional:  # moto looks and then writes, in threads; S3 does both at once
                data = b"".join(self.app(environ, remember))
        else:
            data = b"".join(self.app(environ, remember))
        self.stored.append(request)
        changed = self.on_answer(request, data)
        if changed is None:
            start_response("500 Internal Server Error", [("Content-Length", "0")])
            return []
        start_response(*answer)
        return [changed]


@pytest.fixture(scope="session")
def s3_server() -> Iterator[tuple[str, Wire]]:
    """(URL, wire) of moto's server, in a thread of its own on a free port."""
    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, MotoRequestHandler, create_backend_app
    from werkzeug.serving import make_server

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    wire = Wire(DomainDispatcherApplication(create_backend_app))
    server = make_server("127.0.0.1", 0, wire, threaded=True, request_handler=MotoRequestHandler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", wire
    server.shutdown()


@pytest.fixture
def wire(s3_server: tuple[str, Wire], monkeypatch: pytest.MonkeyPatch) -> Iterator[Wire]:
    """The wire with a fresh log, and the environment that leads boto3 to it."""
    url, wire = s3_server
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name, value in {
        "AWS_ENDPOINT_URL": url,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        "AWS_EC2_METADATA_DISABLED": "true",
    }.items():
        monkeypatch.setenv(name, value)
    wire.reset()
    yield wire
    wire.reset()


@pytest.fixture
def s3(wire: Wire) -> Any:
    """A plain client of the same server, to look behind the store's back."""
    return boto3.client("s3")


@pytest.fixture
def s3_url(s3: Any, tmp_path: Path) -> str:
    bucket = "b-" + hashlib.sha256(str(tmp_path).encode()).hexdigest()[:20]
    s3.create_bucket(Bucket=bucket)
    return f"s3://{bucket}/jobs"


@pytest.fixture
def s3_store(s3_url: str) -> Store:
    return open_store(s3_url)


@pytest.fixture(params=["file", "s3"])
def store_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(request.getfixturevalue("s3_url")) if request.param == "s3" else (tmp_path / "the store").as_uri()


@pytest.fixture
def store(store_url: str) -> Store:
    """An empty store: every test that asks for it runs on a folder and on S3."""
    return open_store(store_url)


@pytest.fixture
def run_python() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs a program of ours in a process of its own, with the repository to import from."""

    def run(*arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, *arguments]
        return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=280, check=check)

    return run


@dataclass(frozen=True)
class FinishedJob:
    """A job folder in which the trainer has finished: adapter, launch, result and proof, but no manifest yet."""

    folder: Path
    spec: LaunchSpec
    result: Result
    proof: Proof

    @property
    def adapter(self) -> Path:
        return self.folder / "adapter"

    def vouch(self, **changes: Record) -> Any:
        """write_manifest with these records, some of them replaced."""
        records = {"spec": self.spec, "result": self.result, "proof": self.proof} | changes
        return write_manifest(self.folder, **records, cost_usd=1.25, now=1_700_000_000.0)  # type: ignore[arg-type]


def safetensors_bytes(tensors: dict[str, tuple[str, list[int], int]]) -> bytes:
    """A safetensors file of (dtype, shape, bytes) per tensor, filled with a pattern."""
    header, at = {}, 0
    for name, (dtype, shape, size) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + (bytes(range(251)) * (at // 251 + 1))[:at]


@pytest.fixture
def make_safetensors() -> Callable[[dict[str, tuple[str, list[int], int]]], bytes]:
    return safetensors_bytes


@pytest.fixture
def make_job(tmp_path: Path) -> Callable[..., FinishedJob]:
    """Lays out a finished job; `rows` sets the size of its one tensor, 1 KiB each."""

    def make(job_id: str = "job-1", rows: int = 8, text: str = "{}") -> FinishedJob:
        folder = tmp_path / f"made-{rows}-{len(text)}" / job_id
        (folder / "adapter").mkdir(parents=True)
        files = {
            "adapter_config.json": text.encode(),
            "adapter_model.safetensors": safetensors_bytes({"a.lora_A.weight": ("F32", [rows, 256], rows * 1024)}),
        }
        for name, data in files.items():
            (folder / "adapter" / name).write_bytes(data)
        hashes = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
        return FinishedJob(folder, _spec(job_id), _result(job_id, hashes), _proof(job_id, hashes))

    return make


@pytest.fixture
def job(make_job: Callable[..., FinishedJob]) -> FinishedJob:
    return make_job()


def _spec(job_id: str) -> LaunchSpec:
    return LaunchSpec(
        job_id=job_id,
        recipe_name="smoke/zero3",
        recipe_sha256="1" * 64,
        recipe=Recipe(base=Base(id="lorry/smoke")),
        backend="local",
        offer=None,
        model_type="qwen3_next",
        gpus=2,
        nodes=1,
        accumulation_steps=1,
        total_steps=4,
        steps_per_epoch=2,
        trainable_parameters=2048,
        deadline_seconds=3600,
        quote_usd=0.0,
        cap_usd=1.0,
        source="examples/set.jsonl",
        source_sha256="2" * 64,
        train_sha256="3" * 64,
        valid_sha256="4" * 64,
        train_examples=8,
        valid_examples=2,
        store="file:///jobs",
        commit="5" * 40,
    )


def _result(job_id: str, hashes: dict[str, str]) -> Result:
    return Result(
        job_id=job_id,
        outcome="completed",
        exit_code=0,
        attempt=1,
        step=4,
        total_steps=4,
        initial_validation_loss=5.0,
        final_validation_loss=4.0,
        trainable_parameters=2048,
        adapter_sha256=hashes,
        base_sha256="6" * 64,
        versions={"peft": "0.21.2"},
        wall_seconds=12.0,
    )


def _proof(job_id: str, hashes: dict[str, str]) -> Proof:
    return Proof(
        job_id=job_id,
        passed=True,
        sentence="the adapter changes the model and is reproduced",
        adapter_sha256=hashes,
        tensors=1,
        tensors_consumed=1,
        effect=0.5,
        reproduction_error=0.0,
        positions=16,
        seconds=1.0,
    )
