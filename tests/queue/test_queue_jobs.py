"""Jobs on the queue of the local Runpod: the real backend, the real worker in the real loop, the real container."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from scripts.adapter import verify_adapter
from scripts.container.supervisor import MARK
from scripts.errors import Refused
from scripts.fake_runpod.host import Mishap
from scripts.fake_runpod.server import Fault
from scripts.state import job_state
from scripts.stop import stop_job
from tests.queue.conftest import QueueRoom

MakeRoom = Callable[..., QueueRoom]


def processes(room: QueueRoom) -> list[int]:
    """Every process of the containers of this job on the workers' disks."""
    needle, found = f"jobs/{room.spec.job_id}".encode(), []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                variables = (entry / "environ").read_bytes().split(b"\0")
            except OSError:
                continue
            marks = [v for v in variables if v.startswith(f"{MARK}=".encode())]
            if any(v.endswith(needle) and str(room.queue.runpod.fleet.folder).encode() in v for v in marks):
                found.append(int(entry.name))
    return found


def test_a_launched_job_trains_on_a_worker_and_comes_home(make_room: MakeRoom) -> None:
    room = make_room()
    handle = room.launch().handle
    assert room.launch().handle == handle, "launched twice is asked for once"
    done = room.queue.wait(handle["queue"], "COMPLETED", "FAILED")
    assert done["status"] == "COMPLETED", done
    assert done["output"]["status"] == "completed"
    assert set(done["output"]["model_files"]) == {"adapter_config.json", "adapter_model.safetensors", "manifest.json"}
    verify_adapter(room.store.root / "job-1" / "adapter")
    seen = room.backend().observe(handle)
    assert seen.phase == "gone"
    assert seen.usd == pytest.approx(done["executionTime"] / 3_600_000 * 2.736)
    assert room.trainings() == 1
    lines = list(room.backend().logs(handle))
    assert any("Finished" in line for line in lines), lines
    sent = [body for method, path, body in room.queue.runpod.log if path.endswith("/run")]
    assert len(sent) == 1


@pytest.mark.slow
def test_progress_is_told_while_it_runs_and_is_never_the_last_word(make_room: MakeRoom) -> None:
    room = make_room(steps=60, step_seconds=0.05)
    handle = room.launch().handle
    told: list[dict[str, Any]] = []
    while (view := room.queue.status(handle["queue"]))["status"] in ("IN_QUEUE", "IN_PROGRESS"):
        if view["status"] == "IN_PROGRESS" and "output" in view and view["output"] not in told:
            told.append(view["output"])
        time.sleep(0.05)
    assert view["output"]["progress"] == 100
    steps = [output["current_step"] for output in told]
    assert len(steps) >= 2
    assert all(isinstance(step, int) for step in steps)
    posts = [body for _, path, body in room.queue.runpod.log if "/job-done/" in path]
    assert '"status": "IN_PROGRESS"' not in posts[-1]


@pytest.mark.slow
def test_a_stop_ends_the_container_with_all_its_processes(make_room: MakeRoom) -> None:
    room = make_room(steps=5000)
    handle = room.launch().handle
    room.reach(3)
    assert len(processes(room)) >= 2
    stop_job(room.store, "job-1", room.backend(), "user", "not wanted", time.time())
    room.wait(lambda: (c := room.files().container) and c.ended == "cancelled")
    room.wait(lambda: not processes(room))
    assert room.backend().observe(handle).phase == "gone"
    assert room.queue.status(handle["queue"])["status"] == "CANCELLED"
    state = job_state(room.files(), room.backend().observe(handle), time.time())
    assert (state.state, state.is_final) == ("cancelled", True)
    room.backend().stop(handle)


@pytest.mark.slow
def test_a_cancel_on_the_queue_alone_kills_even_a_deaf_training_and_leaves_a_reason(make_room: MakeRoom) -> None:
    room = make_room(steps=5000, faults={"1": ["deaf", 4]}, timing={"grace": 1.0})
    handle = room.launch().handle
    room.reach(4)
    assert room.queue.ask("POST", f"cancel/{handle['queue']}").json()["status"] == "CANCELLED"
    room.wait(lambda: (c := room.files().container) and c.ended == "failed")
    room.wait(lambda: not processes(room))
    assert "the queue ended it" in room.files().container.sentence  # type: ignore[union-attr]


@pytest.mark.slow
def test_a_worker_killed_with_9_loses_no_more_than_a_checkpoint(make_room: MakeRoom) -> None:
    room = make_room(faults={"1": ["hang", 7]}, timing={"no_progress": 300.0})
    handle = room.launch().handle
    room.reach(7)
    worker = next(iter(room.queue.runpod.fleet.workers.values()))
    assert worker.running is not None
    os.kill(worker.running._child.pid, signal.SIGKILL)  # type: ignore[attr-defined]
    done = room.queue.wait(handle["queue"], "COMPLETED", "FAILED")
    assert done["status"] == "COMPLETED", done
    container = room.files().container
    assert container is not None
    assert [attempt.number for attempt in container.attempts] == [1, 2]
    assert container.attempts[1].resumed_from is not None
    assert room.queue.runpod.fleet.queue.jobs[handle["queue"]].deliveries == 2


@pytest.mark.slow
def test_a_worker_that_vanishes_is_followed_by_one_elsewhere(make_room: MakeRoom) -> None:
    room = make_room(faults={"1": ["hang", 7]}, timing={"no_progress": 300.0})
    handle = room.launch().handle
    room.reach(7)
    with room.queue.runpod.lock:
        next(iter(room.queue.runpod.fleet.workers.values())).mishap = Mishap("vanish")
    assert room.queue.wait(handle["queue"], "COMPLETED", "FAILED")["status"] == "COMPLETED"
    assert room.trainings() == 2


@pytest.mark.slow
def test_a_failed_training_is_failed_on_the_queue_with_our_sentence(make_room: MakeRoom) -> None:
    room = make_room(faults={"1": ["out_of_memory", 2]})
    handle = room.launch().handle
    done = room.queue.wait(handle["queue"], "COMPLETED", "FAILED")
    assert (done["status"], "output" in done) == ("FAILED", False) or done["output"] == {}, done
    assert "out_of_memory at step 2" in done["error"]
    assert "out_of_memory at step 2" in room.backend().observe(handle).detail
    assert job_state(room.files(), None, time.time()).state == "failed"


@pytest.mark.slow
def test_a_lost_answer_makes_no_second_training(make_room: MakeRoom) -> None:
    room = make_room()
    room.queue.runpod.faults.append(Fault("POST", "/run$", 0))
    handle = room.launch().handle
    jobs = room.queue.runpod.fleet.queue.jobs
    assert len(jobs) in (1, 2), "the request that was lost, and the one that took its place"
    for job in list(jobs):
        assert room.queue.wait(job, "COMPLETED", "FAILED")["status"] == "COMPLETED"
    assert handle["queue"] in jobs
    assert room.trainings() == 1
    others = [room.queue.status(job)["output"] for job in jobs if job != handle["queue"]]
    assert all(output["superseded"] for output in others)


@pytest.mark.slow
def test_an_endpoint_that_idleness_put_to_sleep_is_woken(make_room: MakeRoom) -> None:
    room = make_room()
    room.queue.set(workers={"max": 0})
    handle = room.launch().handle
    assert room.queue.wait(handle["queue"], "COMPLETED")
    with room.queue.runpod.lock:
        assert room.queue.runpod.account.held["serverless"][room.queue.endpoint]["workers"]["max"] == 1


def test_a_price_above_the_quote_is_refused_before_anything_is_asked(make_room: MakeRoom) -> None:
    room = make_room()
    room.queue.runpod.account.catalog.prices["AMPERE_80"] = 3.0
    with pytest.raises(Refused, match=r"pool AMPERE_80: \$3.00 an hour now, the quote was \$2.74"):
        room.launch()
    assert room.queue.runpod.fleet.queue.jobs == {}


@pytest.mark.slow
def test_what_the_platform_has_forgotten_the_job_folder_still_knows(make_room: MakeRoom) -> None:
    room = make_room()
    handle = room.launch().handle
    room.queue.wait(handle["queue"], "COMPLETED")
    room.queue.runpod.account.clock.jump(1801)
    assert room.queue.ask("GET", f"status/{handle['queue']}").status_code == 404
    seen = room.backend().observe(handle)
    assert (seen.phase, "30 minutes" in seen.detail) == ("gone", True)
    state = job_state(room.files(), seen, time.time())
    assert (state.state, state.sentence) == ("completed", "the adapter is proved and stored")


def test_a_job_that_no_worker_takes_is_cancelled_and_costs_nothing(make_room: MakeRoom) -> None:
    room = make_room()
    room.queue.runpod.fleet.mishaps.append(Mishap("stuck"))
    handle = room.launch().handle
    waiting = room.backend().observe(handle)
    assert (waiting.phase, waiting.usd) == ("waiting", 0.0)
    assert [owned.job_id for owned in room.backend().owned()] == ["job-1"]
    late = room.backend(now=lambda: time.time() + 3700).observe(handle)
    assert (late.phase, "1 initializing" in late.detail) == ("gone", True)
    assert room.queue.status(handle["queue"])["status"] == "CANCELLED"
    assert room.backend().owned() == []
    assert job_state(room.files(), late, time.time()).spent_usd == 0.0
