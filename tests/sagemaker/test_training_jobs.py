"""A job in a training job of a local SageMaker: asked for once, followed, interrupted, stopped, explained, settled."""

from __future__ import annotations

import io
import json
import re
import time
from collections.abc import Callable
from dataclasses import replace

import pytest

from scripts.adapter import verify_adapter
from scripts.cli import main
from scripts.cost import settle
from scripts.pull import pull
from scripts.reap import make_rounds
from scripts.state import job_state, overdue
from scripts.stop import stop_job
from scripts.store import open_store
from scripts.tick import Hands, tick
from scripts.tick import Room as TickRoom
from scripts.watch import watch
from tests.sagemaker.conftest import KEYS, SETTINGS, Room
from tests.sagemaker.fake_sagemaker import IMAGE, SPOT_SHARE, Fault, Mishap, Pace

MakeRoom = Callable[..., Room]


def test_a_job_is_asked_for_once_trained_followed_and_settled_by_its_billed_seconds(
    make_room: MakeRoom, tmp_path
) -> None:
    room = make_room()
    room.account.faults.append(Fault("CreateTrainingJob", 0, carried_out=True))  # made, and the answer is lost
    handle = room.launch().handle
    assert room.launch().handle == handle
    assert list(room.account.jobs) == [handle["training_job"]]
    out = io.StringIO()
    state = watch(room.store, "job-1", room.backend, out, poll_seconds=0.2)
    assert state.state == "completed", out.getvalue() + room.said()
    room.finish()
    assert pull(room.store, "job-1", tmp_path / "adapter").job_id == "job-1"
    verify_adapter(tmp_path / "adapter")
    job = room.account.jobs[handle["training_job"]]
    assert [turn["Status"] for turn in job.transitions] == [
        *("Starting", "Downloading", "Training", "Uploading", "Completed")
    ]
    seen = room.backend.observe(handle)
    assert (seen.phase, seen.detail) == ("gone", f"training job {job.name}: Completed")
    assert job.starts == 1
    host = room.account.folder / job.name / "0-algo-1"
    environment = json.loads((host / "environment.json").read_text())
    assert environment["LORRY_STORE"] == room.spec.store
    assert (host / "opt/ml/input/data/training/train.jsonl").read_text() == "{}\n"
    assert not any(value in json.dumps(room.account.log) for value in KEYS.values()), "no key in a request"
    said = list(room.backend.logs(handle))
    assert all(re.match(r"\d{4}-\d\d-\d\dT\S+ algo-1: ", line) for line in said)
    assert any("takes the job" in line for line in said)
    room.account.jobs[job.name].on_seconds = 1800.0
    settlement = settle(room.store, room.files(), state, room.backend.charges, time.time())
    assert settlement is not None
    assert (settlement.usd, settlement.source, settlement.is_final) == (3.956, "bill", True)  # 1800 s of 7.912 an hour


def test_a_machine_that_is_kept_warm_is_reported_until_it_is_cold(
    make_room: MakeRoom, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = {"LORRY_SAGEMAKER_WARM_MINUTES": "3"}
    room = make_room(settings=settings)
    room.account.pace = Pace(launching=1e9)
    room.spec = room.spec.model_copy(update={"cap_usd": 0.5})
    job = room.account.jobs[room.launch().handle["training_job"]]
    assert room.backend.forgotten() == []
    job.status, job.ended_at = "Completed", room.account.clock.now()
    for name, value in {**SETTINGS, **settings, "LORRY_STORE": room.store.url}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("RUNPOD_API_KEY", raising=False)
    assert main(["reap", "--yes", "--json"]) == 0
    (seen,) = json.loads(capsys.readouterr().out)["decisions"]
    assert (seen["action"], seen["name"]) == ("report", f"training job {job.name}")
    assert seen["reason"].startswith(
        "its machine is kept warm, and billed, for 3 minutes after its end; to end it: `aws"
    )
    assert seen["usd_per_month"] == pytest.approx(7.912 * 3 / 60), "the minutes, not a month of them"
    room.account.clock.jump(181.0)
    assert room.backend.forgotten() == []


@pytest.mark.slow
def test_an_interruption_of_spot_is_outlived_with_the_checkpoint(make_room: MakeRoom) -> None:
    room = make_room(settings={"LORRY_SAGEMAKER_SPOT": "yes"}, steps=40, step_seconds=0.1, checkpoint_steps=2)
    room.account.mishaps.append(Mishap("interrupt", after_seconds=3600.0))
    handle = room.launch().handle
    room.reach(5)
    room.account.jobs[handle["training_job"]].mishap = Mishap("interrupt")
    files = room.finish()
    job = room.account.jobs[handle["training_job"]]
    assert job.status == "Completed", room.said()
    assert [turn["Status"] for turn in job.transitions][3:6] == ["Interrupted", "Downloading", "Training"]
    assert files.container is not None
    first, second = files.container.attempts
    assert first.exit_code is None, "it was told to end"
    assert second.resumed_from is not None
    assert int(second.resumed_from[5:]) >= 5, "what it had done was saved when the machine was taken"
    assert files.manifest is not None
    assert files.container.waited_seconds > 0, "what it waited counts against no limit"
    assert files.manifest.image == IMAGE
    usd = room.backend.charges(room.store, files)
    assert usd is not None
    assert usd.usd[job.name] <= SPOT_SHARE * job.on_seconds / 3600 * 7.912 + 0.001


@pytest.mark.slow
def test_a_spot_job_that_waits_for_its_next_machine_costs_nothing_and_is_ended_by_nobody(make_room: MakeRoom) -> None:
    room = make_room(settings={"LORRY_SAGEMAKER_SPOT": "yes"}, steps=4000, step_seconds=0.05, checkpoint_steps=2)
    room.account.pace = Pace(launching=0.0, downloading=0.0, uploading=0.0, back=1e9)
    handle = room.launch().handle
    room.reach(3)
    job = room.account.jobs[handle["training_job"]]
    job.mishap = Mishap("interrupt")
    room.wait(lambda: room.backend.observe(handle).phase == "waiting")
    room.account.clock.jump(2 * 3600.0)
    now = room.account.clock.now()
    hands = Hands(lambda name: room.backend, room.backend.charges, lambda: now)
    report = tick([TickRoom(room.store)], hands)
    assert (report.done, report.troubles) == ([], [])
    seen = room.backend.observe(handle)
    assert overdue(room.files(), replace(seen, usd=None), now) is None, "nor where the platform says no billed seconds"
    rounds = make_rounds({"sagemaker": room.backend}, open_store, lambda url: True, now, ends=True)
    assert (rounds.decisions, rounds.troubles) == ([], {})
    assert job.secondary == "Interrupted"
    room.account.clock.jump(4 * 3600.0)  # beyond MaxWaitTimeInSeconds the platform itself gives up
    assert room.backend.observe(handle).detail.endswith("Stopped, MaxWaitTimeExceeded")


@pytest.mark.slow
def test_a_stop_saves_a_checkpoint_and_a_second_stop_does_no_harm(make_room: MakeRoom) -> None:
    room = make_room(steps=4000, step_seconds=0.05, checkpoint_steps=5000)
    handle = room.launch().handle
    room.reach(3)
    for _ in range(2):
        stop_job(room.store, "job-1", room.backend, "user", "enough", time.time())
    files = room.finish()
    seen = room.backend.observe(handle)
    assert seen.detail.endswith("Stopped")
    assert job_state(files, seen, time.time()).state == "cancelled"
    assert any(key.endswith("COMPLETE") for key in room.store.keys("job-1/checkpoints"))
    room.backend.stop(handle)
    assert room.backend.owned() == []


@pytest.mark.slow
def test_a_failure_shows_its_cause_at_the_service_too(make_room: MakeRoom) -> None:
    room = make_room(faults={"1": ["out_of_memory", 2]})
    handle = room.launch().handle
    room.finish()
    seen = room.backend.observe(handle)
    assert "AlgorithmError: out_of_memory: out_of_memory at step 2, exit code: 20" in seen.detail


def test_the_platforms_own_time_limit_ends_a_job_and_says_so(make_room: MakeRoom) -> None:
    room = make_room(steps=4000, step_seconds=0.05)
    handle = room.launch().handle
    room.reach(3)
    owned = room.backend.owned()
    assert [one.job_id for one in owned] == ["job-1"]
    assert owned[0].usd_per_hour == 7.912
    room.account.clock.jump(3600 + 301)
    room.finish()
    assert room.backend.observe(handle).detail.endswith("Stopped, MaxRuntimeExceeded")
    again = room.launch().handle  # the job goes on under the next name
    assert again["training_job"] == handle["training_job"] + "-2"
    room.backend.stop(again)
    room.finish()
    assert set(room.backend.charges(room.store, room.files()).usd) == {handle["training_job"], again["training_job"]}


@pytest.mark.slow
def test_the_hosts_of_one_training_job_are_the_nodes_of_the_job(make_room: MakeRoom) -> None:
    room = make_room(steps=40, step_seconds=0.1)
    room.spec = room.spec.model_copy(update={"nodes": 2})
    handle = room.launch().handle
    files = room.finish()
    job = room.account.jobs[handle["training_job"]]
    assert job.status == "Completed", room.said()
    assert files.manifest is not None
    said = "\n".join(room.backend.logs(handle))
    assert "algo-1: " in said
    assert re.search("algo-2: .*node 1 joins attempt 1", said)
    assert files.container is not None
    assert len(files.container.attempts) == 1
    usd = room.backend.charges(room.store, files)
    assert usd is not None
    assert usd.usd[job.name] == pytest.approx(2 * int(job.on_seconds) / 3600 * 7.912, abs=1e-5)
