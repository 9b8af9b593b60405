"""Checks of a room that rents machines of EC2: its subnets offer its types, and a quota lets a job have its nodes."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from scripts.backends.ec2_request import read_ec2_settings
from scripts.doctor.aws_checks import SIGN_IN, ask_aws, could_not_look, why_no_aws
from scripts.doctor.finding import Finding, Subject, failed, not_checked, ok

_QUOTAS = {  # market and family -> quota code, and what it counts in vCPUs
    ("on-demand", "p"): ("L-417A185B", "running on-demand P instances"),
    ("on-demand", "g"): ("L-DB2E81BA", "running on-demand G and VT instances"),
    ("spot", "p"): ("L-7212CCBC", "P spot instances"),
    ("spot", "g"): ("L-3819A6DF", "G and VT spot instances"),
}


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


def check_quotas(subject: Subject) -> Iterator[Finding]:
    """A job may have all its nodes in the market of the settings. Quotas of GPUs begin at 0; more takes days."""
    types = [str(name) for name in subject.rooms.get("ec2_instance_types") or ()]
    market = read_ec2_settings(subject.environment).market
    families = sorted({name[0] for name in types} & {"g", "p"})
    if not families:
        yield not_checked("AWS quotas", "no applied AWS room rents GPUs", "name a root such as infra/live/prod/aws")
    elif market not in ("on-demand", "spot"):
        yield ok("AWS quotas", f"{market}: machines that are reserved already are counted against no quota")
    else:
        for family in families:
            yield _quota(subject, market, family, [name for name in types if name[0] == family])


def _quota(subject: Subject, market: str, family: str, types: list[str]) -> Finding:
    """One quota, and whether it holds the nodes of a job in at least one of its types."""
    code, what = _QUOTAS[market, family]
    name, step = f"AWS quota {code}", f"look in the console of Service Quotas for '{what}'"
    if why := why_no_aws(subject):
        return not_checked(name, why, SIGN_IN)
    answer = ask_aws(subject, "service-quotas", "get_service_quota", ServiceCode="ec2", QuotaCode=code)
    if isinstance(answer, str):
        return not_checked(name, answer, step)
    vcpus = float(answer["Quota"]["Value"])
    wanted = {kind: subject.nodes * _vcpus(kind) for kind in types}
    takes = ", ".join(f"{subject.nodes} x {kind} takes {most}" for kind, most in sorted(wanted.items()))
    seen = f"{vcpus:g} vCPUs of {what}; {takes}"
    if vcpus < min(wanted.values()):
        return failed(name, seen, f"ask for {max(wanted.values())}; it takes days, so ask now")
    return ok(name, seen)


def _vcpus(kind: str) -> int:
    """Of an EC2 type by its size: Nxlarge has 4 x N, as p5.48xlarge has 192. Another size counts as the smallest."""
    size = re.search(r"(\d+)xlarge$", kind)
    return 4 * int(size[1] if size else 1)


def _offered(subject: Subject, types: list[str], subnets: list[str]) -> Iterator[Finding]:
    filters: list[dict[str, Any]] = [{"Name": "subnet-id", "Values": subnets}]
    seen = ask_aws(subject, "ec2", "describe_subnets", Filters=filters)
    given: dict[str, Any] = {"LocationType": "availability-zone"}
    given["Filters"] = [{"Name": "instance-type", "Values": types}]
    offered = ask_aws(subject, "ec2", "describe_instance_type_offerings", **given)
    for answer in (seen, offered):
        if isinstance(answer, str):
            denied = answer.startswith("UnauthorizedOperation") or not could_not_look(answer)  # a launch asks it too
            step = "take the launcher's policy of Terraform as it is"
            yield failed("EC2", answer, step) if denied else not_checked("EC2", answer, "try it again")
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
