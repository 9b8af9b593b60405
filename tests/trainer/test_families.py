"""Every family of the catalog trains, exports and proves at toy size; bf16 and other numbers of ranks resume."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from recipes.catalog import load_catalog
from recipes.job import Proof, read_record
from trainer.targets import meta_model, plan_targets

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

DENSE = {"intermediate_size": 96, "num_hidden_layers": 2}
MOE = {"moe_intermediate_size": 32, "num_experts": 8, "num_experts_per_tok": 2, "num_hidden_layers": 2}
HYBRID = MOE | {
    "num_hidden_layers": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "shared_expert_intermediate_size": 32,
}
ROUTED = {
    "moe_intermediate_size": 32, "n_routed_experts": 8, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1,
    "num_hidden_layers": 3, "first_k_dense_replace": 1, "intermediate_size": 96,
}  # fmt: skip
LATENT = ROUTED | {
    "num_key_value_heads": 4, "head_dim": None, "q_lora_rank": 24, "kv_lora_rank": 16,
    "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16,
}  # fmt: skip
SINKS = {
    "num_local_experts": 8, "num_experts_per_tok": 2, "intermediate_size": 32, "num_hidden_layers": 2,
    "sliding_window": 8,
}  # fmt: skip
VISION = {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 64}
FAMILIES = {
    "mistral": ("mistralai/Mistral-7B-Instruct-v0.2", DENSE),
    "qwen3": ("Qwen/Qwen3-8B", DENSE),
    "qwen3_moe": ("Qwen/Qwen3-30B-A3B-Instruct-2507", MOE),
    "qwen3_5_moe": ("Qwen/Qwen3.6-35B-A3B", HYBRID),
    "glm4_moe": ("zai-org/GLM-4.5-Air", ROUTED | {"attention_bias": True}),
    "gpt_oss": ("openai/gpt-oss-120b", SINKS),
    "deepseek_v3": ("deepseek-ai/DeepSeek-V3", LATENT),
}


def tiny(family: str, smoke_model: Path, folder: Path) -> Path:
    """A toy model of the family with the smoke model's tokenizer; qwen3_5_moe with a vision tower, as published."""
    text = {
        "vocab_size": 400,
        "hidden_size": 64,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "pad_token_id": 0,
        "eos_token_id": 2,
        **FAMILIES[family][1],
    }
    text = {name: value for name, value in text.items() if value is not None}
    torch.manual_seed(0)
    if family == "qwen3_5_moe":
        config = AutoConfig.for_model(family, text_config=text, vision_config=VISION)
        AutoModelForImageTextToText.from_config(config).save_pretrained(folder)
    else:
        AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **text)).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(smoke_model / name, folder / name)
    return folder


SELDOM = ("glm4_moe", "mistral", "qwen3")
"Nothing of theirs that one of the others has not: trained before a release."


@pytest.mark.parametrize(
    "family", [pytest.param(f, marks=[pytest.mark.long] if f in SELDOM else []) for f in sorted(FAMILIES)]
)
def test_each_family_trains_all_its_groups_and_is_proven(
    family: str, jobs: Any, smoke_model: Path, tmp_path: Path
) -> None:
    model, base_id = tiny(family, smoke_model, tmp_path / "model"), FAMILIES[family][0]
    facts = load_catalog().families[family]
    changes = {
        "base": {"id": base_id},
        "adapter": {"targets": tuple(facts.groups)},
        "training": {"max_steps": 3},
        "hardware": {"gpus": 1},
    }
    recipe = jobs.changed(jobs.recipe, changes)
    plan = plan_targets(meta_model(AutoConfig.from_pretrained(model), torch.float32), facts, recipe.adapter)
    job = jobs.make(tmp_path / "job", changes, jobs.conversations(12), trainable_parameters=plan.parameters)
    log = jobs.train(job, model)
    assert job.result.outcome == "completed", log[-3000:]
    assert [row.group for row in job.result.trained] == list(facts.groups)
    assert job.losses[-1] < job.losses[0]
    assert proven(job, model).passed


def test_bf16_trains_proves_and_resumes_bit_for_bit(jobs: Any, smoke_model: Path, tmp_path: Path) -> None:
    changes = {"training": {"max_steps": 5, "precision": "bf16", "checkpoint_steps": 2}}
    job = jobs.make(tmp_path / "job", changes, jobs.conversations(20))
    log = jobs.train(job, smoke_model)
    assert job.result.outcome == "completed", log[-3000:]
    assert "frozen: 343,976 bfloat16 (100.0%); adapter: 79,872 bfloat16; optimizer float32" in log
    assert re.search(r"experts: 5\d\.\d% of an update of 1e-3 .* in torch\.bfloat16", log)
    proof = proven(job, smoke_model)
    assert proof.passed
    assert proof.reproduction_error <= 0.1 * proof.effect
    whole = jobs.tensors(job)
    assert all(tensor.dtype == torch.float32 for tensor in whole.values()), (
        "the masters are exported, not their rounding"
    )
    assert "resumes from step-000004" in jobs.train(job, smoke_model, attempt=2)
    again = jobs.tensors(job)
    assert all(torch.equal(again[key], whole[key]) for key in whole)


def test_checkpoints_resume_on_other_numbers_of_ranks(jobs: Any, smoke_model: Path, tmp_path: Path) -> None:
    """2 ranks save; 1 and 3 ranks end with the same adapter. 3 ranks cut matrices of 2^n numbers unevenly."""
    rows = jobs.conversations(22)
    training = {"max_steps": 6, "global_batch": 6, "micro_batch": 1, "checkpoint_steps": 4}
    job = jobs.make(tmp_path / "2", {"training": training}, rows)
    assert jobs.train(job, smoke_model)
    whole = jobs.tensors(job)
    for ranks in (1, 3):
        other = jobs.make(tmp_path / str(ranks), {"training": training, "hardware": {"gpus": ranks}}, rows)
        shutil.copytree(job.folder / "checkpoints", other.folder / "checkpoints")
        log = jobs.train(other, smoke_model)
        assert "resumes from step-000004" in log
        assert other.result.outcome == "completed", log[-3000:]
        tensors = jobs.tensors(other)
        assert all(torch.allclose(tensors[key], whole[key], atol=1e-4) for key in whole)
        assert other.losses == pytest.approx(job.losses[4:], rel=1e-5)


def proven(job: Any, model: Path) -> Proof:
    """proof.json of a fresh process."""
    command = [sys.executable, "-m", "trainer.prove", "--job", str(job.folder), "--model", str(model)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False, env=dict(os.environ))
    assert ended.returncode == 0, ended.stdout + ended.stderr
    proof = read_record(Proof, job.folder / "proof.json")
    assert proof is not None
    return proof
