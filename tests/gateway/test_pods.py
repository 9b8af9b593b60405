"""The front door with Runpod behind it: one key is one Pod whatever fails, and a Pod may ask the door for its end."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from scripts.backends.runpod_api import RunpodApi
from scripts.backends.runpod_pod import RunpodPodBackend
from scripts.container.pod_end import PodEnd, end_of_pod
from scripts.fake_runpod.host import Host
from scripts.fake_runpod.server import Fault, LocalRunpod, serve
from tests.gateway.conftest import SECRET, Front
from tests.gateway.test_rented import JOB, MISTRAL, RUN

CONTROL_KEY = "rpa_CANARY_control_plane_key"
IMAGE = "registry.example/lorry/trainer@sha256:" + "a" * 64


class Held(Exception):
    """The container waits for its Pod to end."""


@dataclass
class Quiet:
    """The machines' runner: containers that do nothing, and the environments they were given."""

    environments: list[dict[str, str]] = field(default_factory=list)

    def start(self, pod_id: str, command: Sequence[str], environment: Mapping[str, str], folder: Path) -> Quiet:
        self.environments.append(dict(environment))
        return self

    def exit_code(self) -> None:
        return None

    def lines(self) -> list[str]:
        return []

    def end(self, *, at_once: bool = False) -> None:
        return


@pytest.fixture
def quiet() -> Quiet:
    return Quiet()


@pytest.fixture
def runpod(tmp_path: Path, quiet: Quiet) -> Iterator[LocalRunpod]:
    with serve(CONTROL_KEY, host=Host(tmp_path / "host", quiet)) as local:
        yield local
        assert local.drift == []


@pytest.fixture
def front(make_front: Callable[..., Front], bucket: str, runpod: LocalRunpod) -> Front:
    """A front door that rents Pods; they find it under its own address."""
    with RunpodApi(CONTROL_KEY, runpod.url) as api:
        volume = api.create("network-volumes", {"name": "models", "size": 10, "dataCenter": "US-MO-1"})["id"]
    environment = {
        "RUNPOD_API_KEY": CONTROL_KEY, "RUNPOD_API_BASE_URL": runpod.url, "RUNPOD_VOLUME_ID": volume,
        "LORRY_IMAGE": IMAGE, "LORRY_TOKEN_SECRET": SECRET,
    }  # fmt: skip

    def backend(name: str, given: Mapping[str, str]) -> RunpodPodBackend:
        return RunpodPodBackend(given)

    front = make_front(settings={"store": bucket}, open_backend=backend, environment=environment)
    environment["LORRY_PUBLIC_URL"] = front.url
    return front


def pods(runpod: LocalRunpod) -> list[str]:
    with runpod.lock:
        return [pod["name"] for pod in runpod.account.held["pods"].values()]


@pytest.mark.parametrize("fault", ["none", "reply lost"])
def test_fifty_submits_with_one_key_rent_one_pod(front: Front, runpod: LocalRunpod, fault: str) -> None:
    if fault == "reply lost":
        runpod.faults.append(Fault("POST", "/v2/pods$", 0))
    body = {"input": front.input(job_id=None, hyperparameters=MISTRAL)}

    def submit(number: int) -> Any:
        return front.post(RUN, body, headers={"Idempotency-Key": "order-7"})

    with ThreadPoolExecutor(50) as pool:
        answers = list(pool.map(submit, range(50)))
    assert {answer.status_code for answer in answers} == {200}, answers[0].text
    ids = {answer.json()["id"] for answer in answers}
    assert len(ids) == 1
    assert pods(runpod) == [f"lorry-{ids.pop()}"]
    assert sum(entry[:2] == ("POST", "/v2/pods") for entry in runpod.log) == 1


def test_a_pod_that_may_not_end_itself_is_ended_by_the_front_door(
    front: Front, runpod: LocalRunpod, quiet: Quiet
) -> None:
    front.run(hyperparameters=MISTRAL)
    front.run(hyperparameters=MISTRAL, job_id="another-1")
    front.wait(JOB, lambda view: len(quiet.environments) == 2)
    runpod.pod_keys_work = False
    mine = next(given for given in quiet.environments if given["LORRY_JOB"] == JOB)
    assert (mine["LORRY_FRONT_DOOR"], "LORRY_TOKEN_SECRET" in mine) == (front.url, False)

    def sleep(seconds: float) -> None:
        if seconds >= 15:
            raise Held

    end = end_of_pod(mine, JOB)
    assert end is not None
    with pytest.raises(Held):
        PodEnd(**{**vars(end), "sleep": sleep})()
    assert pods(runpod) == ["lorry-another-1"]
    with pytest.raises(Held):  # its token opens nothing of another job
        PodEnd(**{**vars(end), "sleep": sleep, "job_id": "another-1"})()
    assert pods(runpod) == ["lorry-another-1"]


def test_why_a_pod_is_stuck_reaches_its_client(front: Front, runpod: LocalRunpod) -> None:
    with runpod.lock:
        runpod.host.provisioning_seconds = 9999.0  # type: ignore[union-attr]
    front.run(hyperparameters=MISTRAL)
    told = front.get(f"/training/status/{JOB}").json()["message"]
    assert re.fullmatch(r"waiting for the machine's first word \(Pod \w+: PROVISIONING\)", told)
