"""What is asked of the queue: compared by whole value with its golden file, and refused where it cannot be kept to."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from recipes.job import LaunchSpec
from scripts.backends.runpod_queue import WOKEN_WORKERS, RunpodQueueBackend, sentence_of
from scripts.backends.runpod_queue_request import numbered, queue_request, unfit
from scripts.errors import Refused
from scripts.fake_runpod.catalog import Catalog
from scripts.fake_runpod.contract import Contract
from scripts.worker import QueueWorker
from tests.queue.conftest import OFFER, QUEUE
from tests.runpod.conftest import OPENAPI, spec_of

GOLDEN = Path(__file__).parent / "golden" / "queue.json"
STORE = "s3://a-bucket/clients/acme/jobs"
ENDPOINT = QUEUE | {"id": "ep1", "gpu": {"pools": ["AMPERE_80"], "count": 1, "excludedTypes": []}}


def a_spec(**changes: Any) -> LaunchSpec:
    return spec_of("job-1", STORE).model_copy(update={"backend": "runpod_queue", "offer": OFFER, **changes})


def test_the_request_is_the_committed_one() -> None:
    text = json.dumps(numbered(queue_request(a_spec(), "ep1"), 1), indent=2, sort_keys=True) + "\n"
    if os.environ.get("LORRY_WRITE_GOLDEN"):
        GOLDEN.parent.mkdir(exist_ok=True)
        GOLDEN.write_text(text)
    again = "if this is meant, run: LORRY_WRITE_GOLDEN=1 python -m pytest tests/queue/test_queue_request.py"
    assert text == GOLDEN.read_text(), again


def test_both_clocks_are_sent_and_leave_the_container_time_to_end_by_itself() -> None:
    policy = queue_request(a_spec(deadline_seconds=7200), "ep1")["policy"]
    assert policy["executionTimeout"] == (7200 + 300) * 1000
    assert policy["ttl"] == policy["executionTimeout"] + 3_600_000, "the wait for a worker comes on top"


def test_a_job_that_the_queue_cannot_run_is_refused_with_every_reason() -> None:
    with pytest.raises(Refused) as refused:
        queue_request(a_spec(offer="runpod-h200-1", nodes=2, deadline_seconds=8 * 86_400), "")
    assert [problem.where for problem in refused.value.problems] == [
        "offer", "hardware.nodes", "RUNPOD_TRAINING_ENDPOINT_ID", "limits.max_hours",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("endpoint", "prices", "said"),
    [
        (ENDPOINT, {}, None),
        (None, {}, "there is none of that id"),
        (ENDPOINT | {"type": "LOAD_BALANCER"}, {}, "it is no queue"),
        (ENDPOINT | {"gpu": {"pools": ["AMPERE_80"], "count": 2}}, {}, "its workers have 2 GPUs, the job needs 1"),
        (ENDPOINT | {"gpu": None}, {}, "its workers have 0 GPUs"),
        (ENDPOINT, {"AMPERE_80": 2.75}, "$2.75 an hour now, the quote was $2.74"),
        (ENDPOINT | {"gpu": {"pools": ["ADA_48_PRO"], "count": 1}}, {}, "a GPU of 48 GB, the plan is for 79.2 GiB"),
        (ENDPOINT | {"gpu": {"pools": ["AMPERE_80", "HOPPER_141"], "count": 1}}, {}, "pool HOPPER_141: $5.58 an hour"),
        (ENDPOINT | {"gpu": {"pools": ["ADA_24"], "count": 1}}, {}, "this account is offered none of it"),
    ],
)
def test_an_endpoint_must_keep_what_the_plan_promises(
    endpoint: dict[str, Any] | None, prices: dict[str, float], said: str | None
) -> None:
    found = "; ".join(str(problem) for problem in unfit(endpoint, a_spec(), Catalog(prices=prices).gpus()))
    assert (found == "") if said is None else (said in found), found


@pytest.mark.parametrize("openapi", [None, *([OPENAPI] if OPENAPI else [])])
def test_what_wakes_an_endpoint_keeps_to_the_contract(openapi: Path | None) -> None:
    route = Contract.load(openapi).find("PATCH", "/v2/serverless/ep1")
    assert route is not None
    assert route.request_errors({"workers": {"max": WOKEN_WORKERS}}) == []
    assert route.request_errors({"workers": {"most": 1}}), "the check can fail"


def test_the_sentence_of_a_failure_is_found_in_what_the_worker_loop_makes_of_it() -> None:
    wrapped = json.dumps({"error_type": "E", "error_message": "the disk is full", "error_traceback": "..."})
    assert [sentence_of(value) for value in (wrapped, "the disk is full", None, "[1]")] == [
        "the disk is full", "the disk is full", "", "[1]",
    ]  # fmt: skip


def test_without_a_store_nothing_is_owned_and_nobody_is_asked() -> None:
    assert RunpodQueueBackend({}).owned() == []


def test_the_worker_is_imported_without_the_runpod_package_a_server_or_torch() -> None:
    code = (
        "import sys, scripts.worker; print([m for m in ('runpod', 'torch', 'starlette', 'boto3') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({}, "LORRY_STORE: not set"),
        ({"LORRY_STORE": "{{ RUNPOD_SECRET_store }}"}, "LORRY_STORE: a secret that was not filled in"),
        ({"LORRY_STORE": "s3://a-bucket/jobs", "LORRY_CLIENT": "A B"}, "LORRY_CLIENT: 'A B'"),
        ({"LORRY_STORE": "s3://a-bucket/jobs", "LORRY_RECIPE": "smoke/none"}, "smoke/none"),
        ({"LORRY_STORE": "s3://a-bucket/jobs", "LORRY_MAX_USD_PER_MONTH": "much"}, "LORRY_MAX_USD_PER_MONTH: 'much'"),
        ({"LORRY_STORE": "s3://a-bucket/jobs"}, "input.base_model: missing"),
    ],
)
def test_a_worker_that_cannot_train_fails_each_job_with_the_reason(environment: dict[str, str], said: str) -> None:
    worker = QueueWorker(environment, lambda job, progress: None)
    output = asyncio.run(worker.handler({"id": "q1", "input": {"dataset_url": "https://a.example/set.jsonl"}}))
    assert said in output["error"]
