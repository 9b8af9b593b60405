"""What a piece of our code really asks of AWS, as IAM would judge it: action, resource and context of every request.

with asked_of_aws() as asked: backend.submit(...)
for right in rights_of(asked, room): is_allowed(right.action, right.resource, policies, context=right.context)
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

from botocore.client import BaseClient

from tests.infra.conftest import REGION

Json = dict[str, Any]
ACCOUNT = "123456789012"
_EC2, _SAGEMAKER = f"arn:aws:ec2:{REGION}:{ACCOUNT}", f"arn:aws:sagemaker:{REGION}:{ACCOUNT}"
_LOGS = f"arn:aws:logs:{REGION}:{ACCOUNT}:log-group"
_SPOT_ROLE = f"arn:aws:iam::{ACCOUNT}:role/aws-service-role/spot.amazonaws.com/AWSServiceRoleForEC2Spot"
_S3 = {"HeadObject": "GetObject", "ListObjectsV2": "ListBucket", "ListObjectVersions": "ListBucketVersions"}
_FREE = ("GetCallerIdentity", "AssumeRole", "AssumeRoleWithWebIdentity")
"The first needs no right; of the others the trust of the role decides."


@dataclass(frozen=True)
class Asked:
    """One request, as boto3 was given it."""

    service: str
    operation: str
    given: Json


@dataclass(frozen=True)
class Right:
    """One judgement of IAM that a request needs."""

    action: str
    resource: str
    context: Json = field(default_factory=dict)


@contextmanager
def asked_of_aws() -> Iterator[list[Asked]]:
    """Every request of every client of boto3 in this process, whoever answers it."""
    asked: list[Asked] = []
    original = BaseClient._make_api_call

    def noted(self: BaseClient, operation: str, given: Json) -> Any:
        asked.append(Asked(self.meta.service_model.service_name, operation, dict(given)))
        return original(self, operation, given)

    with patch.object(BaseClient, "_make_api_call", noted):
        yield asked


def rights_of(asked: list[Asked], tags: Json, machine_role: str) -> list[Right]:
    """What all of it needs. tags: of the machines that it ends or reads. machine_role: that of the launch template."""
    found = {}
    for one in asked:
        for right in _rights(one, tags, machine_role):
            found[right.action, right.resource, str(right.context)] = right
    return list(found.values())


def _rights(asked: Asked, tags: Json, machine_role: str) -> list[Right]:
    operation, given = asked.operation, asked.given
    about_the_caller = given.get("ActionNames") == ["iam:PassRole"]  # answered or not, a launch goes on
    if operation in _FREE or about_the_caller:
        return []
    if asked.service == "s3":
        return _of_s3(operation, given)
    if operation == "RunInstances":
        return _of_a_start(given, machine_role)
    if operation == "CreateTrainingJob":
        return _of_a_training_job(given)
    ours = {f"ec2:ResourceTag/{key}": value for key, value in tags.items()}
    prefix = {"service-quotas": "servicequotas"}.get(asked.service, asked.service)
    resources: dict[str, list[Right | str]] = {
        "TerminateInstances": [Right("", f"{_EC2}:instance/{i}", ours) for i in given.get("InstanceIds", ())],
        "GetConsoleOutput": [Right("", f"{_EC2}:instance/{given.get('InstanceId')}", ours)],
        "DescribeTrainingJob": [f"{_SAGEMAKER}:training-job/{given.get('TrainingJobName')}"],
        "StopTrainingJob": [f"{_SAGEMAKER}:training-job/{given.get('TrainingJobName')}"],
        "DescribeLogStreams": [f"{_LOGS}:{given.get('logGroupName')}:log-stream:"],
        "GetLogEvents": [f"{_LOGS}:{given.get('logGroupName')}:log-stream:{given.get('logStreamName')}"],
        "SimulatePrincipalPolicy": [str(given.get("PolicySourceArn"))],
        "GetRole": [f"arn:aws:iam::{ACCOUNT}:role/{given.get('RoleName')}"],
        "GetInstanceProfile": [f"arn:aws:iam::{ACCOUNT}:instance-profile/{given.get('InstanceProfileName')}"],
        "GetServiceQuota": [f"arn:aws:servicequotas:{REGION}:{ACCOUNT}:ec2/{given.get('QuotaCode')}"],
        "DescribeImages": [f"arn:aws:ecr:{REGION}:{ACCOUNT}:repository/{given.get('repositoryName')}"],
    }
    named = resources.get(operation, ["*"])  # lists and descriptions of EC2 cannot be narrowed
    rights = [right if isinstance(right, Right) else Right("", right) for right in named]
    return [Right(f"{prefix}:{operation}", right.resource, right.context) for right in rights]


def _of_s3(operation: str, given: Json) -> list[Right]:
    action, bucket = _S3.get(operation, operation), f"arn:aws:s3:::{given['Bucket']}"
    if "Key" in given:
        tagged = [Right("s3:PutObjectTagging", f"{bucket}/{given['Key']}")] if "Tagging" in given else []
        return [Right(f"s3:{action}", f"{bucket}/{given['Key']}"), *tagged]
    prefix = {"s3:prefix": given["Prefix"]} if "Prefix" in given else {}
    return [Right(f"s3:{action}", bucket, prefix)]


def _of_a_start(given: Json, machine_role: str) -> list[Right]:
    """RunInstances is judged for each thing that it uses or makes; tags and the machine's role are judged beside it."""
    template = f"{_EC2}:launch-template/{given['LaunchTemplate']['LaunchTemplateId']}"
    context = {"ec2:LaunchTemplate": template}
    used = [f"{_EC2}:{kind}/*" for kind in ("volume", "network-interface")]
    used += [template, f"arn:aws:ec2:{REGION}::image/ami-1"]
    used += [f"{_EC2}:subnet/{one['SubnetId']}" for one in given["NetworkInterfaces"]]
    used += [f"{_EC2}:security-group/{group}" for one in given["NetworkInterfaces"] for group in one["Groups"]]
    rights = [Right("ec2:RunInstances", resource, context) for resource in used]
    typed = context | {"ec2:InstanceType": given["InstanceType"]}
    rights.append(Right("ec2:RunInstances", f"{_EC2}:instance/*", typed))
    at_start = {"ec2:CreateAction": "RunInstances"}
    rights += [
        Right("ec2:CreateTags", f"{_EC2}:{one['ResourceType']}/x", at_start) for one in given["TagSpecifications"]
    ]
    if given.get("InstanceMarketOptions", {}).get("MarketType") == "spot":
        service = {"iam:AWSServiceName": "spot.amazonaws.com"}
        rights.append(Right("iam:CreateServiceLinkedRole", _SPOT_ROLE, service))
    return [*rights, Right("iam:PassRole", machine_role, {"iam:PassedToService": "ec2.amazonaws.com"})]


def _of_a_training_job(given: Json) -> list[Right]:
    job = f"{_SAGEMAKER}:training-job/{given['TrainingJobName']}"
    context = {
        "sagemaker:InstanceTypes": [given["ResourceConfig"]["InstanceType"]],
        "sagemaker:MaxRuntimeInSeconds": given["StoppingCondition"]["MaxRuntimeInSeconds"],
    }
    assert re.fullmatch(r"[a-zA-Z0-9](-*[a-zA-Z0-9]){0,62}", given["TrainingJobName"])
    rights = [Right(f"sagemaker:{action}", job, context) for action in ("CreateTrainingJob", "AddTags")]
    return [*rights, Right("iam:PassRole", given["RoleArn"], {"iam:PassedToService": "sagemaker.amazonaws.com"})]
