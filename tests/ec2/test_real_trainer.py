"""The smoke recipe on EC2, all real but the hardware: moto's EC2, S3 and STS, the rendered user data, the trainer."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import httpx
import pytest

from scripts.backends.ec2 import Ec2Backend
from scripts.fake_runpod.store import serve_store
from scripts.job_folder import read_job
from scripts.launch import launch
from scripts.pull import pull
from scripts.store import open_store
from scripts.watch import watch
from tests.ec2.conftest import POLICY
from tests.runpod.conftest import REPOSITORY
from tests.runpod.test_real_trainer import smoke_spec

STORE = "s3://bucket/jobs"
USER_DATA = REPOSITORY / "tests" / "infra" / "golden" / "ec2-user-data.sh"
CANARY = "CANARY-key-of-the-launcher"


@pytest.fixture
def aws(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, str]]:
    """A local AWS with a bucket, a launch template, a subnet and a group: what Terraform would have made."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    with serve_store("bucket", limited=False) as url:
        httpx.post(f"{url}/moto-api/reset")  # its state is the process's, whatever server it had
        values = {"AWS_ENDPOINT_URL": url, "AWS_DEFAULT_REGION": "us-east-1", "AWS_ACCESS_KEY_ID": "mine"}
        for name, value in (values | {"AWS_SECRET_ACCESS_KEY": CANARY}).items():
            monkeypatch.setenv(name, value)
        boto3.client("s3").create_bucket(Bucket="bucket")
        ec2 = boto3.client("ec2")
        subnets = ec2.describe_subnets()["Subnets"]
        group = ec2.create_security_group(GroupName="lorry", Description="d", VpcId=subnets[0]["VpcId"])["GroupId"]
        tags = [{"ResourceType": "instance", "Tags": [{"Key": "lorry", "Value": "lorry-dev"}]}]
        data = {"ImageId": ec2.describe_images()["Images"][0]["ImageId"], "TagSpecifications": tags}
        made = ec2.create_launch_template(LaunchTemplateName="lorry", LaunchTemplateData=data)
        yield {
            "LORRY_EC2_TEMPLATE": made["LaunchTemplate"]["LaunchTemplateId"],
            "LORRY_EC2_ROLE_ID": "AROAMACHINE",
            "LORRY_EC2_SUBNETS": ",".join(row["SubnetId"] for row in subnets),
            "LORRY_EC2_GROUP": group,
            "LORRY_TRAINER_ROLE": "arn:aws:iam::123456789012:role/lorry-trainer",
            "LORRY_SESSION_POLICY": POLICY,
        }


class Hardware:
    """Boots each new instance of the account: its user data runs as a process, and its end ends the instance."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.ec2, self.over = folder, boto3.client("ec2"), threading.Event()
        self.booted: dict[str, subprocess.Popen[str]] = {}
        self.role_id = "AROAMACHINE"
        (folder / "bin").mkdir(parents=True)
        tools = {name: f'exec {sys.executable} -m tests.ec2.tools {name} "$@"' for name in ("aws", "docker")}
        for name, body in (tools | {"shutdown": f'echo "$*" >> {folder}/shutdowns'}).items():
            path = folder / "bin" / name
            path.write_text(f"#!/bin/bash\n{body}\n")
            path.chmod(0o755)

    def run(self) -> None:
        while not self.over.wait(0.3):
            for reservation in self.ec2.describe_instances()["Reservations"]:
                for row in reservation["Instances"]:
                    self.go_on(row["InstanceId"], row["State"]["Name"])

    def go_on(self, instance: str, state: str) -> None:
        if state == "running" and instance not in self.booted:
            self.booted[instance] = self.boot(instance)
        elif state == "running" and self.booted[instance].poll() is not None:
            self.ec2.terminate_instances(InstanceIds=[instance])

    def boot(self, instance: str) -> subprocess.Popen[str]:
        place = self.folder / instance
        place.mkdir()
        script = USER_DATA.read_text().replace("/run/lorry.env", f"{place}/lorry.env")
        script = script.replace("/opt/dlami/nvme", f"{place}/nvme")
        script = script.replace("lorry-dev-artifacts-123456789012-us-east-1", "bucket")
        seen = {name: os.environ[name] for name in ("AWS_ENDPOINT_URL", "HOME", "AWS_DEFAULT_REGION")}
        seen |= {
            "AWS_ACCESS_KEY_ID": "role",
            "AWS_SECRET_ACCESS_KEY": "role",
            "MACHINE_ID": f"{self.role_id}:{instance}",
        }
        seen |= {"PATH": f"{self.folder}/bin:{os.environ['PATH']}", "PYTHONPATH": str(REPOSITORY)}
        name = "AWS_EC2_METADATA_SERVICE_ENDPOINT"
        seen[name] = os.environ.get(name, "http://127.0.0.1:9")
        with (place / "console.log").open("w") as log:
            said = {"stdout": log, "stderr": log, "text": True, "start_new_session": True}
            return subprocess.Popen(["bash", "-c", script], env=seen, cwd=REPOSITORY, **said)

    def said(self) -> str:
        return "\n".join(path.read_text()[-4000:] for path in self.folder.glob("*/console.log"))


@pytest.fixture
def hardware(aws: dict[str, str], tmp_path: Path) -> Iterator[Hardware]:
    made = Hardware(tmp_path / "hardware")
    thread = threading.Thread(target=made.run, daemon=True)
    thread.start()
    yield made
    made.over.set()
    thread.join()
    for process in made.booted.values():
        process.kill()
        process.wait()


@pytest.mark.long
@pytest.mark.timeout(1200)
def test_the_smoke_recipe_trains_on_a_machine_of_ec2(aws: dict[str, str], hardware: Hardware, tmp_path: Path) -> None:
    spec = smoke_spec(tmp_path / "data", "real-1", "ec2", 20.0)
    store, backend = open_store(STORE), Ec2Backend(aws)
    began = time.time()
    handle = launch(store, spec, None, tmp_path / "data", backend, began).handle
    (instance,) = handle["instances"]
    (owned,) = backend.owned()
    assert (owned.job_id, owned.handle["instances"], owned.handle["store"]) == ("real-1", [instance], STORE)
    out = io.StringIO()
    state = watch(store, "real-1", backend, out, poll_seconds=0.5)
    assert state.state == "completed", out.getvalue() + hardware.said()
    manifest = pull(store, "real-1", tmp_path / "adapter")
    assert (manifest.base_model, manifest.recipe_name) == ("lorry/smoke", "smoke/zero3")
    assert manifest.effect > 0
    give_up = time.monotonic() + 120
    while backend.observe(handle).phase != "gone":  # it shut itself down: nobody else ended it
        assert time.monotonic() < give_up, hardware.said()
        time.sleep(0.2)
    shutdowns = (tmp_path / "hardware" / "shutdowns").read_text().splitlines()
    assert shutdowns[0].startswith("-h +1440 ")
    assert shutdowns[1].startswith("-h +")  # the deadline of the job
    assert shutdowns[-1] == "-h now"
    charges = backend.charges(store, read_job(store, "real-1"))
    assert charges is not None
    assert charges.is_closed
    assert 0 < charges.usd[instance] <= handle["usd_per_hour"] * (time.time() - began + 2) / 3600
    assert not _leaks(store, hardware)


def _leaks(store: Any, hardware: Hardware) -> list[str]:
    seen = [(key, store.read(key) or b"") for key in store.keys("real-1")]
    seen += [(str(path), path.read_bytes()) for path in hardware.folder.rglob("*") if path.is_file()]
    assert len(seen) > 15
    return [where for where, data in seen if CANARY.encode() in data]
