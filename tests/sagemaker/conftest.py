"""A local SageMaker whose training jobs run the real container with the replay trainer, and a bucket."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import boto3
import httpx
import pytest

from recipes.job import LaunchSpec, Submission
from scripts.backends.sagemaker import SageMakerBackend
from scripts.fake_runpod.clock import Clock
from scripts.fake_runpod.processes import ProcessRunner
from scripts.fake_runpod.store import serve_store
from scripts.job_folder import JobFiles, read_job
from scripts.launch import launch
from scripts.store import Store, open_store
from tests.container.replay_trainer import tensors
from tests.runpod.conftest import REPOSITORY, data_in
from tests.runpod.conftest import spec_of as pod_spec_of
from tests.sagemaker.fake_sagemaker import IMAGE, REGION, ROLE, Pace, SageMaker
from tests.sagemaker.wire import serve

OFFER = "sagemaker-p5-4xlarge-1"
STORE = "s3://bucket/jobs"
KEY_ARN = f"arn:aws:kms:{REGION}:123456789012:key/1"
SETTINGS = {
    "LORRY_SAGEMAKER_ROLE": ROLE,
    "LORRY_IMAGE": IMAGE,
    "AWS_DEFAULT_REGION": REGION,
}
KEYS = {"AWS_ACCESS_KEY_ID": "CANARYACCESSKEY", "AWS_SECRET_ACCESS_KEY": "CANARY-secret-access-key"}
FAST = Pace(launching=0.0, downloading=0.0, uploading=0.0, back=0.2)
LIMIT_SECONDS = 200.0


def spec_of(job_id: str, store: str = STORE, **changes: Any) -> LaunchSpec:
    """What render would give for the smoke recipe on one H100 of SageMaker."""
    return pod_spec_of(job_id, store, **{"backend": "sagemaker", "offer": OFFER} | changes)


@dataclass
class Room:
    """One account, a bucket, and one job in it."""

    account: SageMaker
    store: Store
    data: Path
    spec: LaunchSpec
    environment: dict[str, str]
    submissions: list[Submission] = field(default_factory=list)

    @cached_property
    def backend(self) -> SageMakerBackend:
        return SageMakerBackend(self.environment)

    def launch(self) -> Submission:
        self.submissions.append(launch(self.store, self.spec, None, self.data, self.backend, time.time()))
        return self.submissions[-1]

    def files(self) -> JobFiles:
        return read_job(self.store, self.spec.job_id)

    def wait(self, for_what: Callable[[], Any]) -> None:
        """Until it is so, looking ten times a second."""
        give_up = time.monotonic() + LIMIT_SECONDS
        while not for_what():
            assert time.monotonic() < give_up, f"never came: {self.files().container}\n{self.said()}"
            time.sleep(0.1)

    def reach(self, step: int) -> None:
        self.wait(lambda: (status := self.files().status) and status.step >= step)

    def finish(self) -> JobFiles:
        """The files when the training job is over."""
        self.wait(lambda: self.backend.observe(self.submissions[-1].handle).phase == "gone")
        return self.files()

    def said(self) -> str:
        return "\n".join(
            f"{job.name} {job.secondary}: {line}" for job in self.account.jobs.values() for _, line in job.lines
        )

    def creates(self) -> int:
        """How many requests for a training job came over the wire."""
        return sum(action == "CreateTrainingJob" for action, _ in self.account.log)


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The URL of an S3 with one bucket, which boto3 in this process finds."""
    for name in [name for name in os.environ if name.startswith(("AWS_", "LORRY_SAGEMAKER"))]:
        monkeypatch.delenv(name)
    with serve_store("bucket", limited=False) as url:
        for name, value in {**KEYS, "AWS_ENDPOINT_URL": url, "AWS_DEFAULT_REGION": REGION}.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        httpx.post(f"{url}/moto-api/reset")  # its state is the process's, whatever server it had
        boto3.client("s3").create_bucket(Bucket="bucket")
        yield url


def s3_folder(url: str, into: Path | None) -> bool:
    """Copies what lies below an S3 URL, as SageMaker fills a channel; whether there was any."""
    name, _, prefix = url.removeprefix("s3://").partition("/")
    client = boto3.client("s3")
    keys = [row["Key"] for row in client.list_objects_v2(Bucket=name, Prefix=prefix).get("Contents", ())]
    for key in keys if into else ():
        assert into is not None
        path = into / (key.removeprefix(prefix).lstrip("/") or key.rpartition("/")[2])
        path.parent.mkdir(parents=True, exist_ok=True)
        client.download_file(name, key, str(path))
    return bool(keys)


@pytest.fixture
def make_account(bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., SageMaker]]:
    """make_account(modules={...}): the local SageMaker; its containers get the role's keys, as on the platform."""
    from contextlib import ExitStack

    with ExitStack() as stack:

        def make(modules: dict[str, str] | None = None) -> SageMaker:
            role = {**KEYS, "AWS_ENDPOINT_URL": bucket, "AWS_EC2_METADATA_DISABLED": "true"}
            runner = ProcessRunner(modules, grace_seconds=120.0)
            folder = tmp_path / "hosts"
            account = SageMaker(folder, runner, clock=Clock(), pace=FAST, bucket=s3_folder, variables=role)
            url = stack.enter_context(serve(account))
            monkeypatch.setenv("AWS_ENDPOINT_URL_SAGEMAKER", url)
            monkeypatch.setenv("AWS_ENDPOINT_URL_CLOUDWATCH_LOGS", url)
            return account

        yield make


@pytest.fixture
def make_room(make_account: Callable[..., SageMaker], tmp_path: Path) -> Callable[..., Room]:
    """make_room("job-1", deadline_seconds=600, settings={}, **replay): a job, not launched."""
    account = make_account({"scripts.container": "tests.runpod.replay_pod"})
    models = tmp_path / "models" / "lorry--smoke"
    shutil.copytree(REPOSITORY / "recipes" / "smoke" / "model", models)
    (models / "model.safetensors").write_bytes(tensors(0))
    account.variables["LORRY_MODELS"] = str(models.parent)

    def make(
        job_id: str = "job-1", deadline_seconds: int = 3600, settings: dict[str, str] | None = None, **replay: Any
    ) -> Room:
        store = open_store(STORE)
        script = {"steps": 8, "step_seconds": 0.02, "checkpoint_steps": 3} | replay
        script["timing"] = {"grace": 5.0, "no_progress": 20.0} | script.get("timing", {})
        store.write(f"{job_id}/replay.json", json.dumps(script).encode())
        spec = spec_of(job_id, deadline_seconds=deadline_seconds, steps=int(script["steps"]))
        return Room(account, store, data_in(tmp_path / "data"), spec, SETTINGS | (settings or {}))

    return make
