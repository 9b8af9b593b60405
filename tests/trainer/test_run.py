"""A whole run of two ranks, what it leaves behind, and what it is equal to."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from recipes.catalog import load_catalog
from recipes.job import Proof, Status, read_record
from recipes.schedule import batch_of_step, learning_rate_of_step
from trainer.base_files import file_sha256, loading
from trainer.batches import padded
from trainer.cross_entropy import IGNORED
from trainer.data import ChatTokens, read_examples
from trainer.export import write_adapter
from trainer.targets import attach, lora_config, meta_model, named_trainable, plan_targets

LOSS_TOLERANCE = 1e-5
"Relative, per step."
ADAPTER_TOLERANCE = 5e-5
"Relative L2 of all adapter tensors together."

LOADING = loading(load_catalog().families["qwen3_next"])


def test_two_ranks_train_and_the_loss_falls_on_what_was_held_out(reference: Any) -> None:
    result = reference.result
    assert (result.outcome, result.exit_code, result.step, result.world_size) == ("completed", 0, 12, 2)
    assert result.final_validation_loss < result.initial_validation_loss - 0.3
    assert reference.losses[-1] < reference.losses[0] - 0.3
    assert (result.first_training_loss, result.final_training_loss) == (reference.losses[0], reference.losses[-1])
    assert result.trainable_parameters == sum(row.parameters for row in result.trained) == 79872
    assert [row.group for row in result.trained] == ["attention", "linear_attention", "shared_expert", "experts"]
    assert [row.matrices for row in result.trained] == [4, 6, 12, 8]


def test_status_and_metrics_hold_integers_and_loss_with_learning_rate(reference: Any) -> None:
    metrics = reference.metrics
    assert [(m.kind, m.step) for m in metrics] == [("eval", 0), *(("train", s) for s in range(1, 13)), ("eval", 12)]
    training = reference.spec.recipe.training
    for metric in metrics[1:-1]:
        assert metric.learning_rate == learning_rate_of_step(metric.step - 1, 12, 5e-3, "cosine", 0.05)
        assert metric.gradient_norm > 0
        assert metric.tokens_per_second > 0
        assert metric.epoch == (metric.step - 1) * training.global_batch // 24 + 1
    status = read_record(Status, reference.folder / "status.json")
    assert (status.stage, status.progress, status.step, status.epoch) == ("done", 100, 12, 2)
    assert status.training_loss == metrics[-2].training_loss
    assert status.learning_rate == metrics[-2].learning_rate
    assert metrics[1].step_seconds is None, "the first step warms up"
    assert status.step_seconds == metrics[-2].step_seconds > 0
    assert reference.result.step_seconds > 0
    assert status.validation_loss == metrics[-1].validation_loss


def test_the_log_shows_what_is_trained_and_in_which_precision(reference: Any) -> None:
    log = (reference.folder / "trainer-1.log").read_text(encoding="utf-8")
    assert "experts                   8         57,344" in log
    assert "frozen: 343,976 float32 (100.0%); adapter: 79,872 float32; optimizer float32" in log
    assert "experts: 100.0% of an update of 1e-3 of the weights reaches the output in torch.float32" in log


def test_adapter_files_are_whole_readable_and_name_the_base_not_a_path(reference: Any) -> None:
    adapter = reference.folder / "adapter"
    assert sorted(p.name for p in adapter.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    assert {p.stat().st_mode & 0o777 for p in adapter.iterdir()} == {0o644}
    assert reference.result.adapter_sha256 == {p.name: file_sha256(p) for p in adapter.iterdir()}
    config = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["base_model_name_or_path"] == "lorry/smoke"
    assert (config["r"], config["lora_alpha"], config["rank_pattern"]) == (8, 16, {})
    with safe_open(adapter / "adapter_model.safetensors", "pt") as file:
        shapes = {key: tuple(file.get_tensor(key).shape) for key in file.keys()}  # noqa: SIM118
    assert len(shapes) == 60
    assert all(math.prod(shape) > 0 for shape in shapes.values()), "an ungathered save writes empty tensors"
    assert shapes["base_model.model.model.layers.0.mlp.experts.base_layer.lora_B.weight"] == (64, 64)
    assert shapes["base_model.model.model.layers.0.mlp.shared_expert.gate_proj.lora_A.weight"] == (8, 64)


def test_a_fresh_process_reproduces_the_trained_model(reference: Any, smoke_model: Path) -> None:
    command = [sys.executable, "-m", "trainer.prove", "--job", str(reference.folder), "--model", str(smoke_model)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    proof = read_record(Proof, reference.folder / "proof.json")
    assert proof.passed
    assert proof.tensors == proof.tensors_consumed == 60
    assert proof.effect > 0.05
    assert proof.reproduction_error < 1e-5
    assert 4 <= proof.positions <= 64
    assert proof.adapter_sha256 == reference.result.adapter_sha256


def test_losses_equal_a_plain_single_process_run_of_transformers_and_peft(
    reference: Any, smoke_model: Path, tmp_path: Path
) -> None:
    spec = reference.spec
    training = spec.recipe.training
    plain = plain_losses(reference, smoke_model, steps=3, start=tmp_path / "start")
    assert reference.losses[0] == pytest.approx(plain[0], rel=LOSS_TOLERANCE)
    assert reference.losses[:3] == pytest.approx(plain, rel=LOSS_TOLERANCE)
    assert training.gradient_clipping == 1.0


def test_adapter_reloads_with_the_validation_loss_of_the_result(reference: Any, smoke_model: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(smoke_model, dtype=torch.float32, **LOADING)[0]
    model = PeftModel.from_pretrained(base, reference.folder / "adapter").eval()
    chat = ChatTokens(smoke_model)
    spec = reference.spec
    valid = read_examples(reference.folder / "data" / "valid.jsonl", spec.valid_sha256, 4, chat, 1024)
    with torch.no_grad():
        total = sum(float(plain_nll(model, [example], chat.pad_id)) for example in valid)
    mean = total / sum(len(example.predicted) for example in valid)
    assert mean == pytest.approx(reference.result.final_validation_loss, rel=1e-5)


@pytest.mark.slow
def test_one_rank_takes_the_same_steps_as_two(reference: Any, jobs: Any, smoke_model: Path, tmp_path: Path) -> None:
    """Two ranks accumulate over 2 passes, one rank over 4: only the order of the sums differs."""
    one = jobs.make(tmp_path / "one", jobs.reference | {"hardware": {"gpus": 1}}, jobs.reference_rows())
    log = jobs.train(one, smoke_model)
    assert one.result.outcome == "completed", log[-3000:]
    assert (reference.result.world_size, one.result.world_size) == (2, 1)
    assert (reference.spec.accumulation_steps, one.spec.accumulation_steps) == (2, 4)
    assert reference.losses == pytest.approx(one.losses, rel=LOSS_TOLERANCE)
    assert relative_l2(jobs.tensors(reference), jobs.tensors(one)) <= ADAPTER_TOLERANCE
    assert reference.result.final_validation_loss == pytest.approx(one.result.final_validation_loss, rel=LOSS_TOLERANCE)


def relative_l2(first: dict[str, Any], second: dict[str, Any]) -> float:
    assert first.keys() == second.keys()
    difference = sum(float((first[key] - second[key]).double().square().sum()) for key in first)
    return math.sqrt(difference / sum(float(t.double().square().sum()) for t in second.values()))


def plain_nll(model: Any, examples: list[Any], pad_id: int) -> Any:
    """The loss written out with full logits, for comparison with the trainer's."""
    batch = padded(examples, pad_id, "cpu")
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
    targets = batch["labels"][:, 1:].flatten()
    return torch.nn.functional.cross_entropy(
        logits[:, :-1].float().flatten(0, 1), targets, ignore_index=IGNORED, reduction="sum"
    )


def plain_losses(job: Any, model_folder: Path, steps: int, start: Path) -> list[float]:
    """Losses of the same steps by PEFT alone: whole global batch in one pass, torch's clipping and AdamW."""
    spec = job.spec
    recipe, family = spec.recipe, load_catalog().families["qwen3_next"]
    chat = ChatTokens(model_folder)
    rows = read_examples(job.folder / "data" / "train.jsonl", spec.train_sha256, spec.train_examples, chat, 1024)
    write_start(recipe, family, model_folder, start)
    base = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32, **LOADING)[0]
    model = PeftModel.from_pretrained(base, start, is_trainable=True).train()
    trainable = [p for p in model.parameters() if p.requires_grad]
    adamw = torch.optim.AdamW(trainable, lr=5e-3, weight_decay=0.0)
    losses = []
    for step in range(steps):
        batch = [rows[i] for i in batch_of_step(step, len(rows), 4, recipe.training.seed)]
        adamw.param_groups[0]["lr"] = learning_rate_of_step(step, spec.total_steps, 5e-3, "cosine", 0.05)
        loss = plain_nll(model, batch, chat.pad_id) / sum(len(e.predicted) for e in batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trainable, 1.0)
        adamw.step()
        adamw.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def write_start(recipe: Any, family: Any, model_folder: Path, folder: Path) -> None:
    """The untrained adapter of the recipe's seed, as PEFT reads it: the same A on both sides of a comparison."""
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32, **LOADING)[0]
    plan = plan_targets(meta_model(model.config, torch.float32), family, recipe.adapter)
    attach(model, family, recipe.adapter, plan, seed=recipe.training.seed, dtype=torch.float32)
    weights = {name: p.detach().clone() for name, p in named_trainable(model).items()}
    write_adapter(folder, lora_config(family, recipe.adapter), recipe.base, weights, plan)
