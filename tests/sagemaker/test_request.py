"""The request for a training job: the committed one, valid for botocore and for the service itself, or refused."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import boto3
import pytest
from botocore.validate import ParamValidator

from recipes.job import LaunchSpec, Metric
from recipes.load import load_recipe, recipe_names
from recipes.recipe import Base
from scripts.backends.sagemaker import phase_of
from scripts.backends.sagemaker_request import (
    METRICS,
    SageMakerSettings,
    read_sagemaker_settings,
    training_job_name,
    training_request,
)
from scripts.errors import InputError, Refused
from tests.sagemaker.conftest import KEY_ARN, KEYS, SETTINGS, spec_of
from tests.sagemaker.wire import require_model

GOLDEN = Path(__file__).parent / "golden"
ACME = "s3://a-bucket/clients/acme/jobs"
ENVIRONMENT = SETTINGS | KEYS | {"HF_TOKEN": "hf_CANARY", "LORRY_TOKEN_SECRET": "CANARY-token-secret"}
VPC = {"LORRY_SAGEMAKER_SUBNETS": "subnet-1, subnet-2", "LORRY_SAGEMAKER_SECURITY_GROUPS": "sg-1"}


def large(**changes: Any) -> LaunchSpec:
    """A job that needs a staged model."""
    spec = spec_of("bicycle-1", ACME, **changes)
    return spec.model_copy(update={"recipe": spec.recipe.model_copy(update={"base": Base(id="Qwen/Qwen3-8B")})})


def request_of(spec: LaunchSpec, **settings: str) -> dict[str, Any]:
    return training_request(spec, read_sagemaker_settings(ENVIRONMENT | settings))


def require_valid(body: dict[str, Any]) -> None:
    """By botocore's parameter validation, and by the patterns and lengths of the service that botocore leaves to it."""
    client = boto3.client("sagemaker", region_name="us-east-1", **{k.lower(): v for k, v in KEYS.items()})
    shape = client.meta.service_model.operation_model("CreateTrainingJob").input_shape
    assert ParamValidator().validate(body, shape).generate_report() == ""
    require_model(body)


@pytest.mark.parametrize(
    ("name", "spec", "settings"),
    [
        ("on-demand", large(), VPC | {"LORRY_KMS_KEY": KEY_ARN}),
        ("spot-two-nodes", large(nodes=2), {"LORRY_SAGEMAKER_SPOT": "yes", "LORRY_SAGEMAKER_PREFIX": "lorry-demo-"}),
    ],
)
def test_the_request_is_the_committed_one_and_valid(name: str, spec: LaunchSpec, settings: dict[str, str]) -> None:
    body = request_of(spec, **settings)
    text, golden = json.dumps(body, indent=2, sort_keys=True) + "\n", GOLDEN / f"{name}.json"
    if os.environ.get("LORRY_WRITE_GOLDEN"):
        golden.write_text(text)
    again = "if this is meant, run: LORRY_WRITE_GOLDEN=1 python -m pytest tests/sagemaker/test_request.py"
    assert text == golden.read_text(), again
    require_valid(body)
    assert "CANARY" not in text
    assert "HyperParameters" not in body, "256 characters hold no recipe: it is a channel"


def test_a_warm_pool_is_asked_for_where_its_minutes_are_paid_for() -> None:
    spec = spec_of("job-1", cap_usd=0.5)
    body = request_of(spec.model_copy(update={"quote_usd": 0.4}), LORRY_SAGEMAKER_WARM_MINUTES="3")
    require_valid(body)
    assert body["ResourceConfig"]["KeepAlivePeriodInSeconds"] == 180


def test_the_metric_definitions_find_the_figures_in_a_line_of_the_trainer() -> None:
    train = Metric(
        kind="train", at=1.5, attempt=1, epoch=1, step=7, training_loss=1.25, learning_rate=1e-05, gradient_norm=0.5,
        tokens_per_second=900.0,
    )  # fmt: skip
    valid = Metric(kind="eval", at=2.5, attempt=1, epoch=1, step=7, validation_loss=2.5)
    lines = [metric.model_dump_json(exclude_none=True) for metric in (train, valid)]
    found = {name: [float(m) for line in lines for m in re.findall(regex, line)] for name, regex in METRICS.items()}
    assert found == {
        "train:loss": [1.25],
        "train:learning_rate": [1e-05],
        "train:gradient_norm": [0.5],
        "train:tokens_per_second": [900.0],
        "validation:loss": [2.5],
        "step": [7.0, 7.0],
    }


@pytest.mark.parametrize(
    ("changes", "settings", "said"),
    [
        (
            {},
            {"LORRY_IMAGE": "registry.example/trainer:latest"},
            "image: 'registry.example/trainer:latest'; LORRY_IMAGE",
        ),
        ({}, {"LORRY_IMAGE": ""}, "image: not set; LORRY_IMAGE in ECR by digest"),
        (
            {},
            {"AWS_DEFAULT_REGION": "eu-west-1"},
            "image: it is in us-east-1, the job in eu-west-1; push it to ECR in eu",
        ),
        ({}, {"AWS_DEFAULT_REGION": ""}, "AWS_DEFAULT_REGION: not set; the region of the store's bucket"),
        ({}, {"LORRY_SAGEMAKER_ROLE": ""}, "LORRY_SAGEMAKER_ROLE: not set; the execution role: sagemaker_role_arn"),
        (
            {"job_id": "a" * 50},
            {},
            f"job id: {'a' * 50} has 50 characters; at most 48 on SageMaker; name it with --job",
        ),
        ({"store": "s3://bucket/" + "a" * 245}, {}, "aaa... has 257 characters; at most 256: a shorter prefix"),
        ({"offer": "local-2"}, {}, "offer: local-2 is no offer of sagemaker; plan the recipe for sagemaker"),
        ({"deadline_seconds": 28 * 86_400}, {}, "limits.max_hours: 672 h; at most 28 days on SageMaker"),
        ({}, {"LORRY_SAGEMAKER_SUBNETS": "subnet-1"}, "LORRY_SAGEMAKER_SECURITY_GROUPS: not set; both or neither"),
        ({}, {"LORRY_KMS_KEY": KEY_ARN.replace("east", "west")}, "the ARN of a key in us-east-1: kms_key_arn"),
        ({}, {"LORRY_SAGEMAKER_WARM_MINUTES": "60"}, "60 minutes cost $7.91 beyond the cap of $2.00; fewer minutes"),
        (
            {},
            {"LORRY_SAGEMAKER_WARM_MINUTES": "1", "LORRY_SAGEMAKER_SPOT": "yes"},
            "set together with spot; one of the two",
        ),
    ],
)
def test_a_job_that_cannot_run_there_is_refused_with_the_next_step(
    changes: dict[str, Any], settings: dict[str, str], said: str
) -> None:
    with pytest.raises(Refused) as refused:
        request_of(spec_of("job-1").model_copy(update=changes), **settings)
    assert said in str(refused.value)
    assert len(refused.value.problems) == 1


def test_all_reasons_come_at_once() -> None:
    with pytest.raises(Refused) as refused:
        training_request(spec_of("a" * 50, offer=None), SageMakerSettings())
    assert len(refused.value.problems) == 5


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[("SPOT", "perhaps"), ("PREFIX", "Lorry")],
        *[("WARM_MINUTES", value) for value in ("361", "-1")],
    ],
)
def test_a_setting_that_says_nothing_is_refused(name: str, value: str) -> None:
    with pytest.raises(InputError, match=f"LORRY_SAGEMAKER_{name}: '{value}'"):
        read_sagemaker_settings({f"LORRY_SAGEMAKER_{name}": value})


def test_a_number_too_long_to_be_one_is_refused_too() -> None:
    with pytest.raises(InputError, match=f"LORRY_SAGEMAKER_WARM_MINUTES: '{'9' * 40}'; 0 to 360"):
        read_sagemaker_settings({"LORRY_SAGEMAKER_WARM_MINUTES": "9" * 5000})


def test_an_empty_setting_counts_as_not_set() -> None:
    """So arrives a repository variable of GitHub that nobody made."""
    names = ("PREFIX", "SUBNETS", "SECURITY_GROUPS", "SPOT", "WARM_MINUTES")
    empty = dict.fromkeys((f"LORRY_SAGEMAKER_{name}" for name in names), "") | {"LORRY_STORE_REGION": ""}
    assert read_sagemaker_settings({**SETTINGS, **empty}) == read_sagemaker_settings(SETTINGS)


def test_two_jobs_never_share_a_name() -> None:
    """Also a second training job of one job, and jobs of one id in the stores of two clients."""
    jobs = [(job, store, n) for job in ("a-1", "a-1-2") for store in (ACME, ACME + "2") for n in (1, 2, 12)]
    assert len({training_job_name("lorry-", *job) for job in jobs}) == len(jobs)
    assert training_job_name("lorry-", "a" * 48, ACME, 99).count("") - 1 == 63


@pytest.mark.parametrize(
    ("status", "secondary", "phase"),
    [
        ("InProgress", "Pending", "waiting"),
        ("InProgress", "Starting", "waiting"),
        ("InProgress", "DownloadingTrainingImage", "waiting"),
        ("InProgress", "Training", "running"),
        ("InProgress", "Interrupted", "waiting"),
        ("Stopping", "Stopping", "running"),
        ("Stopped", "MaxRuntimeExceeded", "gone"),
        ("Stopped", "MaxWaitTimeExceeded", "gone"),
        ("Failed", "Failed", "gone"),
    ],
)
def test_both_statuses_make_the_phase(status: str, secondary: str, phase: str) -> None:
    assert phase_of(status, secondary) == phase


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_is_a_valid_request_or_a_sentence(name: str) -> None:
    """Whether or not the recipe allows SageMaker: asked to, it plans, renders and requests, or says why not."""
    from recipes.catalog import load_catalog
    from recipes.load import LoadedRecipe, recipe_sha256
    from scripts.plan import make_plan
    from scripts.render import render

    written = load_recipe(name)
    hardware = written.recipe.hardware.model_copy(update={"backends": ("sagemaker",)})
    recipe = written.recipe.model_copy(update={"hardware": hardware})
    loaded, catalog = LoadedRecipe(name, recipe, recipe_sha256(recipe)), load_catalog()
    try:
        plan = make_plan(loaded, None, catalog)
        spec = render(loaded, plan, None, catalog, job_id="job-1", backend="sagemaker", store=ACME, commit=None)
        body = request_of(spec)
    except Refused as refused:
        assert all(problem.got for problem in refused.problems)  # noqa: PT017  both ends are right
        return
    require_valid(body)
    assert body["ResourceConfig"]["InstanceCount"] == recipe.hardware.nodes
    assert body["StoppingCondition"]["MaxRuntimeInSeconds"] > spec.deadline_seconds
