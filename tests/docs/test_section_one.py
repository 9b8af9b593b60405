"""Section 1 of the instructions, walked from its first command to its last, on stand-ins for Runpod and AWS.

What differs from a real walk is in STAND_INS and nowhere else: the person's own values, and a model and a recipe that
train on this machine. Steps are shell blocks as they are printed; what one exports the next one sees.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from scripts.container.nodes import free_port
from scripts.fake_runpod.host import Host
from scripts.fake_runpod.processes import ProcessRunner
from scripts.fake_runpod.server import LocalRunpod, serve
from tests.docs.made import DOCUMENTS
from tests.docs.stand_ins import local_sagemaker, private_server, push_image, put_job_again
from tests.docs.window import Window, copy_of_the_repository, put_programs
from tests.infra.conftest import (  # noqa: F401  (fixtures)
    RUNPOD_KEY,
    aws_fake,
    aws_provider,
    aws_server,
    base_env,
    client,
    short_tmp,
    start_provider,
)
from tests.tools import tool_environment

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]
STEP = re.compile(r"^## (Step (\d+)\. .+)$", flags=re.MULTILINE)
TOY_STEPS = 24
"Of recipes/smoke/pod.yaml with examples/bicycle-care.jsonl."


def steps() -> dict[int, tuple[str, list[str]]]:
    """Number -> (heading, shell blocks) of Section 1."""
    text = DOCUMENTS[1].read_text(encoding="utf-8").partition("# Section 2")[0]
    found = list(STEP.finditer(text))
    ends = [*(one.start() for one in found[1:]), len(text)]
    return {
        int(one[2]): (one[1], re.findall(r"^```sh\n(.*?)^```", text[one.end() : end], flags=re.M | re.S))
        for one, end in zip(found, ends, strict=True)
    }


class Walk(Window):
    """One person's terminal window in a copy of the repository, and what stands in for that person's own values."""

    def __init__(self, folder: Path, environment: dict[str, str], stand_ins: dict[str, str]) -> None:
        super().__init__(folder, environment)
        self.stand_ins = stand_ins

    def do(self, number: int, *, without: str | tuple[str, ...] = (), may_fail: str = "\0") -> str:
        """Runs the blocks of a step and returns what they printed. A step that fails fails the test."""
        heading, blocks = steps()[number]
        said = ""
        for block in blocks:
            for old, new in self.stand_ins.items():
                block = block.replace(old, new)
            lines = [line for line in block.splitlines() if not line.startswith(without)]
            lines = [line + " || true" if line.startswith(may_fail) else line for line in lines]
            said += self.run("\n".join(lines), heading)
        return said


@pytest.fixture
def runpod(short_tmp: Path) -> Iterator[LocalRunpod]:  # noqa: F811
    with serve(RUNPOD_KEY, host=Host(short_tmp / "pods", ProcessRunner())) as local:
        yield local


@pytest.fixture
def walk(
    tmp_path: Path,
    base_env: dict[str, str],  # noqa: F811
    aws_provider: None,  # noqa: F811
    aws_fake: str,  # noqa: F811
    runpod: LocalRunpod,
) -> Iterator[Walk]:
    """A window at the beginning, with the two clouds, Runpod's provider and the programs of step 1 in place."""
    copy = copy_of_the_repository(tmp_path / "lorry")
    aws = tool_environment("awscli==1.46.3") / "bin"
    programs = put_programs(tmp_path / "bin", aws=f'exec {aws}/python {aws}/aws "$@"')
    for user in ("lorry-front-door", "lorry-machines"):  # step 5
        client(aws_fake, "iam").create_user(UserName=user)
    ec2 = client(aws_fake, "ec2")
    vpc = ec2.describe_vpcs()["Vpcs"][0]["VpcId"]
    subnet = ec2.describe_subnets(Filters=[{"Name": "vpc-id", "Values": [vpc]}])["Subnets"][0]["SubnetId"]
    provider, attached = start_provider(base_env, runpod.url)
    environment = {
        **{name: value for name, value in base_env.items() if not name.startswith("AWS_")},
        "PATH": f"{programs}:{os.environ['PATH']}",
        "PYTHONPATH": str(copy),
        "TF_REATTACH_PROVIDERS": attached,
        "RUNPOD_API_BASE_URL": runpod.url,
        "AWS_ENDPOINT_URL": aws_fake,
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    stand_ins = {
        'export PATH="$PWD/.venv/bin:$PATH"': ":",
        "YOUR_ADMIN_KEY_ID": "testing",
        "YOUR_ADMIN_SECRET": "testing",
        "YOUR_RUNPOD_KEY": RUNPOD_KEY,
        "YOUR_NAME-lorry-state": "someone-lorry-state",
        "YOUR_ACCOUNT": "123456789012",
        "YOUR_GITHUB_NAME": "someone",
        "YOUR_VPC": vpc,
        "YOUR_SUBNET": subnet,
        "YOU@EXAMPLE.COM": "someone@example.com",
        "MACHINES_KEY_ID": "testing",
        "MACHINES_SECRET": "testing",
        "YOUR_VOLUME_KEY_ID": "testing",
        "YOUR_VOLUME_SECRET": "testing",
        "https://s3api-us-mo-1.runpod.io": aws_fake,
        "AWS_DEFAULT_REGION=US-MO-1": "AWS_DEFAULT_REGION=us-east-1",
        "examples/workshop-12.jsonl": "examples/bicycle-care.jsonl",
        "runpod destroy": "runpod destroy -no-color -auto-approve",  # a person types yes
        "aws destroy": "aws destroy -no-color -auto-approve",
        "Qwen/Qwen3.6-35B-A3B": "lorry/smoke",
        "qwen3.6-35b-a3b/zero3": "smoke/pod",
    }
    window = Walk(copy, environment, stand_ins)
    yield window
    provider.communicate()


def test_the_steps_are_numbered_and_each_has_commands_or_is_marked_as_console() -> None:
    found = steps()
    assert list(found) == list(range(1, len(found) + 1))
    text = DOCUMENTS[1].read_text(encoding="utf-8")
    for heading, blocks in found.values():
        body = heading + text.partition(heading)[2].partition("\n## ")[0]
        assert blocks or "(console)" in body or heading == "Step 1. What you need", heading


def test_section_one_leads_from_nothing_to_an_adapter_and_back(
    walk: Walk,
    runpod: LocalRunpod,
    aws_fake: str,  # noqa: F811
    tmp_path: Path,
) -> None:
    for number in (1, 2, 3, 6, 7):
        walk.do(number)
    assert "Apply complete" in walk.do(8)
    walk.stand_ins["sha256:" + "0" * 64] = push_image(aws_fake)
    assert "@sha256:" in walk.do(9)
    assert "Apply complete" in walk.do(10)
    said = walk.do(11)
    assert said.count("missing") == 2, said
    assert said.count("created") == 2, said
    # The stand-in for the model is made where it is used, so there is nothing to stage: tests/setup/test_stage.py does
    # that against a local hub. The stand-in for AWS knows no quotas, which the doctor may say.
    said = walk.do(12, without="  lorry stage", may_fail="lorry doctor")
    assert re.findall(r"^failed +(.+?):", said, flags=re.MULTILINE) == [], said
    assert "verified" in walk.do(13)
    walk.do(14)
    the_adapter_is_put_to_work(walk, aws_fake)
    a_job_runs_on_aws(walk, aws_fake, tmp_path / "sagemaker")
    front_door_opens(walk)
    said = walk.do(19)
    assert said.count("Destroy complete") == 2
    assert not runpod.account.held["pods"]
    assert not runpod.account.held["network-volumes"]


def the_adapter_is_put_to_work(walk: Walk, aws_fake: str) -> None:  # noqa: F811
    """Step 15. The second training is not done: the first adapter stands in under its name."""
    put_job_again(aws_fake, walk.environment["LORRY_STORE"], "rehearsal-1", "rehearsal-2")
    with private_server(walk.folder, walk.environment, "lorry/smoke") as url:
        walk.stand_ins["https://YOUR_SERVER"] = url
        walk.stand_ins["file:///YOUR_ADAPTERS_FOLDER"] = (walk.folder / "served").as_uri()
        said = walk.do(15, without=("lorry launch", "lorry watch"))
    assert "answers as trained" in said
    assert "live: the base model, rehearsal-1 for 10%" in said, said
    assert re.search(r"roll back rehearsal-1: done .*; live: rehearsal-1\n", said), said


def a_job_runs_on_aws(walk: Walk, aws_fake: str, folder: Path) -> None:  # noqa: F811
    """Step 16."""
    role, store = walk.environment["LORRY_SAGEMAKER_ROLE"], walk.environment["LORRY_STORE"]
    with local_sagemaker(folder, aws_fake, role, store, "aws-smoke-1", TOY_STEPS) as (account, url):
        places = {"AWS_ENDPOINT_URL_SAGEMAKER": url, "AWS_ENDPOINT_URL_CLOUDWATCH_LOGS": url}
        walk.environment |= places
        said = walk.do(16, may_fail="lorry doctor")
        for name in places:
            del walk.environment[name]
        assert [job.status for job in account.jobs.values()] == ["Completed"]
    assert re.findall(r"^failed +(.+?):", said, flags=re.MULTILINE) == [], said
    assert "verified" in said, said


def front_door_opens(walk: Walk) -> None:
    """Step 17, whose last command stays: it is started, asked with the key that was made, and ended."""
    walk.do(17, without="lorry gateway")
    port = free_port()
    command = [sys.executable, "-m", "scripts.cli", "gateway", "--clients", "clients.yaml", "--port", str(port)]
    door = subprocess.Popen(command, cwd=walk.folder, env=walk.environment)
    key = (walk.folder / "client.key").read_text().strip()
    try:
        give_up = time.monotonic() + 120
        while True:
            try:
                url = f"http://127.0.0.1:{port}/v2/lorry/health"
                assert httpx.get(url, headers={"Authorization": f"Bearer {key}"}).status_code == 200
                assert httpx.get(url, headers={"Authorization": "Bearer wrong"}).status_code == 401
                return
            except httpx.ConnectError:
                assert door.poll() is None
                assert time.monotonic() < give_up
                time.sleep(0.2)
    finally:
        door.terminate()
        door.wait()
