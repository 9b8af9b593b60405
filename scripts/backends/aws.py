"""AWS as our backends ask it: clients that do not wait for ever, and every failure as a sentence with its next step.

ec2 = aws_client("ec2"); answer = ask(ec2, "describe_instances", Filters=[...])      # AwsError when AWS says no
"""

from __future__ import annotations

import re
from typing import Any

from scripts.errors import Problem, ProviderError

_SIGN_IN = "sign in again, or check the keys of this account"
_UNREACHED = "check AWS_DEFAULT_REGION and the network"
_RIGHTS = (
    "take the launcher's policy of Terraform as it is, and a room that may rent this type: instance_types in "
    "infra/live; dev rents small machines alone"
)
_QUOTA = "ask for a higher quota in the console of Service Quotas; `lorry doctor` names it"
_ELSEWHERE = "launch it again later, or in another zone or region"
_ADVICE = {
    "AccessDenied": _RIGHTS,
    "AccessDeniedException": _RIGHTS,
    "UnauthorizedOperation": _RIGHTS,
    "AuthFailure": _SIGN_IN,
    "ExpiredToken": _SIGN_IN,
    "ExpiredTokenException": _SIGN_IN,
    "RequestExpired": "set this machine's clock by NTP; " + _SIGN_IN,
    "InvalidClientTokenId": _SIGN_IN,
    "UnrecognizedClientException": _SIGN_IN,
    "SignatureDoesNotMatch": _SIGN_IN,
    "OptInRequired": "enable the region for this account",
    "VcpuLimitExceeded": _QUOTA,
    "InstanceLimitExceeded": _QUOTA,
    "MaxSpotInstanceCountExceeded": _QUOTA,
    "ResourceLimitExceeded": _QUOTA,
    "InsufficientInstanceCapacity": _ELSEWHERE,
    "InsufficientHostCapacity": _ELSEWHERE,
    "ReservationCapacityExceeded": "wait until machines of the reservation are free, or launch without it",
    "Unsupported": _ELSEWHERE,
    "SpotMaxPriceTooLow": "launch it again later, or on demand",
    "InvalidLaunchTemplateId.NotFound": "run `terraform apply` on the AWS room, and set what it says",
    "InvalidSubnetID.NotFound": "run `terraform apply` on the AWS room, and set what it says",
}
_NO_RIGHT = frozenset({"AccessDenied", "AccessDeniedException", "UnauthorizedOperation", "OptInRequired"})
_QUOTA_OF_ZERO = re.compile(r"\blimit of 0 |\bis 0 Instances\b")
"As EC2 and SageMaker say it; another quota may be used up by a machine that ends."
CAPACITY = frozenset(
    {
        *("InsufficientInstanceCapacity", "InsufficientHostCapacity", "InsufficientReservedInstanceCapacity"),
        *("Unsupported", "SpotMaxPriceTooLow", "MaxSpotInstanceCountExceeded", "ReservationCapacityExceeded"),
        *("VcpuLimitExceeded", "InstanceLimitExceeded"),
    }
)
"Answers that mean: not this type in this place now. Another candidate may do."
_UNCERTAIN = frozenset({"InternalError", "InternalFailure", "ServiceUnavailable", "Unavailable", "RequestTimeout"})
THROTTLED = frozenset({"RequestLimitExceeded", "Throttling", "ThrottlingException", "TooManyRequestsException"})


class AwsError(ProviderError):
    """What AWS refused or did not answer. aws_code: its own word. maybe_done: it may have been carried out."""

    def __init__(self, problem: Problem, aws_code: str, maybe_done: bool) -> None:
        super().__init__(problem)
        self.aws_code, self.maybe_done = aws_code, maybe_done
        self.lasts = aws_code in _NO_RIGHT or _QUOTA_OF_ZERO.search(problem.got) is not None

    @property
    def wants_another_place(self) -> bool:
        """Whether the same may be had in another zone, as another type or later."""
        return self.aws_code in CAPACITY

    @property
    def may_be_asked_again(self) -> bool:
        """Whether the very same request may do better: the answer was lost, or AWS asked for patience."""
        return self.maybe_done or self.aws_code in THROTTLED


def aws_client(service: str, region: str | None = None) -> Any:
    """A client of that service with credentials and endpoint as boto3 finds them, and the region where none is given.

    Raises ProviderError.
    """
    import boto3
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError

    retries: Any = {"mode": "standard", "total_max_attempts": 5}
    try:
        config = Config(connect_timeout=10, read_timeout=30, retries=retries)
        return boto3.client(service, region_name=region, config=config)
    except BotoCoreError as error:
        step = "set AWS_DEFAULT_REGION, and AWS_PROFILE or keys"
        raise ProviderError(Problem(f"AWS {service}", _line(error), step)) from None


def ask(client: Any, action: str, **arguments: Any) -> dict[str, Any]:
    """The answer to one request. Raises AwsError."""
    from botocore.exceptions import BotoCoreError, ClientError, ConnectionError, HTTPClientError
    from botocore.parsers import ResponseParserError

    where = f"AWS {client.meta.service_model.service_name} {action}"
    try:
        return dict(getattr(client, action)(**arguments))
    except ClientError as error:
        said = error.response.get("Error", {})
        code = str(said.get("Code") or "refused")
        step = _ADVICE.get(code, "try it again" if code in _UNCERTAIN | THROTTLED else "see the message")
        maybe_done = (
            code in _UNCERTAIN or int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)) >= 500
        )
        raise AwsError(Problem(where, f"{code}: {_line(said.get('Message', ''))}", step), code, maybe_done) from None
    except ConnectionError as error:  # the last try was not sent; one before it may have been, and heard
        raise AwsError(Problem(where, _line(error), _UNREACHED), "NoAnswer", True) from None
    except (HTTPClientError, ResponseParserError) as error:  # sent or not, nobody knows
        raise AwsError(Problem(where, f"no answer ({_line(error)})", "try it again"), "NoAnswer", True) from None
    except BotoCoreError as error:
        raise AwsError(Problem(where, _line(error), _SIGN_IN), type(error).__name__, False) from None


def _line(said: object) -> str:
    return " ".join(str(said).split())[:300]
