"""The settings of the web app, written from what the applied rooms say about themselves. No secret is among them.

settings = web_settings(read_outputs(Path("infra/live/prod/runpod"), os.environ))
print(as_dotenv(settings))
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scripts.errors import Conflict, NotFound, Problem
from scripts.store.disk import disk_errors, unfinished

_DIRECT = {  # setting -> field of the rooms
    "LORRY_STORE": "store_url",
    "LORRY_STORE_REGION": "region",
    "RUNPOD_DATACENTER": "datacenter",
    "RUNPOD_VOLUME_ID": "volume_id",
    "RUNPOD_TRAINING_ENDPOINT_ID": "training_endpoint_id",
    "RUNPOD_SERVING_ENDPOINT_ID": "serving_endpoint_id",
    # for whoever launches on AWS
    "LORRY_TRAINER_ROLE": "trainer_role_arn",
    "LORRY_SESSION_POLICY": "trainer_session_policy",
    "LORRY_KMS_KEY": "kms_key_arn",
    "LORRY_SAGEMAKER_ROLE": "sagemaker_role_arn",
    "LORRY_SAGEMAKER_PREFIX": "sagemaker_job_name_prefix",
    "LORRY_SAGEMAKER_SUBNETS": "sagemaker_subnets",
    "LORRY_SAGEMAKER_SECURITY_GROUPS": "sagemaker_security_groups",
    "LORRY_EC2_TEMPLATE": "ec2_launch_template_id",
    "LORRY_EC2_ROLE_ID": "ec2_machine_role_id",
    "LORRY_EC2_SUBNETS": "ec2_subnet_ids",
    "LORRY_EC2_GROUP": "ec2_security_group_id",
    "LORRY_EC2_PLACEMENT_GROUP": "ec2_placement_group",
    "LORRY_EC2_MAX_HOURS": "ec2_max_hours",
}
_BARE = re.compile(r"[A-Za-z0-9_./:@+-]+")
_FRONT_DOOR_PATH = "/v2/lorry"  # the web app takes the last part of its URL for an endpoint id


@dataclass(frozen=True)
class WebSettings:
    """settings: name -> value. secrets: name -> where a person gets the value, which is never written here."""

    settings: dict[str, str]
    secrets: dict[str, str]


def web_settings(rooms: Mapping[str, Any], inference: Mapping[str, str] | None = None) -> WebSettings:
    """What the web app must know, from the merged outputs of the rooms. Raises NotFound where nothing can train.

    inference: what scripts.serving.history.inference_settings says of the store.
    """
    inside = rooms.get("sagemaker_vpc_config") or {}
    rooms = {
        **rooms,
        "sagemaker_subnets": inside.get("Subnets"),
        "sagemaker_security_groups": inside.get("SecurityGroupIds"),
    }
    settings: dict[str, str] = {}
    secrets: dict[str, str] = {}
    if rooms.get("gateway_url"):
        settings["GPU_CLUSTER_API_URL"] = str(rooms["gateway_url"]).rstrip("/") + _FRONT_DOOR_PATH
        secrets = {"GPU_CLUSTER_API_KEY": "the client's key of the front door"}
    elif rooms.get("training_url"):
        settings["GPU_CLUSTER_API_URL"] = str(rooms["training_url"]).rstrip("/")
        secrets = {"GPU_CLUSTER_API_KEY": "a Runpod key that may only call this endpoint"}
    elif not rooms.get("sagemaker_role_arn"):  # with an AWS room alone a front door stands where its owner put it
        want = "name the Runpod root too, such as infra/live/prod/runpod"
        raise NotFound(Problem("env", "these rooms have no front door and no training endpoint", want))
    if rooms.get("serving_openai_url"):
        settings["INFERENCE_API_URL"] = str(rooms["serving_openai_url"]).removesuffix("/openai/v1")
    settings = dict(inference or {}) | settings
    settings |= {name: _text(rooms[field]) for name, field in _DIRECT.items() if rooms.get(field)}
    return WebSettings(settings, secrets)


def _text(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def as_dotenv(web: WebSettings) -> str:
    """Lines NAME=value, quoted where it must be; a secret is a comment that says where its value comes from."""
    lines = [f"{name}={value if _BARE.fullmatch(value) else json.dumps(value)}" for name, value in web.settings.items()]
    lines += [f"# {name} is secret and not written here: set it to {source}" for name, source in web.secrets.items()]
    return "\n".join(lines) + "\n"


def write_once(path: Path, text: str) -> None:
    """Writes a new file, whole or not at all. Raises Conflict when it exists with other text: it may hold keys."""
    with disk_errors(path), unfinished(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
        try:
            os.link(temporary, path)
        except FileExistsError:
            if path.read_text(encoding="utf-8", errors="replace") != text:
                want = "another --out, or remove it first"
                raise Conflict(Problem(str(path), "it exists and says something else", want)) from None
