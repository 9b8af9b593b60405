"""What ends a job from outside, and what is left of it: the user, the deadline, the machine, kill -9."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable

import pytest

from recipes.job import ContainerState
from scripts.audit import verify
from scripts.errors import NotFound
from scripts.job_folder import JobFiles
from scripts.job_lock import lock_owner
from scripts.stop import stop_job
from tests.container.conftest import Job

MakeJob = Callable[..., Job]
SLOW = {"steps": 100_000, "step_seconds": 0.05, "checkpoint_steps": 100_000}


def checkpoints(job: Job) -> list[str]:
    return sorted(path.parent.name for path in job.folder.glob("checkpoints/*/COMPLETE"))


def test_a_stop_by_the_user_saves_a_checkpoint_and_ends_as_cancelled(make_job: MakeJob) -> None:
    job = make_job(**SLOW)
    job.launch()
    job.reach(2)
    stop_job(job.store, "job-1", job.backend, "user", "wrong recipe", time.time())
    files = job.finish()
    assert files.container is not None
    assert (files.container.ended, files.container.cause) == ("cancelled", "cancelled")
    assert "wrong recipe" in files.container.sentence
    assert len(checkpoints(job)) == 1
    assert not job.processes()


def test_a_stop_written_by_somebody_elsewhere_is_seen(make_job: MakeJob) -> None:
    job = make_job(**SLOW)
    job.launch()
    job.reach(1)
    job.store.create("job-1/stop.json", b'{"by": "reaper", "reason": "overdue", "at": 1.0}')
    files = job.finish()
    assert files.container is not None
    assert (files.container.ended, files.container.cause) == ("failed", "cancelled")
    assert "it was stopped (reaper): overdue" in files.container.sentence


def test_the_first_stop_wins_and_a_job_that_has_ended_is_not_stopped(make_job: MakeJob) -> None:
    job = make_job(**SLOW)
    with pytest.raises(NotFound, match="job job-1: no such job"):
        stop_job(job.store, "job-1", job.backend, "user", "first", 1.0)
    job.launch()
    first = stop_job(job.store, "job-1", job.backend, "user", "first", 1.0)
    second = stop_job(job.store, "job-1", job.backend, "cap", "second", 2.0)
    assert first == second
    assert [(e.what, e.who, e.note) for e in verify(job.store).entries] == [("stop", "lorry (user)", "first")]
    files = job.finish()
    assert files.container is not None
    assert files.container.ended == "cancelled"
    assert stop_job(job.store, "job-1", job.backend, "user", "too late", 3.0) is None


def test_a_job_stopped_before_its_launch_gets_no_machine(make_job: MakeJob) -> None:
    job = make_job()
    job.store.create("job-1/stop.json", b'{"by": "user", "reason": "never mind", "at": 1.0}')
    assert job.launch().handle == {}
    assert job.starts() == 0


def test_a_trainer_that_ignores_the_stop_is_killed_after_the_grace(make_job: MakeJob) -> None:
    job = make_job(timing={"grace": 0.3}, faults={"1": ["deaf", 2]}, **SLOW)
    job.launch()
    job.reach(2)
    stop_job(job.store, "job-1", job.backend, "user", "", time.time())
    files = job.finish()  # the trainer would go on for ever
    assert files.container is not None
    assert files.container.ended == "cancelled"
    assert not job.processes()


def test_the_deadline_counts_from_the_first_start(make_job: MakeJob) -> None:
    job = make_job(deadline_seconds=3600, **SLOW)
    job.launch()
    job.reach(1)
    job.kill_container()
    job.wait(job.is_gone)
    first = job.files().container
    assert first is not None
    # As if it had been an hour ago, all but the time in which a second attempt comes to its first steps.
    earlier = first.model_copy(update={"started_at": time.time() - 3600 + 6})
    job.store.write("job-1/container.json", earlier.model_dump_json().encode())
    job.launch()
    files = job.finish()
    assert files.container is not None
    assert (files.container.ended, files.container.cause) == ("failed", "deadline")
    assert files.container.started_at == earlier.started_at


def test_an_hour_that_an_earlier_machine_used_is_not_given_again(make_job: MakeJob) -> None:
    job = make_job(deadline_seconds=3600, **SLOW)
    began = time.time() - 3600
    earlier = ContainerState(job_id="job-1", stage="training", updated_at=began + 9, started_at=began, pid=1)
    job.store.write("job-1/container.json", earlier.model_dump_json().encode())
    job.launch()
    files = job.finish()
    assert files.container is not None
    assert (files.container.ended, files.container.cause) == ("failed", "deadline")
    assert files.container.started_at == began
    assert files.status is None or files.status.step < 100


def test_where_the_platform_waits_for_free_only_the_hours_of_a_machine_count(make_job: MakeJob) -> None:
    """The same two hours ago as above, but on spot machines of SageMaker, and it had one for nine seconds of them."""
    job = make_job(deadline_seconds=3600)
    job.spec = job.spec.model_copy(update={"backend": "sagemaker"})
    began = time.time() - 7200
    earlier = ContainerState(job_id="job-1", stage="training", updated_at=began + 9, started_at=began, pid=1)
    job.store.write("job-1/container.json", earlier.model_dump_json().encode())
    job.launch()
    files = job.finish()
    assert files.container is not None
    assert files.container.ended == "completed", job.log()
    assert files.container.started_at == began
    assert 7000 < files.container.waited_seconds <= time.time() - began - 9


def test_a_machine_that_is_told_to_end_leaves_a_job_that_goes_on_elsewhere(make_job: MakeJob) -> None:
    job = make_job(checkpoint_steps=50, faults={"1": ["hang", 5]})
    job.launch()
    job.reach(3)
    owner = lock_owner(job.folder)
    assert owner is not None
    os.kill(owner.pid, signal.SIGTERM)
    files = job.finish()
    assert files.container is not None
    assert files.container.ended is None
    assert "started again, it goes on" in job.log()
    saved = checkpoints(job)
    assert len(saved) == 1
    job.launch()
    files = job.finish()
    assert files.container is not None
    assert files.container.ended == "completed", job.log()
    assert files.container.attempts[1].resumed_from == saved[0]


def test_kill_9_of_the_container_leaves_no_trainer_and_the_next_start_goes_on(make_job: MakeJob) -> None:
    job = make_job(steps=12, checkpoint_steps=5, faults={"1": ["hang", 7]})
    job.launch()
    job.reach(7)
    job.kill_container()
    job.wait(job.is_gone)
    job.launch()
    files: JobFiles = job.finish()
    assert files.container is not None
    assert files.container.ended == "completed", job.log()
    first, second = files.container.attempts
    assert first.exit_code is None
    assert second.resumed_from is not None
    assert not (job.folder / "violations").exists()
    assert not job.processes()
