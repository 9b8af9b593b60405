"""What is wrong with a room that rents machines of EC2 is a sentence with its next step, before anything is rented."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest

from scripts.doctor import ec2_checks
from scripts.doctor.ec2_checks import check_ec2
from scripts.doctor.finding import Subject

ROOMS = {"ec2_instance_types": ["p5.48xlarge"], "ec2_subnet_ids": ["subnet-a", "subnet-b"]}
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


def said(rooms: dict[str, Any] = ROOMS, market: str = "") -> list[tuple[str, str, str]]:
    subject = Subject(now=datetime.now(UTC), rooms=rooms, environment={"LORRY_EC2_MARKET": market})
    return [(finding.state, finding.seen, finding.step) for finding in check_ec2(subject)]


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


def test_spot_has_a_quota_of_its_own(answers: dict[str, Any]) -> None:
    assert said(market="spot")[-1] == ("ok", "192 vCPUs of P spot instances", "")
    answers["get_service_quota"] = {"Quota": {"Value": 0.0}}
    assert said(market="spot")[-1][:2] == ("failed", "0 vCPUs of P spot instances")


def test_without_such_a_room_nothing_is_checked(answers: dict[str, Any]) -> None:
    assert [state for state, _, _ in said({})] == ["not checked"]
