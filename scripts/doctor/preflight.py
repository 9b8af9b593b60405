"""What AWS would refuse a planned job, asked before anything is started: checks of `lorry doctor`, of the plan's types.

findings = preflight("sagemaker", plan, catalog, Subject(now=now, store=settings.store, environment=os.environ))
require_passed(findings)
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

from recipes.catalog import Catalog
from recipes.preparation import Plan
from scripts.backends import RENTS
from scripts.backends.ec2_request import read_ec2_settings
from scripts.backends.sagemaker_request import region_of
from scripts.doctor import run_check
from scripts.doctor.aws_checks import SIGN_IN, check_credentials, why_no_aws
from scripts.doctor.ec2_checks import check_ec2, check_quotas
from scripts.doctor.finding import Check, Finding, Subject, not_checked
from scripts.doctor.sagemaker_checks import check_sagemaker
from scripts.doctor.template_checks import check_template
from scripts.errors import Problem, Refused

AwsBackend = Literal["sagemaker", "ec2"]
_CHECKS: dict[AwsBackend, dict[str, Check]] = {
    "sagemaker": {"SageMaker": check_sagemaker},
    "ec2": {"AWS quotas": check_quotas, "EC2": check_ec2, "EC2 template": check_template},
}


def preflight(
    backend: AwsBackend, plan: Plan, catalog: Catalog, subject: Subject, offers: Collection[str] = ()
) -> list[Finding]:
    """Findings about the types that fit the plan on that backend; without settings or keys one that says so.

    offers: what a launch would ask for, instead of all that fit.
    """
    setting = RENTS[backend]
    fitting = offers or [offer.offer for offer in plan.offers if offer.backend == backend and offer.fits]
    if not fitting:
        return [not_checked(backend, "no offer of it fits this recipe", "the table above says why")]
    if not subject.environment.get(setting):
        return [not_checked(backend, f"{setting} is not set", "`lorry env` prints it for an applied AWS root")]
    if why := why_no_aws(subject):
        return [not_checked(backend, why, SIGN_IN)]
    types = sorted({catalog.offers[name].provider_type for name in fitting})
    subject = replace(subject, rooms=_rooms(backend, types, subject.environment), nodes=plan.nodes)
    findings = run_check("AWS credentials", check_credentials, subject)
    if all(finding.state != "failed" for finding in findings):
        for name, check in _CHECKS[backend].items():
            findings += run_check(name, check, subject)
    return findings


def require_passed(findings: Sequence[Finding]) -> None:
    """Raises Refused with everything that failed. What could not be checked holds up nothing, and what another type
    passes neither: a launch then takes that one."""
    passed = {_question(finding) for finding in findings if finding.state == "ok"}
    bad = [f for f in findings if f.state == "failed" and _question(f) not in passed]
    if bad:
        raise Refused(*(Problem(finding.check, finding.seen, finding.step) for finding in bad))


def _question(finding: Finding) -> str:
    """What a check asks; there is a quota for each family of types."""
    return finding.check.partition(" L-")[0]


def _rooms(backend: AwsBackend, types: list[str], environment: Mapping[str, str]) -> dict[str, Any]:
    """What Terraform says of its rooms, as the settings repeat it, with the types of the plan."""
    region = {"region": region_of(environment)}
    if backend == "sagemaker":
        return region | {"sagemaker_role_arn": environment["LORRY_SAGEMAKER_ROLE"], "sagemaker_instance_types": types}
    settings = read_ec2_settings(environment)
    return region | {
        "ec2_instance_types": types,
        "ec2_subnet_ids": settings.subnets,
        "ec2_launch_template_id": settings.template,
        "ec2_machine_role_id": settings.role_id,
        "trainer_role_arn": "" if settings.front_door and settings.token_secret else settings.trainer_role,
    }
