"""A launch on AWS asks first whether it could start: a missing image or role is met by no machine that is paid for."""

from __future__ import annotations

import base64
import os
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import boto3
import pytest

from scripts.cli import main
from scripts.doctor import role_checks, template_checks
from scripts.doctor.finding import Finding, Subject
from scripts.doctor.preflight import require_passed
from scripts.doctor.template_checks import check_template
from scripts.errors import Refused
from tests.ec2.conftest import POLICY
from tests.runpod.conftest import REPOSITORY
from tests.sagemaker.conftest import KEYS, SETTINGS, bucket  # noqa: F401
from tests.sagemaker.fake_sagemaker import IMAGE, SageMaker
from tests.sagemaker.wire import serve

SET = REPOSITORY / "examples" / "bicycle-care.jsonl"
TRUST = "{}"
USER_DATA = f"#!/bin/bash\nshutdown -h +60\ndocker pull --quiet {IMAGE} || exit 1\n"
ROOM = {"ec2_launch_template_id": "lt-1", "ec2_machine_role_id": "AROAMACHINE"}
TRAINER = "arn:aws:iam::123456789012:role/lorry-trainer"


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What AWS answers to each action, all of it in order; a text is a refusal."""
    data = {"UserData": base64.b64encode(USER_DATA.encode()).decode(), "IamInstanceProfile": {"Arn": "arn:x/lorry"}}
    role = {"RoleId": "AROAMACHINE", "Arn": "arn:aws:iam::123456789012:role/machine"}
    given: dict[str, Any] = {
        "describe_launch_template_versions": {"LaunchTemplateVersions": [{"LaunchTemplateData": data}]}
    }
    given["get_instance_profile"] = {"InstanceProfile": {"Roles": [role]}}
    given["describe_images"] = {}
    given["get_caller_identity"] = {"Arn": "arn:aws:iam::123456789012:user/ann"}
    given["simulate_principal_policy"] = {"EvaluationResults": [{"EvalActionName": "x", "EvalDecision": "allowed"}]}
    for module in (template_checks, role_checks):
        monkeypatch.setattr(module, "ask_aws", lambda subject, service, action, *_, **__: given[action])
    monkeypatch.setattr("scripts.doctor.aws_checks.ask_aws", lambda subject, service, action, *_, **__: given[action])
    for module_name in ("aws_checks", "template_checks"):
        monkeypatch.setattr(f"scripts.doctor.{module_name}.why_no_aws", lambda subject: "")
    return given


def found(**rooms: str) -> dict[str, Finding]:
    subject = Subject(datetime.now(UTC), ROOM | {"trainer_role_arn": TRAINER} | rooms, store="s3://bucket/jobs")
    return {finding.check: finding for finding in check_template(subject)}


def test_a_template_with_its_image_and_its_roles_is_right(answers: dict[str, Any]) -> None:
    assert {name: finding.state for name, finding in found().items()} == dict.fromkeys(
        ["EC2 image", "EC2 role", "EC2 role handed over", "EC2 trainer role"], "ok"
    )
    assert found()["EC2 image"].seen.startswith(IMAGE)


@pytest.mark.parametrize(
    ("action", "answer", "check", "state", "sentence"),
    [
        ("describe_images", "ImageNotFoundException (none)", "EC2 image", "failed", "ImageNotFoundException"),
        ("describe_images", "AccessDeniedException (no)", "EC2 image", "not checked", "AccessDeniedException"),
        ("describe_images", "Could not connect to the endpoint", "EC2 image", "not checked", "Could not connect"),
        ("get_instance_profile", "NoSuchEntity (none)", "EC2 role", "failed", "instance profile lorry is not there"),
        ("get_instance_profile", "AccessDenied (no)", "EC2 role", "not checked", "AccessDenied"),
        ("describe_launch_template_versions", "InvalidLaunchTemplateId.NotFound (x)", "EC2 template", "failed", "lt-1"),
        ("describe_launch_template_versions", "UnauthorizedOperation (x)", "EC2 template", "not checked", "Unauth"),
        (
            "simulate_principal_policy",
            {"EvaluationResults": [{"EvalActionName": "iam:PassRole", "EvalDecision": "implicitDeny"}]},
            "EC2 role handed over",
            "failed",
            "user/ann may not give arn:aws:iam::123456789012:role/machine to ec2.amazonaws.com",
        ),
    ],
)
def test_what_a_machine_would_miss_is_a_sentence(
    answers: dict[str, Any], action: str, answer: Any, check: str, state: str, sentence: str
) -> None:
    answers[action] = answer
    finding = found()[check]
    assert finding.state == state
    assert sentence in finding.seen
    assert finding.step


def test_a_role_id_of_another_room_is_found(answers: dict[str, Any]) -> None:
    finding = found(ec2_machine_role_id="AROAOTHER")["EC2 role"]
    assert (finding.state, finding.step.split()[1]) == ("failed", "LORRY_EC2_ROLE_ID")


def test_what_another_type_passes_or_nobody_could_check_holds_up_nothing() -> None:
    bad, good = Finding("EC2", "failed", "p5 is not offered", "go"), Finding("EC2", "ok", "p5en is offered")
    quota = Finding("AWS quota L-417A185B", "failed", "0 vCPUs", "ask")
    require_passed([bad, good, Finding("EC2 image", "not checked", "no right", "ask")])
    require_passed([quota, Finding("AWS quota L-DB2E81BA", "ok", "192 vCPUs")])
    with pytest.raises(Refused) as raised:
        require_passed([bad, quota, Finding("EC2 image", "ok", "there")])
    assert [problem.got for problem in raised.value.problems] == ["p5 is not offered", "0 vCPUs"]


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """The smoke recipe where AWS may run it."""
    text = (REPOSITORY / "recipes" / "smoke" / "pod.yaml").read_text()
    path = tmp_path / "aws.yaml"
    path.write_text(
        text.replace("backends: [runpod_pod]", "backends: [sagemaker, ec2]").replace("max_usd: 1", "max_usd: 20")
    )
    return path


@pytest.fixture
def sagemaker(bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SageMaker]:  # noqa: F811
    """A SageMaker on the wire that starts nothing while one looks, beside moto for everything else."""
    from scripts.fake_runpod.clock import Clock
    from scripts.fake_runpod.processes import ProcessRunner
    from tests.sagemaker.fake_sagemaker import Pace

    runner = ProcessRunner({}, grace_seconds=5.0)
    account = SageMaker(tmp_path, runner, clock=Clock(), pace=Pace(launching=3600), bucket=None, variables={})
    with serve(account) as url:
        settings = SETTINGS | {"LORRY_STORE": "s3://bucket/jobs", "AWS_ENDPOINT_URL_SAGEMAKER": url}
        for name, value in settings.items():
            monkeypatch.setenv(name, value)
        yield account


def launched(recipe: Path, backend: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    words = ["launch", str(recipe), "--training-set", str(SET), "--backend", backend, "--job", f"{backend}-1"]
    code = main(words)
    return code, capsys.readouterr().err


@pytest.mark.slow
def test_no_launch_starts_before_its_image_and_roles_are_there(
    sagemaker: SageMaker, recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ec2, iam, ecr = (boto3.client(name) for name in ("ec2", "iam", "ecr"))
    subnets = [row["SubnetId"] for row in ec2.describe_subnets()["Subnets"]]
    data = {"ImageId": "ami-0123456789abcdef0"}
    data |= {"UserData": base64.b64encode(USER_DATA.encode()).decode(), "IamInstanceProfile": {"Name": "lorry"}}
    template = ec2.create_launch_template(LaunchTemplateName="lorry", LaunchTemplateData=data)
    settings = {
        "LORRY_EC2_TEMPLATE": template["LaunchTemplate"]["LaunchTemplateId"],
        "LORRY_EC2_ROLE_ID": "AROAMACHINE",
        "LORRY_EC2_SUBNETS": ",".join(subnets),
        "LORRY_EC2_GROUP": "sg-1",
        "LORRY_TRAINER_ROLE": TRAINER,
        "LORRY_SESSION_POLICY": POLICY,
    }
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    jobs = boto3.client("s3")

    code, said = launched(recipe, "sagemaker", capsys)
    assert code == 3
    assert "SageMaker role: there is no role" in said
    assert "SageMaker image: " in said
    assert "RepositoryNotFoundException" in said
    assert not [action for action, _ in sagemaker.log if action == "CreateTrainingJob"]
    code, said = launched(recipe, "ec2", capsys)
    assert code == 3
    assert "RepositoryNotFoundException" in said
    assert "EC2 role: instance profile lorry is not there" in said
    assert f"EC2 trainer role: there is no role {TRAINER}" in said
    assert not ec2.describe_instances()["Reservations"]
    assert not jobs.list_objects_v2(Bucket="bucket").get("Contents"), "nothing is recorded of what is refused"

    for name in ("lorry-sagemaker", "lorry-trainer"):
        iam.create_role(RoleName=name, AssumeRolePolicyDocument=TRUST)
    ecr.create_repository(repositoryName="lorry/trainer")
    manifest = '{"schemaVersion": 2, "mediaType": "application/vnd.docker.distribution.manifest.v2+json"}'
    pushed = ecr.put_image(repositoryName="lorry/trainer", imageManifest=manifest, imageTag="t")
    there = f"{IMAGE.partition('@')[0]}@{pushed['image']['imageId']['imageDigest']}"
    monkeypatch.setenv("LORRY_IMAGE", there)
    code, said = launched(recipe, "sagemaker", capsys)
    assert (code, len(sagemaker.jobs)) == (0, 1), said
    assert "not checked  SageMaker role handed over" in said, "moto judges no policies, and that holds up nothing"


def test_settings_that_are_wrong_are_refused_before_aws_is_asked(
    sagemaker: SageMaker, recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LORRY_SAGEMAKER_SPOT", "perhaps")
    code, said = launched(recipe, "sagemaker", capsys)
    assert (code, "LORRY_SAGEMAKER_SPOT: 'perhaps'; yes or no" in said) == (2, True), said
    assert "preflight" not in said
    assert not sagemaker.log
    assert os.environ["AWS_ACCESS_KEY_ID"] == KEYS["AWS_ACCESS_KEY_ID"]
