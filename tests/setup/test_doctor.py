"""The doctor: every check runs, each finding says what was seen and what to do, and only failures count."""

from __future__ import annotations

import json
import re
from datetime import UTC, datetime, timedelta
from pathlib import Path

import boto3
import pytest

from scripts.backends.runpod_api import RunpodApi
from scripts.doctor import Subject, examine
from scripts.env import web_settings
from scripts.fake_runpod.server import Fault
from scripts.stage import Staging, stage
from scripts.store import open_store
from tests.setup.conftest import KEY
from tests.setup.model_copy import MODEL, NAME, SHARDS, make_copy

DIGEST = "sha256:" + "a" * 64
IMAGE = f"ghcr.io/example/trainer@{DIGEST}"
QUEUE = {
    "name": "lorry-dev-training",
    "type": "QUEUE",
    "image": IMAGE,
    "gpu": {"pools": ["HOPPER_141"]},
    "scaling": {"type": "REQUEST_COUNT", "requestCount": 1},
    "timeout": 3_600_000,
    "env": {"LORRY_MODELS": "/runpod-volume/models"},
}


@pytest.fixture
def room(api):
    """A room as Terraform makes it, and what it says about itself."""
    volume = api.create("network-volumes", {"name": "lorry-dev-models", "size": 300, "dataCenter": "US-KS-2"})
    env = {"LORRY_MODELS": "/workspace/models", "HF_TOKEN": "{{ RUNPOD_SECRET_hf }}"}
    template = api.create("templates", {"name": "lorry-dev-pod", "image": IMAGE, "env": env})
    api.create("account/secrets", {"name": "hf", "value": "v"})
    endpoint = api.create("serverless", QUEUE | {"networkVolumes": [volume["id"]], "dataCenterIds": ["US-KS-2"]})
    return {
        "datacenter": "US-KS-2",
        "volume_id": volume["id"],
        "volume_mount_path": "/workspace",
        "pod_template_id": template["id"],
        "training_endpoint_id": endpoint["id"],
        "gpu_types": ["NVIDIA H200"],
        "secret_names": ["hf"],
    }


@pytest.fixture
def subject(room, api, tmp_path):
    """The room, with a model staged on this machine and no AWS."""
    models = tmp_path / "models"
    stage(Staging(MODEL, open_store(models.as_uri()), models, make_copy(tmp_path / "copy")), now=0.0)
    return Subject(
        now=datetime.now(UTC),
        rooms=room,
        runpod=api,
        model=MODEL,
        models=models.as_uri(),
        store=tmp_path.as_uri(),
        environment={"AWS_ENDPOINT_URL": "https://s3api-us-ks-2.runpod.io/"},
    )


def changed(subject, **fields):
    return Subject(**(vars(subject) | fields))


def states(findings):
    return {finding.check: finding.state for finding in findings}


def finding(subject, check):
    (found,) = [finding for finding in examine(subject) if finding.check == check]
    return found


def test_a_sound_set_up_passes_every_check_that_can_be_made(subject):
    findings = examine(subject)
    assert states(findings) == {
        "Runpod key": "ok",
        "clock": "ok",
        "volume": "ok",
        "Pod template": "ok",
        "training endpoint": "ok",
        "secrets": "ok",
        "stock": "ok",
        "model": "ok",
        "room for models": "ok",
        "AWS credentials": "not checked",
        "store": "not checked",
        "AWS quotas": "not checked",
        "image": "not checked",
        "EC2": "not checked",
        "EC2 template": "not checked",
        "SageMaker": "not checked",
    }
    assert all(finding.seen for finding in findings)
    assert "NVIDIA H200 in US-KS-2: HIGH, $4.59 per GPU-hour" in [finding.seen for finding in findings]


def test_the_doctor_changes_nothing(subject, runpod):
    before = json.dumps(runpod.account.held)
    runpod.log.clear()
    examine(subject)
    assert json.dumps(runpod.account.held) == before
    assert {(method, path) for method, path, _ in runpod.log if method != "GET"} == {
        ("DELETE", "/v2/pods/lorry-doctor-probe")
    }


def test_without_anything_configured_each_check_says_how_to_configure_it(tmp_path):
    findings = examine(
        Subject(
            now=datetime.now(UTC), models=tmp_path.as_uri(), environment={"AWS_ENDPOINT_URL": "https://x.runpod.io"}
        )
    )
    assert {finding.state for finding in findings if finding.check != "room for models"} == {"not checked"}
    assert len(findings) == 16
    said = {finding.check: f"{finding.seen}; {finding.step}" for finding in findings}
    assert "set RUNPOD_API_KEY" in said["volume"]
    assert "--model" in said["model"]
    assert "set LORRY_STORE to s3://bucket/prefix" in said["store"]
    assert "name a root such as infra/live/prod/aws" in said["AWS quotas"]


@pytest.mark.parametrize(
    ("status", "method", "said"),
    [
        (401, "GET", "it may not list Pods (status 401); make a key with read and write access to the API"),
        (403, "GET", "it may not list Pods (status 403); make a key with read and write access to the API"),
        (403, "DELETE", "it may read but not change; make a key with read and write access"),
        (500, "GET", "Runpod: GET /pods: status 500: boom; Runpod has trouble: run the same command again later"),
    ],
)
def test_a_key_that_falls_short_fails_and_spares_the_checks_behind_it(status, method, said, subject, runpod):
    runpod.faults.append(Fault(method, "/pods", status, "boom", times=9))
    findings = examine(subject)
    assert said in f"{findings[0].seen}; {findings[0].step}"
    rest = states(findings)
    assert [rest[name] for name in ("volume", "stock", "secrets")] == ["not checked"] * 3
    assert rest["model"] == "ok", "what needs no key is checked all the same"


def test_one_failing_answer_does_not_hide_the_other_findings(subject, runpod):
    runpod.faults.append(Fault("GET", "/templates", 500, "boom", times=99))
    found = states(examine(subject))
    assert (found["Pod template"], found["secrets"]) == ("failed", "failed")
    assert (found["volume"], found["stock"], found["training endpoint"]) == ("ok", "ok", "ok")


@pytest.mark.parametrize(("minutes", "side"), [(60, "ahead of"), (-60, "behind")])
def test_a_wrong_clock_is_told(minutes, side, subject):
    skewed = finding(changed(subject, now=datetime.now(UTC) + timedelta(minutes=minutes)), "clock")
    assert (skewed.state, "NTP" in skewed.step) == ("failed", True)
    told = re.fullmatch(rf"this machine is (\d+) s {side} Runpod", skewed.seen)
    assert told
    assert abs(int(told[1]) - 3600) < 50, "an hour, give or take what a busy machine needs to ask"


def break_room(api, rooms, what):
    volume, template, endpoint = rooms["volume_id"], rooms["pod_template_id"], rooms["training_endpoint_id"]
    if what == "volume gone":
        return rooms | {"volume_id": "nope"}
    if what == "template mounts elsewhere":
        api.change("templates", template, {"env": {"LORRY_MODELS": "/runpod-volume/models"}})
    if what == "endpoint without volume":
        api.change("serverless", endpoint, {"networkVolumes": []})
    if what == "endpoint mounts elsewhere":
        api.change("serverless", endpoint, {"env": {"LORRY_MODELS": "workspace/models"}})
    if what == "endpoint without time limit":
        api.change("serverless", endpoint, {"timeout": 0})
    if what == "endpoint asleep":
        api.change("serverless", endpoint, {"workers": {"max": 0}})
    if what == "room elsewhere":
        return rooms | {"datacenter": "US-CA-2"}
    if what == "secret gone":
        api.change("templates", template, {"env": {"LORRY_MODELS": "/workspace/models", "A": "{{ RUNPOD_SECRET_b }}"}})
    assert volume
    return rooms


@pytest.mark.parametrize(
    ("what", "check", "said"),
    [
        ("volume gone", "volume", "there is no volume nope; run plan and apply"),
        ("room elsewhere", "volume", "is in US-KS-2, the room is in US-CA-2"),
        (
            "template mounts elsewhere",
            "Pod template",
            "LORRY_MODELS is '/runpod-volume/models', but the volume is mounted at /workspace",
        ),
        ("endpoint without volume", "training endpoint", "it does not mount volume"),
        ("endpoint mounts elsewhere", "training endpoint", "but the volume is mounted at /runpod-volume"),
        ("endpoint without time limit", "training endpoint", "its time limit is 0"),
        ("endpoint asleep", "training endpoint", "it may start no worker"),
        ("secret gone", "secrets", "b does not exist, needed by lorry-dev-pod; set RUNPOD_SECRET_b and run"),
    ],
)
def test_what_differs_from_the_room_is_told(what, check, said, subject, api):
    rooms = break_room(api, subject.rooms, what)
    found = [f for f in examine(changed(subject, rooms=rooms)) if f.check == check and f.state == "failed"]
    assert [said in f"{f.seen}; {f.step}" for f in found] == [True]


@pytest.mark.parametrize(
    ("gpu", "said"),
    [
        ("NVIDIA L40S", "no NVIDIA L40S in US-KS-2 now; wait, take another GPU, or a volume in EU-RO-1, US-NC-2"),
        ("NVIDIA H201", "Runpod rents no GPU 'NVIDIA H201'; did you mean 'NVIDIA H200'?"),
    ],
)
def test_want_of_stock_names_where_there_is_some(gpu, said, subject):
    found = finding(changed(subject, rooms=subject.rooms | {"gpu_types": [gpu]}), "stock")
    assert (found.state, f"{found.seen}; {found.step}") == ("failed", said)


def test_a_model_that_is_not_whole_or_not_staged_is_told(subject, tmp_path):
    folder = tmp_path / "models" / NAME
    (folder / SHARDS[1]).write_bytes(b"short")
    broken = finding(subject, "model")
    assert (broken.state, f"1 of 6 files are not whole, first {folder.as_uri()}/{SHARDS[1]}" in broken.seen) == (
        "failed",
        True,
    )
    missing = finding(changed(subject, model="Qwen/Qwen3-32B"), "model")
    assert (missing.state, missing.step.startswith("run `lorry stage Qwen/Qwen3-32B --to file://")) == ("failed", True)
    assert "did you mean" in finding(changed(subject, model="Qwen/Qwen3-8C"), "model").step


def test_a_volume_without_room_for_the_model_is_told(subject, s3, room, api):
    s3.create_bucket(Bucket=room["volume_id"])
    models = f"s3://{room['volume_id']}/models"
    subject = changed(subject, models=models, model="Qwen/Qwen3-Next-80B-A3B-Instruct", environment={})
    assert finding(subject, "room for models").seen == f"300.0 GB are free at {models}, 164.0 GB are needed"
    small = api.create("network-volumes", {"name": "small", "size": 100, "dataCenter": "US-KS-2"})["id"]
    s3.create_bucket(Bucket=small)
    found = finding(changed(subject, models=f"s3://{small}/models"), "room for models")
    assert (found.state, "make the disk or volume larger" in found.step) == ("failed", True)


def test_a_model_in_a_bucket_is_compared_file_by_file(subject, s3, tmp_path):
    s3.create_bucket(Bucket="lorry-models")
    store = open_store("s3://lorry-models/models")
    stage(Staging(MODEL, store, tmp_path / "models"), now=0.0)
    subject = changed(subject, models=store.url, environment={})
    assert finding(subject, "model").state == "ok"
    s3.put_object(Bucket="lorry-models", Key=f"models/{NAME}/tokenizer.json", Body=b"")
    assert "tokenizer.json" in finding(subject, "model").seen


def test_aws_is_asked_who_and_what_it_allows(subject, s3):
    s3.create_bucket(Bucket="lorry-store")
    rooms = subject.rooms | {
        "store_url": "s3://lorry-store",
        "region": "us-east-1",
        "sagemaker_role_arn": "arn:aws:iam::123456789012:role/x",
        "ec2_instance_types": ["p5.48xlarge", "g6e.12xlarge"],
    }
    findings = {f.check: f for f in examine(changed(subject, rooms=rooms, environment={}))}
    assert (findings["AWS credentials"].state, "123456789012" in findings["AWS credentials"].seen) == ("ok", True)
    assert findings["store"].state == "ok"
    quotas = [findings[f"AWS quota {code}"] for code in ("L-417A185B", "L-DB2E81BA")]
    assert [(q.state, "NoSuchResource" in q.seen) for q in quotas] == [("not checked", True)] * 2
    lost = finding(changed(subject, rooms=rooms | {"store_url": "s3://lorry-nowhere"}, environment={}), "store")
    assert (lost.state, lost.step) == ("failed", "create the bucket, or correct the store's URL")


@pytest.mark.parametrize(("value", "state"), [(0.0, "failed"), (192.0, "ok")])
def test_a_quota_of_zero_fails_before_money_is_spent(value, state, subject, aws, monkeypatch):
    from moto.servicequotas.models import ServiceQuotasBackend

    answer = {"QuotaCode": "L-417A185B", "Value": value}
    monkeypatch.setattr(ServiceQuotasBackend, "get_service_quota", lambda *_, **__: answer)
    rooms = subject.rooms | {"ec2_instance_types": ["p5.48xlarge"]}
    found = finding(changed(subject, rooms=rooms, environment={}), "AWS quota L-417A185B")
    assert found.state == state
    assert (found.step == "ask for 192; it takes days, so ask now") == (state == "failed")


def test_the_image_must_be_in_its_registry_and_pinned(subject, aws, api):
    ecr = boto3.client("ecr")
    ecr.create_repository(repositoryName="lorry/trainer")
    home = "123456789012.dkr.ecr.us-east-1.amazonaws.com/lorry/trainer"
    manifest = {"schemaVersion": 2, "mediaType": "application/vnd.docker.distribution.manifest.v2+json"}
    pushed = ecr.put_image(repositoryName="lorry/trainer", imageManifest=json.dumps(manifest), imageTag="t")
    there = pushed["image"]["imageId"]["imageDigest"]
    subject = changed(subject, environment={})
    for image, state in [
        (f"{home}@{there}", "ok"),
        (f"{home}@{DIGEST}", "failed"),
        (f"{home}:t", "failed"),
        (IMAGE, "not checked"),
    ]:
        api.change("templates", subject.rooms["pod_template_id"], {"image": image})
        assert finding(subject, "image").state == state, image


def test_a_credential_that_aws_refuses_is_a_finding(subject, aws, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    found = finding(changed(subject, environment={}), "AWS credentials")
    assert found.state == "failed"
    assert "127.0.0.1:9" in found.seen
    assert found.step == "check AWS_DEFAULT_REGION and the network"


def test_the_command_prints_a_line_per_check_and_fails_only_on_failures(
    apply_room, lorry, room, tmp_path, aws, runpod, seen
):
    stage(Staging(MODEL, open_store((tmp_path / "models").as_uri()), tmp_path, make_copy(tmp_path / "copy")), now=0.0)
    root = str(apply_room(room))
    done = lorry("doctor", root, "--model", MODEL)
    seen += [done.out, done.error]
    assert (done.code, done.error) == (0, "")
    assert len(done.out.splitlines()) == 16
    assert done.out.splitlines()[0] == "ok           Runpod key: it may read and change the account; 0 Pods now"

    runpod.account.catalog.stock["US-KS-2"]["NVIDIA H200"] = "NONE"
    again = lorry("doctor", root, str(tmp_path), "--json")
    findings = {row["check"]: row["state"] for row in json.loads(again.out)}
    assert again.code == 7
    assert (findings["stock"], findings[f"root {tmp_path}"], findings["volume"]) == ("failed", "failed", "ok")


def test_a_key_that_is_wrong_never_shows(room, runpod, seen, tmp_path):
    with RunpodApi("rpa_" + KEY, runpod.url) as wrong:
        findings = examine(Subject(now=datetime.now(UTC), rooms=room, runpod=wrong, models=tmp_path.as_uri()))
    seen += [str(finding) for finding in findings]
    assert findings[0].state == "failed"


def test_only_what_the_rooms_say_is_read(subject, aws):
    asked = set()

    class Room(dict):
        def get(self, name, default=None):
            asked.add(name)
            return super().get(name, default)

        def __getitem__(self, name):
            asked.add(name)
            return super().__getitem__(name)

    rooms = Room(subject.rooms | {"gateway_url": "https://g", "sagemaker_role_arn": "arn"})
    examine(changed(subject, rooms=rooms, environment={}))
    web_settings(rooms)
    stacks = Path(__file__).parents[2] / "infra" / "stacks"
    said = {
        name for file in stacks.glob("*/outputs.tf") for name in re.findall(r'^output "(\w+)"', file.read_text(), re.M)
    }
    assert len(asked) > 12
    assert asked <= said
