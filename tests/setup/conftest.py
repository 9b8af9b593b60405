"""A local Runpod and a local AWS, and secrets that must never be seen."""

from __future__ import annotations

import argparse
import json
import logging
import os
import shutil
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from scripts.backends.runpod_api import RunpodApi
from scripts.cli.set_up import COMMANDS
from scripts.errors import LorryError
from scripts.fake_runpod.server import LocalRunpod, serve
from scripts.settings import Settings

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
def seen(caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]) -> Iterator[list[str]]:
    """What a person or a log could see; at the end none of it may hold the key. Tests add their own words to it."""
    caplog.set_level(logging.DEBUG)
    words: list[str] = []
    yield words
    out, err = capsys.readouterr()
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
    urllib.request.urlopen(urllib.request.Request(f"{aws_server}/moto-api/reset", method="POST"), timeout=120).read()
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_ENDPOINT_URL", aws_server)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "testing")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    return aws_server


@pytest.fixture
def s3(aws: str) -> Any:
    import boto3

    return boto3.client("s3")


@dataclass(frozen=True)
class Spoken:
    """What a command said and returned."""

    code: int
    out: str
    error: str


@pytest.fixture
def lorry(
    runpod: LocalRunpod, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., Spoken]:
    """lorry("doctor", "--json"): one of the commands under test, with the key and address of the local Runpod."""
    monkeypatch.setenv("RUNPOD_API_KEY", KEY)
    monkeypatch.setenv("RUNPOD_API_BASE_URL", runpod.url)
    settings = Settings(store=(tmp_path / "jobs").as_uri(), models=tmp_path / "models", tokenizers=())

    def run(name: str, *words: str) -> Spoken:
        command = next(command for command in COMMANDS if command.name == name)
        parser = argparse.ArgumentParser()
        command.arguments(parser)
        try:
            code = command.run(parser.parse_args(words), settings)
        except LorryError as error:
            print(error, file=sys.stderr)
            code = error.exit_code
        said = capsys.readouterr()
        assert KEY not in said.out + said.err
        return Spoken(code, said.out, said.err)

    return run


@pytest.fixture(scope="session")
def apply_room(tmp_path_factory: pytest.TempPathFactory) -> Callable[[dict[str, Any]], Path]:
    """A Terraform root whose output `room` is the given mapping, applied by the real Terraform."""
    if shutil.which("terraform") is None:
        pytest.skip("terraform is not on the PATH: commands that read its outputs need 1.11 or later")

    def apply(room: dict[str, Any]) -> Path:
        root = tmp_path_factory.mktemp("root")
        (root / "main.tf.json").write_text(json.dumps({"output": {"room": {"value": room}}}))
        command = ["terraform", f"-chdir={root}", "apply", "-auto-approve", "-no-color"]
        subprocess.run(command, check=True, capture_output=True, env={**os.environ, "CHECKPOINT_DISABLE": "1"})
        return root

    return apply
