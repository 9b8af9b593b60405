"""The body of POST /v2/pods or /v2/clusters for a job: what runs, where, with which variables. Pure, without a secret.

request = pod_request(spec, read_pod_settings(os.environ)); body = placed(request, candidate, deadline, token)
"""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from recipes.catalog import load_catalog
from recipes.job import LaunchSpec
from scripts.backends.base import machine_name
from scripts.backends.runpod_machines import cluster_name
from scripts.backends.runpod_offers import Candidate, Limits
from scripts.errors import InputError, Problem, Refused
from scripts.job_token import KEYS_SECONDS, client_of, door_variables

Json = dict[str, Any]
MOST_VARIABLES = 50
_PLACED_VARIABLES = 4  # deadline, token, and where boto3 fetches keys with it
MOUNT = "/workspace"
CUDA = "13.0"
"What torch in the trainer's image is built for; the driver of an older host cannot run it. infra/image/trainer.lock."
_OS_DISK_GB = 20
_DIGEST = re.compile(r"[^\s@]+@sha256:[0-9a-f]{64}")
_VARIABLE = re.compile(r"(?!RUNPOD_|LORRY_(?:STORE|JOB|DEADLINE)$)[A-Z][A-Z0-9_]{1,80}")
_SECRET = re.compile(r"(?!RUNPOD)[A-Za-z_][A-Za-z0-9_.\-/]{0,190}")
_STORE_KEYS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
_PASSED_ON = ("AWS_DEFAULT_REGION", "AWS_ENDPOINT_URL")  # neither is secret


@dataclass(frozen=True)
class PodSettings:
    """secrets: variable of the Pod -> the Runpod secret that fills it. plain: variables passed on as they are.
    limits: where it may run, as set by a person."""

    image: str = ""
    volume_id: str = ""
    registry_id: str = ""
    limits: Limits = field(default_factory=Limits)
    secrets: Mapping[str, str] = field(default_factory=dict)
    plain: Mapping[str, str] = field(default_factory=dict)
    front_door: str = ""
    token_secret: str = field(default="", repr=False)


def read_pod_settings(environment: Mapping[str, str]) -> PodSettings:
    """Settings from LORRY_IMAGE, RUNPOD_VOLUME_ID, RUNPOD_DATACENTER, RUNPOD_REGISTRY_ID, LORRY_COMPLIANCE,
    LORRY_POD_SECRETS (VARIABLE=secret,...), LORRY_PUBLIC_URL and LORRY_TOKEN_SECRET. Raises InputError."""
    secrets, problems = {}, []
    for pair in filter(None, environment.get("LORRY_POD_SECRETS", "").split(",")):
        variable, _, secret = (part.strip() for part in pair.partition("="))
        if not _VARIABLE.fullmatch(variable) or not _SECRET.fullmatch(secret):
            want = "VARIABLE=name of a Runpod secret, such as AWS_ACCESS_KEY_ID=lorry_store_key_id, with commas between"
            problems.append(Problem("LORRY_POD_SECRETS", f"{variable[:80]!r} does not name one", want))
        secrets[variable] = secret
    if problems:
        raise InputError(*problems)
    return PodSettings(
        image=environment.get("LORRY_IMAGE", ""),
        volume_id=environment.get("RUNPOD_VOLUME_ID", ""),
        registry_id=environment.get("RUNPOD_REGISTRY_ID", ""),
        limits=Limits(_words(environment, "RUNPOD_DATACENTER"), _words(environment, "LORRY_COMPLIANCE")),
        secrets=secrets,
        plain={name: environment[name] for name in _PASSED_ON if environment.get(name)},
        front_door=environment.get("LORRY_PUBLIC_URL", "").rstrip("/"),
        token_secret=environment.get("LORRY_TOKEN_SECRET", ""),
    )


def pod_request(spec: LaunchSpec, settings: PodSettings) -> Json:
    """The body without what only the moment of asking knows: the datacentre, the deadline and the job's token.

    Raises Refused with every reason why this job cannot run in a Pod.
    """
    image = spec.image or settings.image
    problems = _problems(spec, settings, image)
    if problems:
        raise Refused(*problems)
    offer = load_catalog().offers[spec.offer or ""]
    body: Json = {
        "name": machine_name(spec.job_id),
        "image": image,
        "args": shlex.join(_command(spec)),
        "disk": disk_gb(spec),
        "env": _variables(spec, settings) | {"LORRY_TRAINER_IMAGE": image},
        "ports": [],
    }
    if spec.nodes > 1:
        shape = {"gpuTypeId": offer.provider_type, "gpuCountPerPod": spec.gpus, "podCount": spec.nodes}
        body |= {"name": cluster_name(spec.job_id, spec.store), "type": "TRAINING", "compute": shape}
    else:
        # Without the count the scheduler finds no machine.
        body |= {"cloud": "SECURE", "gpu": {"id": offer.provider_type, "count": spec.gpus, "minCudaVersion": CUDA}}
    if settings.volume_id:
        body["mounts"] = {"network": [{"volumeId": settings.volume_id, "path": MOUNT}]}
    if settings.registry_id and spec.nodes == 1:
        body["registry"] = settings.registry_id
    return body


def placed(request: Mapping[str, Any], candidate: Candidate, deadline: int, token: str) -> Json:
    """The body for one place. deadline: unix seconds after which anybody may end the Pod. token: of the job, for the
    front door, where boto3 then fetches the keys of the store and renews them; empty without one."""
    env = {**request["env"], "LORRY_DEADLINE": str(deadline)}
    if token:
        env |= door_variables(env["LORRY_FRONT_DOOR"], env["LORRY_JOB"], token)
    shape: Json = (
        {"compute": {**request["compute"], "gpuTypeId": candidate.gpu}}
        if "compute" in request
        else {"gpu": {**request["gpu"], "id": candidate.gpu}}
    )
    return {**request, **shape, "dataCenterIds": [candidate.datacenter], "env": env}


def disk_gb(spec: LaunchSpec) -> int:
    """Container disk: 20 GB for the system and the logs, and three checkpoints of 16 bytes for each trained parameter
    (weights and both Adam moments in fp32, and the adapter)."""
    return _OS_DISK_GB + math.ceil(3 * 16 * spec.trainable_parameters / 1e9)


def _words(environment: Mapping[str, str], name: str) -> frozenset[str]:
    return frozenset(environment.get(name, "").replace(",", " ").split())


def _command(spec: LaunchSpec) -> list[str]:
    """The work folder has a fixed place, so that a container that is started again finds what it left."""
    where = ["--store", spec.store, "--job", spec.job_id, "--work", f"jobs/{spec.job_id}"]
    return ["python", "-m", "scripts.container", *where]


def _variables(spec: LaunchSpec, settings: PodSettings) -> dict[str, str]:
    references = {name: f"{{{{ RUNPOD_SECRET_{secret} }}}}" for name, secret in settings.secrets.items()}
    models = {"LORRY_MODELS": f"{MOUNT}/models"} if settings.volume_id else {}
    own = {"LORRY_STORE": spec.store, "LORRY_JOB": spec.job_id, "LORRY_FRONT_DOOR": settings.front_door}
    own |= {"NODES": str(spec.nodes)} if spec.nodes > 1 else {}  # rank and address of node 0 come from the platform
    return {**settings.plain, **references, **models, **own}


def _problems(spec: LaunchSpec, settings: PodSettings, image: str) -> list[Problem]:
    catalog, found = load_catalog(), []
    offer, model = catalog.offers.get(spec.offer or ""), catalog.models.get(spec.recipe.base.id)
    if offer is None or offer.backend != "runpod_pod":
        found.append(Problem("offer", f"{spec.offer} is no offer of runpod_pod", "plan the recipe for runpod_pod"))
    if spec.nodes > 1 and settings.registry_id:
        said = "set, and Runpod's clusters cannot pull from a private registry"
        want = "unset, with LORRY_IMAGE in a public registry: it holds no secret, no model and no data"
        found.append(Problem("RUNPOD_REGISTRY_ID", said, want))
    if not _DIGEST.fullmatch(image):
        want = "LORRY_IMAGE: registry/name@sha256:..., since a tag may mean another image on each host"
        found.append(Problem("image", repr(image[:120]) if image else "not set", want))
    if model is not None and model.staged and not settings.volume_id:
        want = "the network volume to which `lorry stage` has brought it"
        found.append(Problem("RUNPOD_VOLUME_ID", f"not set, and {spec.recipe.base.id} must be staged", want))
    has_token = bool(settings.front_door and settings.token_secret and client_of(spec.store))
    if spec.store.startswith("s3://") and not has_token and not set(_STORE_KEYS) <= set(settings.secrets):
        want = "LORRY_POD_SECRETS=" + ",".join(f"{name}=name-of-a-runpod-secret" for name in _STORE_KEYS)
        found.append(Problem("store", f"a Pod would have no key for {spec.store}", want))
    if spec.store.startswith("s3://") and not has_token and spec.deadline_seconds > KEYS_SECONDS:
        hours = spec.deadline_seconds / 3600
        want = (
            "LORRY_PUBLIC_URL and LORRY_TOKEN_SECRET, so that the front door renews its keys, or limits.max_hours: 12"
        )
        found.append(Problem("deadline", f"{hours:.1f} h, and keys without a front door last 12", want))
    variables = len(_variables(spec, settings)) + _PLACED_VARIABLES
    if variables > MOST_VARIABLES:
        found.append(
            Problem("variables", f"{variables} of them", f"at most {MOST_VARIABLES}: shorten LORRY_POD_SECRETS")
        )
    return found
