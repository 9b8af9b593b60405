"""The request for machines of EC2, by whole value and by botocore's own check; bad settings are sentences."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, get_args

import pytest
from botocore.validate import ParamValidator

from recipes.catalog import load_catalog
from recipes.load import LoadedRecipe, load_recipe, recipe_names, recipe_sha256
from scripts.backends.ec2_places import Place, choose_places, spot_prices
from scripts.backends.ec2_request import Market, ec2_request, key_variables, launch_file, placed, read_ec2_settings
from scripts.errors import InputError, ProviderError, Refused
from scripts.plan import make_plan
from scripts.render import render
from tests.ec2.conftest import ENVIRONMENT, ec2_spec, settings_of
from tests.ec2.local_ec2 import client_of_service

GOLDEN = Path(__file__).parent / "golden"
SHAPE = client_of_service("ec2").meta.service_model.operation_model("RunInstances").input_shape
SUBNETS = [
    {"SubnetId": "subnet-a", "AvailabilityZone": "us-east-1a"},
    {"SubnetId": "subnet-b", "AvailabilityZone": "us-east-1b"},
]
NODES = {"offer": "ec2-p5-8", "gpus": 8, "nodes": 2, "cap_usd": 300.0}
BLOCK = {"LORRY_EC2_MARKET": "capacity-block", "LORRY_EC2_RESERVATION": "cr-0123456789abcdef0"}
CASES: dict[str, tuple[dict[str, Any], dict[str, str]]] = {
    "on-demand": ({}, {}),
    "spot": ({}, {"LORRY_EC2_MARKET": "spot"}),
    "two-nodes": (NODES, {}),
    "two-nodes-capacity-block": (NODES, BLOCK),
}


def body(changes: dict[str, Any], environment: dict[str, str]) -> dict[str, Any]:
    spec, settings = ec2_spec(**changes), settings_of(**environment)
    offer = load_catalog().offers[spec.offer or ""]
    place = Place(spec.offer or "", offer.provider_type, "subnet-a", "us-east-1a", offer.usd_per_hour)
    return placed(ec2_request(spec, settings), spec, settings, place, 1_800_003_600, "t" * 64)


@pytest.mark.parametrize("name", CASES)
def test_the_request_is_the_committed_one_and_botocore_takes_it(name: str) -> None:
    made = body(*CASES[name])
    assert not ParamValidator().validate(made, SHAPE).has_errors()
    text, path = json.dumps(made, indent=1) + "\n", GOLDEN / f"{name}.json"
    if os.environ.get("LORRY_WRITE_GOLDEN"):
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    again = "if this is meant, run: LORRY_WRITE_GOLDEN=1 python -m pytest tests/ec2/test_request.py"
    assert text == path.read_text(), again


def test_each_of_two_nodes_is_told_its_rank_and_where_the_first_one_is() -> None:
    session = {"AccessKeyId": "ASIA1", "SecretAccessKey": "s", "SessionToken": "t"}
    settings, spec = settings_of(), ec2_spec(**NODES)
    keys = key_variables(settings, spec.job_id, "", session, "us-east-1")
    texts = [launch_file(spec, settings, 1_800_003_600, keys, node, ["10.0.0.4", "10.0.0.5"]) for node in range(2)]
    told = [dict(line.split("=", 1) for line in text.splitlines()) for text in texts]
    assert [(t["NODES"], t["NODE_RANK"], t["MASTER_ADDR"]) for t in told] == [
        ("2", "0", "10.0.0.4"),
        ("2", "1", "10.0.0.4"),
    ]
    assert told[0]["LORRY_MODELS_FROM"] == "s3://bucket/models"
    assert "NODES" not in launch_file(ec2_spec(), settings, 1, keys, 0, ["10.0.0.4"])


@pytest.mark.parametrize("market", get_args(Market))
@pytest.mark.parametrize("nodes", [{}, NODES])
def test_the_request_alone_says_where_machines_stand_close_together(market: str, nodes: Any) -> None:
    reserved = BLOCK["LORRY_EC2_RESERVATION"] if market in ("reservation", "capacity-block") else ""
    asked = ec2_request(ec2_spec(**nodes), settings_of(LORRY_EC2_MARKET=market, LORRY_EC2_RESERVATION=reserved))
    group = {"GroupName": "lorry-trainer"} if nodes and market != "capacity-block" else None
    assert asked.get("Placement") == group


def test_with_a_front_door_a_machine_gets_a_token_and_no_key() -> None:
    settings = settings_of(LORRY_PUBLIC_URL="https://lorry.example/", LORRY_TOKEN_SECRET="s" * 16)
    told = key_variables(settings, "job-1", "job-1.acme.1.abc", None, "us-east-1")
    assert told["AWS_CONTAINER_CREDENTIALS_FULL_URI"] == "https://lorry.example/machines/job-1/credentials"
    assert not [name for name in told if name.startswith("AWS_SECRET") or name == "AWS_ACCESS_KEY_ID"]


@pytest.mark.parametrize(
    ("changes", "environment", "sentence"),
    [
        ({"offer": "runpod-h200-1"}, {}, "offer: runpod-h200-1 is no offer of ec2; plan the recipe for ec2"),
        ({}, {"LORRY_EC2_TEMPLATE": ""}, "LORRY_EC2_TEMPLATE: not set; run `lorry env`"),
        ({}, {"LORRY_EC2_SUBNETS": ""}, "LORRY_EC2_SUBNETS: not set"),
        (NODES, {"LORRY_EC2_PLACEMENT_GROUP": ""}, "LORRY_EC2_PLACEMENT_GROUP: not set, and hardware.nodes is 2"),
        ({"deadline_seconds": 90_000}, {}, "deadline: 25.0 h, and the template ends its machines after 24"),
        ({"deadline_seconds": 50_000}, {}, "deadline: 13.9 h, and keys without a front door last 12"),
        ({"store": "s3://bucket/" + "a" * 245}, {}, "aaa... has 257 characters; at most 256: a shorter prefix"),
        ({}, {"LORRY_TRAINER_ROLE": ""}, "store: a machine would have no key for s3://bucket/clients/acme/jobs"),
    ],
)
def test_what_cannot_run_there_is_a_sentence(changes: Any, environment: dict[str, str], sentence: str) -> None:
    with pytest.raises(Refused) as caught:
        ec2_request(ec2_spec(**changes), settings_of(**environment))
    assert sentence in str(caught.value)


@pytest.mark.parametrize(
    ("environment", "sentence"),
    [
        ({"LORRY_EC2_MARKET": "cheap"}, "LORRY_EC2_MARKET: 'cheap'; one of on-demand, spot, reservation"),
        ({"LORRY_EC2_MARKET": "capacity-block"}, "LORRY_EC2_RESERVATION: capacity-block with reservation none"),
        (BLOCK | {"LORRY_EC2_MARKET": "spot"}, "spot with reservation cr-0123456789abcdef0; its id"),
        ({"LORRY_EC2_MAX_HOURS": "a day"}, "LORRY_EC2_MAX_HOURS: 'a day'; hours, such as 24"),
        (
            {"LORRY_SESSION_POLICY": "{nonsense"},
            "LORRY_SESSION_POLICY: '{nonsense'; the JSON of trainer_session_policy",
        ),
        ({"LORRY_SESSION_POLICY": "[]"}, "LORRY_SESSION_POLICY: '[]'; the JSON of"),
    ],
)
def test_wrong_settings_are_sentences(environment: dict[str, str], sentence: str) -> None:
    with pytest.raises(InputError) as caught:
        read_ec2_settings(ENVIRONMENT | environment)
    assert sentence in str(caught.value)


def places(offered: set[tuple[str, str]], *more: Any, **changes: Any) -> list[tuple[str, str]]:
    spec = ec2_spec(**changes)
    return [(p.instance_type, p.zone) for p in choose_places(spec, load_catalog(), SUBNETS, offered, *more)]


A, B = "us-east-1a", "us-east-1b"
EIGHT = {"offer": "ec2-p5en-8", "gpus": 8}


def test_on_demand_takes_the_planned_type_in_every_zone_that_offers_it() -> None:
    assert places({("p5.4xlarge", A), ("p5.4xlarge", B), ("p5.48xlarge", A)}) == [("p5.4xlarge", A), ("p5.4xlarge", B)]


def test_spot_goes_where_it_will_last_then_where_it_is_cheap() -> None:
    offered = {("p5.4xlarge", A), ("p5.4xlarge", B)}
    usd = {("p5.4xlarge", A): 2.0, ("p5.4xlarge", B): 3.0}
    assert places(offered, usd) == [("p5.4xlarge", A), ("p5.4xlarge", B)]
    assert places(offered, usd, {("p5.4xlarge", A): 2, ("p5.4xlarge", B): 9}) == [("p5.4xlarge", B), ("p5.4xlarge", A)]


def test_a_better_type_is_taken_where_it_costs_no_more_than_the_quote() -> None:
    usd = {("p5en.48xlarge", A): 30.0, ("p6-b200.48xlarge", B): 28.0}
    assert places(set(usd), usd, **EIGHT) == [("p6-b200.48xlarge", B), ("p5en.48xlarge", A)]


def test_spot_above_the_quote_is_not_asked_for() -> None:
    with pytest.raises(ProviderError, match=r"spot costs \$9.00 an hour at least, and the quote is \$6.88"):
        places({("p5.4xlarge", A)}, {("p5.4xlarge", A): 9.0})


def test_a_type_that_our_zones_do_not_offer_is_named_with_the_zones_that_do() -> None:
    with pytest.raises(Refused, match=r"p5.4xlarge is not offered in us-east-1a, us-east-1b; a subnet in us-east-1f"):
        places({("p5.4xlarge", "us-east-1f")})


def test_the_newest_spot_price_counts() -> None:
    rows = [
        {"InstanceType": "t", "AvailabilityZone": A, "SpotPrice": usd, "Timestamp": at}
        for usd, at in (("2.0", "2026-11-22T10:00:00"), ("1.0", "2026-11-22T09:00:00"))
    ]
    assert spot_prices(rows) == {("t", A): 2.0}


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_on_ec2_is_a_request_or_a_sentence(name: str) -> None:
    written, catalog = load_recipe(name), load_catalog()
    hardware = written.recipe.hardware.model_copy(update={"backends": ("ec2",)})
    recipe = written.recipe.model_copy(update={"hardware": hardware})
    loaded = LoadedRecipe(name, recipe, recipe_sha256(recipe))
    given: dict[str, Any] = {"job_id": "job-1", "backend": "ec2", "store": "s3://bucket/jobs", "commit": None}
    try:
        spec = render(loaded, make_plan(loaded, None, catalog), None, catalog, **given)
        asked = ec2_request(spec, settings_of())
    except Refused as refusal:
        assert all(problem.got for problem in refusal.problems)  # noqa: PT017  both ends are right
        return
    offer = catalog.offers[spec.offer or ""]
    place = Place(spec.offer or "", offer.provider_type, "subnet-a", "us-east-1a", offer.usd_per_hour)
    made = placed(asked, spec, settings_of(), place, 1_800_003_600, "t" * 64)
    assert not ParamValidator().validate(made, SHAPE).has_errors()
    assert (made["MinCount"], made["MaxCount"]) == (spec.nodes, spec.nodes)
    assert len(made["NetworkInterfaces"]) == 1 + (offer.efa_cards if spec.nodes > 1 else 0)
