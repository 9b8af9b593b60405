"""The web app's settings from what applied rooms say about themselves."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from recipes.serving import Place
from scripts.env import as_dotenv, web_settings
from scripts.errors import NotFound
from scripts.serving.history import following, inference_settings
from scripts.store import open_store

ROOM = {
    "datacenter": "US-KS-2",
    "volume_id": "v1",
    "training_endpoint_id": "e1",
    "training_url": "https://api.runpod.ai/v2/e1",
    "gateway_url": "https://g1.api.runpod.ai",
    "serving_endpoint_id": "s1",
    "serving_openai_url": "https://api.runpod.ai/v2/s1/openai/v1",
    "registry_id": "r1",
    "registry_password": "CANARY",
}
DOTENV = """\
GPU_CLUSTER_API_URL=https://g1.api.runpod.ai/v2/lorry
INFERENCE_API_URL=https://api.runpod.ai/v2/s1
RUNPOD_DATACENTER=US-KS-2
RUNPOD_VOLUME_ID=v1
RUNPOD_TRAINING_ENDPOINT_ID=e1
RUNPOD_SERVING_ENDPOINT_ID=s1
# GPU_CLUSTER_API_KEY is secret and not written here: set it to the client's key of the front door
"""


def test_the_front_door_is_what_the_web_app_calls():
    assert as_dotenv(web_settings(ROOM)) == DOTENV


def test_without_a_front_door_the_web_app_calls_the_training_endpoint():
    web = web_settings(ROOM | {"gateway_url": None, "serving_openai_url": None, "serving_endpoint_id": None})
    assert web.settings["GPU_CLUSTER_API_URL"] == "https://api.runpod.ai/v2/e1"
    assert web.secrets == {"GPU_CLUSTER_API_KEY": "a Runpod key that may only call this endpoint"}
    assert not any(name.startswith("INFERENCE") or "SERVING" in name for name in web.settings)


def test_the_chat_is_sent_to_what_is_live_and_a_share_to_the_canary(tmp_path: Path) -> None:
    store = open_store(tmp_path.as_uri())
    assert inference_settings(store) == {}
    place = Place(url="http://127.0.0.1:8800/v1/", base="lorry/smoke", adapters="file:///a", mounted="/a")
    said = {"deed": "canary", "job_id": "two", "by": "ann", "at": 1.0, "outcome": "done"}
    following(store, "main", None, place=place, live="one", canary="two", canary_share=0.1, **said)
    assert inference_settings(store)["INFERENCE_API_URL"] == "http://127.0.0.1:8800"  # a /v1 is the route's own
    settings = web_settings(ROOM, inference_settings(store)).settings
    assert {name: value for name, value in settings.items() if name.startswith("INFERENCE")} == {
        "INFERENCE_API_URL": "https://api.runpod.ai/v2/s1",  # what the rooms say of themselves comes first
        "INFERENCE_MODEL": "one",
        "INFERENCE_CANARY_MODEL": "two",
        "INFERENCE_CANARY_SHARE": "0.1",
    }


def test_rooms_in_which_nothing_trains_are_named():
    with pytest.raises(NotFound, match="no front door and no training endpoint; name the Runpod root too"):
        web_settings({"store_url": "s3://b", "region": "us-east-1"})


def test_an_aws_room_alone_is_enough_to_launch_there():
    room = {
        "sagemaker_role_arn": "arn:aws:iam::123456789012:role/lorry-training",
        "sagemaker_job_name_prefix": "lorry-dev-",
        "sagemaker_vpc_config": {"Subnets": ["subnet-1", "subnet-2"], "SecurityGroupIds": ["sg-1"]},
        "kms_key_arn": "arn:aws:kms:us-east-1:123456789012:key/1",
        "ec2_launch_template_id": None,
    }
    assert web_settings(room).secrets == {}
    assert web_settings(room).settings == {
        "LORRY_KMS_KEY": "arn:aws:kms:us-east-1:123456789012:key/1",
        "LORRY_SAGEMAKER_ROLE": "arn:aws:iam::123456789012:role/lorry-training",
        "LORRY_SAGEMAKER_PREFIX": "lorry-dev-",
        "LORRY_SAGEMAKER_SUBNETS": "subnet-1,subnet-2",
        "LORRY_SAGEMAKER_SECURITY_GROUPS": "sg-1",
    }


def test_a_value_that_a_shell_would_split_is_quoted():
    assert 'RUNPOD_DATACENTER="a b # \\"c\\""\n' in as_dotenv(web_settings(ROOM | {"datacenter": 'a b # "c"'}))


def test_settings_are_read_from_real_roots_and_written_once(apply_room, lorry, tmp_path):
    roots = [str(apply_room(ROOM)), str(apply_room({"store_url": "s3://lorry-bucket", "region": "us-east-1"}))]
    printed = lorry("env", *roots)
    assert printed.code == 0
    assert "LORRY_STORE=s3://lorry-bucket\nLORRY_STORE_REGION=us-east-1\n" in printed.out
    assert "CANARY" not in printed.out
    assert json.loads(lorry("env", *roots, "--json").out)["settings"]["RUNPOD_VOLUME_ID"] == "v1"

    file = tmp_path / ".env.local"
    for _ in range(2):
        done = lorry("env", *roots, "--out", str(file))
        assert done.out == f"{file}: 8 settings; set GPU_CLUSTER_API_KEY yourself\n"
    assert file.read_text() == printed.out
    file.write_text(printed.out + "GPU_CLUSTER_API_KEY=mine\n")
    refused = lorry("env", *roots, "--out", str(file))
    assert (refused.code, "it exists and says something else" in refused.error) == (5, True)
    assert "mine" in file.read_text()
    assert [path.name for path in tmp_path.iterdir()] == [".env.local"]


def test_a_root_that_was_never_applied_is_named(lorry, tmp_path):
    done = lorry("env", str(tmp_path))
    assert done.code == 4
    assert "nothing has been applied here" in done.error
