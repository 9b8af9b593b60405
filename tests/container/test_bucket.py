"""The same container with its job in a bucket: what a new machine finds there, and what is seen from outside."""

from __future__ import annotations

import logging
import os
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest

from scripts.adapter import verify_adapter
from scripts.container.supervisor import end_leftovers
from scripts.job_folder import download_folder
from scripts.stop import stop_job
from scripts.store import Store, open_store
from tests.container.conftest import Job

MakeJob = Callable[..., Job]


class Gate:
    """Stands before the server and refuses the next `refusals` uploads of adapter files."""

    def __init__(self, app: Any) -> None:
        self.app, self.refusals = app, 0

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Any:
        if self.refusals and environ["REQUEST_METHOD"] == "PUT" and "/adapter/" in environ["PATH_INFO"]:
            self.refusals -= 1
            start_response("503 Slow Down", [("Content-Length", "0")])
            return [b""]
        return self.app(environ, start_response)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    """moto's server behind a gate, and the environment that leads boto3 to it."""
    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import make_server

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    gate = Gate(DomainDispatcherApplication(create_backend_app))
    server = make_server("127.0.0.1", 0, gate, threaded=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    values = {
        "ENDPOINT_URL": f"http://127.0.0.1:{server.server_port}",
        "ACCESS_KEY_ID": "test",
        "CONFIG_FILE": os.devnull,
    }
    values |= {"SECRET_ACCESS_KEY": "test", "DEFAULT_REGION": "us-east-1", "SHARED_CREDENTIALS_FILE": os.devnull}
    for name, value in values.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    yield gate
    server.shutdown()


@pytest.fixture
def bucket(gate: Gate) -> Store:
    """A store in a bucket of its own: moto keeps its buckets from one server to the next."""
    name = f"jobs-{secrets.token_hex(8)}"
    boto3.client("s3").create_bucket(Bucket=name)
    return open_store(f"s3://{name}/jobs")


def make(make_job: MakeJob, bucket: Store, tmp_path: Path, **replay: Any) -> Job:
    return make_job(store=bucket, folder=tmp_path / ".cache" / "lorry" / "work" / "job-1", **replay)


def test_a_new_machine_goes_on_from_the_bucket(make_job: MakeJob, bucket: Store, tmp_path: Path) -> None:
    job = make(make_job, bucket, tmp_path, steps=12, checkpoint_steps=5, faults={"1": ["hang", 7]})
    job.launch()
    job.wait(lambda: any(key.endswith("COMPLETE") for key in bucket.keys("job-1/checkpoints")))
    job.kill_container()
    job.wait(job.is_gone)
    end_leftovers(job.folder)
    shutil.rmtree(job.folder)  # the machine is gone with its disk
    job.launch()
    files = job.finish()
    assert files.container is not None
    assert files.container.ended == "completed", job.log()
    first, second = files.container.attempts
    assert (first.number, second.number) == (1, 2)
    assert second.resumed_from is not None
    download_folder(bucket, "job-1/adapter", tmp_path / "home")
    assert verify_adapter(tmp_path / "home").job_id == "job-1"
    keys = bucket.keys("job-1")
    assert {"job-1/logs/trainer-1.log", "job-1/logs/trainer-2.log", "job-1/logs/container.log"} <= set(keys)
    log = bucket.read("job-1/logs/container.log") or b""
    assert log.index(b"takes the job, 0 attempts so far") < log.index(b"takes the job, 1 attempts so far")


def test_an_adapter_lost_with_its_machine_before_it_was_stored_is_trained_again(
    make_job: MakeJob, bucket: Store, tmp_path: Path
) -> None:
    """The bucket knows the result by then, but not the adapter that it names."""
    job = make(make_job, bucket, tmp_path, prove=["hang"], timing={"grace": 5.0, "no_progress": 200.0})
    job.launch()
    job.wait(lambda: bucket.read("job-1/result.json") and bucket.keys("job-1/checkpoints"))
    job.kill_container()
    job.wait(job.is_gone)
    end_leftovers(job.folder)
    shutil.rmtree(job.folder)
    bucket.write("job-1/replay.json", (bucket.read("job-1/replay.json") or b"").replace(b'"hang"', b'""'))
    job.launch()
    files = job.finish()
    assert files.container is not None
    assert files.container.ended == "completed", job.log()
    assert [attempt.number for attempt in files.container.attempts] == [1, 2]
    download_folder(bucket, "job-1/adapter", tmp_path / "home")
    assert verify_adapter(tmp_path / "home").job_id == "job-1"


def test_a_stop_in_the_bucket_reaches_the_machine_and_its_checkpoint_comes_home(
    make_job: MakeJob, bucket: Store, tmp_path: Path
) -> None:
    job = make(make_job, bucket, tmp_path, steps=100_000, checkpoint_steps=100_000)
    job.launch()
    job.reach(1)
    bucket.create("job-1/stop.json", b'{"by": "user", "reason": "from my phone", "at": 1.0}')
    files = job.finish()
    assert files.container is not None
    assert files.container.ended == "cancelled", job.log()
    assert [key for key in bucket.keys("job-1/checkpoints") if key.endswith("COMPLETE")]
    assert bucket.read("job-1/adapter/manifest.json") is None


def test_a_job_in_a_bucket_can_be_stopped_from_here(make_job: MakeJob, bucket: Store, tmp_path: Path) -> None:
    job = make(make_job, bucket, tmp_path, steps=100_000)
    job.launch()
    stop_job(bucket, "job-1", job.backend, "user", "", time.time())
    files = job.finish()
    assert files.container is not None
    assert files.container.ended == "cancelled", job.log()


@pytest.mark.slow
def test_hours_of_training_outwait_a_store_that_does_not_answer(
    make_job: MakeJob, bucket: Store, gate: Gate, tmp_path: Path
) -> None:
    gate.refusals = 7  # five are boto3's own attempts, which take about ten seconds
    job = make(make_job, bucket, tmp_path)
    job.launch()
    files = job.finish()
    assert files.container is not None
    assert files.container.ended == "completed", job.log()
    assert "the store does not take it, trying again" in job.log()
    assert gate.refusals == 0


def test_what_an_ended_job_could_not_bring_home_is_brought_at_the_next_start(
    make_job: MakeJob, bucket: Store, tmp_path: Path
) -> None:
    job = make(make_job, bucket, tmp_path)
    job.launch()
    job.finish()
    before = job.files().container
    assert before is not None
    cut = before.model_copy(update={"ended": None, "stage": "storing", "updated_at": before.updated_at - 1})
    bucket.write("job-1/container.json", cut.model_dump_json().encode())  # as if the last word had been lost
    handle = job.backend.submit(job.spec, job.backend.request(job.spec))
    job.wait(lambda: job.backend.observe(handle).phase == "gone")
    files = job.files()
    assert files.container is not None
    assert files.container.ended == "completed"
    assert len(files.container.attempts) == 1
