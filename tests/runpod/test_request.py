"""The request for a Pod, compared by whole value with its golden file and checked against Runpod's own contract."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from recipes.catalog import load_catalog
from recipes.load import LoadedRecipe, load_recipe, recipe_names, recipe_sha256
from scripts.backends.runpod_offers import Candidate, Limits, choose
from scripts.backends.runpod_pod_request import CUDA, PodSettings, disk_gb, placed, pod_request, read_pod_settings
from scripts.errors import InputError, ProviderError, Refused
from scripts.fake_runpod.catalog import Catalog
from scripts.fake_runpod.contract import Contract
from scripts.job_token import make_token
from scripts.plan import make_plan
from scripts.render import render
from tests.runpod.conftest import IMAGE, OPENAPI, spec_of

CONTRACTS = [None, *([OPENAPI] if OPENAPI else [])]
GOLDEN = Path(__file__).parent / "golden"
SECRET = "CANARY-token-secret-of-the-front-door"
ENVIRONMENT = {
    "RUNPOD_API_KEY": "rpa_CANARY_control_plane_key",
    "AWS_ACCESS_KEY_ID": "CANARYACCESSKEY",
    "AWS_SECRET_ACCESS_KEY": "CANARY/secret/key",
    "HF_TOKEN": "hf_CANARY",
    "LORRY_TOKEN_SECRET": SECRET,
    "LORRY_PUBLIC_URL": "https://lorry.example/",
    "LORRY_IMAGE": IMAGE,
    "RUNPOD_VOLUME_ID": "vol1",
    "RUNPOD_REGISTRY_ID": "reg1",
    "LORRY_POD_SECRETS": "HF_TOKEN=lorry_hf, AWS_ACCESS_KEY_ID=store/id,AWS_SECRET_ACCESS_KEY=store.key",
    "AWS_DEFAULT_REGION": "eu-central-1",
}
PUBLIC = ENVIRONMENT | {"RUNPOD_REGISTRY_ID": ""}
STORE = "s3://a-bucket/clients/acme/jobs"
ON_TWO_NODES = {"nodes": 2, "gpus": 8, "offer": "runpod-a100-sxm-8"}
PLACE = Candidate("runpod-a100-pcie-1", "NVIDIA A100 80GB PCIe", "EU-CZ-1", 1.79, "LOW")


def body(environment: dict[str, str] = ENVIRONMENT, **changes: Any) -> dict[str, Any]:
    spec = spec_of("job-1", STORE).model_copy(update=changes)
    token = make_token("job-1", "acme", 1_800_007_200, SECRET)
    return placed(pod_request(spec, read_pod_settings(environment)), PLACE, 1_800_003_600, token)


@pytest.mark.parametrize(("name", "made"), [("pod", body()), ("cluster", body(PUBLIC, **ON_TWO_NODES))])
def test_the_request_is_the_committed_one(name: str, made: dict[str, Any]) -> None:
    text, path = json.dumps(made, indent=2, sort_keys=True) + "\n", GOLDEN / f"{name}.json"
    if os.environ.get("LORRY_WRITE_GOLDEN"):
        path.write_text(text)
    again = "if this is meant, run: LORRY_WRITE_GOLDEN=1 python -m pytest tests/runpod/test_request.py"
    assert text == path.read_text(), again


@pytest.mark.parametrize(
    "openapi", [None, *([OPENAPI] if OPENAPI else [])], ids=["hand-written", "published"][: 1 + bool(OPENAPI)]
)
def test_the_request_keeps_to_the_contract(openapi: Path | None) -> None:
    route = Contract.load(openapi).find("POST", "/v2/pods")
    assert route is not None
    assert route.request_errors(body()) == []
    assert route.request_errors(pod_request(spec_of("job-1", STORE), read_pod_settings(ENVIRONMENT))) == []
    assert route.request_errors(body() | {"interruptible": True}), "the check can fail"
    clusters = Contract.load(openapi).find("POST", "/v2/clusters")
    assert clusters is not None
    assert clusters.request_errors(body(PUBLIC, **ON_TWO_NODES)) == []
    assert clusters.request_errors(body(PUBLIC, **ON_TWO_NODES) | {"registry": "reg1"}), "it takes no private image"


@pytest.mark.parametrize("nodes", [1, 2])
@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_in_a_pod_or_a_cluster_is_a_request_or_a_sentence(name: str, nodes: int) -> None:
    written, catalog = load_recipe(name), load_catalog()
    hardware = written.recipe.hardware.model_copy(update={"backends": ("runpod_pod",), "nodes": nodes})
    recipe = written.recipe.model_copy(update={"hardware": hardware})
    loaded = LoadedRecipe(name, recipe, recipe_sha256(recipe))
    given: dict[str, Any] = {"job_id": "job-1", "backend": "runpod_pod", "store": STORE, "commit": None}
    try:
        spec = render(loaded, make_plan(loaded, None, catalog), None, catalog, **given)
        asked = pod_request(spec, read_pod_settings(PUBLIC))
    except Refused as refusal:
        assert all(problem.got for problem in refusal.problems)  # noqa: PT017  both ends are right
        return
    route = Contract.load(OPENAPI).find("POST", "/v2/pods" if nodes == 1 else "/v2/clusters")
    assert route is not None
    assert route.request_errors(asked) == []
    assert ("compute" in asked) == (nodes == 2)
    if nodes == 2:
        assert asked["compute"]["podCount"] == 2
        assert asked["compute"]["gpuCountPerPod"] == spec.gpus == 8, "a node is a whole machine"


def test_some_recipe_is_a_cluster_of_two() -> None:
    """Otherwise the claim before would hold of nothing."""
    written, catalog = load_recipe("glm-4.5/zero3"), load_catalog()
    hardware = written.recipe.hardware.model_copy(update={"backends": ("runpod_pod",)})
    recipe = written.recipe.model_copy(update={"hardware": hardware})
    plan = make_plan(LoadedRecipe("glm-4.5/zero3", recipe, recipe_sha256(recipe)), None, catalog)
    assert plan.chosen is not None
    assert plan.chosen.startswith("runpod-")
    assert plan.chosen.endswith("-8")


def test_no_secret_is_in_the_request_and_the_platform_fills_in_references() -> None:
    text = json.dumps(body())
    assert "CANARY" not in text
    assert body()["env"]["AWS_SECRET_ACCESS_KEY"] == "{{ RUNPOD_SECRET_store.key }}"
    assert "RUNPOD_API_KEY" not in body()["env"]
    assert "CANARY" not in repr(read_pod_settings(ENVIRONMENT))


def test_the_count_is_always_sent_and_the_command_is_one_string_for_a_shell_lexer() -> None:
    made = body(store="s3://bucket/with space/jobs")
    assert made["gpu"] == {"id": "NVIDIA A100 80GB PCIe", "count": 1, "minCudaVersion": CUDA}
    assert made["args"] == (
        "python -m scripts.container --store 's3://bucket/with space/jobs' --job job-1 --work jobs/job-1"
    )


@pytest.mark.parametrize(
    ("changes", "environment", "said"),
    [
        (
            {},
            {"LORRY_IMAGE": "registry.example/trainer:latest"},
            "image: 'registry.example/trainer:latest'; LORRY_IMAGE",
        ),
        ({}, {"LORRY_IMAGE": ""}, "image: not set; LORRY_IMAGE: registry/name@sha256:"),
        (
            {"nodes": 2},
            {},
            "RUNPOD_REGISTRY_ID: set, and Runpod's clusters cannot pull from a private registry; unset",
        ),
        ({"offer": "local-2"}, {}, "offer: local-2 is no offer of runpod_pod"),
        ({}, {"LORRY_POD_SECRETS": "", "LORRY_TOKEN_SECRET": ""}, "a Pod would have no key for s3://a-bucket"),
        (
            {"deadline_seconds": 50_000},
            {"LORRY_PUBLIC_URL": ""},
            "13.9 h, and keys without a front door last 12; LORRY_P",
        ),
        ({}, {"LORRY_POD_SECRETS": ",".join(f"V{n}=s{n}" for n in range(50))}, "variables: 59 of them; at most 50"),
    ],
)
def test_a_job_that_cannot_run_in_a_pod_is_refused_with_the_reason(
    changes: dict[str, Any], environment: dict[str, str], said: str
) -> None:
    with pytest.raises(Refused) as refused:
        body(ENVIRONMENT | environment, **changes)
    assert said in str(refused.value)


def test_all_reasons_come_at_once() -> None:
    with pytest.raises(Refused) as refused:
        pod_request(spec_of("job-1", STORE, nodes=2), PodSettings(registry_id="reg1"))
    assert len(refused.value.problems) == 3


def test_a_large_model_needs_a_volume_on_which_it_is_staged() -> None:
    spec = spec_of("job-1", STORE)
    large = spec.model_copy(
        update={
            "recipe": spec.recipe.model_copy(
                update={"base": spec.recipe.base.model_copy(update={"id": "Qwen/Qwen3-8B"})}
            )
        }
    )
    with pytest.raises(Refused, match="RUNPOD_VOLUME_ID: not set, and Qwen/Qwen3-8B must be staged"):
        pod_request(large, read_pod_settings(ENVIRONMENT | {"RUNPOD_VOLUME_ID": ""}))


@pytest.mark.parametrize(
    "pair", ["HF_TOKEN", "HF_TOKEN=hf abc", "RUNPOD_API_KEY=mine", "LORRY_JOB=x", "lower=x", "A_B=RUNPOD_X"]
)
def test_what_names_no_secret_is_refused(pair: str) -> None:
    with pytest.raises(InputError, match="LORRY_POD_SECRETS"):
        read_pod_settings({"LORRY_POD_SECRETS": pair})


def test_the_disk_holds_three_checkpoints() -> None:
    assert disk_gb(spec_of("job-1", STORE, trainable_parameters=900_000_000)) == 20 + 44


def places(catalog: Catalog, limits: Limits | None = None, **changes: Any) -> list[tuple[str, str]]:
    spec = spec_of("job-1", STORE, **changes)
    found = choose(spec, load_catalog(), catalog.gpus(True), catalog.datacenters(True), limits or Limits())
    return [(candidate.gpu, candidate.datacenter) for candidate in found]


def test_the_planned_gpu_goes_first_at_its_price_then_the_larger_stock() -> None:
    assert places(Catalog()) == [
        ("NVIDIA A100 80GB PCIe", "EU-CZ-1"),
        ("NVIDIA A100-SXM4-80GB", "US-MO-1"),
        ("NVIDIA A100-SXM4-80GB", "US-KS-2"),
    ]


def test_a_better_gpu_at_a_lower_price_goes_before_the_planned_one() -> None:
    assert places(Catalog(prices={"NVIDIA H200": 1.50}))[:3] == [
        ("NVIDIA H200", "US-KS-2"),
        ("NVIDIA H200", "US-NC-2"),
        ("NVIDIA H200", "US-CA-2"),
    ]


def test_a_smaller_or_slower_gpu_is_never_taken_however_cheap() -> None:
    cheap = Catalog(prices={"NVIDIA A100-SXM4-80GB": 0.5, "NVIDIA L40S": 0.1})
    assert {gpu for gpu, _ in places(cheap, offer="runpod-h100-sxm-1")} == {"NVIDIA H100 80GB HBM3"}


def test_a_recipe_that_insists_on_a_gpu_gets_no_other() -> None:
    spec = spec_of("job-1", STORE)
    hardware = spec.recipe.hardware.model_copy(update={"gpu": "a100-sxm"})
    insisting = spec.recipe.model_copy(update={"hardware": hardware})
    found = places(Catalog(), offer="runpod-a100-sxm-1", recipe=insisting)
    assert {gpu for gpu, _ in found} == {"NVIDIA A100-SXM4-80GB"}


def test_a_volume_keeps_the_pod_in_its_datacentre_and_says_where_there_is_stock() -> None:
    assert places(Catalog(), Limits(frozenset({"US-KS-2"}))) == [("NVIDIA A100-SXM4-80GB", "US-KS-2")]
    with pytest.raises(ProviderError) as nowhere:
        places(Catalog(), Limits(frozenset({"EU-RO-1"})))
    said = "no stock of 1 x NVIDIA A100 80GB PCIe or better in EU-RO-1; there is stock in EU-CZ-1, US-KS-2, US-MO-1"
    assert said in str(nowhere.value)


def test_a_datacentre_without_the_wanted_compliance_is_left_out() -> None:
    assert places(Catalog(), Limits(compliance=frozenset({"SOC_2_TYPE_2"}))) == [("NVIDIA A100-SXM4-80GB", "US-KS-2")]
    with pytest.raises(ProviderError, match="any datacentre with HIPAA"):
        places(Catalog(), Limits(compliance=frozenset({"HIPAA"})))


def test_more_gpus_than_one_machine_has_is_refused() -> None:
    rows = [{**row, "maxCount": {"secure": 4, "community": 0}} for row in Catalog().gpus(True)]
    spec = spec_of("job-1", STORE, offer="runpod-a100-pcie-8", gpus=8)
    with pytest.raises(Refused, match="a Pod has at most 4 of NVIDIA A100 80GB PCIe"):
        choose(spec, load_catalog(), rows, Catalog().datacenters(True), Limits())
