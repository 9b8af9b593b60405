"""What stands in for the machines of Section 1 beyond Runpod: a server of the private model, and a SageMaker.

A second adapter is the first one under another name, and the training job of SageMaker replays its training: that both
are trained for real is shown in tests/serving and tests/sagemaker.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import httpx

from scripts.container.nodes import free_port
from scripts.fake_runpod.processes import ProcessRunner
from scripts.store import open_store
from tests.container.replay_trainer import tensors
from tests.docs.made import ROOT
from tests.infra.conftest import REGION, client
from tests.sagemaker.conftest import FAST, s3_folder
from tests.sagemaker.fake_sagemaker import SageMaker
from tests.sagemaker.wire import serve

START_SECONDS = 180.0
_NAMED = ("launch.json", "result.json", "proof.json", "scores.json", "adapter/manifest.json")


def push_image(url: str) -> str:
    """The digest of an image in the trainer's repository, as the workflow `image` would leave one."""
    kind = "application/vnd.docker.distribution.manifest.v2+json"
    layers = {"schemaVersion": 2, "mediaType": kind, "config": {"digest": "sha256:" + "1" * 64}, "layers": []}
    ecr = client(url, "ecr")
    pushed = ecr.put_image(repositoryName="lorry-dev/trainer", imageManifest=json.dumps(layers), imageTag="first")
    return str(pushed["image"]["imageId"]["imageDigest"])


def put_job_again(aws: str, store: str, job_id: str, new_id: str) -> None:
    """The same finished job under another name in the store."""
    with patch.dict(os.environ, _keys(aws)):
        jobs = open_store(store)
        for key in list(jobs.keys(job_id)):
            body, name = jobs.read(key), key.removeprefix(f"{job_id}/")
            assert body is not None
            if name in _NAMED:
                body = json.dumps(json.loads(body) | {"job_id": new_id}).encode()
            jobs.write(f"{new_id}/{name}", body)


def _keys(aws: str) -> dict[str, str]:
    keys = {"AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing", "AWS_ENDPOINT_URL": aws}
    return keys | {"AWS_DEFAULT_REGION": REGION, "AWS_EC2_METADATA_DISABLED": "true"}


@contextmanager
def private_server(folder: Path, environment: Mapping[str, str], model: str) -> Iterator[str]:
    """The URL of a server of the base model that loads adapters, as `lorry serve --local` opens it."""
    port = free_port()
    command = [sys.executable, "-m", "scripts.cli", "serve", "--local", model, "--port", str(port)]
    child = subprocess.Popen(command, cwd=folder, env=dict(environment))
    url = f"http://127.0.0.1:{port}"
    give_up = time.monotonic() + START_SECONDS
    try:
        while True:
            try:
                assert httpx.get(f"{url}/health", timeout=60).status_code == 200
                break
            except httpx.TransportError:
                assert child.poll() is None, "the server ended"
                assert time.monotonic() < give_up
                time.sleep(0.2)
        yield url
    finally:
        child.terminate()
        child.wait(60)


@contextmanager
def local_sagemaker(
    folder: Path, aws: str, role: str, store: str, job_id: str, steps: int
) -> Iterator[tuple[SageMaker, str]]:
    """A SageMaker that knows this role, and its URL; what one job shall replay lies in the store."""
    models = folder / "models" / "lorry--smoke"
    shutil.copytree(ROOT / "recipes" / "smoke" / "model", models)
    (models / "model.safetensors").write_bytes(tensors(0))
    script = {"steps": steps, "step_seconds": 0.02, "checkpoint_steps": 3, "timing": {"no_progress": 120.0}}
    runner = ProcessRunner({"scripts.container": "tests.runpod.replay_pod"}, grace_seconds=120.0)
    variables = {**_keys(aws), "LORRY_MODELS": str(models.parent)}
    account = SageMaker(folder / "hosts", runner, pace=FAST, bucket=s3_folder, variables=variables)
    account.roles.add(role)
    with patch.dict(os.environ, _keys(aws)), serve(account) as url:
        open_store(store).write(f"{job_id}/replay.json", json.dumps(script).encode())
        yield account, url
