"""A merge is PEFT's own in fp32, rounded once; it keeps what transformers drops, counts its loss, passes the probe."""

from __future__ import annotations

import json
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from recipes.job import read_record
from recipes.merged import MergedModel
from tests.staging.conftest import logits, toy
from tests.staging.merging import ALPHA, RANK, adapted, change_config, make_job, vouch
from tests.staging.test_quantize import run
from trainer.failures import TrainingStopped
from trainer.merge import job_source, merge

MTP = "mtp.layers.0.mlp.experts.0.up_proj.weight"


def merged(job: Path, base: Path, to: Path, precision: Any = "fp32") -> MergedModel:
    return merge(job_source(job), base, to, precision, lambda done, total: None)


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for path in sorted(folder.glob("*.safetensors")) for k, v in load_file(path).items()}


@pytest.fixture(scope="module")
def bases(base: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The 80B's family with an expert per tensor in two files and an MTP layer; the same fused; a dense model."""
    root = tmp_path_factory.mktemp("merging")
    whole = load_file(base("qwen3_next") / "model.safetensors") | {MTP: torch.randn(8, 8).to(torch.float16)}
    names = sorted(whole)
    for folder in (root / "per_expert", root / "fused"):
        shutil.copytree(base("qwen3_next"), folder)
        (folder / "model.safetensors").unlink()
    parts = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, mine in parts.items():
        save_file({n: whole[n].contiguous() for n in mine}, root / "per_expert" / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {n: file for file, mine in parts.items() for n in mine}}
    (root / "per_expert" / "model.safetensors.index.json").write_text(json.dumps(index))
    fused = {n: p.detach().contiguous() for n, p in toy("qwen3_next").named_parameters()}
    save_file(fused, root / "fused" / "model.safetensors", metadata={"format": "pt"})
    return {"qwen3_next": root / "per_expert", "fused": root / "fused", "qwen3": base("qwen3")}


@pytest.fixture(scope="module")
def jobs(bases: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A finished job on each base."""
    root = tmp_path_factory.mktemp("jobs")
    for name, base in bases.items():
        make_job("qwen3" if name == "qwen3" else "qwen3_next", base, root / name)
    return {name: root / name for name in bases}


@pytest.mark.parametrize("name", ["qwen3_next", "fused", "qwen3"])
def test_merged_weights_are_those_of_peft_in_every_layout(name: str, bases: Any, jobs: Any, tmp_path: Path) -> None:
    record = merged(jobs[name], bases[name], tmp_path / "to")
    family = "qwen3" if name == "qwen3" else "qwen3_next"
    wanted = adapted(family, bases[name], 0.2).merge_and_unload()
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "to", dtype=torch.float32)
    state = found.state_dict()
    for key, tensor in wanted.state_dict().items():
        torch.testing.assert_close(state[key], tensor, rtol=1e-5, atol=1e-6, msg=key)
    torch.testing.assert_close(logits(found), logits(wanted), rtol=1e-4, atol=1e-4)
    assert record.probe_error is not None
    assert record.probe_limit is not None
    assert record.probe_error < record.probe_limit / 10
    assert {row.group for row in record.survival} == (
        {"attention", "mlp"} if name == "qwen3" else {"attention", "linear_attention", "shared_expert", "experts"}
    )
    assert all(abs(row.share - 1) < 1e-4 and row.relative_error < 1e-4 for row in record.survival)
    assert sorted(tensors(tmp_path / "to")) == sorted(tensors(bases[name])), "names and layout are the base's"
    assert not list(tmp_path.glob(".*"))
    assert not list((tmp_path / "to").glob(".*"))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_what_transformers_drops_keeps_its_bytes(precision: str, bases: Any, jobs: Any, tmp_path: Path) -> None:
    record = merged(jobs["qwen3_next"], bases["qwen3_next"], tmp_path / "to", precision)
    found, before = tensors(tmp_path / "to"), tensors(bases["qwen3_next"])
    assert found[MTP].dtype == torch.float16
    assert torch.equal(found[MTP], before[MTP])
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    assert {t.dtype for n, t in found.items() if n != MTP} == {dtype}
    assert torch.equal(found["lm_head.weight"], before["lm_head.weight"].to(dtype))
    assert json.loads((tmp_path / "to" / "config.json").read_bytes())["dtype"] == str(dtype).removeprefix("torch.")
    assert set(record.files) == {p.name for p in bases["qwen3_next"].glob("*.safetensors")}
    assert (tmp_path / "to" / "chat_template.jinja").exists()


@pytest.mark.parametrize("size", [0.2, 0.002])
def test_the_loss_in_bf16_is_what_an_independent_count_says(size: float, bases: Any, tmp_path: Path) -> None:
    """Dense arithmetic in float64 over all expert stacks, without the code of the merge."""
    base = tmp_path / "base"
    shutil.copytree(bases["fused"], base)
    rounded = {n: t.to(torch.bfloat16) for n, t in load_file(base / "model.safetensors").items()}
    save_file(rounded, base / "model.safetensors", metadata={"format": "pt"})
    make_job("qwen3_next", base, tmp_path / "job", size)
    source = job_source(tmp_path / "job")
    to = tmp_path / "to"
    # Without its probe: what a small delta loses in bf16 is what is counted here.
    record = merge(replace(source, probe=None), base, to, "bf16", lambda done, total: None)
    lora = load_file(tmp_path / "job" / "adapter" / "adapter_model.safetensors")
    meant, arrived = [], []
    for layer in range(2):
        for stack, deep in (("gate_up_proj", ".base_layer"), ("down_proj", "")):
            name = f"model.layers.{layer}.mlp.experts"
            a, b = (lora[f"base_model.model.{name}{deep}.lora_{kind}.weight"].double() for kind in "AB")
            factors = a.view(8, RANK, -1), b.view(-1, RANK, 8)
            meant.append((torch.einsum("eri,ore->eoi", *factors) * ALPHA / RANK).flatten())
            now = load_file(to / "model.safetensors")[f"{name}.{stack}"].double()
            arrived.append((now - rounded[f"{name}.{stack}"].double()).flatten())
    wanted, got = torch.cat(meant), torch.cat(arrived)
    row = next(row for row in record.survival if row.group == "experts")
    assert row.weights == len(wanted)
    assert row.share == pytest.approx(float(got @ wanted / (wanted @ wanted)), rel=1e-4)
    assert row.relative_error == pytest.approx(float((got - wanted).norm() / wanted.norm()), rel=1e-3)
    assert (row.relative_error > 0.3) == (size < 0.01), "a small delta is lost in the rounding, and is said to be"


def test_a_merge_that_says_something_else_than_the_training_is_refused(bases: Any, jobs: Any, tmp_path: Path) -> None:
    job = Path(shutil.copytree(jobs["qwen3_next"], tmp_path / "job"))
    path = job / "adapter" / "adapter_model.safetensors"
    lora = load_file(path)
    save_file({n: t * 1.5 if "experts" in n and "lora_B" in n else t for n, t in lora.items()}, path)
    vouch(job, bases["qwen3_next"])
    with pytest.raises(TrainingStopped, match=r"does not say what the trained model said: error .* at most") as stopped:
        merged(job, bases["qwen3_next"], tmp_path / "to")
    assert stopped.value.cause == "no_effect"
    assert [path.name for path in tmp_path.iterdir()] == ["job"], "nothing is left of it"


def test_an_adapter_trained_on_rounded_weights_is_held_to_what_it_changes(bases: Any, tmp_path: Path) -> None:
    """The base that the trainer saw said something else everywhere; the adapter's effect is still the same."""
    shifted = tmp_path / "shifted"
    shutil.copytree(bases["fused"], shifted)
    whole = load_file(shifted / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    noisy = {n: t * (1 + 0.01 * torch.randn(t.shape, generator=generator)) for n, t in whole.items()}
    save_file(noisy, shifted / "model.safetensors", metadata={"format": "pt"})
    for quantize, passes in (("int8", True), (None, False)):
        job = tmp_path / f"job-{quantize}"
        make_job("qwen3_next", shifted, job, 0.05, quantize)
        vouch(job, bases["fused"])
        if passes:
            assert merged(job, bases["fused"], tmp_path / "to", "bf16").probe_error is not None
        else:
            with pytest.raises(TrainingStopped, match="does not say what the trained model said"):
                merged(job, bases["fused"], tmp_path / "refused")


def test_what_does_not_belong_together_is_refused(bases: Any, jobs: Any, base: Any, tmp_path: Path) -> None:
    with pytest.raises(TrainingStopped, match="not the base model the adapter was trained on"):
        merged(jobs["qwen3_next"], base("qwen3_next"), tmp_path / "to")
    job = Path(shutil.copytree(jobs["qwen3"], tmp_path / "job"))
    change_config(job / "adapter", use_rslora=True)
    with pytest.raises(TrainingStopped, match=r"adapter_config\.json: not the file that was proved"):
        job_source(job)
    vouch(job, bases["qwen3"])
    with pytest.raises(TrainingStopped, match="use_rslora is set; only plain LoRA is merged"):
        merged(job, bases["qwen3"], tmp_path / "to")
    job = Path(shutil.copytree(jobs["qwen3_next"], tmp_path / "other"))
    vouch(job, bases["qwen3"])
    with pytest.raises(TrainingStopped, match=r"adapted modules are not in the base, first model\.layers\.0\."):
        merged(job, bases["qwen3"], tmp_path / "to")
    (job / "probe.safetensors").unlink()
    with pytest.raises(TrainingStopped, match=r"no probe\.safetensors; give the adapter's folder"):
        job_source(job)
    assert not (tmp_path / "to").exists()


def test_a_folder_that_is_there_is_never_replaced(bases: Any, jobs: Any, tmp_path: Path) -> None:
    first = merged(jobs["qwen3"], bases["qwen3"], tmp_path / "to")
    assert merged(jobs["qwen3"], bases["qwen3"], tmp_path / "to") == first, "the same merge is there already"
    with pytest.raises(TrainingStopped, match="it is there and not this merge; name a new folder"):
        merged(jobs["qwen3"], bases["qwen3"], tmp_path / "to", "bf16")


KILLED = """
import os, signal, sys
from pathlib import Path
import trainer.merge as m
put = m.ShardWriter.put
def killing(self, name, parts):
    if "00002-of" in self._path.name and len(self._left) < 20:
        os.kill(os.getpid(), signal.SIGKILL)
    put(self, name, parts)
m.ShardWriter.put = killing
m.merge(m.job_source(Path(sys.argv[1])), Path(sys.argv[2]), Path(sys.argv[3]), "fp32", lambda d, t: None)
"""


def test_killed_in_the_middle_it_goes_on_and_counts_the_same_loss(bases: Any, jobs: Any, tmp_path: Path) -> None:
    job, base = jobs["qwen3_next"], bases["qwen3_next"]
    assert run(KILLED, str(job), str(base), str(tmp_path / "to")).returncode == -signal.SIGKILL
    assert not (tmp_path / "to").exists()
    first = tmp_path / ".to.merging" / "model-00001-of-00002.safetensors"
    before = os.stat(first).st_ino
    record = merged(job, base, tmp_path / "to")
    assert os.stat(tmp_path / "to" / first.name).st_ino == before, "what was whole was kept"
    assert record == merged(job, base, tmp_path / "straight")
    assert read_record(MergedModel, tmp_path / "to" / "merged.json") == record
