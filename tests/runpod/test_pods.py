"""A job in a Pod, from the launch to the last cent: the real container in a process, on the local Runpod."""

from __future__ import annotations

import io
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from scripts.adapter import verify_adapter
from scripts.backends.runpod_api import RunpodApi
from scripts.fake_runpod.host import Mishap
from scripts.fake_runpod.pods import NO_CAPACITY
from scripts.fake_runpod.server import Fault
from scripts.job_lock import lock_owner
from scripts.stop import stop_job
from scripts.watch import watch
from tests.runpod.conftest import IMAGE, KEY, Room

MakeRoom = Callable[..., Room]


def adapter(room: Room) -> Path:
    return Path(room.store.url.removeprefix("file://")) / room.spec.job_id / "adapter"


def starts(room: Room) -> int:
    """How many trainers were started."""
    files = room.files()
    return len(files.container.attempts) if files.container else 0


def test_a_pod_trains_to_a_verified_adapter_and_leaves_a_bill_and_nothing_else(make_room: MakeRoom) -> None:
    room = make_room()
    began = time.time()
    submission = room.launch()
    pod = submission.handle["pod"]
    assert submission.handle["datacenter"] == "US-MO-1", "where its volume is"
    assert [owned.job_id for owned in room.backend.owned()] == ["job-1"]
    out = io.StringIO()
    state = watch(room.store, "job-1", room.backend, out, poll_seconds=0.1)
    assert state.state == "completed", out.getvalue() + room.said()
    room.finish()
    assert verify_adapter(adapter(room)).job_id == "job-1"
    bill = room.billed()
    assert list(bill) == [pod] == room.claims().pods()
    assert 0 < bill[pod] <= 1.79 * (time.time() - began) / 3600
    assert room.backend.observe(submission.handle).phase == "gone"
    assert room.backend.owned() == []
    assert room.creates() == 1


def test_no_secret_is_in_a_request_a_log_the_trainers_environment_or_the_job_folder(
    make_room: MakeRoom,
) -> None:
    room = make_room()
    canaries = {"AWS_ACCESS_KEY_ID": "CANARY-id", "AWS_SECRET_ACCESS_KEY": "CANARY-secret", "HF_TOKEN": "hf_CANARY"}
    room.environment["LORRY_POD_SECRETS"] = ",".join(f"{name}={name.lower()}" for name in canaries)
    with RunpodApi(KEY, room.runpod.url) as api:
        for name, value in canaries.items():
            api.create("account/secrets", {"name": name.lower(), "value": value}, secret=True)
    room.runpod.log.clear()
    pod = room.launch().handle["pod"]
    room.finish()
    disk = room.runpod.host.folder / pod  # type: ignore[union-attr]
    own = disk / "environment.json"  # what the container itself was given
    assert all(value in own.read_text() for value in canaries.values())
    seen = {f"{method} {path}": path + body for method, path, body in room.runpod.log} | {"the Pod's log": room.said()}
    roots = (disk, Path(room.store.url.removeprefix("file://")))
    paths = [path for root in roots for path in root.rglob("*") if path.is_file() and path != own]
    assert {"environment.txt", "container.log", "launch.json"} <= {path.name for path in paths}
    seen |= {str(path): path.read_bytes().decode("utf-8", "replace") for path in paths}
    assert [where for where, text in seen.items() for value in (*canaries.values(), KEY) if value in text] == []


def test_the_log_of_a_pod_is_that_of_its_container_and_its_platform(make_room: MakeRoom) -> None:
    room = make_room(steps=100_000)
    handle = room.launch().handle
    room.wait(lambda: "attempt 1 starts" in room.said())
    lines = list(room.backend.logs(handle))
    assert any(line.endswith("system: the Pod is RUNNING") for line in lines)
    assert any("container: " in line and "attempt 1 starts" in line for line in lines)
    room.backend.stop(handle)
    room.finish()


def test_a_stop_ends_the_job_and_the_pod(make_room: MakeRoom) -> None:
    room = make_room(steps=100_000)
    handle = room.launch().handle
    room.wait(lambda: (status := room.files().status) and status.step >= 2)
    stop_job(room.store, "job-1", room.backend, "user", "wrong recipe", time.time())
    assert room.pods() == []
    state = watch(room.store, "job-1", room.backend, io.StringIO(), poll_seconds=0.1)
    assert state.state == "cancelled"
    room.backend.stop(handle)  # nothing is there, and no error


def test_a_job_that_fails_ends_its_pod_too(make_room: MakeRoom) -> None:
    room = make_room(faults={"1": ["out_of_memory", 2]})
    room.launch()
    files = room.finish()
    assert files.container is not None
    assert (files.container.ended, files.container.cause) == ("failed", "out_of_memory")


def test_a_container_that_dies_is_started_again_and_goes_on(make_room: MakeRoom) -> None:
    room = make_room(steps=12, checkpoint_steps=5, faults={"1": ["hang", 7]})
    handle = room.launch().handle
    work = room.runpod.host.folder / handle["pod"] / "jobs" / "job-1"  # type: ignore[union-attr]
    room.wait(lambda: (status := room.files().status) and status.step >= 7)
    owner = lock_owner(work)
    assert owner is not None
    os.kill(owner.pid, signal.SIGKILL)
    files = room.finish()
    assert files.container is not None
    assert files.container.ended == "completed", room.said()
    assert files.container.attempts[1].resumed_from is not None
    assert len(room.claims().pods()) == 1


def test_a_container_that_cannot_end_its_pod_holds_and_trains_nothing_again(make_room: MakeRoom) -> None:
    room = make_room(steps=4)
    room.runpod.pod_keys_work = False
    handle = room.launch().handle
    room.wait(lambda: "holding, since a restart would cost as much" in room.said())
    work = room.runpod.host.folder / handle["pod"] / "jobs" / "job-1"  # type: ignore[union-attr]
    before = (work / "adapter" / "manifest.json").read_bytes()
    owner = lock_owner(work)
    assert owner is not None
    os.kill(owner.pid, signal.SIGKILL)  # and the platform starts it again
    room.runpod.pod_keys_work = True
    files = room.finish()
    # Its own log: the Pod's is gone with the Pod, which this container ends as soon as it has said it.
    assert "the job has ended already: completed" in (work / "logs" / "container.log").read_text()
    assert starts(room) == 1
    assert files.manifest is not None
    assert files.manifest.image == IMAGE
    assert (work / "adapter" / "manifest.json").read_bytes() == before


def test_a_machine_that_vanishes_is_replaced_by_one_that_goes_on(make_room: MakeRoom) -> None:
    room = make_room(steps=12, checkpoint_steps=4, faults={"1": ["hang", 7]})
    handle = room.launch().handle
    room.wait(lambda: any(key.endswith("COMPLETE") for key in room.store.keys("job-1/checkpoints")))
    with room.runpod.lock:
        room.runpod.host.machines[handle["pod"]].mishap = Mishap("vanish")  # type: ignore[union-attr]
    state = watch(room.store, "job-1", room.backend, io.StringIO(), poll_seconds=0.1)
    assert state.state == "lost"
    assert room.launch().handle["pod"] != handle["pod"]
    files = room.finish()
    assert files.container is not None
    assert files.container.ended == "completed", room.said()
    assert files.container.attempts[-1].resumed_from is not None
    assert set(room.billed()) == set(room.claims().pods())
    assert len(room.claims().pods()) == 2


def test_a_deadline_that_has_passed_ends_the_pod_from_inside(make_room: MakeRoom) -> None:
    room = make_room(deadline_seconds=3, steps=100_000)
    room.launch()
    files = room.finish()
    assert files.container is not None
    assert (files.container.ended, files.container.cause) == ("failed", "deadline")


def test_gpus_that_idle_end_the_job_although_its_trainer_reports_steps(make_room: MakeRoom) -> None:
    room = make_room(steps=100_000, gpus_busy=False, timing={"idle": 0.4})
    room.launch()
    files = room.finish()
    assert files.container is not None
    assert (files.container.ended, files.container.cause) == ("failed", "no_progress")


def test_a_second_pod_ends_at_its_own_deadline_too(make_room: MakeRoom) -> None:
    room = make_room(deadline_seconds=3600, steps=100_000)
    room.launch(now=lambda: time.time() - 3597)
    files = room.finish()
    assert files.container is not None
    assert (files.container.ended, files.container.cause) == ("failed", "deadline")


@pytest.mark.parametrize(
    "fault",
    [
        Fault("POST", "/v2/pods$", 0),
        Fault("POST", "/v2/pods$", 503, carried_out=True),
        Fault("POST", "/v2/pods$", 502),
        Fault("POST", "/v2/pods$", 429, headers={"Retry-After": "1"}, times=2),
        Fault("GET", "/v2/pods$", 500, times=2),
        Fault("GET", "/v2/catalog", 0, times=1),
    ],
    ids=["reply lost", "done but 503", "not done and 502", "rate", "list fails", "catalogue silent"],
)
def test_after_a_failed_request_there_is_exactly_one_pod(make_room: MakeRoom, fault: Fault) -> None:
    room = make_room(steps=100_000)
    room.runpod.faults.append(Fault(**vars(fault)))
    handle = room.launch(sleep=lambda seconds: None).handle
    assert [pod["id"] for pod in room.pods()] == [handle["pod"]]
    assert room.launch().handle["pod"] == handle["pod"]
    room.backend.stop(handle)
    room.finish()
    assert set(room.billed()) == set(room.claims().pods())


def test_a_place_without_capacity_is_passed_over(make_room: MakeRoom) -> None:
    room = make_room(steps=100_000)
    del room.environment["RUNPOD_VOLUME_ID"]  # free to go anywhere
    room.runpod.faults.append(Fault("POST", "/v2/pods$", 400, NO_CAPACITY, times=2))
    handle = room.launch().handle
    asked = [body for method, path, body in room.runpod.log if (method, path) == ("POST", "/v2/pods")]
    assert len({body[body.index('"dataCenterIds"') :] for body in asked}) == len(asked) == 3
    room.backend.stop(handle)
    room.finish()
