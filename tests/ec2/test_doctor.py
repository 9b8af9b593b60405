"""What is wrong with a room that rents machines of EC2 is a sentence with its next step, before anything is rented."""

from __future__ import annotations

from datetime import UTC, datetime
from fnmatch import fnmatchcase
from typing import Any

import pytest

from recipes.catalog import load_catalog
from recipes.load import load_recipe
from scripts.doctor import aws_checks, ec2_checks, preflight
from scripts.doctor.ec2_checks import check_ec2, check_quotas
from scripts.doctor.finding import Subject
from scripts.plan import make_plan

ROOMS = {"ec2_instance_types": ["p5.48xlarge"], "ec2_subnet_ids": ["subnet-a", "subnet-b"]}
BLOCK = {"LORRY_EC2_MARKET": "capacity-block", "LORRY_EC2_RESERVATION": "cr-1"}
SUBNETS = [{"SubnetId": f"subnet-{z}", "AvailabilityZone": f"us-east-1{z}"} for z in "ab"]


def offered(*zones: str) -> dict[str, Any]:
    return {"InstanceTypeOfferings": [{"InstanceType": "p5.48xlarge", "Location": zone} for zone in zones]}


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What AWS answers to each action; a text is a refusal."""
    given: dict[str, Any] = {"describe_subnets": {"Subnets": SUBNETS}}
    given["describe_instance_type_offerings"] = offered("us-east-1b")
    given["get_service_quota"] = {"Quota": {"Value": 192.0}}
    monkeypatch.setattr(ec2_checks, "ask_aws", lambda subject, service, action, **_: given[action])
    monkeypatch.setattr(ec2_checks, "why_no_aws", lambda subject: "")
    return given


def said(rooms: dict[str, Any] = ROOMS) -> list[tuple[str, str, str]]:
    subject = Subject(now=datetime.now(UTC), rooms=rooms)
    return [(finding.state, finding.seen, finding.step) for finding in check_ec2(subject)]


def quota(kind: str, nodes: int = 1, **environment: str) -> str:
    """What is found for a room of that type."""
    subject = Subject(datetime.now(UTC), {"ec2_instance_types": [kind]}, environment=environment, nodes=nodes)
    (found,) = check_quotas(subject)
    return str(found)


def test_a_type_that_a_zone_of_the_room_offers_is_right(answers: dict[str, Any]) -> None:
    assert said() == [("ok", "p5.48xlarge is offered in us-east-1b", "")]


@pytest.mark.parametrize(
    ("action", "answer", "sentence"),
    [
        (
            "describe_instance_type_offerings",
            offered("us-east-1f"),
            ("failed", "p5.48xlarge is not offered in us-east-1a, us-east-1b", "a subnet in us-east-1f"),
        ),
        (
            "describe_instance_type_offerings",
            offered(),
            ("failed", "p5.48xlarge is not offered in us-east-1a, us-east-1b", "another type or region"),
        ),
        (
            "describe_subnets",
            {"Subnets": SUBNETS[1:]},
            ("failed", "there is no subnet subnet-a", "run plan and apply on the AWS root"),
        ),
        (
            "describe_subnets",
            "UnauthorizedOperation (no)",
            ("failed", "UnauthorizedOperation (no)", "take the launcher's policy of Terraform as it is"),
        ),
    ],
)
def test_what_is_wrong_is_a_sentence(action: str, answer: Any, sentence: Any, answers: dict[str, Any]) -> None:
    answers[action] = answer
    assert said()[0] == sentence


@pytest.mark.parametrize(
    ("kind", "nodes", "environment", "sentence"),
    [
        (
            "p5.48xlarge",
            1,
            {},
            "ok * L-417A185B: 192 vCPUs of running on-demand P instances; 1 x p5.48xlarge takes 192",
        ),
        ("p5.48xlarge", 2, {}, "failed * L-417A185B: 192 vCPUs of *; 2 x p5.48xlarge takes 384; ask for 384; *"),
        ("p5.4xlarge", 2, {}, "ok * L-417A185B: *; 2 x p5.4xlarge takes 32"),
        ("g6e.48xlarge", 2, {}, "failed * L-DB2E81BA: *"),
        ("p5.48xlarge", 1, {"LORRY_EC2_MARKET": "spot"}, "ok * L-7212CCBC: 192 vCPUs of P spot instances; *"),
        ("g6e.48xlarge", 2, {"LORRY_EC2_MARKET": "spot"}, "failed * L-3819A6DF: *"),
        ("p5.48xlarge", 2, {"LORRY_EC2_RESERVATION": "cr-1"}, "ok * reservation: *counted against no quota"),
        ("p5.48xlarge", 2, BLOCK, "ok * capacity-block: *counted against no quota"),
    ],
)
def test_the_quota_of_the_market_must_hold_all_nodes(
    answers: dict[str, Any], kind: str, nodes: int, environment: dict[str, str], sentence: str
) -> None:
    assert fnmatchcase(found := quota(kind, nodes, **environment), sentence), found


def test_without_such_a_room_nothing_is_checked(answers: dict[str, Any]) -> None:
    assert [state for state, _, _ in said({})] == ["not checked"]


def test_a_plan_asks_for_its_own_types_in_the_subnets_of_the_settings(
    answers: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (aws_checks, preflight):
        monkeypatch.setattr(module, "why_no_aws", lambda subject: "")
    monkeypatch.setattr(aws_checks, "ask_aws", lambda subject, service, action, **_: answers[action])
    answers["get_caller_identity"] = {"Account": "1", "Arn": "arn:x"}
    answers["get_service_quota"] = {"Quota": {"Value": 0.0}}
    catalog = load_catalog()
    plan = make_plan(load_recipe("qwen3-next-80b/zero3", catalog), None, catalog)
    settings = {"LORRY_EC2_TEMPLATE": "lt-1", "LORRY_EC2_SUBNETS": "subnet-a,subnet-b"}
    found = preflight.preflight("ec2", plan, catalog, Subject(datetime.now(UTC), environment=settings))
    sentences = [str(finding) for finding in found]
    assert any(
        "0 vCPUs of running on-demand P instances; 1 x p" in said and "; ask for 192;" in said for said in sentences
    ), sentences
    assert "ok           EC2: p5.48xlarge is offered in us-east-1b" in sentences
    answers["get_caller_identity"] = "ExpiredToken (it is old)"
    found = preflight.preflight("ec2", plan, catalog, Subject(datetime.now(UTC), environment=settings))
    assert [finding.step for finding in found] == ["sign in again, or correct the key"]
