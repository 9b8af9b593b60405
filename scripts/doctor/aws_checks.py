"""Checks of AWS: credentials, the store's bucket, the image's digest; and how each check asks AWS."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

from scripts.doctor.finding import NO_ROOM, Finding, Subject, failed, not_checked, ok
from scripts.store import open_store

_ECR = re.compile(r"(?P<account>\d{12})\.dkr\.ecr\.(?P<region>[a-z0-9-]+)\.amazonaws\.com/(?P<name>[^@:]+)")
_DIGEST = re.compile(r"@(sha256:[0-9a-f]{64})$")
_CODED = re.compile(r"[\w.]+ \(")
_SAYS_NOTHING = re.compile(
    r"AccessDenied|Unauthorized|403 |Throttling|RequestLimitExceeded|Internal|\w*Unavailable|50\d "
)
SIGN_IN = "set AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, for an account of AWS"


def check_credentials(subject: Subject) -> Iterator[Finding]:
    """Whose credentials these are."""
    if why := why_no_aws(subject):
        yield not_checked("AWS credentials", why, SIGN_IN)
        return
    answer = ask_aws(subject, "sts", "get_caller_identity")
    if isinstance(answer, str):
        unheard = could_not_look(answer)  # nobody is forbidden this question
        step = "check AWS_DEFAULT_REGION and the network" if unheard else "sign in again, or correct the key"
        yield failed("AWS credentials", answer, step)
    else:
        yield ok("AWS credentials", f"account {answer['Account']}, {answer['Arn']}")


def check_bucket(subject: Subject) -> Iterator[Finding]:
    """The store can be reached and read. A missing key in it is an answer too."""
    url = subject.store if subject.store.startswith("s3://") else str(subject.rooms.get("store_url") or subject.store)
    if not url.startswith("s3://"):
        want = "set LORRY_STORE to s3://bucket/prefix; machines elsewhere cannot read a folder of this one"
        yield not_checked("store", f"{url or 'none'} is no bucket", want)
    elif why := why_no_aws(subject):
        yield not_checked("store", why, SIGN_IN)
    else:
        open_store(url).read("lorry-doctor/none")
        yield ok("store", f"{url} can be read")


def check_image(subject: Subject) -> Iterator[Finding]:
    """The trainer image that the Pod template names is pinned, and its digest is in the registry."""
    if subject.runpod is None or not subject.rooms.get("pod_template_id"):
        why = subject.why_no_runpod if subject.runpod is None else "no applied Runpod room was given"
        yield not_checked("image", why, NO_ROOM)
        return
    template = subject.runpod.read("templates", subject.rooms["pod_template_id"]) or {}
    yield from check_in_registry(subject, "image", str(template.get("image")))


def check_in_registry(subject: Subject, name: str, image: str, region: str = "") -> Iterator[Finding]:
    """An image is named by digest, and is there; in ECR of `region`, where one is given."""
    digest, home = _DIGEST.search(image), _ECR.match(image)
    if digest is None:
        yield failed(name, f"{image or 'none'} is not pinned by digest", "name it as registry/name@sha256:...")
    elif region and (home is None or home["region"] != region):
        yield failed(name, f"{image} is not in ECR of {region}", "push it there: `terraform output` of the AWS room")
    elif home is None:
        yield not_checked(name, f"{image} is not in ECR", "look in its own registry that the digest is there")
    elif why := why_no_aws(subject):
        yield not_checked(name, why, SIGN_IN)
    else:
        where: dict[str, Any] = {"registryId": home["account"], "repositoryName": home["name"]}
        where["imageIds"] = [{"imageDigest": digest[1]}]
        answer = ask_aws(subject, "ecr", "describe_images", home["region"], **where)
        if isinstance(answer, str) and could_not_look(answer):
            yield not_checked(name, f"{image}: {answer}", "ask with a key that has ecr:DescribeImages")
        elif isinstance(answer, str):
            yield failed(name, f"{image}: {answer}", "push the image, or correct its name")
        else:
            yield ok(name, f"{image} is in the registry")


def why_no_aws(subject: Subject) -> str:
    """Why AWS cannot be asked; empty when it can."""
    endpoint = subject.environment.get("AWS_ENDPOINT_URL", "")
    if (urlsplit(endpoint).hostname or "").endswith(".runpod.io"):
        return "AWS_ENDPOINT_URL names the S3 of Runpod"
    import boto3

    return "" if boto3.Session().get_credentials() else "there are no AWS credentials"


def could_not_look(answer: str) -> bool:
    """Whether a sentence of `ask_aws` says nothing of what was asked: this key may not look, or nobody answered."""
    return _CODED.match(answer) is None or _SAYS_NOTHING.match(answer) is not None


def ask_aws(
    subject: Subject, service: str, action: str, region: str | None = None, **arguments: Any
) -> dict[str, Any] | str:
    """The answer of AWS, or the sentence in which it was refused."""
    import boto3
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError, ClientError
    from botocore.parsers import ResponseParserError

    region = region or subject.rooms.get("region") or boto3.Session().region_name or "us-east-1"
    config = Config(connect_timeout=5, read_timeout=20, retries={"mode": "standard", "total_max_attempts": 2})
    try:
        client = boto3.client(service, region_name=region, config=config)
        return dict(getattr(client, action)(**arguments))
    except ClientError as error:
        said = error.response["Error"]
        return (
            f"{said.get('Code', 'refused')} ({' '.join(str(said.get('Message') or 'no reason given').split())[:200]})"
        )
    except (BotoCoreError, ResponseParserError) as error:
        return " ".join(str(error).split())[:200]
