"""The local clouds and Terraform, as fixtures: a local AWS, a local Runpod, a stand-in for Runpod's provider."""

from __future__ import annotations

import logging
import os
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest

from scripts.fake_runpod.server import LocalRunpod, serve
from scripts.terraform import Terraform

REPOSITORY = Path(__file__).resolve().parents[2]
INFRA = REPOSITORY / "infra"
STATE_BUCKET = "lorry-state"
REGION = "us-east-1"
RUNPOD_KEY = "rp_test"
Environment = dict[str, str]


@pytest.fixture(scope="session")
def short_tmp() -> Iterator[Path]:
    """A folder with a short path: a unix socket's path may have 108 bytes."""
    with tempfile.TemporaryDirectory(prefix="lr") as folder:
        yield Path(folder)


@pytest.fixture(scope="session")
def base_env(short_tmp: Path) -> Environment:
    """The environment of every command, built from nothing: no key, profile or cache of the developer comes along."""
    if shutil.which("terraform") is None:
        pytest.skip("terraform is not on the PATH: the Terraform tests need 1.11 or later")
    config = short_tmp / "cli.tfrc"
    mirror = os.environ.get("TF_PLUGIN_MIRROR")
    found = f'filesystem_mirror {{\n path = "{mirror}"\n include = ["registry.terraform.io/hashicorp/*"]\n}}'
    config.write_text(f"provider_installation {{\n{found if mirror else ''}\n}}\ndisable_checkpoint = true\n")
    home = short_tmp / "home"
    home.mkdir()
    return {
        "PATH": os.environ["PATH"],
        "HOME": str(home),
        "TMPDIR": str(short_tmp),
        "TF_CLI_CONFIG_FILE": str(config),
        "TF_IN_AUTOMATION": "1",
        "CHECKPOINT_DISABLE": "1",
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_REGION": REGION,
        "AWS_EC2_METADATA_DISABLED": "true",
    }


@pytest.fixture(scope="session")
def aws_provider(base_env: Environment) -> None:
    """Needed by every test that loads the AWS provider."""
    if "TF_PLUGIN_MIRROR" not in os.environ:
        pytest.skip("TF_PLUGIN_MIRROR is not set: no folder of unpacked providers that holds hashicorp/aws")


@pytest.fixture(scope="session")
def aws_server() -> Iterator[str]:
    from tests.infra import patched_moto

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    with patched_moto.serve() as url:
        yield url


@pytest.fixture
def aws_fake(aws_server: str) -> str:
    """URL of an empty local AWS that holds the state bucket."""
    from tests.infra import patched_moto

    patched_moto.reset(aws_server)
    client(aws_server, "s3").create_bucket(Bucket=STATE_BUCKET)
    return aws_server


def client(url: str, service: str, key: str = "testing", secret: str = "testing", token: str | None = None) -> Any:
    """A boto3 client of the local AWS."""
    return boto3.client(
        service,
        endpoint_url=url,
        region_name=REGION,
        aws_access_key_id=key,
        aws_secret_access_key=secret,
        aws_session_token=token,
    )


@pytest.fixture(scope="session")
def runpod_server() -> Iterator[LocalRunpod]:
    document = os.environ.get("RUNPOD_OPENAPI")
    with serve(RUNPOD_KEY, Path(document) if document else None) as local:
        yield local


@pytest.fixture
def runpod_rest(runpod_server: LocalRunpod) -> Iterator[LocalRunpod]:
    """An empty local Runpod; its answers must keep to the contract."""
    runpod_server.reset()
    yield runpod_server
    assert runpod_server.drift == []


def start_provider(base_env: Environment, url: str, key: str = RUNPOD_KEY) -> tuple[subprocess.Popen[str], str]:
    """The provider stand-in and the value of TF_REATTACH_PROVIDERS; close its stdin to end it."""
    keys = {"RUNPOD_API_KEY": key} if key else {}
    process = subprocess.Popen(
        [sys.executable, "-u", "-m", "tests.infra.provider_double", "--dev"],
        env={**base_env, **keys, "RUNPOD_API_BASE_URL": url, "PYTHONPATH": str(REPOSITORY)},
        cwd=REPOSITORY,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    for line in process.stdout:
        if "TF_REATTACH_PROVIDERS" in line:
            return process, line.split("'")[1]
    raise AssertionError("the provider stand-in did not start")


@pytest.fixture(scope="session")
def runpod_provider(base_env: Environment, runpod_server: LocalRunpod) -> Iterator[str]:
    process, attached = start_provider(base_env, runpod_server.url)
    yield attached
    process.communicate()


@pytest.fixture
def infra_copy(tmp_path: Path) -> Path:
    """infra/ as committed, without what Terraform leaves in it."""
    copy = tmp_path / "infra"
    shutil.copytree(INFRA, copy, ignore=shutil.ignore_patterns(".terraform", "*.tfstate*", "*.tfplan"))
    return copy


MakeTerraform = Callable[..., Terraform]


@pytest.fixture
def runpod_tf(
    infra_copy: Path, base_env: Environment, runpod_rest: LocalRunpod, runpod_provider: str, aws_fake: str
) -> MakeTerraform:
    """runpod_tf("live/dev/runpod", {...variables}): a root against the local Runpod, its state in the local AWS."""

    def make(root: str, variables: dict[str, Any], **environment: str) -> Terraform:
        attached = {"TF_REATTACH_PROVIDERS": runpod_provider, "AWS_ENDPOINT_URL": aws_fake}
        return Terraform(infra_copy / root, {**base_env, **attached, **environment}, variables)

    return make


def init(terraform: Terraform, **options: Any) -> None:
    """Init with the state bucket of the local AWS."""
    terraform.init(backend_config={"bucket": STATE_BUCKET, "region": REGION}, **options)


def cpu_seconds_of_children() -> float:
    """What processes that have ended used of the processors: the part of a duration that no other load changes."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime
