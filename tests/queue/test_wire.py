"""Both sides of the queue of the local Runpod, spoken to by the unmodified `runpod` 1.12: clients and worker loop."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from scripts.backends.runpod_api import RunpodApi
from scripts.fake_runpod.clock import Clock
from scripts.fake_runpod.fleet import Worker
from scripts.fake_runpod.server import LocalRunpod, serve
from scripts.machine import ROOT
from tests.queue.conftest import QUEUE, Queue
from tests.runpod.conftest import KEY, OPENAPI

START = 1_800_000_000.0
Start = Callable[..., Worker]


@pytest.fixture
def queue() -> Iterator[Queue]:
    """An endpoint whose workers are brought by the test."""
    with serve(KEY, OPENAPI) as local:
        yield a_queue(local)
        assert local.drift == []


def a_queue(local: LocalRunpod) -> Queue:
    with RunpodApi(KEY, local.url) as api:
        return Queue(local, api.create("serverless", QUEUE)["id"])


@pytest.fixture
def start(queue: Queue, tmp_path: Path) -> Iterator[Start]:
    """start("4"): the unmodified worker loop around the plain handler, in a process of its own."""
    children: list[subprocess.Popen[bytes]] = []

    def begin(mode: str = "1") -> Worker:
        with queue.runpod.lock:
            account = queue.runpod.account
            endpoint = account.held["serverless"][queue.endpoint]
            worker = queue.runpod.fleet.add(account, endpoint)
            environment = queue.runpod.fleet.environment(account, endpoint, worker)
        own = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-m", "tests.queue.plain_handler", mode]
        children.append(subprocess.Popen(command, env=own | environment, start_new_session=True, cwd=tmp_path))
        return worker

    yield begin
    for child in children:
        os.killpg(child.pid, 9)
        child.wait()


def ask(queue: Queue, tmp_path: Path) -> dict[str, Any]:
    environment = {**os.environ, "RUNPOD_ENDPOINT_BASE_URL": queue.runpod.url, "HOME": str(tmp_path)}
    command = [sys.executable, str(Path(__file__).parent / "foreign_client.py"), queue.endpoint, KEY]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    seen: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return seen


def test_the_unmodified_clients_and_the_unmodified_worker_loop_meet_here(
    queue: Queue, start: Start, tmp_path: Path
) -> None:
    worker = start()
    seen = ask(queue, tmp_path)
    assert (seen["sync"], seen["async"]) == ({"steps": 1}, {"steps": 2})
    assert (seen["queued"], seen["purged"]) == ("IN_QUEUE", {"removed": 1, "status": "completed"})
    assert [seen["after purge"], seen["cancelled"], seen["async cancelled"]] == ["CANCELLED"] * 3
    assert seen["bad"] == "FAILED"
    assert seen["health"]["jobs"] == {"completed": 1, "failed": 1, "inProgress": 0, "inQueue": 0, "retried": 0}
    assert seen["health"]["workers"]["ready"] == 1
    assert "401" in seen["wrong"]
    error = json.loads(queue.status(seen["bad id"])["error"])
    assert (error["error_message"], error["worker_id"]) == ("it went wrong", worker.id)
    assert queue.ask("POST", f"retry/{seen['bad id']}").json()["status"] == "IN_QUEUE"
    assert queue.wait(seen["bad id"], "FAILED")["id"] == seen["bad id"]
    pings = [path for _, path, _ in queue.runpod.log if f"/ping/{worker.id}" in path]
    assert pings, "the loop's own heartbeat process"


@pytest.mark.slow
def test_one_worker_takes_several_jobs_where_it_says_so(queue: Queue, start: Start) -> None:
    jobs = [queue.run({"steps": 5000}) for _ in range(4)]
    start("4")
    for job in jobs:
        queue.wait(job, "IN_PROGRESS")
    assert any("/job-take-batch/" in path for _, path, _ in queue.runpod.log)
    assert queue.ask("GET", "health").json()["jobs"]["inProgress"] == 4
    queue.ask("POST", f"cancel/{jobs[0]}")
    assert [queue.status(job)["status"] for job in jobs] == ["CANCELLED", *["IN_PROGRESS"] * 3]


@pytest.mark.slow
def test_a_stream_is_drained_by_reading(queue: Queue, start: Start) -> None:
    start("stream")
    job = queue.run({"steps": 3})
    assert queue.wait(job, "COMPLETED")["output"] == []
    assert queue.ask("GET", f"stream/{job}").json()["stream"] == [{"output": {"step": n}} for n in range(3)]
    assert queue.ask("GET", f"stream/{job}").json() == {"status": "COMPLETED", "stream": []}


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({}, "input is required"),
        ({"input": {}}, "may not be empty"),
        ({"input": {"a": 1}, "policy": {"ttl": 1}}, "policy.ttl must be 10000 to 604800000 milliseconds"),
        ({"input": {"a": 1}, "policy": {"executionTimeout": "long"}}, "policy.executionTimeout must be 5000"),
        ({"input": {"a": "x" * (10 * 2**20)}}, "10MB max"),
        ([], "not a JSON object"),
    ],
)
def test_what_the_queue_refuses(queue: Queue, body: Any, said: str) -> None:
    answer = queue.ask("POST", "run", body)
    assert (answer.status_code, said in answer.json()["error"]) == (400, True), answer.text


def test_a_job_is_found_on_its_own_endpoint_alone_and_with_the_key_alone(queue: Queue) -> None:
    job = queue.run({"a": 1})
    assert queue.ask("GET", f"status/{job}", key="wrong").status_code == 401
    assert a_queue(queue.runpod).ask("GET", f"status/{job}").status_code == 404
    assert queue.ask("GET", "status/nobody").status_code == 404
    assert queue.ask("GET", f"job-take/nobody?gpu=x&a={job}").status_code == 401


@pytest.fixture
def still() -> Iterator[Queue]:
    """A queue on a clock that stands still."""
    with serve(KEY, OPENAPI, clock=Clock(START)) as local:
        yield a_queue(local)
        assert local.drift == []


def later(queue: Queue, seconds: float) -> None:
    queue.runpod.account.clock.jump(seconds)
    with queue.runpod.lock:
        queue.runpod.fleet.advance(queue.runpod.account)


def take(queue: Queue) -> str:
    """The first worker takes the first job, as its loop would."""
    with queue.runpod.lock:
        worker = next(iter(queue.runpod.fleet.workers))
        return queue.runpod.fleet.queue.take(queue.endpoint, worker, 1)[0].worker or ""


def test_the_clocks_of_a_job_run_as_runpod_says(still: Queue) -> None:
    policy = {"executionTimeout": 60_000, "ttl": 600_000}
    timed, dead, kept = (still.run({"n": n}, policy=policy) for n in range(3))
    later(still, 1)
    worker = take(still)
    later(still, 59)
    assert still.status(timed)["status"] == "IN_PROGRESS"
    later(still, 2)
    assert still.status(timed)["status"] == "TIMED_OUT"
    assert still.runpod.fleet.queue.to_stop == {worker: [timed]}, "its worker is told"
    take(still)
    take(still)
    with still.runpod.lock:
        still.runpod.fleet.queue.done(worker, kept, b'{"output": 1}')
    later(still, 30)
    assert still.status(kept)["status"] == "COMPLETED"
    later(still, 520)  # the life of the others is over, queued or running
    assert still.ask("GET", f"status/{dead}").status_code == 404
    assert still.status(kept)["output"] == 1, "a result is kept for half an hour"
    later(still, 1300)
    assert still.ask("GET", f"status/{kept}").status_code == 404


def test_the_bill_is_worker_time_and_idleness_scales_to_zero(still: Queue) -> None:
    still.set(scaling={"type": "QUEUE_DELAY", "queueDelay": 4}, workers={"min": 0, "max": 3, "idleTimeout": 100})
    job = still.run({"a": 1}, policy={"executionTimeout": 7_200_000})
    later(still, 0)
    assert still.ask("GET", "health").json()["workers"]["initializing"] == 1
    worker = take(still)
    with still.runpod.lock:
        still.runpod.fleet.ready(still.runpod.fleet.workers[worker])
    later(still, 3600)
    with RunpodApi(KEY, still.runpod.url) as api:
        rows = api.workers(still.endpoint)
        assert [(row["id"], row["status"], row["gpuCount"]) for row in rows["workers"]] == [(worker, "RUNNING", 1)]
        assert rows["summary"]["total"] == 1
        with still.runpod.lock:
            still.runpod.fleet.queue.done(worker, job, b'{"output": 1}')
        for seconds in (0, 99, 2, 50_000):
            later(still, seconds)
        assert api.workers(still.endpoint)["workers"] == []
        answer = api.ask("GET", "/billing/serverless", query={"bucketSize": "month", "serverlessId": still.endpoint})
    assert [row["serverlessId"] for row in answer["records"]] == [still.endpoint]
    assert answer["metadata"]["totals"]["totalAmount"] == pytest.approx(2.736 * 3701 / 3600)


def test_an_endpoint_that_nobody_asks_shrinks(still: Queue) -> None:
    still.set(workers={"min": 1, "max": 5})
    for days, most in ((2.9, 5), (0.2, 2), (4, 0)):
        later(still, days * 86_400)
        with RunpodApi(KEY, still.runpod.url) as api:
            endpoint = api.read("serverless", still.endpoint)
        assert endpoint is not None
        assert endpoint["workers"]["max"] == most
    assert still.status(still.run({"a": 1}))["status"] == "IN_QUEUE"
    later(still, 60)
    assert still.ask("GET", "health").json()["workers"]["ready"] == 0


@pytest.mark.slow
def test_a_worker_that_hangs_up_is_handed_no_job(queue: Queue, start: Start) -> None:
    """A killed worker leaves its question open; the job must not go to the dead connection."""
    first = start()
    give_up = time.monotonic() + 60
    while first.seen_at is None:
        assert time.monotonic() < give_up
        time.sleep(0.05)
    with queue.runpod.lock:
        queue.runpod.fleet.end(queue.runpod.account, first)
    second = start()
    job = queue.run({"steps": 1})
    assert queue.wait(job, "COMPLETED")["workerId"] == second.id
