"""Answers of AWS that no mock gives, over real HTTP: a page in place of XML, and a session that a role may not have."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import boto3
import pytest

from scripts.backends.aws import AwsError, ask
from scripts.errors import ProviderError, Refused
from scripts.job_session import job_session

CHAINED = (
    "<ErrorResponse><Error><Type>Sender</Type><Code>ValidationError</Code><Message>The requested DurationSeconds "
    "exceeds the 1 hour session limit for roles assumed by role chaining</Message></Error></ErrorResponse>"
)
DENIED = "<ErrorResponse><Error><Code>AccessDenied</Code><Message>no</Message></Error></ErrorResponse>"


@pytest.fixture
def client() -> Iterator[Callable[[str, int, str], Any]]:
    """client("ec2", 200, "<html>"): one to which every request is answered so."""
    answer: dict[str, Any] = {}

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(answer["status"])
            self.send_header("Content-Length", str(len(answer["body"])))
            self.end_headers()
            self.wfile.write(answer["body"])

        def log_message(self, *words: Any) -> None:
            """Nothing: a test says what it needs."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()

    def make(service: str, status: int, body: str) -> Any:
        answer.update(status=status, body=body.encode())
        keys = {"aws_access_key_id": "k", "aws_secret_access_key": "s", "region_name": "us-east-1"}
        return boto3.client(service, endpoint_url=f"http://127.0.0.1:{server.server_port}", **keys)

    yield make
    server.shutdown()
    server.server_close()


def test_a_page_in_place_of_an_answer_is_an_answer_that_was_lost(client: Callable[[str, int, str], Any]) -> None:
    with pytest.raises(AwsError) as caught:
        ask(client("ec2", 200, "<html>maintenance<br>"), "describe_instances")
    assert caught.value.maybe_done
    assert str(caught.value).startswith("AWS ec2 describe_instances: no answer (")


def test_a_region_that_nobody_answers_in_is_not_a_wrong_key() -> None:
    keys = {"aws_access_key_id": "k", "aws_secret_access_key": "s", "region_name": "us-esat-1"}
    client = boto3.client("ec2", endpoint_url="http://127.0.0.1:9", **keys)
    with pytest.raises(AwsError) as caught:
        ask(client, "describe_instances")
    assert caught.value.problems[0].want == "check AWS_DEFAULT_REGION and the network"
    assert caught.value.may_be_asked_again


def test_a_role_that_takes_a_role_hears_of_its_one_hour(client: Callable[[str, int, str], Any]) -> None:
    role = "arn:aws:iam::123456789012:role/lorry-trainer"
    with pytest.raises(Refused) as caught:
        job_session(role, "{}", "s3://bucket/jobs/job-1", 43200, sts=client("sts", 400, CHAINED))
    assert str(caught.value) == (
        "credentials: AWS gives this caller no session of 12 hours: a role that takes a role gets one hour; launch "
        "with keys of an IAM user, or through a front door, which renews them; or plan at most 1 hour"
    )


@pytest.mark.parametrize(
    ("code", "message", "lasts"),
    [
        ("UnauthorizedOperation", "You are not authorized to perform this operation.", True),
        ("AccessDeniedException", "User: u is not authorized to perform: sagemaker:CreateTrainingJob", True),
        ("VcpuLimitExceeded", "more vCPU capacity than your current vCPU limit of 0 allows for the bucket", True),
        ("VcpuLimitExceeded", "more vCPU capacity than your current vCPU limit of 192 allows for the bucket", False),
        ("ResourceLimitExceeded", "limit 'ml.p5.48xlarge for training job usage' is 0 Instances, with current", True),
        ("ResourceLimitExceeded", "limit 'ml.p5.48xlarge for training job usage' is 10 Instances, with current", False),
        ("InsufficientInstanceCapacity", "We currently do not have sufficient capacity", False),
    ],
)
def test_a_missing_right_and_a_quota_of_zero_last_and_want_of_capacity_does_not(
    client: Callable[[str, int, str], Any], code: str, message: str, lasts: bool
) -> None:
    body = f"<Response><Errors><Error><Code>{code}</Code><Message>{message}</Message></Error></Errors></Response>"
    with pytest.raises(AwsError) as caught:
        ask(client("ec2", 400, body), "describe_instances")
    assert caught.value.lasts is lasts


def test_a_store_with_a_quote_in_its_name_makes_no_other_policy() -> None:
    given = {}

    class Sts:
        def assume_role(self, **asked: Any) -> dict[str, Any]:
            given.update(asked)
            return {"Credentials": {}}

    job_session("role", '{"Resource": "arn:aws:s3:::b/JOB_PREFIX/*"}', 's3://b/jo"bs/job-1', 900, sts=Sts())
    assert json.loads(given["Policy"]) == {"Resource": 'arn:aws:s3:::b/jo"bs/job-1/*'}


def test_a_caller_that_the_trainers_role_does_not_know_hears_where_to_name_it(
    client: Callable[[str, int, str], Any], github: dict[str, str]
) -> None:
    role = "arn:aws:iam::123456789012:role/lorry-trainer"
    with pytest.raises(ProviderError) as caught:
        job_session(role, "{}", "s3://bucket/jobs/job-1", 3600, sts=client("sts", 403, DENIED))
    assert str(caught.value) == (
        "credentials: AWS refused the session (AccessDenied); name this caller in gateway_principals of the AWS room, "
        "or launch by GitHub"
    )
    with pytest.raises(ProviderError, match="apply the AWS room with this repository as `github`"):
        job_session(role, "{}", "s3://bucket/jobs/job-1", 3600, github, client("sts", 403, DENIED))
