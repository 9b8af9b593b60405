"""The Runpod roots as committed, from init to destroy, against the local Runpod."""

from __future__ import annotations

import json

import pytest

from scripts.terraform import read_outputs
from tests.infra.conftest import cpu_seconds_of_children, init

IMAGE = "ghcr.io/example/trainer@sha256:" + "a" * 64
VARIABLES = {
    "datacenter": "US-KS-2",
    "gpu_stock": {"US-KS-2": ["NVIDIA H200"], "US-TX-1": []},
    "images": {"trainer": IMAGE, "gateway": IMAGE, "serving": IMAGE},
    "registry": {"username": "robot", "password": "not-a-real-one"},
    "ecr_repository_arns": {"trainer": "arn:aws:ecr:us-east-1:123456789012:repository/lorry/trainer"},
    "secret_env": {"trainer": {"HF_TOKEN": "lorry_hf_token"}},
}


@pytest.mark.parametrize("environment", ["dev", "prod"])
def test_a_runpod_room_is_made_kept_changed_and_removed(environment, runpod_tf, runpod_rest):
    began = cpu_seconds_of_children()
    root = runpod_tf(f"live/{environment}/runpod", VARIABLES)
    init(root)
    root.validate()

    assert root.plan()
    root.apply()
    assert not root.plan(), "a second plan must find nothing to do"

    room = read_outputs(root.root, root.env)
    held = runpod_rest.account.held
    assert held["network-volumes"][room["volume_id"]]["dataCenter"] == "US-KS-2"
    training = held["serverless"][room["training_endpoint_id"]]
    assert training["timeout"] == {"dev": 12, "prod": 72}[environment] * 3_600_000
    assert (training["type"], training["workers"]["min"]) == ("QUEUE", 0)
    assert training["networkVolumes"] == [room["volume_id"]]
    assert training["env"]["HF_TOKEN"] == "{{ RUNPOD_SECRET_lorry_hf_token }}"
    assert room["training_url"] == f"https://api.runpod.ai/v2/{room['training_endpoint_id']}"
    assert room["secret_names"] == ["lorry_hf_token"]
    assert len(held["delegations"]) == len(held["registries"]) == len(held["templates"]) == 1
    assert len(held["serverless"]) == 3
    template = held["templates"][room["pod_template_id"]]
    assert (template["image"], template["registry"]) == (IMAGE, room["registry_id"])

    published = '[{"name": "bicycle-1", "path": "/runpod-volume/adapters/bicycle-1"}]'
    held["serverless"][room["serving_endpoint_id"]]["env"]["LORA_MODULES"] = published
    larger = runpod_tf(f"live/{environment}/runpod", VARIABLES | {"volume_size_gb": 500})
    assert larger.plan()
    larger.apply()
    assert held["network-volumes"][room["volume_id"]]["size"] == 500
    assert held["serverless"][room["serving_endpoint_id"]]["env"]["LORA_MODULES"] == published

    larger.destroy()
    assert runpod_rest.account.is_empty()
    assert cpu_seconds_of_children() - began < 20  # of two cores in the 10 s that it may take when they are idle


def test_secrets_never_reach_a_request_but_the_registry_login(runpod_tf, runpod_rest):
    root = runpod_tf("live/dev/runpod", VARIABLES)
    init(root)
    root.plan()
    root.apply()
    told = [(method, path) for method, path, body in runpod_rest.log if "not-a-real-one" in body]
    assert told == [("POST", "/v2/registries")]
    assert "not-a-real-one" not in json.dumps(read_outputs(root.root, root.env))
