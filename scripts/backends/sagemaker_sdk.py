"""A training job as SageMaker's own SDK would ask for it: its channels and its entry point, and all else as we ask.

body = through_sdk(request)     # request: of sagemaker_request.py; it needs the `aws` extra

For those whose tools expect what ModelTrainer makes. The SDK uploads its drivers beside the job's files, and starts our
container from them. Its version is pinned: the one function that gives the request without sending it is its own.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping
from importlib import import_module
from typing import Any
from urllib.parse import urlsplit

from scripts.errors import Problem, Refused

Json = dict[str, Any]


def through_sdk(request: Mapping[str, Any]) -> Json:
    """The body of CreateTrainingJob that ModelTrainer makes of our request, under our name. Uploads its drivers.

    Raises Refused where the SDK is not installed.
    """
    try:
        model_trainer = import_module("sagemaker.train").ModelTrainer
    except ImportError:
        want = "install the `aws` extra, or launch without --sdk: the job is the same"
        raise Refused(Problem("--sdk", "the package sagemaker is not installed", want)) from None
    # It would refuse a role that lacks rights which no job of ours uses.
    os.environ.setdefault("SAGEMAKER_VALIDATE_ROLE", "false")
    trainer = model_trainer(**_arguments(request))
    trainer.with_metric_definitions(_metrics(request))
    body: Json = trainer._create_training_job_args(boto3=True)
    kept: Json = _without_nothing(body)
    return kept | {"TrainingJobName": request["TrainingJobName"]}


def _arguments(request: Mapping[str, Any]) -> Json:
    """Our request in the words of ModelTrainer."""
    configs = import_module("sagemaker.core.training.configs")
    image, resources, stop = request["AlgorithmSpecification"], request["ResourceConfig"], request["StoppingCondition"]
    output, kept, vpc = request["OutputDataConfig"], request["CheckpointConfig"], request.get("VpcConfig")
    command = shlex.join([*image["ContainerEntrypoint"], *image["ContainerArguments"]])
    sources = {c["ChannelName"]: c["DataSource"]["S3DataSource"]["S3Uri"] for c in request["InputDataConfig"]}
    inside = {"subnets": vpc["Subnets"], "security_group_ids": vpc["SecurityGroupIds"]} if vpc else {}
    compute = configs.Compute(
        instance_type=resources["InstanceType"],
        instance_count=resources["InstanceCount"],
        volume_size_in_gb=resources["VolumeSizeInGB"],
        keep_alive_period_in_seconds=resources.get("KeepAlivePeriodInSeconds"),
        enable_managed_spot_training=request["EnableManagedSpotTraining"],
    )
    return {
        "training_image": image["TrainingImage"],
        "training_input_mode": image["TrainingInputMode"],
        "role": request["RoleArn"],
        "base_job_name": request["TrainingJobName"],
        "source_code": configs.SourceCode(command=command),
        "compute": compute,
        "networking": configs.Networking(**inside) if vpc else None,
        "stopping_condition": configs.StoppingCondition(
            max_runtime_in_seconds=stop["MaxRuntimeInSeconds"],
            max_wait_time_in_seconds=stop.get("MaxWaitTimeInSeconds"),
            max_pending_time_in_seconds=stop.get("MaxPendingTimeInSeconds"),
        ),
        "output_data_config": configs.OutputDataConfig(
            s3_output_path=output["S3OutputPath"],
            compression_type=output["CompressionType"],
            kms_key_id=output.get("KmsKeyId"),
        ),
        "checkpoint_config": configs.CheckpointConfig(s3_uri=kept["S3Uri"], local_path=kept["LocalPath"]),
        "input_data_config": [configs.InputData(channel_name=c, data_source=url) for c, url in sources.items()],
        "environment": dict(request["Environment"]),
        "tags": [configs.Tag(key=tag["Key"], value=tag["Value"]) for tag in request["Tags"]],
        "sagemaker_session": _session(output["S3OutputPath"]),
    }


def _session(output: str) -> Any:
    """A session that uploads beside the job's other files, and makes no bucket of its own."""
    import boto3

    place = urlsplit(output)
    prefix = place.path.strip("/").removesuffix("/output") + "/sdk"
    session = import_module("sagemaker.train").Session
    return session(boto_session=boto3.Session(), default_bucket=place.netloc, default_bucket_prefix=prefix)


def _metrics(request: Mapping[str, Any]) -> list[Any]:
    metric_definition = import_module("sagemaker.core.training.configs").MetricDefinition
    found = request["AlgorithmSpecification"]["MetricDefinitions"]
    return [metric_definition(name=metric["Name"], regex=metric["Regex"]) for metric in found]


def _without_nothing(value: Any) -> Any:
    """The same without what is None or empty: the service takes a field or none, and no field that says nothing."""
    if isinstance(value, dict):
        kept = {key: _without_nothing(item) for key, item in value.items()}
        return {key: item for key, item in kept.items() if item not in (None, {}, [])}
    return [_without_nothing(item) for item in value] if isinstance(value, list) else value
