"""Session keys for the machine of one job: the trainer's role, narrowed to the job's own prefix and the base models.

keys = job_session(role, policy, "s3://bucket/clients/acme/jobs/job-1", 3600); keys["AccessKeyId"], keys["Expiration"]

A role that takes a role gets one hour. A workflow of GitHub therefore takes the trainer's role by its own identity, as
it took the role that it runs under: then the keys last as long as those of a user.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from scripts.errors import Problem, ProviderError, Refused

TOKEN_URL, TOKEN_KEY = "ACTIONS_ID_TOKEN_REQUEST_URL", "ACTIONS_ID_TOKEN_REQUEST_TOKEN"
"Where a job of GitHub Actions with `id-token: write` asks who it is, and with what; GitHub sets both in every step."
_NOTHING: Mapping[str, str] = MappingProxyType({})


def job_session(
    role: str, policy: str, job_url: str, seconds: int, environment: Mapping[str, str] = _NOTHING, sts: Any = None
) -> Mapping[str, Any]:
    """AccessKeyId, SecretAccessKey, SessionToken and Expiration, as STS gives them.

    role, policy: outputs trainer_role_arn and trainer_session_policy of infra/stacks/aws. seconds: how long they are to
    last; 12 hours at most, and one hour where the caller is a session of a role itself and no workflow of GitHub.
    environment: of this process. sts: a client, else boto3's. Raises Refused where they cannot be had at all,
    ProviderError when AWS or GitHub refuses.
    """
    found = re.fullmatch(r"s3://([^/]+)/?(.*)", job_url)
    if found is None or not role or not policy:
        want = "an s3:// store, LORRY_TRAINER_ROLE and LORRY_SESSION_POLICY"
        raise Refused(Problem("credentials", "session keys cannot be handed out here", want))
    from botocore.exceptions import BotoCoreError, ClientError

    narrowed = json.dumps(json.loads(policy.replace("JOB_PREFIX", json.dumps(found[2])[1:-1])), separators=(",", ":"))
    name = found[2].rpartition("/")[2][:64]
    asked = {"RoleArn": role, "RoleSessionName": name, "Policy": narrowed, "DurationSeconds": seconds}
    token = _workflow_token(environment)
    try:
        if sts is None:
            import boto3

            sts = boto3.client("sts")
        given = (
            sts.assume_role_with_web_identity(WebIdentityToken=token, **asked) if token else sts.assume_role(**asked)
        )
    except (BotoCoreError, ClientError) as error:
        said = error.response["Error"] if isinstance(error, ClientError) else {}
        if "DurationSeconds exceeds" in said.get("Message", ""):  # 1 hour where a role takes a role
            got = (
                f"AWS gives this caller no session of {seconds / 3600:g} hours: a role that takes a role gets one hour"
            )
            want = "launch with keys of an IAM user, or through a front door, which renews them; or plan at most 1 hour"
            raise Refused(Problem("credentials", got, want)) from None
        kind = said.get("Code", "") if said else type(error).__name__
        want = "try again"
        if kind in ("AccessDenied", "InvalidIdentityToken"):
            want = "name this caller in gateway_principals of the AWS room, or launch by GitHub"
            want = "apply the AWS room with this repository as `github`" if token else want
        raise ProviderError(Problem("credentials", f"AWS refused the session ({kind})", want)) from None
    keys: Mapping[str, Any] = given["Credentials"]
    return keys


def _workflow_token(environment: Mapping[str, str]) -> str:
    """By which a job of GitHub Actions proves which it is; empty elsewhere. It lasts minutes: it is asked for anew."""
    url, key = environment.get(TOKEN_URL, ""), environment.get(TOKEN_KEY, "")
    if not url or not key:
        return ""
    import httpx

    headers = {"Authorization": f"Bearer {key}"}
    try:
        answer = httpx.get(f"{url}&audience=sts.amazonaws.com", headers=headers, timeout=30)
        return str(answer.raise_for_status().json()["value"])
    except (httpx.HTTPError, ValueError, KeyError) as error:
        got = f"GitHub did not say who this workflow is ({type(error).__name__})"
        raise ProviderError(Problem("credentials", got, "try again; the job needs `id-token: write`")) from None
