"""Killed, orphaned, stopped and resumed: one training interrupted three times must end as the uninterrupted one."""

from __future__ import annotations

import os
import random
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from recipes.causes import EXIT_CODES
from recipes.job import Result, Status, read_record

RNG = random.Random(20)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
]  # four starts of the trainer in one fixture, on a busy machine


@dataclass
class Interrupted:
    """What was seen of the three interrupted attempts, and the job after a fourth that ended."""

    job: Any
    killed_rank: Result
    survivors_of_rank: list[int]
    survivors_of_torchrun: list[int]
    stopped: Result
    checkpoints_when_stopped: list[str]
    log: str


@pytest.fixture(scope="module")
def interrupted(jobs: Any, smoke_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Interrupted:
    folder = tmp_path_factory.mktemp("interrupted") / "job"
    job = jobs.make(folder, {"training": jobs.reference["training"] | {"checkpoint_steps": 2}}, jobs.reference_rows())

    first = jobs.start(job, smoke_model, attempt=1)
    jobs.wait_for_step(job, RNG.randint(2, 3))
    ranks = jobs.workers(first)
    os.kill(RNG.choice(ranks), signal.SIGKILL)
    jobs.finish(first, job)
    killed_rank, survivors_of_rank = job.result, alive(ranks)

    second = jobs.start(job, smoke_model, attempt=2)
    ranks = both_ranks(job, second, jobs)
    os.kill(second.pid, signal.SIGKILL)
    second.wait()
    survivors_of_torchrun = alive(ranks)

    third = jobs.start(job, smoke_model, attempt=3)
    jobs.wait_for_step(job, 5)
    os.kill(third.pid, signal.SIGTERM)
    jobs.finish(third, job)
    stopped = job.result
    checkpoints = sorted(path.name for path in (job.folder / "checkpoints").iterdir())

    log = jobs.train(job, smoke_model, attempt=4)
    return Interrupted(job, killed_rank, survivors_of_rank, survivors_of_torchrun, stopped, checkpoints, log)


def test_resumed_training_ends_bit_equal_to_the_uninterrupted_one(
    interrupted: Interrupted, reference: Any, jobs: Any
) -> None:
    assert interrupted.job.result.outcome == "completed", interrupted.log[-3000:]
    assert "resumes from step-00000" in interrupted.log
    ours, theirs = jobs.tensors(interrupted.job), jobs.tensors(reference)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert interrupted.job.result.final_validation_loss == reference.result.final_validation_loss


def test_metrics_of_resumed_training_hold_each_step_once(interrupted: Interrupted, reference: Any) -> None:
    metrics = interrupted.job.metrics
    assert [(m.kind, m.step) for m in metrics] == [(m.kind, m.step) for m in reference.metrics]
    assert interrupted.job.losses == reference.losses
    assert metrics[0].attempt < metrics[-1].attempt
    assert metrics[-1].attempt == 4


def test_result_of_resumed_training_remembers_how_it_began(interrupted: Interrupted, reference: Any) -> None:
    ours, theirs = interrupted.job.result, reference.result
    assert ours.initial_validation_loss == theirs.initial_validation_loss
    assert ours.first_training_loss == theirs.first_training_loss
    assert ours.trained_tokens == theirs.trained_tokens
    assert ours.attempt == 4
    assert ours.wall_seconds > interrupted.stopped.wall_seconds, "earlier attempts count"


def test_kill_of_a_rank_ends_the_others_and_is_called_lost_rank(interrupted: Interrupted) -> None:
    result = interrupted.killed_rank
    assert (result.outcome, result.cause, result.exit_code) == ("failed", "lost_rank", EXIT_CODES["lost_rank"])
    assert "a training process died" in result.sentence
    assert interrupted.survivors_of_rank == []


def test_kill_of_torchrun_leaves_no_orphan(interrupted: Interrupted) -> None:
    assert interrupted.survivors_of_torchrun == []


def test_sigterm_saves_a_checkpoint_and_reports_cancelled(interrupted: Interrupted) -> None:
    stopped = interrupted.stopped
    assert (stopped.outcome, stopped.cause, stopped.exit_code) == ("cancelled", "cancelled", EXIT_CODES["cancelled"])
    assert stopped.step >= 5
    assert stopped.sentence == f"stopped on request after step {stopped.step} of 12"
    assert f"step-{stopped.step:06d}" in interrupted.checkpoints_when_stopped
    assert len(interrupted.checkpoints_when_stopped) == 2, "the newest two are kept"


def both_ranks(job: Any, process: Any, jobs: Any) -> list[int]:
    """The two ranks of the second attempt, as soon as its heartbeat shows: a moment after they were started."""
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline:
        status, ranks = read_record(Status, job.folder / "status.json"), jobs.workers(process)
        if status and status.attempt == 2 and len(ranks) == 2:
            return ranks
        time.sleep(0.02)
    raise AssertionError("the second attempt did not start")


def alive(processes: list[int], patience_seconds: float = 60.0) -> list[int]:
    """Those of the processes that still run after a while; a zombie does not run."""
    deadline = time.monotonic() + patience_seconds
    while True:
        running = [pid for pid in processes if _state(pid) not in ("", "Z", "X")]
        if not running or time.monotonic() > deadline:
            return running
        time.sleep(0.05)


def _state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return ""
