"""The local Runpod beyond its control plane: Pods by the clock, logs, secrets, the bill, a bucket, a command."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from scripts.backends.runpod_api import RunpodApi
from scripts.errors import ProviderError
from scripts.fake_runpod.clock import Clock
from scripts.fake_runpod.host import Host, Mishap
from scripts.fake_runpod.processes import ProcessRunner
from scripts.fake_runpod.server import LocalRunpod, serve
from tests.runpod.conftest import KEY, OPENAPI, REPOSITORY

GPU = {"id": "NVIDIA H200", "count": 2}
POD = {"name": "p", "image": "i", "args": "python -m scripts.anything --word 'a b'", "gpu": GPU}
START = 1_800_000_000.0  # a full hour


class Still:
    """A runner whose containers do what they are told: print, exit."""

    def __init__(self) -> None:
        self.started: list[tuple[list[str], dict[str, str]]] = []
        self.printed: list[str] = []
        self.code: int | None = None

    def start(self, pod_id: str, command: Any, environment: Any, folder: Path) -> Any:
        self.started.append((list(command), dict(environment)))
        self.code = None
        return self

    def exit_code(self) -> int | None:
        return self.code

    def lines(self) -> list[str]:
        printed, self.printed = self.printed, []
        return printed

    def end(self, *, at_once: bool = False) -> None:
        self.code = -9


@pytest.fixture
def still() -> Still:
    return Still()


@pytest.fixture
def runpod(still: Still, tmp_path: Path) -> Iterator[LocalRunpod]:
    host = Host(tmp_path, still, provisioning_seconds=60.0, starting_seconds=30.0)
    with serve(KEY, OPENAPI, host=host, clock=Clock(START)) as local:
        yield local
        assert local.drift == []


@pytest.fixture
def api(runpod: LocalRunpod) -> Iterator[RunpodApi]:
    with RunpodApi(KEY, runpod.url) as client:
        yield client


def later(runpod: LocalRunpod, seconds: float) -> None:
    runpod.account.clock.jump(seconds)
    for _ in range(3):
        runpod.advance()


def status(api: RunpodApi, pod: dict[str, Any]) -> str:
    found = api.read("pods", pod["id"])
    return str(found["status"]) if found else "gone"


def test_a_pod_provisions_starts_and_runs_by_the_clock(api: RunpodApi, runpod: LocalRunpod, still: Still) -> None:
    pod = api.create("pods", POD | {"env": {"A": "b"}})
    seen = [pod["status"]]
    for seconds in (0, 59, 1, 29, 1, 3600):
        later(runpod, seconds)
        seen.append(status(api, pod))
    assert seen == ["PROVISIONING", "PROVISIONING", "PROVISIONING", "STARTING", "STARTING", "RUNNING", "RUNNING"]
    command, environment = still.started[0]
    assert command == ["python", "-m", "scripts.anything", "--word", "a b"]
    assert (environment["A"], environment["RUNPOD_POD_ID"], environment["RUNPOD_GPU_COUNT"]) == ("b", pod["id"], "2")
    running = api.read("pods", pod["id"])
    assert running is not None
    assert running["runtime"] == {"uptime": 3600}


def test_the_bill_is_price_times_time_by_pod_and_hour(api: RunpodApi, runpod: LocalRunpod) -> None:
    first = api.create("pods", POD)
    later(runpod, 1800)
    second = api.create("pods", POD)
    later(runpod, 3600)
    api.delete("pods", first["id"])
    later(runpod, 1800)
    api.act_on_pod(second["id"], "stop")
    later(runpod, 36_000)
    answer = api.ask("GET", "/billing/pods", query={"bucketSize": "hour", "startTime": "2027-01-15T08:00:00Z"})
    usd = 2 * 4.59
    rows = [(row["podId"], row["startTime"][11:13], round(row["totalAmount"], 6)) for row in answer["records"]]
    assert rows == [
        (first["id"], "08", round(usd, 6)),
        (second["id"], "08", round(usd / 2, 6)),
        (first["id"], "09", round(usd / 2, 6)),
        (second["id"], "09", round(usd, 6)),
    ]
    assert answer["metadata"]["totals"]["totalAmount"] == pytest.approx(3 * usd)
    one = api.ask("GET", "/billing/pods", query={"podId": first["id"], "bucketSize": "month"})
    assert [round(row["gpuAmount"], 6) for row in one["records"]] == [round(1.5 * usd, 6)]
    with pytest.raises(ProviderError, match="bucketSize fortnight is not one of"):
        api.ask("GET", "/billing/pods", query={"bucketSize": "fortnight"})


def test_an_exited_container_is_started_again_and_a_stopped_pod_is_not(
    api: RunpodApi, runpod: LocalRunpod, still: Still
) -> None:
    pod = api.create("pods", POD)
    later(runpod, 100)
    later(runpod, 31)
    for count in (2, 3):
        still.code = 0
        later(runpod, 1)
        later(runpod, 1)
        assert (len(still.started), status(api, pod)) == (count, "RUNNING")
    api.act_on_pod(pod["id"], "stop")
    later(runpod, 600)
    assert (len(still.started), status(api, pod)) == (3, "EXITED")
    api.act_on_pod(pod["id"], "start")
    for _ in range(3):
        later(runpod, 60)
    assert (len(still.started), status(api, pod)) == (4, "RUNNING")
    api.act_on_pod(pod["id"], "restart")
    later(runpod, 1)
    later(runpod, 30)
    assert (len(still.started), status(api, pod)) == (5, "RUNNING")


@pytest.mark.parametrize(
    ("mishap", "ends"),
    [
        (Mishap("stuck"), "PROVISIONING"),
        (Mishap("error"), "ERROR"),
        (Mishap("vanish", 50), "gone"),
        (Mishap("stop", 50), "EXITED"),
        (Mishap("kill", 50), "RUNNING"),
        (Mishap("vanish", name="another"), "RUNNING"),
    ],
    ids=lambda value: value.kind if isinstance(value, Mishap) else value,
)
def test_each_mishap_befalls_its_pod(
    api: RunpodApi, runpod: LocalRunpod, still: Still, mishap: Mishap, ends: str
) -> None:
    assert runpod.host is not None
    runpod.host.mishaps.append(mishap)
    pod = api.create("pods", POD)
    for _ in range(10):
        later(runpod, 60)
    assert status(api, pod) == ends
    assert len(still.started) == {"stuck": 0, "error": 0, "kill": 2}.get(mishap.kind, 1)


def test_logs_come_by_source_tail_and_cursor(api: RunpodApi, runpod: LocalRunpod, still: Still) -> None:
    pod = api.create("pods", POD)
    later(runpod, 100)
    later(runpod, 31)
    for number in range(3):
        still.printed = [f"line {number}"]
        later(runpod, 1)
    lines = list(api.pod_logs(pod["id"], tail=2))
    assert [(line["source"], line["line"]) for line in lines] == [("container", "line 1"), ("container", "line 2")]
    assert [line["line"] for line in api.pod_logs(pod["id"], since=lines[0]["ts"])] == ["line 2"]
    everything = [line["source"] for line in api.pod_logs(pod["id"])]
    assert everything == ["system"] * 2 + ["container"] * 3


def test_a_secret_reaches_the_container_alone_and_a_missing_one_leaves_its_name(
    api: RunpodApi, runpod: LocalRunpod, still: Still
) -> None:
    secret = api.create("account/secrets", {"name": "hf", "value": "CANARY-one"})
    env = {"HF_TOKEN": "{{ RUNPOD_SECRET_hf }}", "OTHER": "{{ RUNPOD_SECRET_none }}"}
    pod = api.create("pods", POD | {"env": env})
    api.change("account/secrets", secret["id"], {"value": "CANARY-two"})
    later(runpod, 100)
    later(runpod, 31)
    assert still.started[0][1]["HF_TOKEN"] == "CANARY-two"
    assert still.started[0][1]["OTHER"] == "{{ RUNPOD_SECRET_none }}"
    shown = [api.read("pods", pod["id"]), api.listed("account/secrets"), runpod.account.held]
    assert "CANARY" not in json.dumps(shown, default=str)


def test_a_clock_that_jumps_charges_for_the_time_it_shows(api: RunpodApi, runpod: LocalRunpod) -> None:
    pod = api.create("pods", POD)
    later(runpod, 7200)
    later(runpod, -1800)
    assert runpod.account.meter.total(pod["id"], runpod.account.clock.now()) == pytest.approx(1.5 * 2 * 4.59)


def test_only_our_own_modules_are_run(api: RunpodApi, tmp_path: Path) -> None:
    for command in (["sh", "-c", "true"], ["python", "-c", "1"], ["python", "-m", "http.server"]):
        with pytest.raises(ValueError, match="has no images"):
            ProcessRunner().start("pod", command, {}, tmp_path)


def test_the_bucket_has_the_limits_of_a_network_volume() -> None:
    import boto3
    from botocore.exceptions import ClientError

    from scripts.fake_runpod.store import MOST_BYTES, Limited, serve_store

    keys = {"aws_access_key_id": "local", "aws_secret_access_key": "local", "region_name": "us-east-1"}
    with serve_store("lorry") as url:
        s3 = boto3.client("s3", endpoint_url=url, **keys)
        s3.put_object(Bucket="lorry", Key="jobs/a", Body=b"1")
        assert s3.get_object(Bucket="lorry", Key="jobs/a")["Body"].read() == b"1"
        with pytest.raises(ClientError, match="DeleteObjects is not supported"):
            s3.delete_objects(Bucket="lorry", Delete={"Objects": [{"Key": "jobs/a"}]})
        s3.delete_object(Bucket="lorry", Key="jobs/a")
    said: list[str] = []
    passed = Limited(lambda environ, start: [b"passed"])
    for method, query, size in (("GET", "X-Amz-Signature=a", 0), ("PUT", "", MOST_BYTES + 1), ("PUT", "", MOST_BYTES)):
        environ = {"REQUEST_METHOD": method, "QUERY_STRING": query, "CONTENT_LENGTH": str(size)}
        said.append(passed(environ, lambda *_: None)[0].decode())
    assert ["presigned URLs" in said[0], "at most 500 MB" in said[1], said[2]] == [True, True, "passed"]


def test_the_command_says_what_to_set_and_takes_its_pods_with_it(tmp_path: Path) -> None:
    code = "import argparse; from scripts.cli.local_runpod import COMMANDS; c = COMMANDS[0]; "
    code += "p = argparse.ArgumentParser(); c.arguments(p); c.run(p.parse_args(), None)"
    command = [sys.executable, "-c", code, "--json", "--folder", str(tmp_path)]
    child = subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert child.stdout is not None
    values = json.loads(child.stdout.readline())
    assert values["LORRY_STORE"] == "s3://lorry/jobs"
    with RunpodApi(values["RUNPOD_API_KEY"], values["RUNPOD_API_BASE_URL"]) as api:
        assert {row["name"] for row in api.listed("account/secrets")} == {"lorry_store_key_id", "lorry_store_key"}
        env = {"LORRY_STORE": "s3://lorry/jobs", "AWS_ENDPOINT_URL": values["AWS_ENDPOINT_URL"]}
        args = "python -m scripts.container --store s3://lorry/jobs --job job-1 --work jobs/job-1"
        pod = api.create("pods", POD | {"args": args, "env": env})
        give_up = time.monotonic() + 120
        while not (pids := _processes_of(pod["id"])) and time.monotonic() < give_up:
            time.sleep(0.05)
        assert pids
    child.send_signal(signal.SIGTERM)  # Ctrl-C is handled alike
    _, error = child.communicate(timeout=120)
    assert child.returncode == 0, error
    assert "the local Runpod is gone" in error
    assert _processes_of(pod["id"]) == []


def _processes_of(pod_id: str) -> list[int]:
    needle, found = f"RUNPOD_POD_ID={pod_id}".encode(), []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                if needle in (entry / "environ").read_bytes().split(b"\0"):
                    found.append(int(entry.name))
            except OSError:
                continue
    return found
