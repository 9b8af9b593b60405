"""Checks of SageMaker before a job asks for it: its role, its bucket, its image, the quotas of its types, their region.

Each bad finding is one sentence with the next step; nothing is started, and nothing costs anything.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from urllib.parse import SplitResult, urlsplit

from recipes.catalog import load_catalog
from scripts.backends.sagemaker import LOG_GROUP
from scripts.backends.sagemaker_request import ROLE
from scripts.doctor.aws_checks import SIGN_IN, ask_aws, check_in_registry, could_not_look, why_no_aws
from scripts.doctor.finding import Check, Finding, Subject, failed, not_checked, ok
from scripts.doctor.role_checks import IN_THE_STORE, check_handover, check_role

_NO_ROOM = "name an applied AWS root with a SageMaker room, such as infra/live/prod/aws"
_ON_ANYTHING = ["ecr:GetAuthorizationToken", "cloudwatch:PutMetricData"]
_QUOTA_PAGES = 40
_KNOWN_CODES = {"ml.p5.48xlarge for training job usage": "L-82E1C851"}


def check_sagemaker(subject: Subject) -> Iterator[Finding]:
    """All of it, where a room with SageMaker was applied and AWS can be asked."""
    role = str(subject.rooms.get("sagemaker_role_arn") or "")
    if not role:
        yield not_checked("SageMaker", "no applied AWS room with SageMaker was given", _NO_ROOM)
    elif not ROLE.fullmatch(role):
        step = "set LORRY_SAGEMAKER_ROLE to arn:aws:iam::ACCOUNT:role/NAME: `lorry env` prints it"
        yield failed("SageMaker role", f"{role!r} is not the ARN of a role", step)
    elif why := why_no_aws(subject):
        yield not_checked("SageMaker", why, SIGN_IN)
    else:
        for part in PARTS.values():
            yield from part(subject)


def _role(subject: Subject) -> Iterator[Finding]:
    """The execution role exists and may do what a job does, as AWS itself judges, and may be handed over."""
    name, role, store = "SageMaker role", str(subject.rooms["sagemaker_role_arn"]), _store(subject)
    _, partition, _, _, account, _ = role.split(":", 5)
    region = str(subject.rooms.get("region") or "us-east-1")
    stream = f"arn:{partition}:logs:{region}:{account}:log-group:{LOG_GROUP}:log-stream:lorry"
    wanted = [(_ON_ANYTHING, "*"), (["logs:PutLogEvents"], stream)]
    wanted += [(IN_THE_STORE, f"arn:{partition}:s3:::{store.netloc}{store.path}/job/x")] if store.netloc else []
    yield check_role(subject, name, role, wanted, "LORRY_SAGEMAKER_ROLE")
    yield check_handover(subject, name, role, "sagemaker.amazonaws.com")


def _place(subject: Subject) -> Iterator[Finding]:
    """The store's bucket is in the region and account of the jobs; SageMaker reads channels from nowhere else."""
    name, bucket = "SageMaker bucket", _store(subject).netloc
    if not bucket:
        yield not_checked(name, "the store is no bucket", "set LORRY_STORE to s3://bucket/prefix")
        return
    account = str(subject.rooms["sagemaker_role_arn"]).split(":")[4]
    region = str(subject.rooms.get("region") or "us-east-1")
    answer = ask_aws(subject, "s3", "get_bucket_location", Bucket=bucket, ExpectedBucketOwner=account)
    if isinstance(answer, str) and could_not_look(answer):
        step = f"use a bucket of account {account}, or let its role in; training sets of others need a copy"
        if isinstance(ask_aws(subject, "s3", "get_bucket_location", Bucket=bucket), dict):  # whoever may own it
            yield failed(name, f"{bucket} belongs to another account", step)
        else:
            yield not_checked(name, f"{bucket} belongs to another account, or this key may not see it", step)
    elif isinstance(answer, str):
        yield failed(name, f"{bucket}: {answer}", "create it, or correct LORRY_STORE")
    elif (home := str(answer.get("LocationConstraint") or "us-east-1")) != region:
        step = "keep the store in the region of the AWS room: SageMaker reads no other"
        yield failed(name, f"{bucket} is in {home}, the jobs run in {region}", step)
    else:
        yield ok(name, f"{bucket} is in {region}, in the account of the jobs")


def _image(subject: Subject) -> Iterator[Finding]:
    """LORRY_IMAGE is in ECR of the jobs' region, by digest, and there."""
    region = str(subject.rooms.get("region") or "")
    yield from check_in_registry(subject, "SageMaker image", subject.environment.get("LORRY_IMAGE", ""), region)


def _types(subject: Subject) -> Iterator[Finding]:
    """Each type that we plan with is offered in the region, and one has a quota for all nodes, where AWS says so."""
    planned = {o.provider_type for o in load_catalog().offers.values() if o.backend == "sagemaker"}
    types = sorted(subject.rooms.get("sagemaker_instance_types") or planned)
    region = str(subject.rooms.get("region") or "this region")
    plain = [kind.removeprefix("ml.") for kind in types]  # SageMaker lists none, and has what EC2 has
    filters = [{"Name": "instance-type", "Values": plain}]
    answer = ask_aws(subject, "ec2", "describe_instance_type_offerings", Filters=filters)
    if isinstance(answer, str):
        yield not_checked("SageMaker types", answer, "look in the price list of SageMaker for the region")
        offered = types
    else:
        offered = sorted(f"ml.{row['InstanceType']}" for row in answer["InstanceTypeOfferings"])
        missing = [kind for kind in types if kind not in offered]
        said = f"{region} offers {', '.join(offered) or 'none of ours'}"
        if offered:
            yield ok("SageMaker types", said + (f"; not {', '.join(missing)}" if missing else ""))
        else:
            yield failed("SageMaker types", said, "take another region for the AWS room")
    yield _quotas(subject, offered)


def _quotas(subject: Subject, types: list[str]) -> Finding:
    """One line for all types. The code of a quota is in the list that AWS gives; the service has thousands."""
    kind = "spot training job" if subject.environment.get("LORRY_SAGEMAKER_SPOT") == "yes" else "training job"
    wanted = {f"{one} for {kind} usage": one for one in types}
    found: dict[str, tuple[str, float]] = {}
    page: dict[str, Any] = {"ServiceCode": "sagemaker", "MaxResults": 100}
    for _ in range(_QUOTA_PAGES):
        answer = ask_aws(subject, "service-quotas", "list_service_quotas", **page)
        if isinstance(answer, str):
            step = f"look in the console of Service Quotas, SageMaker, for '{next(iter(wanted), kind)}'"
            return not_checked("SageMaker quotas", answer, step)
        for row in answer["Quotas"]:
            if row["QuotaName"] in wanted:
                found[row["QuotaName"]] = (row["QuotaCode"], float(row["Value"]))
        if len(found) == len(wanted) or not answer.get("NextToken"):
            break
        page["NextToken"] = answer["NextToken"]
    granted = [f"{value:g} x {wanted[name]}" for name, (_, value) in sorted(found.items()) if value >= subject.nodes]
    codes = {name: code for name, (code, _) in found.items()} or _KNOWN_CODES
    asked = ", ".join(f"{code} ({name})" for name, code in sorted(codes.items()))
    if not found:  # AWS leaves out those that were never changed
        return not_checked(
            "SageMaker quotas", f"AWS lists none of a type for a {kind}", f"ask for {asked}; it takes days"
        )
    if not granted:
        most = max((value for _, value in found.values()), default=0.0)
        seen = f"at most {most:g} of a type for a {kind}; a job takes {subject.nodes}"
        return failed("SageMaker quotas", seen, f"ask for {asked}; it takes days")
    return ok("SageMaker quotas", ", ".join(granted))


def _store(subject: Subject) -> SplitResult:
    """Bucket (netloc) and prefix (path) of the store; both empty where it is none of S3."""
    url = subject.store if subject.store.startswith("s3://") else str(subject.rooms.get("store_url") or "")
    return urlsplit(url.rstrip("/") if url.startswith("s3://") else "")


PARTS: dict[str, Check] = {"role": _role, "bucket": _place, "image": _image, "types": _types}
