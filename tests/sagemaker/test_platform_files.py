"""The files by which SageMaker and a container talk: hosts, mirrored checkpoints, metric lines, why it failed."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pytest

from scripts.container.__main__ import main
from scripts.container.nodes import node_of
from scripts.container.training_job import TrainingJob, run_in_training_job, training_job
from scripts.errors import InputError, ProviderError


@pytest.fixture
def job(tmp_path: Path) -> TrainingJob:
    return TrainingJob("lorry-job-1--812a", tmp_path / "ml")


def write_hosts(job: TrainingJob, current: str, hosts: list[str]) -> None:
    told = {"current_host": current, "hosts": hosts, "network_interface_name": "eth0"}
    path = job.base / "input" / "config" / "resourceconfig.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(told))


def test_the_hosts_of_the_platform_are_our_nodes(job: TrainingJob) -> None:
    assert job.node_variables() == {}, "the platform does not say"
    write_hosts(job, "algo-1", ["algo-1"])
    assert job.node_variables() == {}
    write_hosts(job, "algo-10", [f"algo-{n}" for n in range(11, 0, -1)])
    said = job.node_variables()
    node = node_of(said)
    assert (node.count, node.rank, node.address, node.leads) == (11, 9, "algo-1", False)
    assert said["NCCL_SOCKET_IFNAME"] == said["GLOO_SOCKET_IFNAME"] == "eth0"
    (job.base / "input" / "config" / "resourceconfig.json").write_text("{")
    with pytest.raises(InputError, match="hosts, current_host"):
        job.node_variables()


def test_a_checkpoint_that_the_mirror_brought_in_half_is_dropped(job: TrainingJob, tmp_path: Path) -> None:
    """The platform copies files in any order; the store has every checkpoint whose mark came last."""
    mirrored = job.base / "checkpoints"
    for step, is_whole in ((20, True), (40, False)):
        folder = mirrored / f"step-{step:06d}"
        folder.mkdir(parents=True)
        (folder / "COMPLETE").write_text(json.dumps({"state.json": hashlib.sha256(b"{}").hexdigest()}))
        if is_whole:
            (folder / "state.json").write_bytes(b"{}")
    job.prepare(tmp_path / "work")
    assert [path.name for path in (tmp_path / "work" / "checkpoints").iterdir()] == ["step-000020"]
    assert (tmp_path / "work" / "checkpoints").resolve() == mirrored.resolve()


def test_the_lines_of_the_trainer_are_printed_once_each(
    job: TrainingJob, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    work = tmp_path / "work"
    metrics = work / "metrics.jsonl"
    work.mkdir()
    metrics.write_text('{"step":1}\n')  # an earlier machine printed it

    def run() -> int:
        with metrics.open("a") as file:
            file.write('{"step":2}\n{"step":3}\n{"st')
        return 0

    assert run_in_training_job(job, work, run) == 0
    assert capsys.readouterr().out == '{"step":2}\n{"step":3}\n'
    assert not (job.base / "output" / "failure").exists()


def test_whatever_goes_wrong_the_service_is_told_why(job: TrainingJob, tmp_path: Path) -> None:
    def run() -> int:
        raise ProviderError()

    def crash() -> int:
        raise RuntimeError("x" * 2000)

    assert run_in_training_job(job, tmp_path / "a", run) == ProviderError.exit_code
    assert run_in_training_job(job, tmp_path / "b", crash) == 1
    said = (job.base / "output" / "failure").read_text()
    assert said.startswith("RuntimeError: xxx")
    assert len(said) == 1024
    assert run_in_training_job(job, tmp_path / "c", lambda: 143) == 143
    assert "told to end before the job was over" in (job.base / "output" / "failure").read_text()


def test_the_container_takes_the_word_that_sagemaker_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRAINING_JOB_NAME", "lorry-job-1--812a")
    monkeypatch.setenv("SAGEMAKER_BASE_DIR", str(tmp_path / "ml"))
    job = training_job(os.environ)
    assert job is not None
    store = (tmp_path / "store").as_uri()
    assert main(["--store", store, "--job", "No_Such", "--work", str(tmp_path / "work"), "train"]) == 2
    assert "--job: 'No_Such'" in (job.base / "output" / "failure").read_text()
    assert training_job({}) is None
