"""Jobs on rented machines, in a bucket: prices, caps, wishes, presigned links, and what a machine may ask for."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx

from scripts.gateway.contact import LOOK_SECONDS
from scripts.job_folder import upload_folder
from scripts.job_token import client_of, make_token, read_token
from scripts.store import open_store
from tests.gateway.conftest import KEYS, SECRET, Front, Rented, a_client

JOB = "5f0c1d7e-58a5-4a3b-9d5e-0c9a54f1e001"
RUN = "/v2/lorry/run"
MISTRAL = {"base_model": "mistralai/mistral-7b-instruct-v0.2", "epochs": 3, "learning_rate": 2e-4, "batch_size": 8,
           "rank": 16, "alpha": 32, "dropout": 0.05}  # fmt: skip
POLICY = json.dumps(
    {
        "Version": "2012-10-17",
        "Statement": [{"Effect": "Allow", "Action": "s3:*", "Resource": "arn:aws:s3:::b/JOB_PREFIX/*"}],
    }
)
MakeFront = Callable[..., Front]


def rented(make_front: MakeFront, bucket: str, provider: Rented, now: Any = time.time, **client: Any) -> Front:
    clients = {"acme": a_client("acme", **client), "brick": a_client("brick")}
    settings = {"store": bucket, "trainer_role": "arn:aws:iam::123456789012:role/trainer", "session_policy": POLICY}
    return make_front(clients, settings, open_backend=lambda name, environment: provider, now=now)


def test_a_wish_for_a_gpu_is_met_where_it_fits_and_priced_before_launch(make_front: MakeFront, bucket: str) -> None:
    front = rented(make_front, bucket, Rented(), max_usd_per_job=100.0)
    for wish, wanted in [
        ({"type": "H200", "count": 2}, "runpod-h200-2"),
        ({"type": "A100-80GB", "count": 1}, "runpod-a100-pcie-1"),
        ({"gpu_type": "NVIDIA H100 PCIe", "num_gpus": 1}, "runpod-h100-pcie-1"),
    ]:
        quoted = front.post("/v2/lorry/quote", {"input": front.input(gpu_config=wish, hyperparameters=MISTRAL)}).json()
        assert quoted["gpu"] == wanted, quoted
        assert 0 < quoted["usd"]["low"] <= quoted["usd"]["likely"] <= quoted["usd"]["high"] == quoted["quote_usd"]
        assert quoted["cap_usd"] >= quoted["quote_usd"]
        assert quoted["total_steps"] > 0
        assert not any("was asked for" in note for note in quoted["notes"])
    unknown = front.post("/v2/lorry/quote", {"input": front.input(hyperparameters=MISTRAL)}).json()
    assert "1 x NVIDIA A40 was asked for" in unknown["notes"][0]  # nobody offers it: the cheapest that fits
    assert open_store(f"{bucket}/clients/acme/jobs").folders() == []


def test_a_rented_job_is_quoted_booked_and_capped(make_front: MakeFront, bucket: str) -> None:
    provider = Rented()
    front = rented(make_front, bucket, provider, max_usd_per_job=100.0, max_usd_per_month=5.0)
    first = front.post(RUN, {"input": front.input(hyperparameters=MISTRAL)}).json()
    assert first["understood"]["base_model"] == "mistralai/Mistral-7B-Instruct-v0.2"
    assert first["understood"]["backend"] == "runpod_pod"
    ids = [first["id"]]
    for number in range(20):
        answer = front.post(RUN, {"input": front.input(job_id=f"more-{number}", hyperparameters=MISTRAL)})
        if answer.status_code == 422:
            break
        ids.append(answer.json()["id"])
    assert answer.status_code == 422
    assert "max_usd_per_month" in answer.json()["error"]
    assert provider.asked == ids
    most = first["cap_usd"]  # what no job can pass; the quote is what it is expected to take
    assert first["quote_usd"] <= most
    assert most * len(ids) <= 5.0 + 1e-6 < most * (len(ids) + 1)


def test_the_cap_per_job_is_kept_by_the_planner(make_front: MakeFront, bucket: str) -> None:
    provider = Rented()
    front = rented(make_front, bucket, provider, max_usd_per_job=0.05)
    answer = front.post(RUN, {"input": front.input(hyperparameters=MISTRAL)})
    assert answer.status_code == 422
    assert "over limits.max_usd 0.05" in answer.json()["error"]
    assert provider.asked == []


def test_the_provider_is_asked_seldom_however_often_a_client_asks(make_front: MakeFront, bucket: str) -> None:
    provider, now = Rented(), time.time()
    front = rented(make_front, bucket, provider, now=lambda: now)  # ten looks may take a slow machine its time
    front.run(hyperparameters=MISTRAL)
    for _ in range(10):
        assert front.status(JOB)["status"] == "IN_QUEUE"
    assert provider.looks == 1
    later = make_front(
        {"acme": a_client("acme")}, {"store": bucket},
        open_backend=lambda name, environment: provider, now=lambda: now + LOOK_SECONDS + 1,
    )  # fmt: skip
    later.status(JOB)
    assert provider.looks == 2


def test_a_queued_job_is_purged_and_its_machine_ended(make_front: MakeFront, bucket: str) -> None:
    provider = Rented()
    front = rented(make_front, bucket, provider)
    front.run(hyperparameters=MISTRAL)
    assert front.get("/v2/lorry/health").json()["jobs"]["inQueue"] == 1
    assert front.post("/v2/lorry/purge-queue", key=KEYS["brick"]).json()["removed"] == 0
    assert front.post("/v2/lorry/purge-queue").json() == {"removed": 1, "status": "completed"}
    assert provider.ended == [JOB]
    assert front.status(JOB)["status"] == "CANCELLED"


def test_links_into_a_bucket_are_presigned(make_front: MakeFront, bucket: str, tmp_path: Path) -> None:
    here = make_front()
    here.run()
    here.finish(JOB)
    store = open_store(f"{bucket}/clients/acme/jobs")
    upload_folder(store, here.folder(JOB), JOB, {})
    front = rented(make_front, bucket, Rented())
    links = front.status(JOB)["output"]["model_files"]
    assert set(links) == {"adapter_config.json", "adapter_model.safetensors", "manifest.json"}
    for name, link in links.items():
        assert "X-Amz-Signature" in link
        assert httpx.get(link, timeout=120).content == (here.folder(JOB) / "adapter" / name).read_bytes()


def test_a_machine_gets_credentials_of_its_own_prefix_through_boto3_alone(make_front: MakeFront, bucket: str) -> None:
    front = rented(make_front, bucket, Rented())
    token = make_token(JOB, "acme", int(time.time()) + 3600, SECRET)
    code = (
        "import boto3; c = boto3.Session().get_credentials().get_frozen_credentials(); print(c.access_key, c.token[:3])"
    )
    environment = {k: v for k, v in os.environ.items() if not k.startswith("AWS_")} | {
        "AWS_CONTAINER_CREDENTIALS_FULL_URI": f"{front.url}/machines/{JOB}/credentials",
        "AWS_CONTAINER_AUTHORIZATION_TOKEN": token,
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
    }
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("ASIA")


def test_a_machine_ends_itself_and_no_other(make_front: MakeFront, bucket: str) -> None:
    provider, ticked = Rented(), []
    front = make_front(
        None, {"store": bucket}, open_backend=lambda name, environment: provider,
        tick=lambda client, job_id: ticked.append((client.name, job_id)),
    )  # fmt: skip
    front.run(hyperparameters=MISTRAL)
    token = make_token(JOB, "acme", int(time.time()) + 3600, SECRET)
    for act in ("end", "credentials", "tick"):
        assert front.post(f"/machines/other-job/{act}", key=token).status_code == 401
        assert front.post(f"/machines/{JOB}/{act}", key=make_token(JOB, "acme", 1, SECRET)).status_code == 401
        for key in (KEYS["acme"], KEYS["brick"], None):
            assert front.post(f"/machines/{JOB}/{act}", key=key).status_code == 401
    assert front.post(f"/machines/{JOB}/end", key=make_token(JOB, "brick", 2**32, SECRET)).status_code == 404
    assert front.get("/v2/lorry/health", token).status_code == 401  # nor does a token open the clients' routes
    assert provider.ended == []
    assert front.post(f"/machines/{JOB}/tick", key=token).json()["ticked"] is True
    assert front.post(f"/machines/{JOB}/end", key=token).json() == {"job_id": JOB, "ended": True}
    assert (provider.ended, ticked) == ([JOB], [("acme", JOB)])


def test_a_look_ticks_the_job_once_and_after_the_answer(make_front: MakeFront) -> None:
    ticked: list[str] = []
    front = make_front(
        open_backend=lambda name, environment: Rented("local"), tick=lambda client, job_id: ticked.append(job_id)
    )
    front.run()
    for _ in range(3):
        front.status(JOB)
    give_up = time.monotonic() + 120
    while not ticked and time.monotonic() < give_up:
        time.sleep(0.01)
    assert ticked == [JOB]


def test_a_changed_token_is_none() -> None:
    token = make_token("job-1", "acme", 2000, SECRET)
    claim = read_token(token, SECRET, 1999.0)
    assert claim is not None
    assert (claim.job_id, claim.client, client_of("s3://b/clients/acme/jobs")) == ("job-1", "acme", "acme")
    assert read_token(token, SECRET, 2000.0) is None
    assert read_token(token, "another-secret-of-length", 1999.0) is None
    changed = (
        token[:-1] + "x",
        token.replace("acme", "brick"),
        token + ".x",
        "",
        token.replace(".", "|"),
        "\u00e9" + token,
    )
    assert [read_token(text, SECRET, 1999.0) for text in changed] == [None] * 6


def test_of_two_recipes_for_one_base_model_the_clients_own_is_taken(make_front: MakeFront, bucket: str) -> None:
    front = rented(make_front, bucket, Rented(), recipe="qwen3-next-80b/zero3", max_usd_per_job=10_000.0)
    numbers = {"base_model": "Qwen/Qwen3-Next-80B-A3B-Instruct", "epochs": 1}
    quoted = front.post("/v2/lorry/quote", {"input": front.input(gpu_config=None, hyperparameters=numbers)})
    assert quoted.status_code == 200, quoted.text
    assert quoted.json()["understood"]["recipe"] == "qwen3-next-80b/zero3"
