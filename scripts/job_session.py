"""Session keys for the machine of one job: the trainer's role, narrowed to the job's own prefix and the base models.

keys = job_session(role, policy, "s3://bucket/clients/acme/jobs/job-1", 3600); keys["AccessKeyId"], keys["Expiration"]
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from scripts.errors import Problem, ProviderError, Refused


def job_session(role: str, policy: str, job_url: str, seconds: int, sts: Any = None) -> Mapping[str, Any]:
    """AccessKeyId, SecretAccessKey, SessionToken and Expiration, as STS gives them.

    role, policy: outputs trainer_role_arn and trainer_session_policy of infra/stacks/aws. seconds: how long they are to
    last; 12 hours at most, and one hour where the caller is a session of a role itself. sts: a client, else boto3's.
    Raises Refused where they cannot be had at all, ProviderError when AWS refuses.
    """
    found = re.fullmatch(r"s3://([^/]+)/?(.*)", job_url)
    if found is None or not role or not policy:
        want = "an s3:// store, LORRY_TRAINER_ROLE and LORRY_SESSION_POLICY"
        raise Refused(Problem("credentials", "session keys cannot be handed out here", want))
    from botocore.exceptions import BotoCoreError, ClientError

    narrowed = json.dumps(json.loads(policy.replace("JOB_PREFIX", found[2])), separators=(",", ":"))
    try:
        if sts is None:
            import boto3

            sts = boto3.client("sts")
        name = found[2].rpartition("/")[2][:64]
        given = sts.assume_role(RoleArn=role, RoleSessionName=name, Policy=narrowed, DurationSeconds=seconds)
    except (BotoCoreError, ClientError) as error:
        said = error.response["Error"] if isinstance(error, ClientError) else {}
        if "DurationSeconds exceeds" in said.get("Message", ""):  # 1 hour where a role takes a role
            got = (
                f"AWS gives this caller no session of {seconds / 3600:g} hours: a role that takes a role gets one hour"
            )
            want = "launch with keys of an IAM user, or through a front door, which renews them; or plan at most 1 hour"
            raise Refused(Problem("credentials", got, want)) from None
        kind = said.get("Code", "") if said else type(error).__name__
        raise ProviderError(Problem("credentials", f"AWS refused the session ({kind})", "try again")) from None
    keys: Mapping[str, Any] = given["Credentials"]
    return keys
