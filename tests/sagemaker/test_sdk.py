"""What SageMaker's own SDK asks for is what we ask for, but for its channels and its entry point."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import boto3
import pytest

from scripts.backends.sagemaker_sdk import through_sdk
from scripts.errors import Refused
from tests.runpod.conftest import REPOSITORY
from tests.sagemaker.test_request import KEY_ARN, VPC, large, request_of, require_valid
from tests.tools import tool_environment

Json = dict[str, Any]


def sdk_says(request: Json, tmp_path: Path) -> Json:
    """The body that ModelTrainer makes, in a process of its own that finds the local S3."""
    python = tool_environment("sagemaker-train==1.27.0", "boto3==1.44.5") / "bin" / "python"
    kept = {k: v for k, v in os.environ.items() if k.startswith("AWS_") or k in ("PATH", "LANG")}
    script = Path(__file__).with_name("sdk_request.py")
    done = subprocess.run(
        [python, script],
        input=json.dumps(request),
        env={**kept, "HOME": str(tmp_path), "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    body: Json = json.loads(done.stdout.rpartition("\nBODY ")[2])
    return body


@pytest.mark.long
@pytest.mark.timeout(1200)
def test_the_sdk_asks_for_the_same_but_for_its_channels_and_entry_point(bucket: str, tmp_path: Path) -> None:
    spec = large().model_copy(update={"store": "s3://bucket/clients/acme/jobs"})
    ours = request_of(spec, **VPC, LORRY_KMS_KEY=KEY_ARN)
    body = sdk_says(ours, tmp_path)
    require_valid(body)
    image, sdk_image = ours.pop("AlgorithmSpecification"), body.pop("AlgorithmSpecification")
    entry = sdk_image.pop("ContainerEntrypoint"), sdk_image.pop("ContainerArguments")
    assert "sm_train.sh" in str(entry)
    image.pop("ContainerEntrypoint"), image.pop("ContainerArguments")
    assert sdk_image == image
    channels = {c["ChannelName"]: c["DataSource"]["S3DataSource"] for c in body.pop("InputDataConfig")}
    wanted = {c["ChannelName"]: c["DataSource"]["S3DataSource"] for c in ours.pop("InputDataConfig")}
    drivers = channels.pop("sm_drivers")
    assert {name: source["S3Uri"] for name, source in channels.items()} == {
        name: source["S3Uri"] for name, source in wanted.items()
    }
    assert body == ours
    assert drivers["S3Uri"].startswith("s3://bucket/clients/acme/jobs/bicycle-1/sdk/"), "beside the job's other files"
    kept = boto3.client("s3").list_objects_v2(Bucket="bucket", Prefix=drivers["S3Uri"].removeprefix("s3://bucket/"))
    script = next(row["Key"] for row in kept["Contents"] if row["Key"].endswith("sm_train.sh"))
    text = boto3.client("s3").get_object(Bucket="bucket", Key=script)["Body"].read().decode()
    assert "python -m scripts.container --store s3://bucket/clients/acme/jobs --job bicycle-1" in text


def test_without_the_sdk_the_flag_is_refused_with_the_other_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sagemaker.train", None)
    with pytest.raises(Refused, match="the package sagemaker is not installed; install the `aws` extra, or launch"):
        through_sdk({})
