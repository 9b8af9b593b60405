"""A training by hand on AWS, from its plan to an adapter: the real workflow, the real trainer, and stand-ins of AWS."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import boto3
import pytest

from scripts.job_folder import read_job
from scripts.pull import pull
from scripts.store import open_store
from tests.ec2.github_identity import TOKEN, serve_github
from tests.ec2.test_real_trainer import Hardware, aws, hardware  # noqa: F401
from tests.sagemaker.conftest import KEYS, SETTINGS, bucket, make_account  # noqa: F401
from tests.sagemaker.fake_sagemaker import SageMaker
from tests.workflows.conftest import KEY, Run

pytestmark = [pytest.mark.slow, pytest.mark.long, pytest.mark.timeout(1200)]
STORE = "s3://bucket/jobs"


def train(act: Run, folder: Path, backend: str, settings: dict[str, str], environment: dict[str, str]) -> str:
    """Runs the workflow for the toy model on that backend; what it printed."""
    recipe = Path("recipes/smoke/zero3.yaml").read_text().replace("[local]", f"[{backend}]")
    recipe = recipe.replace("gpus: 2", "gpus: 1").replace("max_usd: 1", "max_usd: 20").replace("epochs: 4", "epochs: 1")
    (folder / "repository" / "toy.yaml").write_text(recipe)
    inputs = {"recipe": "toy.yaml", "training_set": "examples/bicycle-care.jsonl", "job": "by-hand-1"}
    inputs |= {"budget_usd": "20", "backend": backend}
    words = [word for name, value in inputs.items() for word in ("--input", f"{name}={value}")]
    words += [
        word for name, value in (settings | {"LORRY_STORE": STORE}).items() for word in ("--var", f"{name}={value}")
    ]
    words += [word for name, value in environment.items() for word in ("--env", f"{name}={value}")]
    done: subprocess.CompletedProcess[str] = act("workflow_dispatch", "train", *words)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    return done.stdout + done.stderr


def of_aws() -> dict[str, str]:
    """What stands in this process for the action that signs in, and where the local clouds answer."""
    return {name: value for name, value in os.environ.items() if name.startswith("AWS_")}


def make_role(arn: str) -> str:
    """A role of that ARN in the local AWS; its id."""
    return str(
        boto3.client("iam").create_role(RoleName=arn.rpartition("/")[2], AssumeRolePolicyDocument="{}")["Role"][
            "RoleId"
        ]
    )


def pushed_image() -> str:
    """An image in the registry of the local AWS, by digest."""
    ecr = boto3.client("ecr")
    home = ecr.create_repository(repositoryName="lorry/trainer")["repository"]
    manifest = '{"schemaVersion": 2, "mediaType": "application/vnd.docker.distribution.manifest.v2+json"}'
    image = ecr.put_image(repositoryName="lorry/trainer", imageManifest=manifest, imageTag="t")["image"]
    return f"{home['repositoryUri']}@{image['imageId']['imageDigest']}"


def with_machine_role(template: str) -> str:
    """Gives the launch template an instance profile, as Terraform does; the id of its role."""
    role_id, iam, ec2 = make_role("role/lorry-machine"), boto3.client("iam"), boto3.client("ec2")
    iam.create_instance_profile(InstanceProfileName="lorry-machine")
    iam.add_role_to_instance_profile(InstanceProfileName="lorry-machine", RoleName="lorry-machine")
    given = {"LaunchTemplateId": template}
    data = {"IamInstanceProfile": {"Name": "lorry-machine"}}
    known = ec2.describe_launch_template_versions(**given, Versions=["$Latest"])["LaunchTemplateVersions"][0]
    ec2.create_launch_template_version(**given, LaunchTemplateData=known["LaunchTemplateData"] | data)
    ec2.modify_launch_template(**given, DefaultVersion="2")
    return role_id


def test_on_sagemaker(act: Run, make_account: Callable[..., SageMaker], tmp_path: Path) -> None:  # noqa: F811
    account = make_account()
    account.variables["TORCH_EXTENSIONS_DIR"] = str(tmp_path / "extensions")
    make_role(SETTINGS["LORRY_SAGEMAKER_ROLE"])
    said = train(act, tmp_path, "sagemaker", SETTINGS | {"LORRY_IMAGE": pushed_image()}, of_aws())
    (job,) = account.jobs.values()
    assert (job.status, job.body["RoleArn"]) == ("Completed", SETTINGS["LORRY_SAGEMAKER_ROLE"])
    assert "Before a launch on sagemaker" in said
    assert pull(open_store(STORE), "by-hand-1", tmp_path / "adapter").effect > 0
    assert not [secret for secret in (KEY, *KEYS.values()) if secret in said]


def test_on_ec2_with_the_keys_of_the_workflow(
    act: Run,
    aws: dict[str, str],  # noqa: F811
    hardware: Hardware,  # noqa: F811
    tmp_path: Path,
) -> None:
    make_role(aws["LORRY_TRAINER_ROLE"])
    hardware.role_id = aws["LORRY_EC2_ROLE_ID"] = with_machine_role(aws["LORRY_EC2_TEMPLATE"])
    asked: list[str] = []
    with serve_github(asked) as github:
        said = train(act, tmp_path, "ec2", aws, of_aws() | github)
    assert len(asked) == 1, "by its own identity, and no longer way round"
    files = read_job(open_store(STORE), "by-hand-1")
    assert files.submission is not None
    assert len(files.submission.handle["instances"]) == 1
    assert pull(open_store(STORE), "by-hand-1", tmp_path / "adapter").effect > 0
    assert not [secret for secret in (KEY, TOKEN, github["ACTIONS_ID_TOKEN_REQUEST_TOKEN"]) if secret in said]
