"""Checks of a room that rents machines of EC2: its subnets offer its types, and spot has a quota of its own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from scripts.doctor.aws_checks import SIGN_IN, ask_aws, why_no_aws
from scripts.doctor.finding import Finding, Subject, failed, not_checked, ok

_SPOT_CODES = {"p": ("L-7212CCBC", "P spot instances"), "g": ("L-3819A6DF", "G and VT spot instances")}
_LARGEST_VCPUS = 192


def check_ec2(subject: Subject) -> Iterator[Finding]:
    """Each type of the room can be had in a zone of its subnets; nothing is rented for the answer."""
    types = [str(name) for name in subject.rooms.get("ec2_instance_types") or ()]
    subnets = [str(name) for name in subject.rooms.get("ec2_subnet_ids") or ()]
    if not types or not subnets:
        yield not_checked("EC2", "no applied AWS room rents machines", "name a root such as infra/live/prod/aws")
    elif why := why_no_aws(subject):
        yield not_checked("EC2", why, SIGN_IN)
    else:
        yield from _offered(subject, types, subnets)
        if subject.environment.get("LORRY_EC2_MARKET") == "spot":
            yield from _spot_quotas(subject, types)


def _offered(subject: Subject, types: list[str], subnets: list[str]) -> Iterator[Finding]:
    filters: list[dict[str, Any]] = [{"Name": "subnet-id", "Values": subnets}]
    seen = ask_aws(subject, "ec2", "describe_subnets", Filters=filters)
    given: dict[str, Any] = {"LocationType": "availability-zone"}
    given["Filters"] = [{"Name": "instance-type", "Values": types}]
    offered = ask_aws(subject, "ec2", "describe_instance_type_offerings", **given)
    for answer in (seen, offered):
        if isinstance(answer, str):
            yield failed("EC2", answer, "take the launcher's policy of Terraform as it is")
            return
    assert not isinstance(seen, str)
    assert not isinstance(offered, str)
    zones = {str(row["AvailabilityZone"]) for row in seen["Subnets"]}
    if len(seen["Subnets"]) < len(set(subnets)):
        there = {str(row["SubnetId"]) for row in seen["Subnets"]}
        yield failed("EC2", f"there is no subnet {min(set(subnets) - there)}", "run plan and apply on the AWS root")
    for name in types:
        where = {str(row["Location"]) for row in offered["InstanceTypeOfferings"] if row["InstanceType"] == name}
        if where & zones:
            yield ok("EC2", f"{name} is offered in {', '.join(sorted(where & zones))}")
        else:
            step = f"a subnet in {', '.join(sorted(where))}" if where else "another type or region"
            yield failed("EC2", f"{name} is not offered in {', '.join(sorted(zones)) or 'any zone of the room'}", step)


def _spot_quotas(subject: Subject, types: list[str]) -> Iterator[Finding]:
    for letter in sorted({name[0] for name in types} & _SPOT_CODES.keys()):
        code, what = _SPOT_CODES[letter]
        answer = ask_aws(subject, "service-quotas", "get_service_quota", ServiceCode="ec2", QuotaCode=code)
        if isinstance(answer, str):
            step = f"look in the console of Service Quotas for '{what}'"
            yield not_checked(f"AWS quota {code}", answer, step)
        elif answer["Quota"]["Value"] <= 0:
            step = f"ask for {_LARGEST_VCPUS}; it takes days, so ask now"
            yield failed(f"AWS quota {code}", f"0 vCPUs of {what}", step)
        else:
            yield ok(f"AWS quota {code}", f"{answer['Quota']['Value']:g} vCPUs of {what}")
