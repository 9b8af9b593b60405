"""The engine with a whole quantised model on each rank: what it equals, and what its adapter is worth elsewhere."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from recipes.catalog import load_catalog
from recipes.job import Proof, read_record
from recipes.load import load_recipe
from trainer import probe
from trainer.base_files import BaseFiles
from trainer.experts.module import STACKS, expert_layers
from trainer.load import load_whole
from trainer.quantised_linear import QuantisedLinear
from trainer.quantize import quantise

pytestmark = pytest.mark.timeout(900)  # several starts of the trainer, on a busy machine

REPLICA = {"hardware": {"engine": "replica", "quantize": "int8"}}
SHARED = {"adapter": {"expert_layout": "shared_outer"}}
STEPS = {"training": {"max_steps": 4, "micro_batch": 1, "checkpoint_steps": 2}}
FAMILY = load_catalog().families["qwen3_next"]


def merged(*changes: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    sections = {section for change in changes for section in change}
    return {s: {k: v for change in changes for k, v in change.get(s, {}).items()} for s in sections}


@pytest.fixture(scope="module")
def replica(jobs: Any, smoke_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Four steps of two ranks, int8, shared outer factors: the smoke recipe of this engine, shortened."""
    folder = tmp_path_factory.mktemp("replica") / "job"
    job = jobs.make(folder, merged(REPLICA, SHARED, STEPS), jobs.reference_rows())
    expected = load_recipe("smoke/replica").recipe
    assert job.spec.recipe == jobs.changed(expected, STEPS)
    log = jobs.train(job, smoke_model)
    assert job.result.outcome == "completed", log[-3000:]
    return job


def test_the_log_names_the_share_of_each_precision(replica: Any) -> None:
    log = (replica.folder / "trainer-1.log").read_text(encoding="utf-8")
    # Experts 4 x 8 x 3 x 64 x 32 = 196,608; attention 16,384; linear attention 3 x 16,384; shared experts 24,576.
    assert "frozen: 57,256 float32 (16.6%), 286,720 int8 (83.4%); adapter: 51,200 float32" in log


def test_a_fresh_process_proves_the_adapter_on_the_same_quantised_base(replica: Any, smoke_model: Path) -> None:
    proof = proven(replica, smoke_model)
    assert proof.effect > 0.02
    assert proof.reproduction_error < 1e-5
    assert proof.tensors == proof.tensors_consumed == 60


def test_plain_peft_says_the_same_on_the_weights_that_int8_stands_for(replica: Any, smoke_model: Path) -> None:
    """A quantised base is a base with other numbers: written out in fp32, PEFT adapts it to the same function."""
    model = load_whole(BaseFiles(smoke_model), FAMILY, torch.float32, "cpu", "int8")
    written_out(model)
    peft_model = PeftModel.from_pretrained(model, replica.folder / "adapter").eval()
    conversations, base, trained = probe.read_probe(replica.folder / "probe.safetensors")
    again = probe.log_probabilities(peft_model, conversations, "cpu")
    assert probe.rms(trained, again) < 1e-3 * probe.rms(base, trained)


@pytest.mark.slow
def test_a_staged_model_trains_to_the_same_adapter(replica: Any, jobs: Any, smoke_model: Path, tmp_path: Path) -> None:
    """Staging and quantising on the spot are one arithmetic; the staged one never holds the plain weights."""
    staged = tmp_path / "staged"
    quantise(smoke_model, staged, "int8", model="lorry/smoke", revision=None, say=lambda done, total: None)
    job = jobs.make(tmp_path / "job", merged(REPLICA, SHARED, STEPS), jobs.reference_rows())
    log = jobs.train(job, staged)
    assert job.result.outcome == "completed", log[-3000:]
    assert job.losses == replica.losses
    ours, theirs = jobs.tensors(job), jobs.tensors(replica)
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert job.result.base_sha256 == replica.result.base_sha256
    assert proven(job, staged).reproduction_error < 1e-5


@pytest.mark.slow
def test_one_rank_takes_the_steps_of_two(replica: Any, jobs: Any, smoke_model: Path, tmp_path: Path) -> None:
    changes = merged(REPLICA, SHARED, STEPS, {"hardware": {"gpus": 1}})
    one = jobs.make(tmp_path / "one", changes, jobs.reference_rows())
    log = jobs.train(one, smoke_model)
    assert one.result.outcome == "completed", log[-3000:]
    assert one.losses == pytest.approx(replica.losses, rel=1e-5)
    assert one.result.final_validation_loss == pytest.approx(replica.result.final_validation_loss, rel=1e-5)


@pytest.mark.slow
def test_a_resumed_replica_ends_bit_equal(replica: Any, jobs: Any, smoke_model: Path, tmp_path: Path) -> None:
    job = type(replica)(Path(shutil.copytree(replica.folder, tmp_path / "job")), replica.spec)
    shutil.rmtree(job.folder / "adapter")
    log = jobs.train(job, smoke_model, attempt=2)
    assert "resumes from step-000002" in log
    ours, theirs = jobs.tensors(job), jobs.tensors(replica)
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert job.losses == replica.losses


def written_out(model: Any) -> None:
    """Storages become parameters of what they decode to."""
    for name, linear in list(model.named_modules()):
        if isinstance(linear, QuantisedLinear):
            plain = torch.nn.Linear(linear.in_features, linear.out_features, bias=False)
            plain.weight = torch.nn.Parameter(linear.weight, requires_grad=False)
            model.set_submodule(name, plain)
    for experts in expert_layers(model).values():
        for name in STACKS:
            stack = getattr(experts, name)
            delattr(experts, name)
            decoded = stack.dequantise(0, stack.experts, torch.float32)
            setattr(experts, name, torch.nn.Parameter(decoded, requires_grad=False))
    model.set_experts_implementation("grouped_mm")


def proven(job: Any, model: Path) -> Proof:
    command = [sys.executable, "-m", "trainer.prove", "--job", str(job.folder), "--model", str(model)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    proof = read_record(Proof, job.folder / "proof.json")
    assert proof is not None
    assert proof.passed
    return proof
