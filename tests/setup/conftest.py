"""A local Runpod and a local AWS, and secrets that must never be seen."""

from __future__ import annotations

import logging
import os
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from scripts.backends.runpod_api import RunpodApi
from scripts.fake_runpod.server import LocalRunpod, serve

KEY = "rpa_CANARY_key_9f3c1d"
OPENAPI = Path(os.environ["RUNPOD_OPENAPI"]) if "RUNPOD_OPENAPI" in os.environ else None


@pytest.fixture(scope="session")
def runpod_server() -> Iterator[LocalRunpod]:
    with serve(KEY, OPENAPI) as local:
        yield local


@pytest.fixture
def runpod(runpod_server: LocalRunpod) -> Iterator[LocalRunpod]:
    """An empty local Runpod; its answers must keep to the contract."""
    runpod_server.reset()
    yield runpod_server
    assert runpod_server.drift == []


@pytest.fixture
def waits() -> list[float]:
    """The seconds that the client would have slept."""
    return []


@pytest.fixture
def api(runpod: LocalRunpod, waits: list[float]) -> Iterator[RunpodApi]:
    with RunpodApi(KEY, runpod.url, sleep=waits.append) as client:
        yield client


@pytest.fixture
def seen(caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]) -> Iterator[list[str]]:
    """What a person or a log could see; at the end none of it may hold the key. Tests add their own words to it."""
    caplog.set_level(logging.DEBUG)
    words: list[str] = []
    yield words
    out, err = capfd.readouterr()
    assert KEY not in "\n".join([*words, caplog.text, out, err])


@pytest.fixture(scope="session")
def aws_server() -> Iterator[str]:
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def aws(aws_server: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """URL of an empty local AWS, which the environment of this process names."""
    urllib.request.urlopen(urllib.request.Request(f"{aws_server}/moto-api/reset", method="POST"), timeout=10).read()
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_ENDPOINT_URL", aws_server)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "testing")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    return aws_server
