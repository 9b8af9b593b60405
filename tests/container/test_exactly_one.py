"""Exactly one container per job: races, deaths between record and start, recycled process numbers."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable

import pytest

from scripts.job_lock import Process, is_alive, lock_owner, process_of, take_lock, this_process
from tests.container.conftest import MODULE, REPOSITORY, Job

MakeJob = Callable[..., Job]


def launcher(job: Job, moment: str = "never") -> subprocess.Popen[str]:
    spec = job.data / "spec.json"
    spec.write_text(job.spec.model_dump_json())
    command = [sys.executable, "-m", "tests.container.launcher"]
    command += [job.store.url, str(spec), str(job.data), MODULE, moment]
    return subprocess.Popen(command, cwd=REPOSITORY, env=job.environment, stdout=subprocess.PIPE, text=True)


def test_eight_launches_at_once_start_one_container(make_job: MakeJob) -> None:
    job = make_job(steps=100_000)
    racers = [launcher(job) for _ in range(8)]
    answers = {racer.communicate(timeout=200)[0].strip() for racer in racers}
    assert [racer.returncode for racer in racers] == [0] * 8
    assert len(answers) == 1
    job.launch()
    assert str(job.submissions[-1].handle["pid"]) in answers
    assert job.starts() == 1
    pid = int(answers.pop())  # other containers of this machine are other people's
    assert [owned.job_id for owned in job.backend.owned() if owned.handle["pid"] == pid] == ["job-1"]
    job.kill_container()
    job.wait(job.is_gone)


@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_launch_killed_around_the_start_is_launched_again_as_one_container(make_job: MakeJob, moment: str) -> None:
    job = make_job(steps=40)
    assert launcher(job, moment).wait(timeout=200) == -9
    recorded = job.files().submission
    assert recorded is not None
    assert recorded.handle == {}
    job.launch()
    files = job.finish()
    assert files.container is not None
    assert files.container.ended == "completed", job.log()
    assert job.starts() == 1


def test_a_recycled_process_number_is_another_process(make_job: MakeJob) -> None:
    me = this_process()
    child = subprocess.Popen(["sleep", "600"])
    other = process_of(child.pid)
    assert other is not None
    assert other.started > me.started
    assert not is_alive(Process(child.pid, me.started))
    child.kill()
    child.wait()
    assert not is_alive(other)
    assert is_alive(me)
    assert not is_alive(Process(me.pid, me.started - 1))
    backend = make_job().backend
    assert backend.observe({"pid": me.pid, "started": me.started}).phase == "running"
    assert backend.observe({"pid": me.pid, "started": me.started - 1}).phase == "gone"
    backend.stop({"pid": me.pid, "started": me.started - 1})  # or this test would end here
    assert backend.observe({}).phase == "gone"


def test_the_lock_is_free_when_its_holder_is_gone(tmp_path: object, make_job: MakeJob) -> None:
    job = make_job()
    job.folder.mkdir(parents=True, exist_ok=True)
    assert lock_owner(job.folder) is None
    with take_lock(job.folder) as mine:
        assert mine
        assert lock_owner(job.folder) == process_of(os.getpid())
        with take_lock(job.folder) as second:
            assert not second
    assert lock_owner(job.folder) is None
