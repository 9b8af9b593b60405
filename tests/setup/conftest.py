"""A local Runpod and a local AWS, and secrets that must never be seen."""

from __future__ import annotations

import logging
import os
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
