"""`lorry merge`: by job folder, job id or adapter, with what it lost; what does not belong together is one sentence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from recipes.job import LaunchSpec, Manifest, Proof, Result, read_record
from recipes.merged import MergedModel
from scripts.adapter import write_manifest
from scripts.cli import main
from scripts.errors import NotFound
from scripts.merge import _source
from scripts.store import open_store
from tests.staging.merging import make_job


@pytest.fixture(scope="module")
def job(base: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """jobs/merge-me, finished and proved."""
    folder = tmp_path_factory.mktemp("jobs") / "merge-me"
    make_job("qwen3", base("qwen3"), folder)
    spec, result = read_record(LaunchSpec, folder / "launch.json"), read_record(Result, folder / "result.json")
    assert spec is not None
    assert result is not None
    proof = Proof(
        job_id="merge-me", passed=True, sentence="", adapter_sha256=result.adapter_sha256, tensors=1,
        tensors_consumed=1, effect=1.0, reproduction_error=0.0, positions=1, seconds=0.0,
    )  # fmt: skip
    manifest = write_manifest(folder, spec, result, proof, cost_usd=None, now=0.0)
    assert isinstance(manifest, Manifest)
    return folder


@pytest.mark.slow
def test_a_job_is_merged_and_says_what_arrived(
    job: Path, base: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LORRY_STORE", job.parent.as_uri())
    to = tmp_path / "merged"
    words = ["merge", "merge-me", "--base", str(base("qwen3")), "--to", str(to)]
    assert main(words) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{to}: Qwen/Qwen3-8B with the adapter of merge-me, in bf16"
    assert [line.split()[0] for line in lines[1:3]] == ["attention", "mlp"]
    assert " of the change arrived, rounding error " in lines[1]
    assert "says what the trained model said: off by" in lines[3]
    record = read_record(MergedModel, to / "merged.json")
    assert record is not None
    assert record.job_id == "merge-me"
    assert all(0.9 < row.share < 1.1 and row.relative_error > 0 for row in record.survival)


@pytest.mark.slow
def test_what_does_not_belong_together_is_one_sentence(
    job: Path, base: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = base("qwen3_moe")
    capsys.readouterr()  # making that model shows its progress
    assert main(["merge", str(job), "--base", str(other), "--to", str(tmp_path / "to"), "--json"]) == 2
    said = json.loads(capsys.readouterr().err)
    assert said["error"].endswith("not the base model the adapter was trained on")
    assert not (tmp_path / "to").exists()


def test_a_job_an_adapter_and_nothing_are_told_apart(job: Path, tmp_path: Path) -> None:
    store = open_store(job.parent.as_uri())
    assert _source(str(job), store, tmp_path) == ["--job", str(job)]
    assert _source("merge-me", store, tmp_path) == ["--job", str(job)]
    assert _source(str(job / "adapter"), store, tmp_path) == ["--adapter", str(job / "adapter")]
    with pytest.raises(NotFound, match="job no-such: no such job in"):
        _source("no-such", store, tmp_path)
    with pytest.raises(NotFound, match="no such folder; a job folder, an adapter's folder or a job id"):
        _source("../odd", store, tmp_path)
    with pytest.raises(NotFound, match="without it there is no adapter"):
        _source(str(tmp_path), store, tmp_path)
