"""One id, or one key, is one job: however often, however parallel, from however many front doors it is asked for."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from scripts.gateway.dataset import Fetcher
from tests.gateway.conftest import Front

RUN = "/v2/lorry/run"
JOB = "5f0c1d7e-58a5-4a3b-9d5e-0c9a54f1e001"
KEY = {"Idempotency-Key": "order-7-canary"}


def jobs_of(front: Front) -> list[str]:
    return sorted(path.name for path in front.folder("").iterdir())


def test_fifty_parallel_submits_with_one_key_make_one_job_and_one_machine(
    front: Front, make_front: Callable[..., Front]
) -> None:
    doors = [front, make_front()]  # two processes of a platform that scales
    body = {"input": front.input(job_id=None)}

    def submit(number: int) -> Any:
        return doors[number % 2].post(RUN, body, headers=KEY)

    with ThreadPoolExecutor(50) as pool:
        answers = list(pool.map(submit, range(50)))
    assert {answer.status_code for answer in answers} == {200}
    ids = {answer.json()["id"] for answer in answers}
    assert len(ids) == 1
    assert jobs_of(front) == sorted(ids)
    job = ids.pop()
    assert front.finish(job)["status"] == "COMPLETED"
    assert front.log(job).count("takes the job") == 1
    assert len(front.sets.hits) <= 2  # once for each front door at most


def test_the_same_id_with_another_body_is_a_conflict(still: Front) -> None:
    still.run()
    other = still.post(RUN, {"input": still.input(hyperparameters={"epochs": 3})})
    assert other.status_code == 409
    assert "stands for another request" in other.json()["error"]
    assert other.json()["code"] == "conflict"
    assert len(jobs_of(still)) == 1


def test_the_same_key_with_another_body_is_a_conflict(still: Front) -> None:
    first = still.post(RUN, {"input": still.input(job_id=None)}, headers=KEY).json()["id"]
    assert still.post(RUN, {"input": still.input(job_id=None)}, headers=KEY).json()["id"] == first
    for changes in ({"hyperparameters": {"epochs": 3}}, {"job_id": "another-one"}):
        other = still.post(RUN, {"input": still.input(job_id=None) | changes}, headers=KEY)
        assert other.status_code == 409, changes
    assert jobs_of(still) == [first]


def test_the_same_training_set_signed_anew_is_the_same_request(still: Front) -> None:
    still.run()
    again = still.post(RUN, {"input": still.input(dataset_url=f"{still.sets.url}/set.jsonl?token=signed-anew")})
    assert again.status_code == 200
    assert len(still.sets.hits) == 1


def test_a_refused_training_set_leaves_its_id_free_for_a_corrected_one(front: Front) -> None:
    page = front.sets.put("/expired", b"<html>expired</html>")
    refused = front.post(RUN, {"input": front.input(dataset_url=page)}, headers=KEY)
    assert refused.status_code == 400
    assert "a web page" in refused.json()["error"]
    view = front.status(JOB)
    assert (view["status"], view["error"]) == ("FAILED", refused.json()["error"])
    assert front.post(f"/v2/lorry/retry/{JOB}").status_code == 409
    corrected = front.post(RUN, {"input": front.input()}, headers=KEY)
    assert corrected.status_code == 200, corrected.text
    assert front.finish(JOB)["status"] == "COMPLETED"


@pytest.mark.parametrize(
    "name", ["../../etc/passwd", "UPPER-5F0C", "a" * 150, "..", "a/b", "caf\u00e9", "x\u0000y", " "]
)
def test_an_id_that_is_no_name_stands_for_a_safe_one(still: Front, name: str) -> None:
    answer = still.post(RUN, {"input": still.input(job_id=name)})
    assert answer.status_code == 200, answer.text
    assert answer.json()["id"] == name
    (folder,) = jobs_of(still)
    assert folder.startswith("j")
    assert folder.isalnum()
    if "/" not in name and name.strip(". "):
        assert still.status(name.replace("\u0000", "%00"))["id"] == name


def test_a_job_without_id_or_key_gets_one(still: Front) -> None:
    ids = {still.post(RUN, {"input": still.input(job_id=None)}).json()["id"] for _ in range(2)}
    assert len(ids) == 2


def test_requests_are_recorded_before_the_training_set_is_fetched(front: Front, make_front: Any) -> None:
    """While the set is fetched the job is already known, so a client that lost patience finds it."""
    release = []

    def slow(host: str, port: int) -> list[str]:
        while not release:
            time.sleep(0.01)
        return ["127.0.0.1"]

    door = make_front(fetcher=Fetcher(allows_loopback=True, resolve=slow))
    with ThreadPoolExecutor(1) as pool:
        sent = pool.submit(door.post, RUN, {"input": door.input()})
        while not (front.folder(JOB) / "request.json").exists():
            time.sleep(0.01)
        assert front.status(JOB)["status"] == "IN_QUEUE"
        assert front.post(f"/v2/lorry/cancel/{JOB}").json()["status"] == "CANCELLED"
        release.append(True)
        assert sent.result().status_code == 200
    assert not (front.folder(JOB) / "container.json").exists()  # no machine for a job that was cancelled
    assert front.status(JOB)["status"] == "CANCELLED"
