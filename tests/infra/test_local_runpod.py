"""The local Runpod refuses what Runpod refuses, in Runpod's words, and keeps its answers to the contract."""

from __future__ import annotations

import json
import os
import urllib.error
import urllib.request
from http.client import RemoteDisconnected
from pathlib import Path

import pytest

from scripts.fake_runpod.server import Fault, serve

POD = {"name": "p", "image": "i", "gpu": {"id": "NVIDIA H200", "count": 1}}
QUEUE = {
    "name": "e",
    "type": "QUEUE",
    "image": "i",
    "gpu": {"pools": ["HOPPER_141"]},
    "scaling": {"type": "QUEUE_DELAY", "queueDelay": 4},
}
DOCUMENT = os.environ.get("RUNPOD_OPENAPI")
CONTRACTS = [None, *([Path(DOCUMENT)] if DOCUMENT else [])]


@pytest.fixture(params=CONTRACTS, ids=lambda path: "published" if path else "hand-written")
def runpod(request):
    """A local Runpod under each contract at hand, with `ask(method, path, body)` -> (status, JSON)."""
    with serve("key", request.param) as local:

        def ask(method, path, body=None, key="key"):
            sent = urllib.request.Request(
                local.url + path,
                method=method,
                data=None if body is None else json.dumps(body).encode(),
                headers={"authorization": f"Bearer {key}"},
            )
            try:
                with urllib.request.urlopen(sent, timeout=120) as reply:
                    raw = reply.read().decode()
                    return reply.status, json.loads(raw) if "json" in reply.headers.get_content_type() else raw
            except urllib.error.HTTPError as refused:
                return refused.code, json.loads(refused.read())

        local.ask = ask
        yield local
        assert local.drift == []


def made(runpod, path, body):
    status, answer = runpod.ask("POST", path, body)
    assert status == 201, answer
    return answer


def test_every_kind_of_object_lives_and_dies(runpod):
    volume = made(runpod, "/network-volumes", {"name": "v", "size": 10, "dataCenter": "US-KS-2"})
    registry = made(runpod, "/registries", {"name": "r", "username": "u", "password": "p"})
    assert set(registry) == {"id", "name"}, "credentials are never read back"
    template = made(runpod, "/templates", {"name": "t", "image": "i", "registry": registry["id"]})
    arn = "arn:aws:ecr:us-east-1:123456789012:repository/a/b"
    delegation = made(runpod, "/registries/delegations", {"resource": arn})
    secret = made(runpod, "/account/secrets", {"name": "hf", "value": "hidden"})
    endpoint = made(runpod, "/serverless", QUEUE | {"networkVolumes": [volume["id"]]})
    mounts = {"network": [{"volumeId": volume["id"], "path": "/workspace"}]}
    pod = made(runpod, "/pods", POD | {"mounts": mounts, "templateId": template["id"]})
    assert (pod["dataCenterId"], pod["cost"]) == ("US-KS-2", 4.59)
    assert "hidden" not in json.dumps([secret, runpod.ask("GET", "/account/secrets")])

    lists = ["/network-volumes", "/registries", "/templates", "/registries/delegations", "/serverless", "/pods"]
    for path in [*lists, "/account/secrets"]:
        status, answer = runpod.ask("GET", path)
        assert status == 200
        assert [len(rows) for rows in answer.values()] == [1]

    assert runpod.ask("DELETE", f"/network-volumes/{volume['id']}")[0] == 400, "still attached"
    assert (
        runpod.ask("DELETE", f"/templates/{template['id']}")[1]["detail"] == f"template {template['id']} is in use by p"
    )
    ids = [("/pods", pod), ("/serverless", endpoint), ("/account/secrets", secret), ("/templates", template)]
    for path, item in [*ids, (lists[3], delegation), (lists[1], registry), (lists[0], volume)]:
        assert runpod.ask("DELETE", f"{path}/{item['id']}")[0] == 204
    assert runpod.account.is_empty()


@pytest.mark.parametrize(
    ("path", "body", "status", "said"),
    [
        ("/network-volumes", {"name": "v", "size": 9000, "dataCenter": "US-KS-2"}, 422, "9000 is greater than the"),
        ("/network-volumes", {"name": "v", "size": 10, "dataCenter": "US-TX-1"}, 400, "does not offer network volumes"),
        ("/network-volumes", {"name": "v", "size": 10, "dataCenter": "XX"}, 400, "unknown data center XX"),
        ("/pods", POD | {"interruptible": True}, 422, "'interruptible' was unexpected"),
        ("/pods", POD | {"gpu": {"id": "NVIDIA H200"}}, 400, "no instances currently available"),
        ("/pods", POD | {"dataCenterIds": ["EU-RO-1"]}, 400, "no instances currently available"),
        ("/pods", POD | {"gpu": {"id": "H201", "count": 1}}, 400, "unknown GPU type H201"),
        ("/serverless", QUEUE | {"cpu": [{"id": "cpu3c", "vcpuCount": 2}]}, 400, "exactly one of gpu and cpu"),
        ("/serverless", QUEUE | {"gpu": {"pools": ["HOPPER"]}}, 400, "unknown GPU pool HOPPER"),
        (
            "/serverless",
            QUEUE | {"scaling": {"type": "REQUEST_COUNT", "requestCount": 1}, "workers": {"idleTimeout": 5}},
            422,
            "idleTimeout: not applicable",
        ),
        ("/account/secrets", {"name": "RUNPOD_KEY", "value": "v"}, 422, "RUNPOD_KEY"),
        ("/nothing", {}, 404, "no such route"),
    ],
)
def test_a_wrong_request_is_refused_by_name(path, body, status, said, runpod):
    answer = runpod.ask("POST", path, body)
    assert answer[0] == status
    assert said in answer[1]["detail"]
    assert answer[1]["status"] == status
    assert runpod.account.is_empty()


def test_a_volume_only_grows(runpod):
    volume = made(runpod, "/network-volumes", {"name": "v", "size": 20, "dataCenter": "US-KS-2"})
    assert runpod.ask("PATCH", f"/network-volumes/{volume['id']}", {"size": 10})[0] == 400
    assert runpod.ask("PATCH", f"/network-volumes/{volume['id']}", {"size": 30})[1]["size"] == 30


def test_a_wrong_key_is_refused(runpod):
    assert runpod.ask("GET", "/pods", key="other")[0] == 401


def test_a_timeout_left_out_is_zero_as_on_the_real_service(runpod):
    assert made(runpod, "/serverless", QUEUE)["timeout"] == 0


def test_a_pod_goes_through_its_script_and_stays_on_the_last_status(runpod):
    runpod.account.pod_life = ("PROVISIONING", "RUNNING", "ERROR")
    pod = made(runpod, "/pods", POD)
    seen = [pod["status"]] + [runpod.ask("GET", f"/pods/{pod['id']}")[1]["status"] for _ in range(3)]
    assert seen == ["PROVISIONING", "RUNNING", "ERROR", "ERROR"]
    assert runpod.ask("GET", f"/pods/{pod['id']}")[1]["cost"] == 0


def test_pod_actions_follow_the_status_and_the_lock(runpod):
    path = f"/pods/{made(runpod, '/pods', POD)['id']}"
    assert runpod.ask("POST", f"{path}/action", {"action": "start"})[0] == 409
    runpod.ask("PATCH", path, {"locked": True})
    assert "locked" in runpod.ask("POST", f"{path}/action", {"action": "stop"})[1]["detail"]
    runpod.ask("PATCH", path, {"locked": False})
    assert runpod.ask("POST", f"{path}/action", {"action": "stop"})[1]["status"] == "EXITED"
    assert runpod.ask("POST", f"{path}/action", {"action": "terminate"})[0] == 204
    assert runpod.account.is_empty()


def test_logs_come_as_events(runpod):
    pod = made(runpod, "/pods", POD)
    runpod.account.pod_logs[pod["id"]] = ["one", "two"]
    events = runpod.ask("GET", f"/pods/{pod['id']}/logs")[1].strip().split("\n\n")
    assert [json.loads(e.partition("data: ")[2])["line"] for e in events] == ["one", "two"]


def test_stock_is_shown_where_it_was_asked_for(runpod):
    runpod.account.catalog.stock["US-KS-2"]["NVIDIA H200"] = "NONE"
    rows = runpod.ask("GET", "/catalog/datacenters?include=GPU_AVAILABILITY")[1]["dataCenters"]
    levels = {row["id"]: row["availability"] for row in rows[0]["gpuAvailability"]}
    assert levels["NVIDIA H200"] == "NONE"
    assert "gpuAvailability" not in runpod.ask("GET", "/catalog/datacenters/US-KS-2")[1]
    assert runpod.ask("GET", "/catalog/gpus/NVIDIA%20H200?include=AVAILABILITY")[1]["availability"] == "MEDIUM"


def test_a_create_whose_answer_is_lost_has_still_happened(runpod):
    runpod.faults.append(Fault("POST", "/pods$", 0))
    with pytest.raises((RemoteDisconnected, urllib.error.URLError)):
        runpod.ask("POST", "/pods", POD)
    assert [pod["name"] for pod in runpod.ask("GET", "/pods")[1]["pods"]] == ["p"]


def test_a_scripted_fault_strikes_as_often_as_told(runpod):
    runpod.faults.append(Fault("GET", "/pods", 429, headers={"Retry-After": "7"}, times=2))
    assert [runpod.ask("GET", "/pods")[0] for _ in range(3)] == [429, 429, 200]
    assert [entry[:2] for entry in runpod.log] == [("GET", "/v2/pods")] * 3
