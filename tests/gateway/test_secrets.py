"""Canaries where secrets can be: none of them in an answer, a log, a job folder or a machine's environment."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

from recipes.errors import InputError
from scripts.container.nodes import free_port
from scripts.gateway.settings import read_gateway_settings
from scripts.job_folder import read_job
from scripts.job_report import write_report
from scripts.job_token import make_token
from scripts.state import job_state
from scripts.store import open_store
from tests.gateway.conftest import KEYS, REPOSITORY, SECRET, Front

HERE = Path(__file__).parent

JOB = "5f0c1d7e-58a5-4a3b-9d5e-0c9a54f1e001"
CANARIES = [*KEYS.values(), SECRET, "dataset-canary-3", "aws-secret-canary-4"]


def test_no_secret_leaves_the_front_door(
    front: Front, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.DEBUG)
    front.hands["environment"]["LORRY_TOKEN_SECRET"] = SECRET
    answers = []

    def keep(answer: httpx.Response) -> httpx.Response:
        answers.append(answer.text + str(answer.headers))
        return answer

    keep(front.post("/v2/lorry/run", {"input": front.input()}, headers={"Idempotency-Key": "plain-1"}))
    front.finish(JOB)
    for path in ("/v2/lorry/status/", "/training/status/", "/v1/fine_tuning/jobs/", "/v2/lorry/stream/"):
        keep(front.get(path + JOB))
    keep(front.post("/v2/lorry/run", {"input": front.input(job_id="bad-1", dataset_url=expired(front))}))
    keep(front.get("/v2/lorry/status/bad-1"))
    keep(front.post("/v2/lorry/run", {"input": front.input(dataset_url="https://nowhere/?token=dataset-canary-3")}))
    keep(front.get("/v2/lorry/health", KEYS["acme"] + "x"))
    keep(front.post(f"/machines/{JOB}/end", key=make_token(JOB, "brick", int(time.time()) + 99, SECRET)))
    files = read_job(open_store(front.folder(JOB).parent.as_uri()), JOB)
    write_report(open_store(front.folder(JOB).parent.as_uri()), JOB, job_state(files, None, time.time()))
    assert {"report.html", "environment.txt", "request.json"} <= {path.name for path in front.folder(JOB).iterdir()}
    stored = [path.read_bytes().decode("utf-8", "replace") for path in front.root.rglob("*") if path.is_file()]
    said = "".join(capfd.readouterr())
    heard = [record.getMessage() for record in caplog.records if not record.name.startswith(("httpx", "httpcore"))]
    for canary in CANARIES:
        for where, texts in {"answer": answers, "folder": stored, "output": [said], "log": heard}.items():
            assert not any(canary in text for text in texts), f"{canary} in {where}"


def expired(front: Front) -> str:
    return front.sets.put("/gone.jsonl", b"", 403) + "?token=dataset-canary-3"


def test_the_command_opens_the_front_door_and_closes_it(tmp_path: Path) -> None:
    port = free_port()
    clients = tmp_path / "clients.yaml"
    clients.write_text(f"acme:\n  key_sha256: [{'ab' * 32}]\n  recipe: smoke/zero3\n")
    environment = {**os.environ, "LORRY_TOKEN_SECRET": SECRET, "LORRY_CLIENTS": str(clients), "HOME": str(tmp_path)}
    server = subprocess.Popen(
        [sys.executable, str(HERE / "open_gateway.py"), "--port", str(port)], cwd=tmp_path,
        env=environment | {"PYTHONPATH": str(REPOSITORY)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert server.stdout is not None
        assert server.stdout.readline() == f"the front door is http://127.0.0.1:{port}/v2/lorry\n"
        give_up = time.monotonic() + 120
        while True:
            try:
                answer = httpx.get(f"http://127.0.0.1:{port}/v2/lorry/health?token=canary-in-a-query")
                break
            except httpx.ConnectError:
                assert time.monotonic() < give_up
                time.sleep(0.05)
        assert answer.status_code == 401
        for path in ("healthz", "ping"):
            assert httpx.get(f"http://127.0.0.1:{port}/{path}").json() == {"status": "ok"}
    finally:
        server.send_signal(signal.SIGINT)
        out, err = server.communicate(timeout=120)
    assert server.returncode == 0, err
    assert "jobs go on without it" in err
    assert "canary-in-a-query" not in out + err


def test_the_settings_say_all_that_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORRY_CLIENTS", "nowhere.yaml")
    monkeypatch.delenv("LORRY_TOKEN_SECRET", raising=False)
    monkeypatch.setenv("LORRY_BACKEND", "moon")
    with pytest.raises(InputError) as caught:
        read_gateway_settings(os.environ, Path.cwd())
    assert [str(problem).partition(":")[0] for problem in caught.value.problems] == [
        "LORRY_TOKEN_SECRET",
        "LORRY_BACKEND",
    ]
