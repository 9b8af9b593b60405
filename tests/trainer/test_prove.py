"""Adapters that are zeroed, renamed, of the wrong layout, cut off or of another base are refused by the proof."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from recipes.causes import EXIT_CODES
from recipes.job import Proof, read_record, write_record
from trainer import probe, prove
from trainer.base_files import BaseFiles, file_sha256
from trainer.failures import TrainingStopped
from trainer.merge import job_source, merge

Tensors = dict[str, Any]
EXPERTS_B = "base_model.model.model.layers.{}.mlp.experts.base_layer.lora_B.weight"


@pytest.fixture
def copy(reference: Any, tmp_path: Path) -> Any:
    """The reference job, free to be damaged."""
    return type(reference)(Path(shutil.copytree(reference.folder, tmp_path / "job")), reference.spec)


def rewrite(job: Any, change: Callable[[Tensors], Tensors]) -> None:
    """Changes the adapter's tensors and lets result.json vouch for the new file, so that only the probe can tell."""
    path = job.folder / "adapter" / "adapter_model.safetensors"
    save_file(change(load_file(path)), path)
    vouch(job)


def vouch(job: Any, **fields: Any) -> None:
    adapter = job.folder / "adapter"
    sums = {"adapter_sha256": {p.name: file_sha256(p) for p in adapter.iterdir()}}
    write_record(job.folder / "result.json", job.result.model_copy(update=sums | fields))


def zeroed(tensors: Tensors) -> Tensors:
    return {key: torch.zeros_like(tensor) for key, tensor in tensors.items()}


def renamed(tensors: Tensors) -> Tensors:
    return {key.replace("in_proj_qkvz", "in_proj_zqkv"): tensor for key, tensor in tensors.items()}


def one_missing(tensors: Tensors) -> Tensors:
    return {key: tensors[key] for key in sorted(tensors)[1:]}


def swapped_layers(tensors: Tensors) -> Tensors:
    return tensors | {
        EXPERTS_B.format(0): tensors[EXPERTS_B.format(1)],
        EXPERTS_B.format(1): tensors[EXPERTS_B.format(0)],
    }


def expert_slowest_b(tensors: Tensors) -> Tensors:
    """B read as (out, expert, rank) instead of (out, rank, expert): the layout some trainers wrote."""

    def turned(b: Any) -> Any:
        return b.reshape(b.shape[0], 8, 8).transpose(1, 2).reshape(b.shape).contiguous()

    return {key: turned(t) if "experts" in key and "lora_B" in key else t for key, t in tensors.items()}


def transposed(tensors: Tensors) -> Tensors:
    return {key: t.T.contiguous() if t.shape[0] == t.shape[1] else t for key, t in tensors.items()}


def transposed_shapes(tensors: Tensors) -> Tensors:
    return {key: t.T.contiguous() for key, t in tensors.items()}


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (zeroed, "does not say what the trained model said"),
        (renamed, "adapter tensors have no counterpart"),
        (one_missing, "1 adapter tensors have no counterpart"),
        (swapped_layers, "does not say what the trained model said"),
        (expert_slowest_b, "does not say what the trained model said"),
        (transposed, "does not say what the trained model said"),
        (transposed_shapes, "PEFT cannot load the adapter"),
    ],
)
def test_a_changed_adapter_is_refused(copy: Any, smoke_model: Path, change: Any, sentence: str) -> None:
    rewrite(copy, change)
    with pytest.raises(TrainingStopped, match=sentence) as refused:
        prove.prove(copy.folder, smoke_model)
    assert refused.value.cause == "no_effect"


def test_an_unchanged_adapter_passes_the_same_way(copy: Any, smoke_model: Path) -> None:
    rewrite(copy, dict)
    assert prove.prove(copy.folder, smoke_model).proof.passed


def test_files_the_trainer_did_not_write_are_refused(copy: Any, smoke_model: Path) -> None:
    path = copy.folder / "adapter" / "adapter_model.safetensors"
    whole = path.read_bytes()
    for damaged in (whole[:-100], whole[:-1] + bytes([whole[-1] ^ 1])):
        path.write_bytes(damaged)
        with pytest.raises(TrainingStopped, match=r"adapter_model\.safetensors is not the file the trainer wrote"):
            prove.prove(copy.folder, smoke_model)
    path.unlink()
    with pytest.raises(TrainingStopped, match=r"adapter/adapter_model\.safetensors is missing"):
        prove.prove(copy.folder, smoke_model)


def test_a_cut_off_file_is_refused_even_when_vouched_for(copy: Any, smoke_model: Path) -> None:
    path = copy.folder / "adapter" / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    vouch(copy)
    with pytest.raises(TrainingStopped, match="PEFT cannot load the adapter"):
        prove.prove(copy.folder, smoke_model)


def test_another_base_is_refused_by_its_hash_and_by_what_it_says(copy: Any, smoke_model: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(smoke_model, tmp_path / "other"))
    tensors = load_file(other / "model.safetensors")
    tensors["lm_head.weight"] += 0.05 * torch.randn(tensors["lm_head.weight"].shape)
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(TrainingStopped, match="not the base model the adapter was trained on") as refused:
        prove.prove(copy.folder, other)
    assert refused.value.cause == "bad_base_model"
    vouch(copy, base_sha256=BaseFiles(other).sha256())
    with pytest.raises(TrainingStopped, match="the base model says something else than in training") as refused:
        prove.prove(copy.folder, other)
    assert refused.value.cause == "bad_base_model"


def test_an_adapter_without_effect_is_refused(copy: Any, smoke_model: Path) -> None:
    conversations, base, _ = probe.read_probe(copy.folder / "probe.safetensors")
    probe.write_probe(copy.folder / "probe.safetensors", conversations, base, [b.clone() for b in base])
    rewrite(copy, zeroed)
    with pytest.raises(TrainingStopped, match="the adapter changes nothing"):
        prove.prove(copy.folder, smoke_model)


def test_refusal_is_written_down_with_its_exit_code(
    copy: Any, smoke_model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rewrite(copy, zeroed)
    monkeypatch.setattr("sys.argv", ["prove", "--job", str(copy.folder), "--model", str(smoke_model)])
    assert prove.main() == EXIT_CODES["no_effect"]
    proof = read_record(Proof, copy.folder / "proof.json")
    assert not proof.passed
    assert "does not say what the trained model said" in proof.sentence
    assert proof.sentence in capsys.readouterr().out


def test_tolerances_follow_the_precision() -> None:
    """bf16 rounds a log-probability by a few hundredths; what passes there would be a wrong layout in fp32."""
    prove.refuse_unfaithful("fp32", effect=0.1, error=9e-5, base_error=9e-5)
    prove.refuse_unfaithful("bf16", effect=0.1, error=0.02, base_error=0.02)
    with pytest.raises(TrainingStopped, match="does not say"):
        prove.refuse_unfaithful("fp32", effect=0.1, error=2e-4, base_error=0.0)
    with pytest.raises(TrainingStopped, match="changes nothing"):
        prove.refuse_unfaithful("bf16", effect=0.005, error=0.0, base_error=0.0)
    with pytest.raises(TrainingStopped, match="changes nothing"):
        prove.refuse_unfaithful("fp32", effect=float("nan"), error=0.0, base_error=0.0)


def test_what_was_trained_is_merged_and_says_the_same(reference: Any, smoke_model: Path, tmp_path: Path) -> None:
    """All groups of a real run, experts among them, in the layout the smoke model has."""
    record = merge(job_source(reference.folder), smoke_model, tmp_path / "to", "fp32", lambda done, total: None)
    assert record.probe_error is not None
    assert record.probe_limit is not None
    assert record.probe_error < record.probe_limit / 10
    assert {row.group for row in record.survival} == set(reference.spec.recipe.adapter.targets)
