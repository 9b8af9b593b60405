"""What a GPU machine runs at its first start: the golden text, and what it does whichever way things go."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import time
from pathlib import Path

import pytest

from tests.infra.conftest import INFRA

GOLDEN = Path(__file__).with_name("golden") / "ec2-user-data.sh"
TEMPLATE = INFRA / "modules/ec2-gpu/user-data.sh.tftpl"
VALUES = {
    "max_minutes": 1440,
    "region": "us-east-1",
    "bucket": "lorry-dev-artifacts-123456789012-us-east-1",
    "image": "123456789012.dkr.ecr.us-east-1.amazonaws.com/lorry-dev/trainer@sha256:" + "a" * 64,
    "registry": "123456789012.dkr.ecr.us-east-1.amazonaws.com",
}


@pytest.fixture(scope="module")
def rendered(base_env, tmp_path_factory):
    """The template as Terraform itself renders it."""
    asked = f"templatefile({json.dumps(str(TEMPLATE))}, {json.dumps(VALUES)})"
    done = subprocess.run(
        ["terraform", "console"],
        input=f"jsonencode({asked})\n",
        cwd=tmp_path_factory.mktemp("console"),
        env=base_env,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(json.loads(done.stdout))


def test_the_rendered_script_is_the_golden_one(rendered):
    if os.environ.get("UPDATE_GOLDEN"):
        GOLDEN.write_text(rendered)
    assert rendered == GOLDEN.read_text(), "a change that is meant: run with UPDATE_GOLDEN=1"


def test_nothing_stands_before_the_deadline():
    commands = [line for line in GOLDEN.read_text().splitlines() if line and not line.startswith("#")]
    assert commands[0].startswith("shutdown -h +1440 ")


@pytest.fixture
def machine(tmp_path):
    """machine(fail="docker pull") runs the golden script with stand-ins for shutdown, aws, docker and sleep."""
    bin_folder, log, launch = tmp_path / "bin", tmp_path / "calls", tmp_path / "lorry.env"
    bin_folder.mkdir()

    def run(fail="nothing", launch_file=True, more=""):
        for name in ("shutdown", "aws", "docker", "sleep"):
            tool = bin_folder / name
            lines = ["#!/bin/bash", f'echo "{name} $*" >> {log}', f'case "{name} $*" in "{fail}"*) exit 1;; esac']
            if name == "aws":
                lines.append('case "$*" in "sts get-caller-identity"*) echo AROA:i-1;; esac')
                found = (
                    f'echo -e "LORRY_STORE=s3://b/jobs\\nLORRY_JOB=j1{more}" > {launch}' if launch_file else "exit 1"
                )
                lines.append(f'case "$*" in "s3 cp"*) {found};; esac')
            tool.write_text("\n".join(lines) + "\n")
            tool.chmod(tool.stat().st_mode | stat.S_IEXEC)
        script = (
            GOLDEN.read_text().replace("/run/lorry.env", str(launch)).replace("/opt/dlami/nvme", str(tmp_path / "nvme"))
        )
        done = subprocess.run(
            ["bash", "-c", script], env={"PATH": f"{bin_folder}:{os.environ['PATH']}"}, capture_output=True, text=True
        )
        return done.returncode, log.read_text().splitlines()

    return run


def test_a_good_start_runs_the_trainer_and_shuts_down(machine):
    rc, calls = machine()
    assert rc == 0
    assert calls[0].startswith("shutdown -h +1440")
    run = next(call for call in calls if call.startswith("docker run --rm --gpus all"))
    command = "python -m scripts.container --store s3://b/jobs --job j1 --work /scratch/j1"
    assert run.endswith(f"{VALUES['image']} {command}")
    assert f"--env LORRY_TRAINER_IMAGE={VALUES['image']} " in run, "the manifest tells which image trained"
    own_folder = f"s3://{VALUES['bucket']}/machines/AROA:i-1/launch.env "
    assert any(own_folder in call for call in calls)
    assert calls[-1] == "shutdown -h now"


@pytest.mark.parametrize("fail", ["aws sts", "aws ecr", "docker login", "docker pull", "docker run", "shutdown -h +"])
def test_whatever_fails_the_machine_shuts_down(fail, machine):
    _, calls = machine(fail=fail)
    assert calls[-1] == "shutdown -h now"


def test_a_launch_file_that_never_comes_ends_the_machine_after_ten_minutes(machine):
    rc, calls = machine(launch_file=False)
    assert rc == 1
    assert calls.count("sleep 10") == 60
    assert calls[-1] == "shutdown -h now"
    assert not any(call.startswith("docker") for call in calls)


@pytest.mark.parametrize(("hours", "armed"), [(2, "shutdown -h +140"), (-9, None), (100, None)])
def test_the_deadline_of_the_job_takes_the_place_of_a_later_one(machine, hours, armed):
    """20 minutes past it; one that is over, or later than the machine's own, changes nothing."""
    _, calls = machine(more=f"\\nLORRY_DEADLINE={int(time.time()) + hours * 3600 + 30}")
    again = [call.split(" deadline")[0] for call in calls if call.startswith("shutdown -h +")][1:]
    assert again == ([armed] if armed else [])
    assert calls[-1] == "shutdown -h now"
