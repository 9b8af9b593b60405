"""The web app's calls of every generation, as it sends and reads them."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from recipes.job import Status
from scripts.adapter import verify_adapter
from scripts.cli.front_door import tick_of
from scripts.errors import ProviderError
from scripts.gateway.views import metrics
from scripts.job_lock import is_alive, lock_owner
from tests.gateway.conftest import Front, Rented, a_client

RUN = "/v2/lorry/run"
JOB = "5f0c1d7e-58a5-4a3b-9d5e-0c9a54f1e001"
UI_PRESET = {
    "name": "Balanced", "icon": "scale", "description": "...", "details": ["a"],
    "learning_rate": 5e-5, "batch_size": 4, "epochs": 3, "rank": 16, "alpha": 32, "dropout": 0.1,
}  # fmt: skip
TYPED = {"num_epochs": 5, "lora_rank": 16, "lora_alpha": 32, "lora_dropout": 0.05, "learning_rate": 2e-4,
         "batch_size": 8, "warmup_steps": 10, "weight_decay": 0.01}  # fmt: skip


def test_a_job_goes_from_run_to_an_adapter_that_can_be_fetched(front: Front, tmp_path: Path) -> None:
    accepted = front.post(RUN, {"input": front.input()}).json()
    assert (accepted["id"], accepted["status"]) == (JOB, "IN_QUEUE")
    done = front.finish(JOB)
    assert done["status"] == "COMPLETED", front.log(JOB)
    output = done["output"]
    assert output["progress"] == 100
    assert output["model_files"] == output["download_urls"]
    assert output["model_metadata"]["base_model"] == "lorry/smoke"
    assert "error" not in done
    assert done["cost"] == {"usd": 0.0, "settled": False, "quote_usd": 0.0, "cap_usd": 0.0}
    assert done["executionTime"] > 0
    health = front.get("/v2/lorry/health").json()
    assert health["jobs"] == {"completed": 1, "failed": 0, "inProgress": 0, "inQueue": 0, "retried": 0}
    assert set(health["workers"]) == {"idle", "initializing", "ready", "running", "throttled", "unhealthy"}
    (tmp_path / "home").mkdir()
    for name, link in output["model_files"].items():
        fetched = httpx.get(link)  # the web app sends no key here
        assert fetched.status_code == 200, link
        (tmp_path / "home" / name).write_bytes(fetched.content)
    assert verify_adapter(tmp_path / "home").job_id == JOB


def test_an_old_job_still_answers_from_another_front_door(front: Front, make_front: Any) -> None:
    front.run()
    assert front.finish(JOB)["status"] == "COMPLETED"
    weeks_later = time.time() + 40 * 86_400
    other = make_front(now=lambda: weeks_later)
    links = other.status(JOB)["output"]["model_files"]
    assert set(links) == {"adapter_config.json", "adapter_model.safetensors", "manifest.json"}
    assert httpx.get(links["manifest.json"]).status_code == 200


@pytest.mark.parametrize(
    ("hyperparameters", "gpu_config", "wanted"),
    [
        (UI_PRESET, {"type": "A100-80GB", "count": 2}, {"epochs": 3, "rank": 16, "alpha": 32, "learning_rate": 5e-5}),
        (TYPED, {"gpu_type": "H100", "num_gpus": 2, "gpu_memory_gb": 80, "cost_per_gpu_hour": 4.2},
         {"epochs": 5, "rank": 16, "alpha": 32, "batch_size": 8}),
        ({"epochs": 1, "rank": 8, "batch_size": 2}, None, {"epochs": 1, "rank": 8, "alpha": 16, "batch_size": 2}),
        ({}, {}, {"epochs": 4, "rank": 8, "alpha": 16, "batch_size": 4, "learning_rate": 5e-3}),
        (None, None, {"epochs": 4, "base_model": "lorry/smoke", "asked_model": None}),
        ({"base_model": "Lorry/SMOKE", "epochs": "2", "rank": 4.0}, {"type": "V100-32GB", "count": 8},
         {"epochs": 2, "rank": 4, "base_model": "lorry/smoke", "asked_model": "Lorry/SMOKE"}),
    ],
    ids=["page", "type definitions", "short", "empty", "nothing", "letter case and text"],
)  # fmt: skip
def test_every_spelling_is_understood_and_echoed(
    front: Front, hyperparameters: Any, gpu_config: Any, wanted: dict[str, Any]
) -> None:
    value = front.input(hyperparameters=hyperparameters, gpu_config=gpu_config)
    quoted = front.post("/v2/lorry/quote", {"input": value, "something": 1})
    assert quoted.status_code == 200, quoted.text
    assert quoted.json()["understood"].items() >= wanted.items()


def test_what_changes_nothing_is_said(front: Front) -> None:
    view = front.post("/v2/lorry/quote", {"input": front.input(hyperparameters=TYPED | {"colour": 1})}).json()
    assert view["understood"]["ignored"] == [
        "hyperparameters.colour: unknown",
        "hyperparameters.lora_dropout: LoRA without dropout is what is trained",
        "hyperparameters.warmup_steps: the recipe's warmup_fraction is used",
    ]
    assert "1 x NVIDIA A40 was asked for; local-2 is taken" in view["notes"][0]


def test_the_oldest_generation_submits_flat_and_reads_its_own_words(front: Front) -> None:
    body = front.input(callback_url="https://project.example/functions/v1/training-callback")
    submitted = front.post("/training/submit", body)
    assert submitted.status_code == 200, submitted.text
    job = submitted.json()["external_job_id"]
    assert front.get(f"/training/status/{job}").json()["status"] in ("running", "completed")
    front.finish(job)
    view = front.get(f"/training/status/{job}").json()
    assert (view["status"], view["progress"], view["error_message"]) == ("completed", 100, None)
    assert isinstance(view["current_epoch"], int)
    assert view["current_step"] == 4
    artifacts = front.get(f"/training/artifacts/{job}").json()
    assert httpx.get(artifacts["download_urls"]["manifest.json"]).json()["job_id"] == job
    assert artifacts["model_metadata"]["recipe"] == "smoke/zero3"


def test_artifacts_of_an_unfinished_job_are_refused(still: Front) -> None:
    still.run()
    answer = still.get(f"/training/artifacts/{JOB}")
    assert answer.status_code == 409
    assert "no adapter" in answer.json()["error"]


def test_progress_has_whole_numbers_and_loss_with_learning_rate(front: Front) -> None:
    front.script(JOB, steps=100_000)
    front.run()
    early = front.wait(JOB, lambda view: view["status"] == "IN_PROGRESS")
    assert isinstance(early["output"]["current_step"], int)
    view = front.wait(JOB, lambda view: view.get("output", {}).get("current_step", 0) > 2)
    assert view["output"]["metrics"].keys() >= {"training_loss", "learning_rate"}
    assert view["output"]["progress"] < 100
    assert front.post(f"/v2/lorry/training/cancel/{JOB}").json()["status"] == "cancelled"


def test_metrics_without_a_learning_rate_are_not_shown() -> None:
    half = Status(job_id=JOB, stage="training", attempt=1, updated_at=0.0, training_loss=1.0, tokens_per_second=9.0)
    assert metrics(half) == {}


def test_a_cancel_ends_the_machine_and_stays(front: Front) -> None:
    front.script(JOB, steps=100_000)
    front.run()
    front.wait(JOB, lambda view: view["status"] == "IN_PROGRESS")
    assert front.post(f"/v2/lorry/training/cancel/{JOB}").json()["status"] == "cancelled"
    assert front.status(JOB)["status"] == "CANCELLED"
    give_up = time.monotonic() + 200
    while '"ended": null' in (front.folder(JOB) / "container.json").read_text():
        assert time.monotonic() < give_up, front.log(JOB)
        time.sleep(0.1)
    view = front.status(JOB)
    assert (view["status"], "error" in view) == ("CANCELLED", False)


@pytest.mark.parametrize("path", ["/v2/lorry/cancel/", "/training/cancel/", "/v2/lorry/training/cancel/"])
def test_every_cancel_of_every_generation_reaches_the_machine(make_front: Any, path: str) -> None:
    provider = Rented("local")
    front = make_front(open_backend=lambda name, environment: provider)
    front.run()
    for _ in range(2):
        assert front.post(path + JOB).status_code == 200
    assert set(provider.ended) == {JOB}
    assert front.status(JOB)["status"] == "CANCELLED"


def test_a_cancelled_job_is_not_resurrected_by_the_same_request(still: Front) -> None:
    still.run()
    still.post(f"/v2/lorry/cancel/{JOB}")
    again = still.post(RUN, {"input": still.input()}).json()
    assert (again["id"], again["status"]) == (JOB, "CANCELLED")


@pytest.mark.parametrize("by", ["operator", pytest.param("cap", marks=pytest.mark.slow)])
def test_every_stop_but_the_users_own_is_failed(front: Front, by: str) -> None:
    front.script(JOB, steps=100_000)
    front.run()
    front.wait(JOB, lambda view: view["status"] == "IN_PROGRESS")
    (front.folder(JOB) / "stop.json").write_text(f'{{"by": "{by}", "reason": "it was time", "at": {time.time()}}}')
    view = front.finish(JOB)
    assert view["status"] == "FAILED"
    assert "it was time" in view["error"]


def test_every_end_is_one_of_three_words_whoever_stopped_it(make_front: Any) -> None:
    """The web app acts on COMPLETED and FAILED alone; CANCELLED it only hears after its own cancel."""
    provider = Rented("local")
    front = make_front(open_backend=lambda name, environment: provider)
    for by in ("operator", "cap", "deadline", "reaper", "user"):
        front.run(job_id=f"job-{by}")
        stop = f'{{"by": "{by}", "reason": "it was time", "at": {time.time()}}}'
        (front.folder(f"job-{by}") / "stop.json").write_text(stop)
        provider.ended.append(f"job-{by}")
        view = front.status(f"job-{by}")
        old = front.get(f"/training/status/job-{by}").json()
        if by == "user":
            assert (view["status"], old["status"], "error" in view) == ("CANCELLED", "cancelled", False)
        else:
            assert (view["status"], old["status"], old["error_message"]) == ("FAILED", "failed", view["error"])
            assert ("it was time" in view["error"], "output" in view) == (True, False)


def test_a_failed_job_says_why_and_is_retried_under_its_own_id(front: Front) -> None:
    front.script(JOB, faults={"1": ["out_of_memory", 2]})
    front.run()
    assert front.finish(JOB)["status"] == "FAILED"
    assert "memory" in front.status(JOB)["error"]
    assert "output" not in front.status(JOB)
    assert front.get(f"/training/status/{JOB}").json()["error_message"] == front.status(JOB)["error"]
    retried = front.post(f"/v2/lorry/retry/{JOB}")
    assert retried.status_code == 200, retried.text
    assert retried.json()["id"] == JOB
    done = front.get(f"/v2/lorry/status-sync/{JOB}?wait=60000").json()  # held until it has ended
    assert done["status"] == "COMPLETED"
    assert len(front.sets.hits) == 1  # the training set was in the store
    refused = front.post(f"/v2/lorry/retry/{JOB}")
    assert refused.status_code == 409
    assert "it is COMPLETED" in refused.json()["error"]
    listed = front.get("/v1/fine_tuning/jobs").json()["data"]
    assert [(job["id"], job["status"]) for job in listed] == [(JOB, "succeeded")]


def test_runsync_gives_up_holding_after_its_time(still: Front) -> None:
    answer = still.post("/v2/lorry/runsync?wait=1500", {"input": still.input()})  # which would never end
    assert answer.json()["status"] in ("IN_QUEUE", "IN_PROGRESS")
    assert still.post("/v2/lorry/runsync?wait=soon", {"input": still.input()}).status_code == 400


def test_a_job_that_got_no_machine_is_kept_and_its_client_is_told_under_which_id(make_front: Any) -> None:
    provider = Rented("local")
    front = make_front(open_backend=lambda name, environment: provider)
    given = provider.submit

    def full(spec: Any, request: Any) -> Any:
        raise ProviderError("no stock")

    provider.submit = full  # type: ignore[method-assign]
    answer = front.post("/v2/lorry/run", {"input": front.input()})
    assert answer.status_code == 503
    said = answer.json()["problems"][-1]
    assert said["where"] == f"job {JOB}"
    assert said["got"] == "it is kept, and a machine is asked for again"
    provider.submit = given  # type: ignore[method-assign]
    assert front.post("/v2/lorry/run", {"input": front.input()}).status_code == 200
    assert provider.asked == [JOB]


def test_a_job_left_between_record_and_launch_is_launched_by_the_next_look(front: Front, make_front: Any) -> None:
    front.run()
    front.finish(JOB)
    other = "left-behind-1"
    folder = front.folder(other)
    folder.mkdir()
    for name in ("request.json", "launch.json", "plan.json"):
        text = (front.folder(JOB) / name).read_text()
        (folder / name).write_text(text.replace(JOB, other))
    (folder / "data").mkdir()
    for path in (front.folder(JOB) / "data").iterdir():
        (folder / "data" / path.name).write_bytes(path.read_bytes())
    later = make_front(now=lambda: time.time() + 3600)
    assert later.finish(other)["status"] == "COMPLETED"


def test_a_job_whose_machine_vanished_is_failed_and_goes_on_when_retried(front: Front, make_front: Any) -> None:
    front.script(JOB, steps=6, faults={"1": ["hang", 3]}, timing={"grace": 5.0, "no_progress": 200.0})
    front.run()
    front.wait(JOB, lambda view: view.get("output", {}).get("current_step", 0) >= 3)
    owner = lock_owner(front.folder(JOB))
    assert owner is not None
    os.kill(owner.pid, signal.SIGKILL)
    while is_alive(owner):
        time.sleep(0.01)
    later = make_front(now=lambda: time.time() + 600)
    lost = later.status(JOB)
    assert lost["status"] == "FAILED"
    assert "machine is gone" in lost["error"]
    assert later.post(f"/v2/lorry/retry/{JOB}").status_code == 200
    assert front.finish(JOB)["status"] == "COMPLETED"
    assert '"resumed_from": "step-' in (front.folder(JOB) / "container.json").read_text()


def test_an_overdue_job_is_stopped_by_whoever_looks(front: Front, make_front: Any) -> None:
    front.script(JOB, steps=100_000, timing={"grace": 5.0, "no_progress": 5000.0})
    front.run()
    front.wait(JOB, lambda view: view["status"] == "IN_PROGRESS")
    later = make_front(now=lambda: time.time() + 2 * 3600)  # past the recipe's limit of one hour
    later.status(JOB)
    view = front.finish(JOB)
    assert view["status"] == "FAILED"
    assert "deadline" in view["error"]


def test_the_tick_of_the_command_settles_a_job_that_has_ended(front: Front) -> None:
    front.run()
    front.finish(JOB)
    tick = tick_of(front.root.as_uri())
    give_up = time.monotonic() + 200
    while not (view := front.status(JOB))["cost"]["settled"]:  # once its machine is gone too
        assert time.monotonic() < give_up, view
        tick(a_client("acme"), JOB)
        time.sleep(0.1)
    assert view["cost"]["usd"] == 0.0
