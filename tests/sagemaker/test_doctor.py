"""What is wrong with a SageMaker set-up is one sentence with the next step, before anything is asked for."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import boto3
import pytest

from scripts.doctor import sagemaker_checks
from scripts.doctor.finding import Finding, Subject
from scripts.doctor.sagemaker_checks import check_sagemaker
from tests.sagemaker.fake_sagemaker import REGION

QUOTA = "ml.p5.48xlarge for training job usage"
Json = dict[str, Any]


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Answers to the actions that moto lacks; everything else is asked of it."""
    simulated = [{"EvalActionName": "s3:PutObject", "EvalDecision": "allowed"}]
    pages = [
        {
            "Quotas": [{"QuotaName": "ml.m5.large for endpoint usage", "QuotaCode": "L-1", "Value": 4.0}],
            "NextToken": "2",
        },
        {"Quotas": [{"QuotaName": QUOTA, "QuotaCode": "L-82E1C851", "Value": 1.0}]},
    ]
    given: Json = {"simulate_principal_policy": {"EvaluationResults": simulated}, "list_service_quotas": pages}
    ask = sagemaker_checks.ask_aws

    def answered(
        subject: Subject, service: str, action: str, region: str | None = None, **arguments: Any
    ) -> Json | str:
        if action not in given:
            return ask(subject, service, action, region, **arguments)
        answer = given[action]
        page: Json | str = answer[int(arguments.get("NextToken", 1)) - 1] if isinstance(answer, list) else answer
        return page

    monkeypatch.setattr(sagemaker_checks, "ask_aws", answered)
    return given


@pytest.fixture
def subject(bucket: str, answers: Json) -> Subject:
    """A room as Terraform makes it, all of it in order."""
    boto3.client("iam").create_role(RoleName="lorry-sagemaker", AssumeRolePolicyDocument="{}")
    ecr = boto3.client("ecr")
    ecr.create_repository(repositoryName="lorry/trainer")
    manifest = '{"schemaVersion": 2, "mediaType": "application/vnd.docker.distribution.manifest.v2+json"}'
    pushed = ecr.put_image(repositoryName="lorry/trainer", imageManifest=manifest, imageTag="t")
    digest = pushed["image"]["imageId"]["imageDigest"]
    image = f"123456789012.dkr.ecr.{REGION}.amazonaws.com/lorry/trainer@{digest}"
    role = "arn:aws:iam::123456789012:role/lorry-sagemaker"
    rooms = {"sagemaker_role_arn": role, "region": REGION, "store_url": "s3://bucket"}
    return Subject(now=datetime.now(UTC), rooms=rooms, environment={"LORRY_IMAGE": image})


def found(subject: Subject, **changes: Any) -> dict[str, Finding]:
    return {f.check: f for f in check_sagemaker(Subject(**{**vars(subject), **changes}))}


def test_a_room_in_order_passes_every_check(subject: Subject) -> None:
    findings = found(subject)
    assert {name: f.state for name, f in findings.items()} == dict.fromkeys(
        ["SageMaker role", "SageMaker bucket", "SageMaker image", "SageMaker types", "SageMaker quotas"], "ok"
    ), findings
    assert findings["SageMaker quotas"].seen == "1 x ml.p5.48xlarge"
    assert "ml.p5en.48xlarge" in findings["SageMaker types"].seen


def test_without_a_room_or_keys_nothing_is_asked(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    assert {f.state for f in found(subject, rooms={}).values()} == {"not checked"}
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    assert {f.seen for f in found(subject).values()} == {"there are no AWS credentials"}


def test_a_role_without_a_right_and_a_role_that_is_not_there(subject: Subject, answers: Json) -> None:
    denied = {"EvalActionName": "s3:PutObject", "EvalDecision": "implicitDeny"}
    answers["simulate_principal_policy"] = {"EvaluationResults": [denied]}
    said = found(subject)["SageMaker role"]
    assert (said.state, said.seen.partition(" may not ")[2][:12]) == ("failed", "s3:PutObject")
    assert "apply the AWS room again" in said.step
    answers["simulate_principal_policy"] = "AccessDenied (not allowed)"
    assert found(subject)["SageMaker role"].state == "not checked"
    rooms = {**subject.rooms, "sagemaker_role_arn": "arn:aws:iam::123456789012:role/nobody"}
    assert "there is no role" in found(subject, rooms=rooms)["SageMaker role"].seen


def test_a_bucket_elsewhere_is_named_with_its_region_or_its_owner(subject: Subject, answers: Json) -> None:
    elsewhere = {"CreateBucketConfiguration": {"LocationConstraint": "eu-west-1"}}
    boto3.client("s3").create_bucket(Bucket="far", **elsewhere)
    said = found(subject, store="s3://far/jobs")["SageMaker bucket"]
    assert (said.state, said.seen) == ("failed", f"far is in eu-west-1, the jobs run in {REGION}")
    answers["head_bucket"] = "403 (Forbidden)"
    said = found(subject)["SageMaker bucket"]
    assert said.seen == "bucket belongs to another account, or this key may not see it"
    assert "use a bucket of account 123456789012" in said.step
    answers["head_bucket"] = "404 (Not Found)"
    assert found(subject)["SageMaker bucket"].step == "create it, or correct LORRY_STORE"


def test_an_image_that_is_missing_or_elsewhere(subject: Subject) -> None:
    image = subject.environment["LORRY_IMAGE"]
    for name, seen in [
        ("", "none is not pinned by digest"),
        (image.replace(REGION, "eu-west-1"), f"is not in ECR of {REGION}"),
        (image[:-64] + "0" * 64, "ImageNotFoundException"),
    ]:
        said = found(subject, environment={"LORRY_IMAGE": name})["SageMaker image"]
        assert said.state == "failed"
        assert seen in said.seen


def test_a_quota_of_zero_names_its_code(subject: Subject, answers: Json) -> None:
    answers["list_service_quotas"][1]["Quotas"][0]["Value"] = 0.0
    said = found(subject)["SageMaker quotas"]
    assert said.state == "failed"
    assert said.step == f"ask for L-82E1C851 ({QUOTA}); it takes days"
    said = found(subject, environment={**subject.environment, "LORRY_SAGEMAKER_SPOT": "yes"})["SageMaker quotas"]
    assert said.seen == "0 machines of each type for a spot training job"


def test_a_region_without_our_types(subject: Subject, answers: Json) -> None:
    answers["describe_instance_type_offerings"] = {"InstanceTypeOfferings": []}
    said = found(subject)["SageMaker types"]
    assert (said.state, said.seen) == ("failed", f"{REGION} offers none of ours")
