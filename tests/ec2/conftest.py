"""One account of EC2 on a clock that stands still, the settings of an applied room, and a job for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from recipes.job import LaunchSpec
from scripts.backends.ec2 import Ec2Backend
from scripts.backends.ec2_request import Ec2Settings, read_ec2_settings
from scripts.fake_runpod.clock import Clock
from tests.ec2.github_identity import serve_github
from tests.ec2.local_ec2 import Account
from tests.runpod.conftest import spec_of

EPOCH = 1_800_000_000.0
POLICY = '{"Version": "2012-10-17", "Statement": [{"Effect": "Allow", "Resource": "arn:aws:s3:::b/JOB_PREFIX/*"}]}'
ENVIRONMENT = {
    "LORRY_EC2_TEMPLATE": "lt-0123456789abcdef0",
    "LORRY_EC2_ROLE_ID": "AROAMACHINE",
    "LORRY_EC2_SUBNETS": "subnet-a,subnet-b",
    "LORRY_EC2_GROUP": "sg-0123456789abcdef0",
    "LORRY_EC2_PLACEMENT_GROUP": "lorry-trainer",
    "LORRY_EC2_MAX_HOURS": "24",
    "LORRY_TRAINER_ROLE": "arn:aws:iam::123456789012:role/lorry-trainer",
    "LORRY_SESSION_POLICY": POLICY,
}


def ec2_spec(store: str = "s3://bucket/clients/acme/jobs", job_id: str = "job-1", **changes: Any) -> LaunchSpec:
    """What render would give for the smoke recipe on EC2 with one H100."""
    spec = spec_of(job_id, store, backend="ec2", offer="ec2-p5-4xlarge-1", cap_usd=20.0)
    hardware = spec.recipe.hardware.model_copy(update={"backends": ("ec2",), "nodes": changes.get("nodes", 1)})
    return spec.model_copy(update={"recipe": spec.recipe.model_copy(update={"hardware": hardware}), **changes})


def settings_of(**changes: str) -> Ec2Settings:
    """The settings of an environment with these changes."""
    return read_ec2_settings(ENVIRONMENT | changes)


@pytest.fixture
def clock() -> Clock:
    return Clock(EPOCH)


@pytest.fixture
def account(clock: Clock) -> Account:
    return Account(clock)


@pytest.fixture
def store(tmp_path: Path) -> str:
    return (tmp_path / "store").as_uri()


@pytest.fixture
def backend_of(account: Account, clock: Clock) -> Callable[..., Ec2Backend]:
    """backend_of(LORRY_EC2_MARKET="spot"): a launcher with these settings; its sleep moves the clock."""

    def make(**changes: str) -> Ec2Backend:
        return Ec2Backend(ENVIRONMENT | changes, now=clock.now, sleep=clock.jump, client=account.client)

    return make


@pytest.fixture
def github() -> Iterator[dict[str, str]]:
    """What GitHub sets in a workflow that may ask who it is."""
    with serve_github() as environment:
        yield environment
