"""What is wrong with a SageMaker set-up is one sentence with the next step, before anything is asked for."""

from __future__ import annotations

import json
import os
from datetime import UTC, datetime
from fnmatch import fnmatchcase
from typing import Any

import boto3
import pytest

from recipes.catalog import load_catalog
from recipes.load import load_recipe
from scripts.cli import main
from scripts.doctor import aws_checks, role_checks, sagemaker_checks
from scripts.doctor.finding import Finding, Subject
from scripts.doctor.preflight import preflight
from scripts.doctor.sagemaker_checks import PARTS, check_sagemaker
from scripts.plan import make_plan
from tests.sagemaker.fake_sagemaker import REGION

QUOTA = "ml.p5.48xlarge for training job usage"
_LOGS = f"arn:aws:logs:{REGION}:123456789012:log-group:/aws/sagemaker/TrainingJobs:*"
_JOBS = ["arn:aws:s3:::bucket/jobs/*", "arn:aws:s3:::bucket/clients/*/jobs/*"]
ALLOWED = {  # what the policies of infra/modules/sagemaker-training and artifact-store say
    **{
        "iam:PassRole": ["*"],
        "ecr:GetAuthorizationToken": ["*"],
        "cloudwatch:PutMetricData": ["*"],
        "logs:PutLogEvents": [_LOGS],
    },
    **{"s3:GetObject": _JOBS, "s3:PutObject": _JOBS},
}
ROLES = ("SageMaker role", "SageMaker role handed over")
Json = dict[str, Any]


def simulated(ActionNames: list[str], ResourceArns: list[str], **_: Any) -> Json:  # noqa: N803
    """IAM's judgement of the room's role."""

    def decision(action: str) -> str:
        allowed = any(fnmatchcase(arn, pattern) for arn in ResourceArns for pattern in ALLOWED[action])
        return "allowed" if allowed else "implicitDeny"

    return {"EvaluationResults": [{"EvalActionName": a, "EvalDecision": decision(a)} for a in ActionNames]}


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Answers to the actions that moto lacks, or that it is slow at; everything else is asked of it."""
    pages = [
        {
            "Quotas": [{"QuotaName": "ml.m5.large for endpoint usage", "QuotaCode": "L-1", "Value": 4.0}],
            "NextToken": "2",
        },
        {"Quotas": [{"QuotaName": QUOTA, "QuotaCode": "L-82E1C851", "Value": 1.0}]},
    ]
    offered = [{"InstanceType": "p5.48xlarge"}, {"InstanceType": "p5en.48xlarge"}]
    given: Json = {"simulate_principal_policy": simulated, "list_service_quotas": pages}
    given["describe_instance_type_offerings"] = {"InstanceTypeOfferings": offered}
    ask = aws_checks.ask_aws

    def answered(
        subject: Subject, service: str, action: str, region: str | None = None, **arguments: Any
    ) -> Json | str:
        if action not in given:
            return ask(subject, service, action, region, **arguments)
        answer = given[action]
        answer = answer(**arguments) if callable(answer) else answer
        page: Json | str = answer[int(arguments.get("NextToken", 1)) - 1] if isinstance(answer, list) else answer
        return page

    for module in (sagemaker_checks, role_checks):
        monkeypatch.setattr(module, "ask_aws", answered)
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
    rooms = {"sagemaker_role_arn": role, "region": REGION, "store_url": "s3://bucket/jobs"}
    return Subject(now=datetime.now(UTC), rooms=rooms, environment={"LORRY_IMAGE": image})


def said_of(part: str, subject: Subject, **changes: Any) -> Finding:
    """The last finding of one part of the check, or the first on the role: the last is on who hands it over."""
    return list(PARTS[part](Subject(**{**vars(subject), **changes})))[0 if part == "role" else -1]


def test_a_room_in_order_passes_every_check(subject: Subject) -> None:
    findings = {f.check: f for f in check_sagemaker(subject)}
    assert {name: f.state for name, f in findings.items()} == dict.fromkeys(
        [*ROLES, "SageMaker bucket", "SageMaker image", "SageMaker types", "SageMaker quotas"], "ok"
    ), findings
    assert findings["SageMaker quotas"].seen == "1 x ml.p5.48xlarge"
    assert "ml.p5en.48xlarge" in findings["SageMaker types"].seen


def test_without_a_room_or_keys_nothing_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE", "AWS_ENDPOINT_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("HOME", "/nonexistent")
    nothing = Subject(now=datetime.now(UTC))
    assert [(f.state, f.seen) for f in check_sagemaker(nothing)] == [
        ("not checked", "no applied AWS room with SageMaker was given")
    ]
    room = Subject(now=datetime.now(UTC), rooms={"sagemaker_role_arn": "arn:aws:iam::123456789012:role/x"})
    assert [f.seen for f in check_sagemaker(room)] == ["there are no AWS credentials"]


def test_a_role_without_a_right_and_a_role_that_is_not_there(subject: Subject, answers: Json) -> None:
    said = said_of("role", subject, store="s3://bucket/elsewhere")
    assert said.seen.partition(" may not ")[2] == "s3:GetObject, s3:PutObject"
    assert said_of("role", subject, store="s3://bucket/clients/acme/jobs").state == "ok"
    denied = {"EvalActionName": "s3:PutObject", "EvalDecision": "implicitDeny"}
    answers["simulate_principal_policy"] = {"EvaluationResults": [denied]}
    said = said_of("role", subject)
    assert (said.state, said.seen.partition(" may not ")[2][:12]) == ("failed", "s3:PutObject")
    assert "apply the AWS room again" in said.step
    answers["simulate_principal_policy"] = "AccessDenied (not allowed)"
    assert said_of("role", subject).state == "not checked"
    rooms = {**subject.rooms, "sagemaker_role_arn": "arn:aws:iam::123456789012:role/nobody"}
    assert "there is no role" in said_of("role", subject, rooms=rooms).seen


def test_a_bucket_elsewhere_is_named_with_its_region_or_its_owner(subject: Subject, answers: Json) -> None:
    elsewhere = {"CreateBucketConfiguration": {"LocationConstraint": "eu-west-1"}}
    boto3.client("s3").create_bucket(Bucket="far", **elsewhere)
    said = said_of("bucket", subject, store="s3://far/jobs")
    assert (said.state, said.seen) == ("failed", f"far is in eu-west-1, the jobs run in {REGION}")
    answers["get_bucket_location"] = "AccessDenied (no reason given)"
    said = said_of("bucket", subject)
    assert (said.state, said.seen) == ("not checked", "bucket belongs to another account, or this key may not see it")
    answers["get_bucket_location"] = lambda **given: "403 (Forbidden)" if "ExpectedBucketOwner" in given else {}
    said = said_of("bucket", subject)
    assert (said.state, said.seen) == ("failed", "bucket belongs to another account")
    assert "use a bucket of account 123456789012" in said.step
    answers["get_bucket_location"] = "NoSuchBucket (no such bucket)"
    assert said_of("bucket", subject).step == "create it, or correct LORRY_STORE"


@pytest.mark.parametrize(
    ("caller", "asked", "state"),
    [
        ("arn:aws:iam::123456789012:user/ann", "arn:aws:iam::123456789012:user/ann", "failed"),
        ("arn:aws:sts::123456789012:assumed-role/door/s-1", "arn:aws:iam::123456789012:role/door", "failed"),
        ("arn:aws:iam::123456789012:root", None, "ok"),
        ("ExpiredToken (it is old)", None, "not checked"),
    ],
)
def test_whoever_may_not_hand_the_role_over_is_told_before_a_launch(
    subject: Subject, answers: Json, caller: str, asked: str | None, state: str
) -> None:
    seen = []

    def judge(PolicySourceArn: str, ActionNames: list[str], **given: Any) -> Json:  # noqa: N803
        if ActionNames == ["iam:PassRole"]:
            seen.append((PolicySourceArn, given["ResourceArns"], given["ContextEntries"][0]["ContextKeyValues"]))
        decision = "implicitDeny" if ActionNames == ["iam:PassRole"] else "allowed"
        return {"EvaluationResults": [{"EvalActionName": a, "EvalDecision": decision} for a in ActionNames]}

    answers["simulate_principal_policy"] = judge
    answers["get_caller_identity"] = {"Arn": caller} if caller.startswith("arn") else caller
    role = subject.rooms["sagemaker_role_arn"]
    found = list(PARTS["role"](subject))[-1]
    assert (found.check, found.state) == ("SageMaker role handed over", state)
    assert seen == ([(asked, [role], ["sagemaker.amazonaws.com"])] if asked else [])
    if state == "failed":
        assert found.seen == f"{asked} may not give {role} to sagemaker.amazonaws.com"
        answers["simulate_principal_policy"] = "AccessDenied (no)"
        assert list(PARTS["role"](subject))[-1].state == "not checked"


def test_an_image_that_is_missing_or_elsewhere(subject: Subject) -> None:
    image = subject.environment["LORRY_IMAGE"]
    for name, seen in [
        ("", "none is not pinned by digest"),
        (image.replace(REGION, "eu-west-1"), f"is not in ECR of {REGION}"),
        (image[:-64] + "0" * 64, "ImageNotFoundException"),
    ]:
        said = said_of("image", subject, environment={"LORRY_IMAGE": name})
        assert said.state == "failed"
        assert seen in said.seen


def test_a_quota_of_zero_names_its_code(subject: Subject, answers: Json) -> None:
    answers["list_service_quotas"][1]["Quotas"][0]["Value"] = 0.0
    said = said_of("types", subject)
    assert said.state == "failed"
    assert said.step == f"ask for L-82E1C851 ({QUOTA}); it takes days"
    said = said_of("types", subject, environment={**subject.environment, "LORRY_SAGEMAKER_SPOT": "yes"})
    assert (said.state, said.seen) == ("not checked", "AWS lists none of a type for a spot training job")
    answers["list_service_quotas"][1]["Quotas"][0]["Value"] = 1.0
    said = said_of("types", subject, nodes=2)
    assert (said.state, said.seen) == ("failed", "at most 1 of a type for a training job; a job takes 2")
    answers["list_service_quotas"][1]["Quotas"][0]["Value"] = 2.0
    assert said_of("types", subject, nodes=2).state == "ok"


def test_a_region_without_our_types(subject: Subject, answers: Json) -> None:
    answers["describe_instance_type_offerings"] = {"InstanceTypeOfferings": []}
    said = next(iter(PARTS["types"](subject)))
    assert (said.state, said.seen) == ("failed", f"{REGION} offers none of ours")


def test_a_plan_asks_for_its_own_types_by_the_settings_alone(subject: Subject, answers: Json) -> None:
    catalog = load_catalog()
    plan = make_plan(load_recipe("qwen3-next-80b/zero3", catalog), None, catalog)
    role = {"LORRY_SAGEMAKER_ROLE": subject.rooms["sagemaker_role_arn"], "AWS_REGION": REGION}
    settings = Subject(subject.now, store="s3://bucket/jobs", environment={**subject.environment, **role})
    findings = {f.check: f for f in preflight("sagemaker", plan, catalog, settings)}
    assert {name: f.state for name, f in findings.items()} == dict.fromkeys(
        ["AWS credentials", *ROLES, *(f"SageMaker {part}" for part in ("bucket", "image", "types", "quotas"))], "ok"
    ), findings
    fitting = {catalog.offers[o.offer].provider_type for o in plan.offers if o.fits and o.backend == "sagemaker"}
    assert findings["SageMaker types"].seen.startswith(f"{REGION} offers")
    missing = findings["SageMaker types"].seen.partition("; not ")[2].split(", ")
    assert set(missing) == fitting - {"ml.p5.48xlarge", "ml.p5en.48xlarge"}, "of the plan's types, and no others"
    answers["list_service_quotas"] = {"Quotas": []}
    assert "L-82E1C851" in preflight("sagemaker", plan, catalog, settings)[-1].step
    named = Subject(subject.now, store="s3://bucket/jobs", environment={"LORRY_SAGEMAKER_ROLE": "lorry-sagemaker"})
    found = preflight("sagemaker", plan, catalog, named)[1:]
    assert [(f.state, f.seen) for f in found] == [("failed", "'lorry-sagemaker' is not the ARN of a role")]


def test_a_plan_without_settings_or_keys_says_so_and_is_a_plan_all_the_same(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in [name for name in os.environ if name.startswith(("AWS_", "LORRY_SAGEMAKER", "LORRY_EC2"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("HOME", "/nonexistent")
    assert main(["plan", "qwen3-8b/zero3", "--backend", "sagemaker"]) == 0
    assert "not checked  sagemaker: LORRY_SAGEMAKER_ROLE is not set" in capsys.readouterr().out
    monkeypatch.setenv("LORRY_EC2_TEMPLATE", "lt-1")
    assert main(["plan", "qwen3-8b/zero3", "--backend", "ec2", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["chosen"]
    assert [finding["seen"] for finding in said["preflight"]] == ["there are no AWS credentials"]
    assert main(["plan", "smoke/zero3", "--backend", "ec2"]) == 0
    assert "not checked  ec2: no offer of it fits this recipe; the table above says why" in capsys.readouterr().out
