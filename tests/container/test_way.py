"""The way from launch to manifest, the retries on it, and what a second start of the same job does."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from recipes.causes import EXIT_CODES
from recipes.job import Proof, Result
from scripts.adapter import verify_adapter
from scripts.errors import Conflict
from scripts.job_folder import JobFiles
from scripts.state import job_state
from tests.container.conftest import MODULE, REPOSITORY, Job

MakeJob = Callable[..., Job]


def run(job: Job) -> JobFiles:
    job.launch()
    files = job.finish()
    assert files.container is not None, job.log()
    assert not job.processes()
    assert not (job.folder / "violations").exists()
    return files


def ended(files: JobFiles) -> tuple[Any, Any]:
    assert files.container is not None
    assert (files.manifest is not None) == (files.container.ended == "completed")
    return files.container.ended, files.container.cause


def test_a_job_goes_from_launch_to_manifest(make_job: MakeJob) -> None:
    job = make_job()
    files = run(job)
    assert ended(files) == ("completed", None), job.log()
    assert files.container is not None
    assert files.container.stage == "done"
    assert [(a.number, a.exit_code, a.last_step) for a in files.container.attempts] == [(1, 0, 8)]
    assert verify_adapter(job.folder / "adapter").cost_usd == 0.0
    assert job_state(files, None, files.container.updated_at).state == "completed"


def test_a_job_that_has_ended_stays_as_it_ended(make_job: MakeJob) -> None:
    job = make_job()
    run(job)
    before = (job.folder / "container.json").read_bytes()
    job.launch()
    assert job.starts() == 1
    handle = job.backend.submit(job.spec, job.backend.request(job.spec))  # as a platform that restarts containers does
    job.wait(lambda: job.backend.observe(handle).phase == "gone")
    assert (job.folder / "container.json").read_bytes() == before
    assert "has ended already: completed" in job.log()


def test_the_same_job_id_for_another_run_is_refused(make_job: MakeJob) -> None:
    job = make_job()
    run(job)
    job.spec = job.spec.model_copy(update={"recipe_sha256": "0" * 64})
    with pytest.raises(Conflict, match="job job-1: exists already, with another recipe"):
        job.launch()


@pytest.mark.parametrize("fault", ["crash", "kill", "lost_rank", "torn_result"])
def test_a_trainer_that_dies_is_started_again_from_its_newest_checkpoint(make_job: MakeJob, fault: str) -> None:
    job = make_job(faults={"1": [fault, 7]})
    files = run(job)
    assert ended(files) == ("completed", None), job.log()
    assert files.container is not None
    first, second = files.container.attempts
    assert first.last_step in (6, 7)
    assert (first.resumed_from, second.resumed_from) == (None, "step-000006")


@pytest.mark.parametrize("fault", ["out_of_memory", "disk_full"])
def test_a_cause_that_would_come_again_is_not_tried_again(make_job: MakeJob, fault: str) -> None:
    files = run(make_job(faults={"1": [fault, 4]}))
    assert ended(files) == ("failed", fault)
    assert files.container is not None
    assert len(files.container.attempts) == 1
    assert files.container.sentence


def test_two_deaths_at_the_same_step_are_enough(make_job: MakeJob) -> None:
    files = run(make_job(faults={str(n): ["crash", 5] for n in range(1, 9)}))
    assert ended(files) == ("failed", "unexpected")
    assert files.container is not None
    assert len(files.container.attempts) == 2
    assert "two attempts in a row ended at step 5" in files.container.sentence
    assert "a line of the log before the end" in files.container.sentence


def test_five_attempts_are_the_most(make_job: MakeJob) -> None:
    faults = {str(n): ["kill", 3 * n] for n in range(1, 9)}
    files = run(make_job(steps=40, step_seconds=0.005, faults=faults))
    assert ended(files) == ("failed", "lost_rank")
    assert files.container is not None
    assert len(files.container.attempts) == 5
    assert "it was started 5 times" in files.container.sentence


def test_a_result_of_another_attempt_is_not_taken_for_this_one(make_job: MakeJob) -> None:
    job = make_job(keep_old_result=True, faults={str(n): ["crash", 5] for n in range(1, 9)})
    stale = Result(job_id="job-1", outcome="completed", exit_code=0, attempt=7, step=8, total_steps=8)
    job.store.write("job-1/result.json", stale.model_dump_json().encode())
    files = run(job)
    assert ended(files) == ("failed", "unexpected")
    assert files.container is not None
    assert len(files.container.attempts) == 2
    assert not (job.folder / "proofs.txt").exists()


def test_a_trainer_that_stands_still_is_killed_and_started_again(make_job: MakeJob) -> None:
    timing = {"grace": 0.3, "no_progress": 2.5}
    job = make_job(timing=timing, loading=20.0, faults={"1": ["hang", 4], "2": ["deaf", 5]}, step_seconds=0.2)
    files = run(job)
    assert ended(files) == ("completed", None), job.log()
    assert files.container is not None
    assert len(files.container.attempts) == 3


def test_a_trainer_that_never_moves_ends_as_no_progress(make_job: MakeJob) -> None:
    faults = {str(n): ["deaf", 0] for n in range(1, 9)}
    files = run(make_job(timing={"grace": 0.2, "no_progress": 0.7}, faults=faults))
    assert ended(files) == ("failed", "no_progress")
    assert files.container is not None
    assert len(files.container.attempts) == 2


def test_an_adapter_without_effect_has_no_manifest(make_job: MakeJob) -> None:
    job = make_job(prove=["no_effect"])
    files = run(job)
    assert ended(files) == ("failed", "no_effect")
    assert files.container is not None
    assert files.container.sentence == "it is empty"


def test_a_prover_that_dies_once_is_started_again_and_twice_is_enough(make_job: MakeJob) -> None:
    assert ended(run(make_job("once", prove=["kill"]))) == ("completed", None)
    files = run(make_job("twice", prove=["crash", "crash"]))
    assert ended(files) == ("failed", "unexpected")
    assert files.container is not None
    assert "the adapter could not be proved" in files.container.sentence


def test_a_proof_of_other_bytes_is_none(make_job: MakeJob) -> None:
    job = make_job(prove=["crash", "crash"])
    stale = Proof(
        job_id="job-1", passed=True, sentence="of another adapter", adapter_sha256={"adapter_config.json": "0" * 64},
        tensors=1, tensors_consumed=1, effect=1.0, reproduction_error=0.0, positions=1, seconds=0.0,
    )  # fmt: skip
    job.store.write("job-1/proof.json", stale.model_dump_json().encode())
    assert ended(run(job)) == ("failed", "unexpected")


def test_a_full_disk_does_not_hide_the_cause(make_job: MakeJob) -> None:
    """The trainer makes the container's own file impossible to replace, then dies of a full disk."""
    job = make_job(faults={"1": ["no_room", 4]})
    files = run(job)
    assert ended(files) == ("failed", "disk_full")
    assert "cannot be replaced" in job.log()


def test_a_base_model_that_is_not_whole_is_said_first(make_job: MakeJob, models: Path, tmp_path: Path) -> None:
    broken = tmp_path / "models"
    shutil.copytree(models, broken)
    weights = broken / "lorry--smoke" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-3])
    job = make_job()
    job.environment["LORRY_MODELS"] = str(broken)
    files = run(job)
    assert ended(files) == ("failed", "bad_base_model")
    assert files.container is not None
    assert "1 of 1 weight files are not whole, first model.safetensors" in files.container.sentence
    assert not files.container.attempts


def test_no_cloud_key_reaches_the_trainer(make_job: MakeJob) -> None:
    job = make_job()
    job.environment |= {"AWS_SECRET_ACCESS_KEY": "canary", "LORRY_KEY": "canary"}
    run(job)
    names = (job.folder / "environment.txt").read_text().split()
    assert {"OMP_NUM_THREADS", "DS_ACCELERATOR", "TOKENIZERS_PARALLELISM"} <= set(names)
    assert not [name for name in names if name.startswith(("AWS_", "LORRY_KEY"))]


def test_the_exit_code_is_that_of_the_cause(make_job: MakeJob) -> None:
    job = make_job(faults={"1": ["out_of_memory", 2]})
    job.store.write("job-1/launch.json", job.spec.model_dump_json().encode())
    job.store.write("job-1/data/train.jsonl", b"{}\n")
    command = [sys.executable, "-m", MODULE, "--store", job.store.url, "--job", "job-1"]
    codes = []
    for _ in range(2):
        done = subprocess.run(command, cwd=REPOSITORY, env=job.environment, capture_output=True)
        codes.append(done.returncode)
    assert codes == [EXIT_CODES["out_of_memory"], 0]
