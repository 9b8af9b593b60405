"""Checks of what machines of EC2 start from: the launch template, its image and role, and the trainer's role."""

from __future__ import annotations

import base64
import re
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

from scripts.doctor.aws_checks import SIGN_IN, ask_aws, check_in_registry, could_not_look, why_no_aws
from scripts.doctor.finding import Finding, Subject, failed, not_checked, ok
from scripts.doctor.role_checks import IN_THE_STORE, check_handover, check_role

_APPLY = "run `terraform apply` on the AWS room, and set what it says"
_PULLS = re.compile(r"^docker pull (?:--\S+ )*(\S+)", re.MULTILINE)
_ROLE = re.compile(r"arn:(?P<partition>[^:]+):iam::\d{12}:role/.+")


def check_template(subject: Subject) -> Iterator[Finding]:
    """The template, its image and its role are there; what is missing is else met by a paid machine."""
    template = str(subject.rooms.get("ec2_launch_template_id") or "")
    if not template:
        yield not_checked(
            "EC2 template", "no applied AWS room rents machines", "name a root such as infra/live/prod/aws"
        )
        return
    if why := why_no_aws(subject):
        yield not_checked("EC2 template", why, SIGN_IN)
        return
    given: dict[str, Any] = {"LaunchTemplateId": template, "Versions": ["$Default"]}
    answer = ask_aws(subject, "ec2", "describe_launch_template_versions", **given)
    if isinstance(answer, str) and could_not_look(answer):
        yield not_checked("EC2 template", answer, "ask with a key that has ec2:DescribeLaunchTemplateVersions")
    elif isinstance(answer, str):
        yield failed("EC2 template", f"{template}: {answer}", _APPLY)
    else:
        data = answer["LaunchTemplateVersions"][0]["LaunchTemplateData"]
        yield from _image(subject, data)
        yield from _machine_role(subject, data)
    yield from _trainer_role(subject)


def _image(subject: Subject, data: dict[str, Any]) -> Iterator[Finding]:
    """The image that the user data pulls is named by digest, and is there."""
    pulled = _PULLS.search(base64.b64decode(data.get("UserData") or "").decode(errors="replace"))
    if pulled is None:
        step = "read the template's user data; Terraform's names the image"
        yield not_checked("EC2 image", "the launch template's user data pulls no image", step)
    else:
        yield from check_in_registry(subject, "EC2 image", pulled[1])


def _machine_role(subject: Subject, data: dict[str, Any]) -> Iterator[Finding]:
    """Machines get a role, it is the one that their launch folders are named after, and we may hand it to them."""
    name, profile, known = "EC2 role", data.get("IamInstanceProfile") or {}, subject.rooms.get("ec2_machine_role_id")
    called = str(profile.get("Name") or profile.get("Arn") or "").rpartition("/")[2]
    if not called:
        yield failed(name, "the launch template names no instance profile, so a machine could read nothing", _APPLY)
        return
    answer = ask_aws(subject, "iam", "get_instance_profile", InstanceProfileName=called)
    if isinstance(answer, str) and could_not_look(answer):
        yield not_checked(name, answer, "ask with a key that has iam:GetInstanceProfile")
        return
    roles = [] if isinstance(answer, str) else answer["InstanceProfile"]["Roles"]
    if not roles:
        yield failed(name, f"instance profile {called} is not there, or has no role", _APPLY)
    elif known and roles[0]["RoleId"] != known:
        seen = f"{called} has role {roles[0]['RoleId']}, but machines would look for their work below {known}"
        yield failed(name, seen, "set LORRY_EC2_ROLE_ID again: `lorry env` prints it")
    else:
        yield ok(name, f"{roles[0]['Arn']} is what machines get")
        yield check_handover(subject, name, str(roles[0]["Arn"]), "ec2.amazonaws.com")


def _trainer_role(subject: Subject) -> Iterator[Finding]:
    """The role of the session keys is there and may write jobs. A front door hands out keys of its own."""
    name, role = "EC2 trainer role", str(subject.rooms.get("trainer_role_arn") or "")
    url = subject.store if subject.store.startswith("s3://") else str(subject.rooms.get("store_url") or "")
    if not role:
        return
    if (arn := _ROLE.fullmatch(role)) is None:
        step = "set LORRY_TRAINER_ROLE to arn:aws:iam::ACCOUNT:role/NAME: `lorry env` prints it"
        yield failed(name, f"{role!r} is not the ARN of a role", step)
    elif url.startswith("s3://"):
        where = urlsplit(url.rstrip("/"))
        wanted = [(IN_THE_STORE, f"arn:{arn['partition']}:s3:::{where.netloc}{where.path}/job/x")]
        yield check_role(subject, name, role, wanted, "LORRY_TRAINER_ROLE")
