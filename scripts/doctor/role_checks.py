"""Checks of a role of AWS: it exists, its policies let it do its work, and whoever launches may hand it to a service.

finding = check_role(subject, "EC2 trainer role", arn, [(["s3:GetObject"], "arn:aws:s3:::b/x")], "LORRY_TRAINER_ROLE")
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from scripts.doctor.aws_checks import ask_aws
from scripts.doctor.finding import Finding, Subject, failed, not_checked, ok

IN_THE_STORE = ["s3:GetObject", "s3:PutObject"]
_APPLY = "apply the AWS room again: the role's policies are Terraform's"
_SIMULATE = "ask with a key that has iam:SimulatePrincipalPolicy"
_SESSION = re.compile(r"arn:(?P<partition>[^:]+):sts::(?P<account>\d{12}):assumed-role/(?P<role>[^/]+)/.+")


def check_role(
    subject: Subject, name: str, role: str, wanted: Sequence[tuple[list[str], str]], setting: str
) -> Finding:
    """The role is there and may do what is wanted, as AWS itself judges its policies.

    wanted: actions, and the resource they are done to. setting: the variable that names the role.
    """
    denied: list[str] = []
    for actions, resource in wanted:
        answer = _judged(subject, role, actions, resource)
        if isinstance(answer, str):
            return _unsimulated(subject, name, role, answer, setting)
        denied += answer
    if denied:
        return failed(name, f"{role} may not {', '.join(denied)}", _APPLY)
    return ok(name, f"{role} may do what a job does")


def check_handover(subject: Subject, name: str, role: str, service: str) -> Finding:
    """Whoever asks may give the role to machines of that service: iam:PassRole, without which a launch is refused."""
    name += " handed over"
    caller = ask_aws(subject, "sts", "get_caller_identity")
    if isinstance(caller, str):
        return not_checked(name, caller, _SIMULATE)
    who = _principal(str(caller["Arn"]))
    if who.endswith(":root"):
        return ok(name, "the account itself may hand over any role")
    context = [{"ContextKeyName": "iam:PassedToService", "ContextKeyValues": [service], "ContextKeyType": "string"}]
    denied = _judged(subject, who, ["iam:PassRole"], role, ContextEntries=context)
    if isinstance(denied, str):
        return not_checked(name, denied, _SIMULATE)
    if denied:
        step = "take the launcher's policy of Terraform as it is: it lets iam:PassRole"
        return failed(name, f"{who} may not give {role} to {service}", step)
    return ok(name, f"{who} may give it to {service}")


def _judged(subject: Subject, principal: str, actions: list[str], resource: str, **context: Any) -> list[str] | str:
    """Which of the actions AWS would deny, or the sentence in which it did not judge."""
    given: dict[str, Any] = {
        "PolicySourceArn": principal,
        "ActionNames": actions,
        "ResourceArns": [resource],
        **context,
    }
    answer = ask_aws(subject, "iam", "simulate_principal_policy", **given)
    if isinstance(answer, str):
        return answer
    return [r["EvalActionName"] for r in answer["EvaluationResults"] if r["EvalDecision"] != "allowed"]


def _unsimulated(subject: Subject, name: str, role: str, answer: str, setting: str) -> Finding:
    """AWS did not judge the role: it is not there, or this key may not ask."""
    known = (
        answer if "NoSuchEntity" in answer else ask_aws(subject, "iam", "get_role", RoleName=role.rpartition("/")[2])
    )
    if isinstance(known, str) and "NoSuchEntity" in known:
        return failed(name, f"there is no role {role}", f"apply the AWS room, or correct {setting}")
    return not_checked(name, answer, _SIMULATE)


def _principal(caller: str) -> str:
    """The user or role behind a caller; a session is judged by the role it was taken from."""
    session = _SESSION.fullmatch(caller)
    return f"arn:{session['partition']}:iam::{session['account']}:role/{session['role']}" if session else caller
