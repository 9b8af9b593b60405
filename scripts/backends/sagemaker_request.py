"""The request for a SageMaker training job: what runs, on what, with which channels and limits. Pure, without a secret.

request = training_request(spec, read_sagemaker_settings(os.environ)); body = {**request, "TrainingJobName": name}
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recipes.catalog import load_catalog
from recipes.job import LaunchSpec
from scripts.backends.base import long_store
from scripts.errors import InputError, Problem, Refused
from scripts.job_token import client_of
from scripts.models import recipe_folder

Json = dict[str, Any]
PREFIX = "lorry-"
"Where no Terraform room says another: its launcher may use no other names."
INPUT = "/opt/ml/input/data"
CHECKPOINTS = "/opt/ml/checkpoints"
RECIPE, TRAINING_SET = "recipe", "training"
"Channels: launch.json, and the folder of the training set."
SPARE_SECONDS = 300
"What the platform's own time limit leaves the container beyond its deadline: to save, and to bring home what there is."
LONGEST_SECONDS = 28 * 86_400
PENDING_SECONDS = 7200
"How long a job may wait for a machine on demand. Waiting is free; after two hours a launch of our own is given up too."
SPOT_WAIT_SECONDS = 4 * 3600
"How long a spot job may wait in all, for its first machine and after each interruption."
MOST_WARM_MINUTES = 360
DISK_GB = 30
"Every type we rent has NVMe of its own, which takes the place of a volume; asking for more than that is refused."
ROLE = re.compile(r"arn:aws[a-z-]*:iam::\d{12}:role/.+")
METRICS = {
    "train:loss": '"training_loss":([0-9.eE+-]+)',
    "train:learning_rate": '"learning_rate":([0-9.eE+-]+)',
    "train:gradient_norm": '"gradient_norm":([0-9.eE+-]+)',
    "train:tokens_per_second": '"tokens_per_second":([0-9.eE+-]+)',
    "validation:loss": '"validation_loss":([0-9.eE+-]+)',
    "step": '"step":([0-9]+)',
}
"CloudWatch metric -> where it stands in a line of metrics.jsonl, which the container prints."

_NAME_CHARACTERS = 63
_ARGUMENT_CHARACTERS = 256
_SUFFIX_CHARACTERS = len("--0123-99")
_IMAGE = re.compile(r"(\d{12})\.dkr\.ecr\.([a-z0-9-]+)\.amazonaws\.com(?:\.cn)?/[^\s@]+@sha256:[0-9a-f]{64}")
_KEY = re.compile(r"arn:aws[a-z-]*:kms:([a-z0-9-]+):\d{12}:key/.+")
_PREFIX = re.compile(r"[a-z][a-z0-9-]{0,31}-")


@dataclass(frozen=True)
class SageMakerSettings:
    """What the AWS room and a person decide; infra/stacks/aws names the outputs. warm_minutes: 0 keeps no machine."""

    role: str = ""
    region: str = ""
    image: str = ""
    prefix: str = PREFIX
    kms_key: str = ""
    subnets: tuple[str, ...] = ()
    security_groups: tuple[str, ...] = ()
    spot: bool = False
    warm_minutes: int = 0
    sdk: bool = False
    "Whether the request goes through SageMaker's own SDK."


def read_sagemaker_settings(environment: Mapping[str, str]) -> SageMakerSettings:
    """Settings from LORRY_SAGEMAKER_{ROLE,PREFIX,SUBNETS,SECURITY_GROUPS,SPOT,WARM_MINUTES,SDK},
    LORRY_IMAGE, LORRY_KMS_KEY, and LORRY_STORE_REGION or AWS_DEFAULT_REGION. Raises InputError."""
    problems = []
    spot, warm = environment.get("LORRY_SAGEMAKER_SPOT") or "no", environment.get("LORRY_SAGEMAKER_WARM_MINUTES") or "0"
    prefix = environment.get("LORRY_SAGEMAKER_PREFIX") or PREFIX
    if spot not in ("yes", "no"):
        problems.append(Problem("LORRY_SAGEMAKER_SPOT", repr(spot[:40]), "yes or no"))
    if re.fullmatch("[0-9]{1,4}", warm) is None or int(warm) > MOST_WARM_MINUTES:
        problems.append(Problem("LORRY_SAGEMAKER_WARM_MINUTES", repr(warm[:40]), f"0 to {MOST_WARM_MINUTES}"))
    if not _PREFIX.fullmatch(prefix):
        want = "small letters, digits and hyphens, with a hyphen at the end: sagemaker_job_name_prefix of the AWS room"
        problems.append(Problem("LORRY_SAGEMAKER_PREFIX", repr(prefix[:40]), want))
    if problems:
        raise InputError(*problems)
    return SageMakerSettings(
        role=environment.get("LORRY_SAGEMAKER_ROLE", ""),
        region=region_of(environment),
        image=environment.get("LORRY_IMAGE", ""),
        prefix=prefix,
        kms_key=environment.get("LORRY_KMS_KEY", ""),
        subnets=_words(environment, "LORRY_SAGEMAKER_SUBNETS"),
        security_groups=_words(environment, "LORRY_SAGEMAKER_SECURITY_GROUPS"),
        spot=spot == "yes",
        sdk=environment.get("LORRY_SAGEMAKER_SDK") == "yes",
        warm_minutes=int(warm),
    )


def region_of(environment: Mapping[str, str]) -> str:
    """The region of the store, and so of everything that reads it; empty where nothing says it."""
    names = ("LORRY_STORE_REGION", "AWS_DEFAULT_REGION", "AWS_REGION")
    return next(filter(None, (environment.get(name, "") for name in names)), "")


def training_request(spec: LaunchSpec, settings: SageMakerSettings) -> Json:
    """The body of CreateTrainingJob under the job's first name. Raises Refused with every reason why it cannot run."""
    image = spec.image or settings.image
    problems = _problems(spec, settings, image)
    if problems:
        raise Refused(*problems)
    home = f"{spec.store}/{spec.job_id}"
    body: Json = {
        "TrainingJobName": training_job_name(settings.prefix, spec.job_id, spec.store, 1),
        "AlgorithmSpecification": {
            "TrainingImage": image,
            "TrainingInputMode": "File",
            "ContainerEntrypoint": ["python", "-m", "scripts.container"],
            "ContainerArguments": ["--store", spec.store, "--job", spec.job_id],
            "MetricDefinitions": [{"Name": name, "Regex": regex} for name, regex in METRICS.items()],
        },
        "RoleArn": settings.role,
        "InputDataConfig": [_channel(name, url) for name, url in channels(spec).items()],
        "OutputDataConfig": {"S3OutputPath": f"{home}/output", "CompressionType": "NONE"},
        "CheckpointConfig": {"S3Uri": f"{home}/mirror", "LocalPath": CHECKPOINTS},
        "ResourceConfig": _resources(spec, settings),
        "StoppingCondition": _stopping(spec, settings),
        "EnableManagedSpotTraining": settings.spot,
        "Environment": _variables(spec, settings, image),
        "Tags": _tags(spec, settings),
    }
    if settings.kms_key:  # of the NVMe: the hardware has its own key, and another is refused
        body["OutputDataConfig"]["KmsKeyId"] = settings.kms_key
    if settings.subnets:
        body["VpcConfig"] = {"Subnets": [*settings.subnets], "SecurityGroupIds": [*settings.security_groups]}
    return body


def training_job_name(prefix: str, job_id: str, store: str, number: int) -> str:
    """The name of the job's `number`-th training job. A name is used up for ever, in the whole account and region.

    No job id has a double hyphen, so what follows it is ours: a mark of the store, since two clients may have a job of
    the same id, and the number from the second on. `lorry-bicycle-1--3fa9`, `lorry-bicycle-1--3fa9-2`.
    """
    mark = hashlib.sha256(store.encode()).hexdigest()[:4]
    return f"{prefix}{job_id}--{mark}" + (f"-{number}" if number > 1 else "")


def channels(spec: LaunchSpec) -> dict[str, str]:
    """Channel -> S3 URL. A staged base model is a channel of its folder's name, so that INPUT is a models folder."""
    home = f"{spec.store}/{spec.job_id}"
    found = {RECIPE: f"{home}/launch.json", TRAINING_SET: f"{home}/data/"}
    if is_staged(spec):
        models = spec.store.removeprefix("s3://").partition("/")[0] + "/models"
        folder = model_folder_name(spec)
        found[folder] = f"s3://{models}/{folder}/"
    return found


def is_staged(spec: LaunchSpec) -> bool:
    """Whether the base model must be brought; the smoke model is made on the machine."""
    facts = load_catalog().models.get(spec.recipe.base.id)
    return facts is None or facts.staged


def model_folder_name(spec: LaunchSpec) -> str:
    """The folder of the base model below `models/` of the store's bucket, where `lorry stage` put it."""
    return recipe_folder(Path(), spec.recipe).name


def _channel(name: str, url: str) -> Json:
    source = {"S3DataType": "S3Prefix", "S3Uri": url, "S3DataDistributionType": "FullyReplicated"}
    return {"ChannelName": name, "DataSource": {"S3DataSource": source}, "InputMode": "File"}


def _resources(spec: LaunchSpec, settings: SageMakerSettings) -> Json:
    offer = load_catalog().offers[spec.offer or ""]
    wanted = {"InstanceType": offer.provider_type, "InstanceCount": spec.nodes, "VolumeSizeInGB": DISK_GB}
    return wanted | ({"KeepAlivePeriodInSeconds": settings.warm_minutes * 60} if settings.warm_minutes else {})


def _stopping(spec: LaunchSpec, settings: SageMakerSettings) -> Json:
    run = spec.deadline_seconds + SPARE_SECONDS
    if settings.spot:
        return {"MaxRuntimeInSeconds": run, "MaxWaitTimeInSeconds": run + SPOT_WAIT_SECONDS}
    return {"MaxRuntimeInSeconds": run, "MaxPendingTimeInSeconds": PENDING_SECONDS}


def _variables(spec: LaunchSpec, settings: SageMakerSettings, image: str) -> dict[str, str]:
    own = {"LORRY_STORE": spec.store, "LORRY_JOB": spec.job_id, "AWS_DEFAULT_REGION": settings.region}
    own |= {"LORRY_TRAINER_IMAGE": image}
    return own | ({"LORRY_MODELS": INPUT} if is_staged(spec) else {})


def _tags(spec: LaunchSpec, settings: SageMakerSettings) -> list[Json]:
    tags = {"lorry": settings.prefix.rstrip("-"), "lorry-job": spec.job_id}
    client = client_of(spec.store)
    return [
        {"Key": key, "Value": value} for key, value in (tags | ({"lorry-client": client} if client else {})).items()
    ]


def _words(environment: Mapping[str, str], name: str) -> tuple[str, ...]:
    return tuple(environment.get(name, "").replace(",", " ").split())


def _problems(spec: LaunchSpec, settings: SageMakerSettings, image: str) -> list[Problem]:
    found = long_store(spec.store, _ARGUMENT_CHARACTERS)
    offer = load_catalog().offers.get(spec.offer or "")
    if offer is None or offer.backend != "sagemaker":
        found.append(Problem("offer", f"{spec.offer} is no offer of sagemaker", "plan the recipe for sagemaker"))
    if not ROLE.fullmatch(settings.role):
        want = "the execution role: sagemaker_role_arn of the AWS room"
        found.append(Problem("LORRY_SAGEMAKER_ROLE", repr(settings.role) if settings.role else "not set", want))
    if not settings.region:
        found.append(Problem("AWS_DEFAULT_REGION", "not set", "the region of the store's bucket, such as us-east-1"))
    room = _NAME_CHARACTERS - _SUFFIX_CHARACTERS - len(settings.prefix)
    if len(spec.job_id) > room:
        said = f"{spec.job_id} has {len(spec.job_id)} characters"
        found.append(Problem("job id", said, f"at most {room} on SageMaker; name it with --job"))
    if spec.deadline_seconds + SPARE_SECONDS > LONGEST_SECONDS:
        found.append(Problem("limits.max_hours", f"{spec.deadline_seconds / 3600:g} h", "at most 28 days on SageMaker"))
    if bool(settings.subnets) != bool(settings.security_groups):
        missing = "SECURITY_GROUPS" if settings.subnets else "SUBNETS"
        found.append(Problem(f"LORRY_SAGEMAKER_{missing}", "not set", "both or neither: sagemaker_vpc_config"))
    return found + _wrong_places(settings, image) + _warm_problems(spec, settings)


def _wrong_places(settings: SageMakerSettings, image: str) -> list[Problem]:
    """SageMaker pulls images from its own region alone, by digest for us, and writes with keys of that region."""
    found, region = [], settings.region
    home, key = _IMAGE.fullmatch(image), _KEY.fullmatch(settings.kms_key)
    if home is None:
        want = "LORRY_IMAGE in ECR by digest: ACCOUNT.dkr.ecr.REGION.amazonaws.com/NAME@sha256:..."
        found.append(Problem("image", repr(image[:160]) if image else "not set", want))
    elif region and home[2] != region:
        found.append(Problem("image", f"it is in {home[2]}, the job in {region}", f"push it to ECR in {region}"))
    if settings.kms_key and (key is None or (region and key[1] != region)):
        want = f"the ARN of a key in {region or 'the region of the store'}: kms_key_arn of the AWS room"
        found.append(Problem("LORRY_KMS_KEY", repr(settings.kms_key[:160]), want))
    return found


def _warm_problems(spec: LaunchSpec, settings: SageMakerSettings) -> list[Problem]:
    """A machine that is kept warm costs on after the job, so that time must fit below the recipe's limit too."""
    offer = load_catalog().offers.get(spec.offer or "")
    if not settings.warm_minutes or offer is None:
        return []
    if settings.spot:
        return [Problem("LORRY_SAGEMAKER_WARM_MINUTES", "set together with spot", "one of the two: spot has no pools")]
    usd = settings.warm_minutes / 60 * offer.usd_per_hour * spec.nodes
    if spec.cap_usd + usd > spec.recipe.limits.max_usd:
        said = f"{settings.warm_minutes} minutes cost ${usd:.2f} beyond the cap of ${spec.cap_usd:.2f}"
        return [Problem("LORRY_SAGEMAKER_WARM_MINUTES", said, "fewer minutes, or a higher limits.max_usd")]
    return []
