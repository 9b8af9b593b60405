"""Watching a job: a line per stage, and a stop when it is past its limits."""

from __future__ import annotations

import io
import re
import time
from collections.abc import Callable

import pytest

from scripts.errors import NotFound
from scripts.watch import watch
from tests.container.conftest import Job

MakeJob = Callable[..., Job]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_watching_ends_with_the_job_and_says_each_stage_once(make_job: MakeJob) -> None:
    job, out = make_job(steps=40), io.StringIO()
    job.launch()
    state = watch(job.store, "job-1", job.backend, out, poll_seconds=0.02)
    assert (state.state, state.progress, state.is_final) == ("completed", 100, True)
    lines = out.getvalue().splitlines()
    assert lines[-1] == "completed: the adapter is proved and stored"
    assert any(line.startswith("training, step ") and " of 40, loss " in line for line in lines)
    assert "proving the adapter in a fresh process" in lines
    assert len(lines) == len(set(lines))
    assert len(lines) < 25


def test_a_terminal_gets_a_bar(make_job: MakeJob) -> None:
    job, out = make_job(steps=40), Terminal()
    job.launch()
    assert watch(job.store, "job-1", job.backend, out, poll_seconds=0.02).state == "completed"
    assert "training: " in out.getvalue()
    assert "/40 [" in out.getvalue()
    assert "loss=" in out.getvalue()


def test_a_failed_job_is_told_with_its_sentence(make_job: MakeJob) -> None:
    job, out = make_job(faults={"1": ["out_of_memory", 3]}), io.StringIO()
    job.launch()
    state = watch(job.store, "job-1", job.backend, out, poll_seconds=0.02)
    assert (state.state, state.sentence) == ("failed", "out_of_memory at step 3")
    assert out.getvalue().splitlines()[-1] == "failed: out_of_memory at step 3"


def test_who_watches_stops_a_job_that_is_past_its_deadline(make_job: MakeJob) -> None:
    job, out = make_job(steps=100_000), io.StringIO()
    job.launch()
    job.reach(1)
    state = watch(job.store, "job-1", job.backend, out, poll_seconds=0.02, now=lambda: time.time() + 700)
    assert state.state == "failed"
    assert re.search(r"it was stopped \(deadline\): it ran for 0.\d\d h; the limit is 0.17 h", state.sentence)
    job.wait(job.is_gone)
    assert job.files().container is not None


def test_a_job_whose_machine_is_gone_is_lost_and_goes_on_when_launched(make_job: MakeJob) -> None:
    job, out = make_job(faults={"1": ["hang", 4]}), io.StringIO()
    job.launch()
    job.reach(4)
    job.kill_container()
    job.wait(job.is_gone)
    state = watch(job.store, "job-1", job.backend, out, poll_seconds=0.02)
    assert (state.state, state.is_final) == ("lost", True)
    job.launch()
    assert watch(job.store, "job-1", job.backend, out, poll_seconds=0.02).state == "completed"


def test_an_unknown_job_is_said(make_job: MakeJob) -> None:
    job = make_job()
    with pytest.raises(NotFound, match="job nothing-here: no such job"):
        watch(job.store, "nothing-here", job.backend, io.StringIO())
