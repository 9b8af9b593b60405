"""What each role can and cannot do, from the policies that Terraform really made in the local AWS (dev root)."""

from __future__ import annotations

import json
import shutil
import subprocess
import urllib.request
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import pytest
from botocore.exceptions import ClientError

from recipes.catalog import load_catalog
from recipes.load import load_recipe
from scripts.backends.ec2 import Ec2Backend
from scripts.backends.sagemaker import SageMakerBackend
from scripts.doctor.finding import Subject
from scripts.doctor.preflight import preflight
from scripts.fake_runpod.clock import Clock
from scripts.fake_runpod.processes import ProcessRunner
from scripts.launch import launch
from scripts.plan import make_plan
from scripts.store import open_store
from scripts.tick import Hands, tick
from scripts.tick import Room as Jobs
from tests.ec2.conftest import EPOCH, ec2_spec
from tests.ec2.github_identity import serve_github
from tests.ec2.local_ec2 import BOOT_SECONDS, BOTH, Account
from tests.infra import patched_moto
from tests.infra.asked_of_aws import asked_of_aws, rights_of
from tests.infra.conftest import INFRA, REGION, STATE_BUCKET, client
from tests.infra.iam_evaluator import is_allowed, is_trusted
from tests.infra.test_aws_roots import ACCOUNT, variables
from tests.runpod.conftest import data_in
from tests.sagemaker.conftest import spec_of as sagemaker_spec
from tests.sagemaker.fake_sagemaker import Pace, SageMaker
from tests.sagemaker.wire import serve as serve_sagemaker

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

# All that carries a policy. Left out: the bucket's lifecycle, for which the provider waits 55 s.
STORE = "module.room.module.store"
TARGETS = [
    *(f"module.room.module.{name}" for name in ("registry", "sagemaker", "ec2", "github")),
    f"{STORE}.aws_iam_role_policy.reader",
    *(f"{STORE}.aws_iam_role_policy_attachment.{name}" for name in ("gateway", "trainer", "launcher")),
    f"{STORE}.aws_s3_bucket_policy.this",
]
GITHUB = f"arn:aws:iam::{ACCOUNT}:oidc-provider/token.actions.githubusercontent.com"
VIA_S3 = {"kms:ViaService": f"s3.{REGION}.amazonaws.com"}


@dataclass(frozen=True)
class Room:
    """The applied resources, address below module.room -> values; `url` is the local AWS that holds them."""

    url: str
    resources: dict[str, dict[str, Any]]
    session_template: str
    store_url: str

    def document(self, address, field="policy"):
        return json.loads(self.resources[address][field])

    def role(self, address):
        """Policies of a role: inline ones and attached ones of ours."""
        name = self.resources[address]["name"]
        inline = [r["policy"] for a, r in self.resources.items() if ".aws_iam_role_policy." in a and r["role"] == name]
        arns = {r["policy_arn"] for a, r in self.resources.items() if "_attachment." in a and r["role"] == name}
        managed = [r["policy"] for a, r in self.resources.items() if ".aws_iam_policy." in a and r["arn"] in arns]
        return [json.loads(text) for text in inline + managed]

    @property
    def bucket(self):
        return self.resources["module.store.aws_s3_bucket.this"]["arn"]

    def session(self, prefix):
        """The published session policy, filled in for one job as a launcher does."""
        return json.loads(self.session_template.replace("JOB_PREFIX", prefix))


@pytest.fixture(scope="module")
def room(base_env, aws_provider, aws_server, tmp_path_factory):
    patched_moto.reset(aws_server)
    client(aws_server, "s3").create_bucket(Bucket=STATE_BUCKET)
    copy = tmp_path_factory.mktemp("policies") / "infra"
    shutil.copytree(INFRA, copy, ignore=shutil.ignore_patterns(".terraform"))
    root = copy / "live/dev/aws"
    (root / "given.auto.tfvars.json").write_text(json.dumps(variables(aws_server)))
    env = {**base_env, "AWS_ENDPOINT_URL": aws_server}

    def terraform(*words, said=""):
        done = subprocess.run(["terraform", *words], cwd=root, env=env, capture_output=True, text=True, input=said)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    terraform("init", "-input=false", f"-backend-config=bucket={STATE_BUCKET}", f"-backend-config=region={REGION}")
    terraform("apply", "-input=false", "-auto-approve", *(f"-target={target}" for target in TARGETS))
    state = json.loads(terraform("show", "-json"))["values"]["root_module"]
    template, store = (
        json.loads(terraform("console", said=f"module.room.{name}\n"))
        for name in ("trainer_session_policy", "store_url")
    )
    return Room(aws_server, dict(_resources(state)), template, store)


def _resources(module):
    for resource in module.get("resources", []):
        yield resource["address"].removeprefix("module.room."), resource["values"]
    for child in module.get("child_modules", []):
        yield from _resources(child)


def test_a_trainer_session_reaches_its_own_job_and_no_other(room):
    role = room.role("module.store.aws_iam_role.trainer")
    session = room.session("jobs/clients/acme/jobs/j1")

    def may(action, key):
        return is_allowed(action, f"{room.bucket}/{key}", role, session)

    for action in ("s3:GetObject", "s3:PutObject", "s3:PutObjectTagging", "s3:AbortMultipartUpload"):
        assert may(action, "jobs/clients/acme/jobs/j1/adapter/adapter_model.safetensors")
        for other in (
            "jobs/clients/acme/jobs/j2/x",
            "jobs/clients/acme/jobs/j11/x",
            "jobs/clients/other/jobs/j1/x",
            "machines/i/x",
        ):
            assert not may(action, other)
    assert may("s3:GetObject", "models/Qwen/config.json")
    assert not may("s3:PutObject", "models/Qwen/config.json"), "a job must not change the base model of others"
    assert may("s3:DeleteObject", "jobs/clients/acme/jobs/j1/checkpoints/step-10/x")
    assert not may("s3:DeleteObject", "jobs/clients/acme/jobs/j1/adapter/x")
    assert is_allowed("s3:GetObject", f"{room.bucket}/jobs/clients/acme/jobs/j2/x", role), (
        "the session is what narrows it"
    )


def test_a_trainer_session_lists_its_own_job_only(room):
    role = room.role("module.store.aws_iam_role.trainer")
    session = room.session("jobs/clients/acme/jobs/j1")
    for prefix, expected in [("jobs/clients/acme/jobs/j1/", True), ("jobs/clients/acme/jobs/j2/", False), ("", False)]:
        context = {"s3:prefix": prefix}
        assert is_allowed("s3:ListBucket", room.bucket, role, session, context=context) is expected
    assert not is_allowed("s3:ListBucket", room.bucket, role, session)


@pytest.mark.parametrize("name", ["gateway", "trainer"])
def test_the_address_that_the_room_gives_is_one_its_roles_may_use(name, room):
    """What `lorry env` writes as LORRY_STORE, with a job below it, and a job of a client of the front door."""
    root, role = room.store_url.replace("s3://", "arn:aws:s3:::"), room.role(f"module.store.aws_iam_role.{name}")
    for job in ("rehearsal-1", "clients/acme/jobs/j1"):
        for action in ("s3:GetObject", "s3:PutObject"):
            assert is_allowed(action, f"{root}/{job}/launch.json", role)
        assert is_allowed("s3:ListBucket", room.bucket, role, context={"s3:prefix": f"jobs/{job}/"})


def test_a_machine_writes_no_record_of_those_who_launch(room):
    role = room.role("module.store.aws_iam_role.trainer")
    for record in ("_audit/head.json", "_serving/main/1.json", "clients/acme/notes/_audit/head.json"):
        assert not is_allowed("s3:PutObject", f"{room.bucket}/jobs/{record}", role)


def test_the_session_policy_fits_into_what_sts_takes(room):
    longest = "jobs/clients/" + "c" * 64 + "/jobs/" + "j" * 64
    assert len(json.dumps(room.session(longest), separators=(",", ":"))) <= 2048


@pytest.mark.parametrize("role", ["gateway", "trainer", "reader[0]"])
def test_nobody_fetches_without_tls(role, room):
    policies = room.role(f"module.store.aws_iam_role.{role}")
    wall = room.document("module.store.aws_s3_bucket_policy.this")
    adapter = f"{room.bucket}/jobs/clients/acme/jobs/j1/adapter/adapter_model.safetensors"
    assert is_allowed("s3:GetObject", adapter, policies, bucket=wall)
    assert not is_allowed("s3:GetObject", adapter, policies, bucket=wall, context={"aws:SecureTransport": "false"})


def test_the_key_is_used_through_the_store_only(room):
    key = room.resources["module.store.aws_kms_key.this"]["arn"]
    for name in ("gateway", "trainer", "reader[0]"):
        role = room.role(f"module.store.aws_iam_role.{name}")
        assert is_allowed("kms:Decrypt", key, role, context=VIA_S3)
        assert not is_allowed("kms:Decrypt", key, role)
        assert not is_allowed("kms:ScheduleKeyDeletion", key, role, context=VIA_S3)
    reader = room.role("module.store.aws_iam_role.reader[0]")
    assert not is_allowed("kms:GenerateDataKey", key, reader, context=VIA_S3)


@pytest.mark.parametrize(
    ("subject", "audience", "expected"),
    [
        ("repo:acme/lorry:ref:refs/heads/main", "sts.amazonaws.com", True),
        ("repo:acme@11/lorry@22:ref:refs/heads/main", "sts.amazonaws.com", True),
        ("repo:acme/lorry:environment:train", "sts.amazonaws.com", True),
        ("repo:acme/lorry:environment:reap", "sts.amazonaws.com", True),
        ("repo:acme/lorry:environment:dev", "sts.amazonaws.com", False),
        ("repo:acme/lorry:environment:dev-plan", "sts.amazonaws.com", False),
        ("repo:acme@11/lorry@22:environment:reap", "https://github.com/acme", False),
        ("repo:acme/other:environment:reap", "sts.amazonaws.com", False),
        ("repo:acme/lorry-evil:environment:reap", "sts.amazonaws.com", False),
        ("repo:evil/lorry:environment:reap", "sts.amazonaws.com", False),
        ("repo:acme@99/lorry@22:environment:reap", "sts.amazonaws.com", False),
        ("repo:acme@11/lorry@99:environment:reap", "sts.amazonaws.com", False),
        ("repo:acme/lorry:environment:prod", "sts.amazonaws.com", False),
        ("repo:acme/lorry:pull_request", "sts.amazonaws.com", False),
        ("repo:acme/lorry:ref:refs/heads/feature", "sts.amazonaws.com", False),
    ],
)
def test_github_lets_in_this_repository_and_no_other(subject, audience, expected, room):
    trust = room.document("module.github.aws_iam_role.actions", "assume_role_policy")
    host = "token.actions.githubusercontent.com"
    context = {f"{host}:sub": subject, f"{host}:aud": audience}
    assert is_trusted(trust, "sts:AssumeRoleWithWebIdentity", "Federated", GITHUB, context) is expected
    assert not is_trusted(trust, "sts:AssumeRoleWithWebIdentity", "Federated", GITHUB.replace("git", "x"), context)


@pytest.mark.parametrize(
    ("subject", "expected"),
    [
        ("repo:acme/lorry:environment:train", True),
        ("repo:acme@11/lorry@22:environment:reap", True),
        ("repo:acme/lorry:ref:refs/heads/main", False),
        ("repo:acme/other:environment:reap", False),
        ("repo:acme/lorry:pull_request", False),
    ],
)
def test_workflows_that_launch_hand_out_keys_of_a_job_and_no_others(subject, expected, room):
    trust = room.document("module.store.aws_iam_role.trainer", "assume_role_policy")
    host = "token.actions.githubusercontent.com"
    context = {f"{host}:sub": subject, f"{host}:aud": "sts.amazonaws.com"}
    assert is_trusted(trust, "sts:AssumeRoleWithWebIdentity", "Federated", GITHUB, context) is expected
    actions = room.resources["module.github.aws_iam_role.actions"]["arn"]
    assert not is_trusted(trust, "sts:AssumeRole", "AWS", actions), "that would be an hour, and a second way"


@pytest.fixture
def at_home(room, monkeypatch):
    """This process in the applied room: what `lorry env` would say, and where the local AWS answers."""
    for name, value in {
        **{"AWS_ENDPOINT_URL": room.url, "AWS_DEFAULT_REGION": REGION, "AWS_EC2_METADATA_DISABLED": "true"},
        **{"AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing"},
    }.items():
        monkeypatch.setenv(name, value)
    found = {name: room.resources[address] for name, address in ADDRESSES.items()}
    repository = found["image"]["repository_url"]
    return {
        "LORRY_EC2_TEMPLATE": found["template"]["id"],
        "LORRY_EC2_ROLE_ID": found["machine"]["unique_id"],
        "LORRY_EC2_SUBNETS": "subnet-a,subnet-b",
        "LORRY_EC2_GROUP": found["group"]["id"],
        "LORRY_TRAINER_ROLE": found["trainer"]["arn"],
        "LORRY_SESSION_POLICY": room.session_template,
        "LORRY_SAGEMAKER_ROLE": found["execution"]["arn"],
        "LORRY_SAGEMAKER_PREFIX": "lorry-dev-",
        "LORRY_KMS_KEY": found["key"]["arn"],
        "LORRY_IMAGE": f"{ACCOUNT}.dkr.ecr.{REGION}.amazonaws.com/{repository.partition('/')[2]}@sha256:{'a' * 64}",
        "AWS_DEFAULT_REGION": REGION,
    }


ADDRESSES = {
    "template": "module.ec2[0].aws_launch_template.this",
    "machine": "module.ec2[0].aws_iam_role.machine",
    "group": "module.ec2[0].aws_security_group.machine",
    "trainer": "module.store.aws_iam_role.trainer",
    "execution": "module.sagemaker.aws_iam_role.execution",
    "key": "module.store.aws_kms_key.this",
    "image": 'module.registry.aws_ecr_repository.this["trainer"]',
}


def lives_on_ec2(room, settings, folder):
    """A spot job without a front door: its machine is taken, a tick asks for another, which is watched and ended."""
    clock = Clock(EPOCH)
    account = Account(clock, spot_usd={("p5.4xlarge", zone): 3.0 for zone in BOTH}, scores={"use1-az1": 9})
    with serve_github() as github:
        settings = settings | github | {"LORRY_EC2_MARKET": "spot"}
        backend = Ec2Backend(settings, now=clock.now, sleep=clock.jump, client=account.client)
        store = open_store(room.store_url)
        launch(store, ec2_spec(room.store_url, "spot-1"), None, data_in(folder / "data"), backend, clock.now())
        clock.jump(BOOT_SECONDS + 1)
        (first,) = account.alive()
        account.end(first, "Server.SpotInstanceTermination")
        report = tick([Jobs(store)], Hands(lambda name: backend, backend.charges, clock.now))
    assert (report.done, report.troubles) == (["spot-1: launched again: its machine was taken back"], [])
    (second,) = account.alive()
    assert second != first
    assert {name for name, _ in account.log if "assume" in name} == {"assume_role_with_web_identity"}
    (owned,) = backend.owned()
    backend.forgotten()
    list(backend.logs(owned.handle))
    backend.stop(owned.handle)


def lives_on_sagemaker(room, settings, folder, monkeypatch):
    """A job that a tick asks for, since its launch died before; it is watched and ended."""
    account = SageMaker(folder / "hosts", ProcessRunner(), pace=Pace(launching=1e6))
    account.roles = {settings["LORRY_SAGEMAKER_ROLE"]}
    with serve_sagemaker(account) as url:
        for service in ("SAGEMAKER", "CLOUDWATCH_LOGS"):
            monkeypatch.setenv(f"AWS_ENDPOINT_URL_{service}", url)
        backend, clock = SageMakerBackend(settings), Clock(EPOCH)
        store = open_store(room.store_url)
        spec = sagemaker_spec("asked-1", room.store_url)
        with monkeypatch.context() as dies:
            dies.setattr(backend, "submit", lambda spec, request: {})
            launch(store, spec, None, data_in(folder / "data"), backend, clock.now())
        clock.jump(600)
        report = tick([Jobs(store)], Hands(lambda name: backend, backend.charges, clock.now))
        assert (report.done, report.troubles) == (["asked-1: launched again"], [])
        (owned,) = backend.owned()
        backend.forgotten()
        list(backend.logs(owned.handle))
        backend.stop(owned.handle)


def test_workflows_and_the_front_door_may_do_all_that_a_job_on_aws_asks(room, at_home, tmp_path, monkeypatch):
    """From the plan's questions to the launch after a lost machine, the reaper's look and the end."""
    catalog = load_catalog()
    plan = make_plan(load_recipe("qwen3-8b/zero3", catalog), None, catalog)
    with asked_of_aws() as asked:
        for backend in ("sagemaker", "ec2"):
            preflight(backend, plan, catalog, Subject(datetime.now(UTC), store=room.store_url, environment=at_home))
        lives_on_ec2(room, at_home, tmp_path)
        lives_on_sagemaker(room, at_home, tmp_path, monkeypatch)
    machine = room.resources[ADDRESSES["machine"]]["arn"]
    rights = rights_of(asked, {"lorry": "lorry-dev"}, machine)
    assert {
        "ec2:RunInstances",
        "sagemaker:CreateTrainingJob",
        "servicequotas:GetServiceQuota",
        "ecr:DescribeImages",
    } <= {right.action for right in rights}
    for name in ("module.github.aws_iam_role.actions", "module.store.aws_iam_role.gateway"):
        role = room.role(name)
        denied = [r for r in rights if not is_allowed(r.action, r.resource, role, context=r.context)]
        assert denied == [], name


def test_the_gateway_serves_every_client_and_nothing_else(room):
    role = room.role("module.store.aws_iam_role.gateway")
    for action in ("s3:GetObject", "s3:PutObject", "s3:DeleteObject", "s3:DeleteObjectVersion"):
        assert is_allowed(action, f"{room.bucket}/jobs/clients/acme/jobs/j1/x", role)
        assert not is_allowed(action, f"arn:aws:s3:::{STATE_BUCKET}/dev/aws.tfstate", role)
    assert is_allowed("s3:PutObject", f"{room.bucket}/machines/AROA:i-1/launch.env", role)
    assert not is_allowed("s3:GetObject", f"{room.bucket}/machines/AROA:i-1/launch.env", role)
    assert not is_allowed("s3:DeleteBucket", room.bucket, role)
    assert not is_allowed("s3:PutBucketPolicy", room.bucket, role)
    assert not is_allowed("iam:CreateUser", "*", role)
    trainer = room.resources["module.store.aws_iam_role.trainer"]["arn"]
    assert is_allowed("sts:AssumeRole", trainer, role)
    assert not is_allowed("sts:AssumeRole", room.resources["module.github.aws_iam_role.actions"]["arn"], role)


def test_actions_build_launch_and_look_after_jobs_and_nothing_else(room):
    role = room.role("module.github.aws_iam_role.actions")
    image = room.resources['module.registry.aws_ecr_repository.this["trainer"]']["arn"]
    assert is_allowed("ecr:PutImage", image, role)
    assert is_allowed("s3:GetObject", f"{room.bucket}/jobs/clients/acme/jobs/j1/status.json", role)
    for action, resource in [
        ("ecr:PutImage", image + "-of-another"),
        ("ecr:DeleteRepository", image),
        ("s3:GetObject", f"arn:aws:s3:::{STATE_BUCKET}/dev/aws.tfstate"),
        ("iam:AttachRolePolicy", room.resources["module.github.aws_iam_role.actions"]["arn"]),
        ("iam:PassRole", room.resources["module.store.aws_iam_role.gateway"]["arn"]),
        ("ec2:RunInstances", f"arn:aws:ec2:{REGION}:{ACCOUNT}:instance/*"),
    ]:
        assert not is_allowed(action, resource, role)


def test_roles_are_taken_by_those_who_were_named(room):
    door, serving = f"arn:aws:iam::{ACCOUNT}:role/front-door", f"arn:aws:iam::{ACCOUNT}:user/serving"
    gateway = room.resources["module.store.aws_iam_role.gateway"]["arn"]
    takers = {"gateway": {door}, "trainer": {door, gateway}, "reader[0]": {serving}}
    for name, allowed in takers.items():
        trust = room.document(f"module.store.aws_iam_role.{name}", "assume_role_policy")
        for who in (door, serving, gateway, f"arn:aws:iam::{ACCOUNT}:root", f"arn:aws:iam::{ACCOUNT}:user/other"):
            assert is_trusted(trust, "sts:AssumeRole", "AWS", who) is (who in allowed)


def test_the_reader_fetches_adapters_and_nothing_else(room):
    role = room.role("module.store.aws_iam_role.reader[0]")
    job = f"{room.bucket}/jobs/clients/acme/jobs/j1"
    assert is_allowed("s3:GetObject", f"{job}/adapter/adapter_model.safetensors", role)
    assert is_allowed("s3:GetObject", f"{job}/manifest.json", role)
    for action, resource in [
        ("s3:GetObject", f"{job}/train.jsonl"),
        ("s3:GetObject", f"{job}/checkpoints/step-1/x"),
        ("s3:PutObject", f"{job}/adapter/x"),
        ("s3:DeleteObject", f"{job}/adapter/x"),
        ("s3:ListBucket", room.bucket),
    ]:
        assert not is_allowed(action, resource, role, context={"s3:prefix": "jobs/clients/acme/"})


def test_a_machine_reads_its_own_launch_folder_and_no_clients_data(room):
    role = room.role("module.ec2[0].aws_iam_role.machine")
    me = {"aws:userid": "AROA:i-1"}
    assert is_allowed("s3:GetObject", f"{room.bucket}/machines/AROA:i-1/launch.env", role, context=me)
    assert not is_allowed("s3:GetObject", f"{room.bucket}/machines/AROA:i-2/launch.env", role, context=me)
    assert not is_allowed("s3:GetObject", f"{room.bucket}/jobs/clients/acme/jobs/j1/train.jsonl", role, context=me)
    assert not is_allowed("s3:PutObject", f"{room.bucket}/machines/AROA:i-1/launch.env", role, context=me)
    assert not is_allowed("ec2:RunInstances", "*", role, context=me)
    image = room.resources['module.registry.aws_ecr_repository.this["trainer"]']["arn"]
    assert is_allowed("ecr:BatchGetImage", image, role)
    assert not is_allowed("ecr:PutImage", image, role)


def test_the_sagemaker_launcher_stays_within_its_limits(room):
    launcher = [room.document("module.sagemaker.aws_iam_policy.launcher")]
    job = f"arn:aws:sagemaker:{REGION}:{ACCOUNT}:training-job"

    def may(name="lorry-dev-1", types=("ml.p5.4xlarge",), seconds=12 * 3600):
        context = {"sagemaker:InstanceTypes": list(types), "sagemaker:MaxRuntimeInSeconds": seconds}
        return is_allowed("sagemaker:CreateTrainingJob", f"{job}/{name}", launcher, context=context)

    assert may()
    assert not may(types=["ml.p5.48xlarge"])
    assert not may(types=["ml.p5.4xlarge", "ml.p5.48xlarge"])
    assert not may(seconds=12 * 3600 + 1)
    assert not may(name="other-1")
    role = room.resources["module.sagemaker.aws_iam_role.execution"]["arn"]
    for service, expected in [("sagemaker.amazonaws.com", True), ("ec2.amazonaws.com", False)]:
        assert is_allowed("iam:PassRole", role, launcher, context={"iam:PassedToService": service}) is expected
    image = room.resources['module.registry.aws_ecr_repository.this["trainer"]']["arn"]
    assert is_allowed("ecr:DescribeImages", image, launcher)


def test_the_sagemaker_role_passes_the_sdk_check_and_is_for_this_account(room):
    role = room.role("module.sagemaker.aws_iam_role.execution")
    for action in ("ecr:GetAuthorizationToken", "cloudwatch:PutMetricData", "ec2:DescribeVpcs"):
        assert is_allowed(action, "*", role)
    assert is_allowed("s3:GetObject", f"{room.bucket}/jobs/clients/acme/jobs/j1/train.jsonl", role)
    assert not is_allowed("s3:GetObject", f"arn:aws:s3:::{STATE_BUCKET}/dev/aws.tfstate", role)
    trust = room.document("module.sagemaker.aws_iam_role.execution", "assume_role_policy")
    for account, expected in [(ACCOUNT, True), ("210987654321", False)]:
        context = {"aws:SourceAccount": account}
        assert is_trusted(trust, "sts:AssumeRole", "Service", "sagemaker.amazonaws.com", context) is expected


def test_the_ec2_launcher_starts_from_its_template_and_ends_its_own(room):
    launcher = [room.document("module.ec2[0].aws_iam_policy.launcher")]
    template = room.resources["module.ec2[0].aws_launch_template.this"]["arn"]
    instance = f"arn:aws:ec2:{REGION}:{ACCOUNT}:instance/i-1"

    def may_start(**context):
        return is_allowed("ec2:RunInstances", instance, launcher, context=context)

    assert may_start(**{"ec2:LaunchTemplate": template, "ec2:InstanceType": "g6e.12xlarge"})
    assert not may_start(**{"ec2:LaunchTemplate": template, "ec2:InstanceType": "p5.48xlarge"})
    assert not may_start(**{"ec2:LaunchTemplate": template + "0", "ec2:InstanceType": "g6e.12xlarge"})
    assert not may_start(**{"ec2:InstanceType": "g6e.12xlarge"})
    for prefix, expected in [("lorry-dev", True), ("lorry-prod", False)]:
        context = {"ec2:ResourceTag/lorry": prefix}
        assert is_allowed("ec2:TerminateInstances", instance, launcher, context=context) is expected
    assert not is_allowed("ec2:TerminateInstances", instance, launcher)
    assert not is_allowed("ec2:CreateTags", instance, launcher), "tags are set at the start only"
    image = room.resources['module.registry.aws_ecr_repository.this["trainer"]']["arn"]
    profile = room.resources["module.ec2[0].aws_iam_instance_profile.machine"]["arn"]
    asked = [("ecr:DescribeImages", image), ("iam:GetInstanceProfile", profile)]
    for action, resource in [*asked, ("ec2:DescribeLaunchTemplateVersions", "*")]:
        assert is_allowed(action, resource, launcher), "a launch asks first whether it could start"


def test_the_local_aws_enforces_the_same(room):
    """Real requests under the roles, with enforcement on: signatures and role policies count."""
    bucket = room.bucket.removeprefix("arn:aws:s3:::")
    s3, sts = client(room.url, "s3"), client(room.url, "sts")
    job = "jobs/clients/acme/jobs/j1"
    s3.put_object(Bucket=bucket, Key=f"{job}/train.jsonl", Body=b"x")
    s3.put_object(Bucket=bucket, Key=f"{job}/adapter/a", Body=b"x")
    taken = {}
    for name in ("gateway", "trainer", "reader[0]"):
        arn = room.resources[f"module.store.aws_iam_role.{name}"]["arn"]
        got = sts.assume_role(RoleArn=arn, RoleSessionName="test")["Credentials"]
        taken[name] = client(room.url, "s3", got["AccessKeyId"], got["SecretAccessKey"], got["SessionToken"])

    def refused(call, **arguments):
        with pytest.raises(ClientError) as caught:
            call(Bucket=bucket, **arguments)
        return caught.value.response["Error"]["Code"] in ("AccessDenied", "403")

    with enforcement(room.url):
        assert taken["gateway"].get_object(Bucket=bucket, Key=f"{job}/train.jsonl")["Body"].read() == b"x"
        taken["trainer"].put_object(Bucket=bucket, Key=f"{job}/adapter/b", Body=b"y")
        assert taken["reader[0]"].get_object(Bucket=bucket, Key=f"{job}/adapter/b")["Body"].read() == b"y"
        assert refused(taken["reader[0]"].get_object, Key=f"{job}/train.jsonl")
        assert refused(taken["reader[0]"].put_object, Key=f"{job}/adapter/b", Body=b"z")
        assert refused(taken["trainer"].put_object, Key="models/a", Body=b"z")
        assert refused(taken["trainer"].delete_object, Key=f"{job}/adapter/b")
        patched_moto.Wire.plain_http = True
        assert refused(taken["gateway"].get_object, Key=f"{job}/train.jsonl")
        patched_moto.Wire.plain_http = False


class enforcement:  # noqa: N801
    """While it lasts, the local AWS checks permissions."""

    def __init__(self, url):
        self.url = url

    def __enter__(self):
        self._after(b"0")

    def __exit__(self, *error):
        self._after(b"inf")

    def _after(self, requests):
        headers = {"content-type": "text/plain"}
        sent = urllib.request.Request(f"{self.url}/moto-api/reset-auth", requests, headers, method="POST")
        urllib.request.urlopen(sent, timeout=120).read()
