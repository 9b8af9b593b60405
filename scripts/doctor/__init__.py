"""Checks a live set-up before money is spent: one finding per check, and every check runs.

findings = examine(Subject(rooms=read_outputs(root, os.environ), runpod=RunpodApi(key), ...))
"""

from __future__ import annotations

from scripts.doctor.aws_checks import check_bucket, check_credentials, check_image
from scripts.doctor.ec2_checks import check_ec2, check_quotas
from scripts.doctor.finding import Check, Finding, Subject, failed
from scripts.doctor.model_checks import check_model, check_room_for_models
from scripts.doctor.runpod_checks import ROOM_CHECKS, check_clock, check_key
from scripts.doctor.sagemaker_checks import check_sagemaker
from scripts.doctor.template_checks import check_template
from scripts.errors import LorryError

__all__ = ["Finding", "Subject", "examine", "failure", "run_check"]


def examine(subject: Subject) -> list[Finding]:
    """Every finding about the set-up, in the order in which a person should repair it."""
    findings = run_check("Runpod key", check_key, subject)
    if any(finding.state == "failed" for finding in findings):
        subject = subject.without_runpod("the Runpod key failed its check")
    findings += run_check("clock", check_clock, subject)
    checks = {**ROOM_CHECKS, "model": check_model, "room for models": check_room_for_models}
    checks |= {"AWS credentials": check_credentials, "store": check_bucket, "image": check_image}
    checks |= {"AWS quotas": check_quotas, "EC2": check_ec2, "EC2 template": check_template}
    checks |= {"SageMaker": check_sagemaker}
    for name, check in checks.items():
        findings += run_check(name, check, subject)
    return findings


def failure(name: str, error: LorryError) -> list[Finding]:
    """What went wrong while something was asked, as findings."""
    return [failed(name, f"{problem.where}: {problem.got}", problem.want) for problem in error.problems]


def run_check(name: str, check: Check, subject: Subject) -> list[Finding]:
    """The findings of one check; a failure of what it asked is one too."""
    try:
        return list(check(subject))
    except LorryError as error:
        return failure(name, error)
