"""Seeded faults at every step: a job ends with a verified adapter or with a cause, and never has two trainers."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from scripts.adapter import verify_adapter
from scripts.errors import Conflict, LorryError
from scripts.state import JobState, job_state
from scripts.stop import stop_job
from tests.container.conftest import Job

MakeJob = Callable[..., Job]
WORLDS = 40
AT_ONCE = 4  # they mostly wait: four keep two cores busy
FAULTS = ("none", "crash", "kill", "lost_rank", "torn_result", "hang", "deaf", "out_of_memory", "disk_full", "no_room")
RELAUNCHES = 12


def script_of(seed: int) -> dict[str, Any]:
    """What goes wrong inside the machine in the world of this seed."""
    chance = random.Random(seed)
    steps = chance.randint(6, 25)
    faults = {str(n): [chance.choice(FAULTS), chance.randint(0, steps)] for n in range(1, 7) if chance.random() < 0.5}
    prove = [chance.choice(["", "crash", "kill", "no_effect"])] if chance.random() < 0.25 else []
    timing = {"grace": 0.3, "no_progress": 2.0}
    return {
        "steps": steps,
        "step_seconds": chance.choice([0.005, 0.02, 0.04]),
        "checkpoint_steps": chance.randint(1, 6),
        "faults": faults,
        "prove": prove,
        "timing": timing,
        "loading": 4.0,  # a machine that is busy takes its time to start a process
    }


def blows_of(seed: int) -> list[tuple[float, str]]:
    """What hits the machine from outside: (seconds after the start, what)."""
    chance = random.Random(f"outside {seed}")
    kinds = ["kill"] * chance.choice([0, 0, 1, 2, 3]) + ["stop"] * (chance.random() < 0.25)
    return sorted((chance.uniform(0.05, 3.0), kind) for kind in kinds)


def state_of(job: Job) -> JobState:
    observation = job.backend.observe(job.submissions[-1].handle)
    return job_state(job.files(), observation, time.time())


def live(job: Job, blows: list[tuple[float, str]]) -> None:
    """Launches the job, deals the blows at their time, launches it again whenever its machine is gone too early."""
    began, relaunches = time.monotonic(), 0
    job.launch()
    while True:
        while blows and time.monotonic() - began >= blows[0][0]:
            if blows.pop(0)[1] == "kill":
                job.kill_container()
            else:
                stop_job(job.store, job.spec.job_id, job.backend, "user", "enough", time.time())
        if job.is_gone():
            state = state_of(job)
            if state.is_final and state.state != "lost":
                return
            relaunches += 1
            assert relaunches <= RELAUNCHES, f"launched {relaunches} times\n{job.log()}"
            job.launch()
        assert time.monotonic() - began < 400, f"stuck\n{job.log()}"
        time.sleep(0.01)


def faults_found(job: Job) -> list[str]:
    """Every way in which the end of this job breaks the promise."""
    state, files, found = state_of(job), job.files(), []
    if state.state not in ("completed", "failed", "cancelled"):
        found.append(f"it ended as {state.state}")
    if not state.sentence:
        found.append("no sentence")
    if state.state == "completed":
        try:
            verify_adapter(job.folder / "adapter")
        except LorryError as error:
            found.append(str(error))
        if files.proof is None or not files.proof.passed:
            found.append("completed without a proof")
    elif (job.folder / "adapter" / "manifest.json").exists():
        found.append("a manifest without completion")
    if files.container is not None and files.container.ended == "failed" and files.container.cause is None:
        found.append("failed without a cause")
    if (job.folder / "violations").exists():
        found.append((job.folder / "violations").read_text())
    if left := job.processes():
        found.append(f"processes left: {left}")
    return found


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("seeds", [range(8), pytest.param(range(8, WORLDS), marks=pytest.mark.slow)], ids=str)
def test_every_world_ends_well_or_with_a_cause(make_job: MakeJob, seeds: range) -> None:
    def one(seed: int) -> tuple[int, str, list[str]]:
        chance = random.Random(f"deadline {seed}")
        deadline = 2 if chance.random() < 0.15 else 600
        job = make_job(f"world-{seed}", deadline_seconds=deadline, **script_of(seed))
        live(job, blows_of(seed))
        found = faults_found(job)
        return seed, state_of(job).state, [f"{f}\n{job.log()}" for f in found]

    with ThreadPoolExecutor(AT_ONCE) as pool:
        ends = list(pool.map(one, seeds))
    broken = [f"world {seed}: {fault}" for seed, _, faults in ends for fault in faults]
    assert not broken, "\n".join(broken)
    states = [state for _, state, _ in ends]
    if len(seeds) > 8:  # all kinds of end are in the draw
        assert min(states.count("completed"), states.count("failed")) >= 5, states
        assert "cancelled" in states


def test_a_job_cannot_be_launched_as_another_one_while_it_runs(make_job: MakeJob) -> None:
    job = make_job(steps=100_000)
    job.launch()
    job.spec = job.spec.model_copy(update={"train_sha256": "0" * 64})
    with pytest.raises(Conflict):
        job.launch()
    job.kill_container()
    job.wait(job.is_gone)
