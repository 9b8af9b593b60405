"""Base model files, checkpoints and the diary: what is on disk is whole, or it does not count."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from recipes.catalog import load_catalog
from recipes.job import Metric, Result, Status, read_record
from recipes.recipe import Base
from trainer import checkpoint
from trainer.base_files import BaseFiles, loading
from trainer.export import write_adapter
from trainer.failures import TrainingStopped
from trainer.journal import HEARTBEAT_SECONDS, Journal
from trainer.load import refuse_difference, refuse_incomplete
from trainer.smoke_model import make_smoke_model
from trainer.targets import Target, TargetPlan
from trainer.zero3 import partition

LOADING = loading(load_catalog().families["qwen3_next"])


@pytest.fixture
def base(smoke_model: Path, tmp_path: Path) -> Path:
    """A copy of the smoke model that may be damaged."""
    return Path(shutil.copytree(smoke_model, tmp_path / "base"))


def alter(path: Path, name: str, **replace: Any) -> None:
    """Rewrites a safetensors file with one tensor changed (value=...) or left out."""
    tensors = load_file(path)
    changed = replace.get("value", lambda tensor: None)(tensors.pop(name))
    if changed is not None:
        tensors[name] = changed
    save_file(tensors, path)


def test_smoke_model_is_made_once_and_heals_an_older_one(base: Path) -> None:
    before = (base / "model.safetensors").stat().st_mtime_ns
    assert make_smoke_model(base) is False
    assert (base / "model.safetensors").stat().st_mtime_ns == before
    (base / "config.json").write_text("{}", encoding="utf-8")
    assert make_smoke_model(base) is True
    assert {p.stat().st_mode & 0o777 for p in base.iterdir()} == {0o644}
    (base / "novel.txt").write_text("mine", encoding="utf-8")
    (base / "config.json").write_text("{}", encoding="utf-8")
    with pytest.raises(FileExistsError, match=r"holds novel\.txt, which is not of the smoke model"):
        make_smoke_model(base)


def test_every_weight_read_from_the_files_is_the_loaded_one(smoke_model: Path) -> None:
    """The weight probe compares with these: fused gate_up is gate above up, per expert."""
    files = BaseFiles(smoke_model)
    model = AutoModelForCausalLM.from_pretrained(smoke_model, dtype=torch.float32, **LOADING)[0]
    for name, parameter in model.named_parameters():
        assert torch.equal(files.tensor(name), parameter), name
    with pytest.raises(TrainingStopped, match=r"no tensor model\.layers\.9\.mlp\.experts\.down_proj"):
        files.tensor("model.layers.9.mlp.experts.down_proj")


def test_weights_left_random_are_refused(base: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, **LOADING)[0]
    name = "model.layers.0.mlp.experts.gate_up_proj"
    refuse_difference(name, model.get_parameter(name), BaseFiles(base))
    torch.nn.init.normal_(model.get_parameter(name))
    with pytest.raises(TrainingStopped, match=r"experts\.gate_up_proj: loaded numbers differ") as refused:
        refuse_difference(name, model.get_parameter(name), BaseFiles(base))
    assert refused.value.cause == "bad_base_model"


def test_missing_and_surplus_tensors_are_refused(base: Path) -> None:
    alter(base / "model.safetensors", "model.norm.weight")
    info = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, **LOADING)[1]
    with pytest.raises(TrainingStopped, match=r"missing keys: model\.norm\.weight"):
        refuse_incomplete(info)


def test_cut_off_or_missing_weights_are_refused(base: Path) -> None:
    path = base / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    with pytest.raises(TrainingStopped, match=r"1392719 bytes, its header says 1392720"):
        BaseFiles(base)
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(TrainingStopped, match="not a safetensors file"):
        BaseFiles(base)
    path.unlink()
    with pytest.raises(TrainingStopped, match=r"model\.safetensors is missing"):
        BaseFiles(base)
    (base / "config.json").unlink()
    with pytest.raises(TrainingStopped, match=r"no config\.json"):
        BaseFiles(base)


def test_base_sha256_changes_with_config_names_and_weights(base: Path) -> None:
    sums = {BaseFiles(base).sha256()}
    alter(base / "model.safetensors", "lm_head.weight", value=lambda t: t + 1e-3)
    sums.add(BaseFiles(base).sha256())
    alter(base / "model.safetensors", "lm_head.weight", value=lambda t: t.to(torch.bfloat16))
    sums.add(BaseFiles(base).sha256())
    (base / "config.json").write_text((base / "config.json").read_text(encoding="utf-8") + " ", encoding="utf-8")
    sums.add(BaseFiles(base).sha256())
    assert len(sums) == 4
    assert BaseFiles(base).sha256() in sums


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda t: torch.empty(0), r"has shape \(0,\), planned \(4, 8\)"),
        (lambda t: t.T, r"has shape \(8, 4\), planned \(4, 8\)"),
        (lambda t: t / 0, "holds numbers that are not finite"),
        (lambda t: None, "1 keys are not as planned, first base_model.model.m.lora_A.weight"),
    ],
)
def test_an_adapter_that_is_not_the_plan_is_never_published(tmp_path: Path, damage: Any, sentence: str) -> None:
    """save_pretrained on one rank of a partitioned model writes empty tensors and no error."""
    name = "m.lora_A.default.weight"
    plan = TargetPlan({name: Target("attention", (4, 8))})
    config, base = LoraConfig(r=4, target_modules=["m"]), Base(id="lorry/smoke")
    damaged = damage(torch.ones(4, 8))
    with pytest.raises(ValueError, match=sentence):
        write_adapter(tmp_path / "adapter", config, base, {} if damaged is None else {name: damaged}, plan)
    assert not (tmp_path / "adapter").exists()
    write_adapter(tmp_path / "adapter", config, base, {name: torch.ones(4, 8)}, plan)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter"]


def test_only_a_whole_and_fitting_checkpoint_counts(tmp_path: Path) -> None:
    for step in (2, 4, 6, 8):
        write_checkpoint(tmp_path, step, fits="ours" if step != 8 else "theirs")
    assert checkpoint.newest(tmp_path, "ours").name == "step-000006"
    (tmp_path / "step-000006" / "COMPLETE").unlink()
    assert checkpoint.newest(tmp_path, "ours").name == "step-000004"
    weights = tmp_path / "step-000004" / "lora.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    assert checkpoint.newest(tmp_path, "ours").name == "step-000002"
    assert checkpoint.newest(tmp_path / "nowhere", "ours") is None


def test_a_node_with_another_base_than_node_0_stops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What rank 0 hands out here is written down; tests/container/test_several_nodes.py does it over two nodes."""

    def handed_out(said: list[Any], src: int, device: Any) -> None:
        said[0] = ("theirs", "step-000002", {"step": 2}, {})

    monkeypatch.setattr(checkpoint.dist, "get_rank", lambda: 1)
    monkeypatch.setattr(checkpoint.dist, "broadcast_object_list", handed_out)
    assert checkpoint.Resumed(tmp_path, "theirs", "cpu").name == "step-000002"
    with pytest.raises(TrainingStopped, match="stage the same model on every node"):
        checkpoint.Resumed(tmp_path, "ours", "cpu")


def test_what_changes_the_arithmetic_changes_the_fit_and_nothing_else_does(jobs: Any, tmp_path: Path) -> None:
    rows = jobs.conversations(8)
    keys = {}
    for name, changes in {
        "as is": {},
        "ranks": {"hardware": {"gpus": 1}},
        "micro": {"training": {"micro_batch": 1}},
        "rate": {"training": {"learning_rate": 1e-3}},
        "rank": {"adapter": {"rank": 4}},
        "epochs": {"training": {"epochs": 9}},
        "engine": {"hardware": {"engine": "replica"}},
        "storage": {"hardware": {"engine": "replica", "quantize": "int8"}},
    }.items():
        keys[name] = checkpoint.fit_key(jobs.make(tmp_path / name, changes, rows).spec, "base")
    assert keys["as is"] == keys["ranks"] == keys["micro"] == keys["engine"]
    assert len({keys[name] for name in ("as is", "rate", "rank", "epochs", "storage")}) == 5
    assert checkpoint.fit_key(jobs.make(tmp_path / "x", {}, rows).spec, "another base") != keys["as is"]


def test_parts_of_a_matrix_cover_it_on_any_number_of_ranks() -> None:
    full = torch.arange(10.0).reshape(2, 5)
    for world in (1, 2, 3, 4):
        parts = [partition(full, rank, world) for rank in range(world)]
        assert len({len(part) for part in parts}) == 1
        assert torch.equal(torch.cat(parts)[:10], full.flatten())


def test_heartbeat_beats_by_itself_and_result_is_written_once(jobs: Any, tmp_path: Path) -> None:
    job = jobs.make(tmp_path / "job", {}, jobs.conversations(8))
    (job.folder / "result.json").write_text("{}", encoding="utf-8")
    journal = Journal(job.folder, job.spec, 1, keeper=True)
    journal.open()
    assert not (job.folder / "result.json").exists(), "what an earlier attempt concluded is gone"
    first = read_record(Status, job.folder / "status.json")
    deadline = time.monotonic() + 60 * HEARTBEAT_SECONDS
    while read_record(Status, job.folder / "status.json").updated_at == first.updated_at:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    other = Journal(job.folder, job.spec, 1, keeper=False)
    assert other.close("out_of_memory", "a GPU ran out of memory") == 20
    assert journal.close("lost_rank", "a process died") == 24
    assert job.result.cause == "out_of_memory", "the first failure is the reason, later ones follow from it"


def test_only_rank_zero_reports_success(jobs: Any, tmp_path: Path) -> None:
    job = jobs.make(tmp_path / "job", {}, jobs.conversations(8))
    assert Journal(job.folder, job.spec, 1, keeper=False).close(None, "") == 0
    assert not (job.folder / "result.json").exists()
    journal = Journal(job.folder, job.spec, 1, keeper=True)
    journal.learn(adapter_sha256={"a": "b"})
    assert journal.close(None, "") == 0
    assert job.result.adapter_sha256 == {"a": "b"}
    assert read_record(Result, job.folder / "result.json").outcome == "completed"


def test_rewind_drops_later_and_torn_lines(jobs: Any, tmp_path: Path) -> None:
    job = jobs.make(tmp_path / "job", {}, jobs.conversations(8))
    journal = Journal(job.folder, job.spec, 1, keeper=True)
    for step in (1, 2, 3):
        journal.record(Metric(kind="train", at=0, attempt=1, epoch=1, step=step, training_loss=1.0, learning_rate=1e-3))
    with (job.folder / "metrics.jsonl").open("a", encoding="utf-8") as out:
        out.write('{"kind":"train","st')
    again = Journal(job.folder, job.spec, 2, keeper=True)
    again.rewind(2)
    assert [m.step for m in job.metrics] == [1, 2]
    status = read_record(Status, job.folder / "status.json")
    assert (status.step, status.training_loss, status.learning_rate) == (2, 1.0, 1e-3)
    assert status.progress == 100 * 2 // job.spec.total_steps, "a resumed training does not fall back to nothing"


def write_checkpoint(folder: Path, step: int, fits: str) -> None:
    tensors = {"m/weight": torch.ones(2, 2), "m/exp_avg": torch.ones(2, 2), "m/exp_avg_sq": torch.ones(2, 2)}
    checkpoint._write(folder / f"step-{step:06d}", tensors, {"step": step, "fits": fits, "facts": {}})
    sums = json.loads((folder / f"step-{step:06d}" / "COMPLETE").read_text(encoding="utf-8"))
    assert sorted(sums) == ["lora.safetensors", "state.json"]
