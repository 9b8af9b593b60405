"""A finished training at toy size without a training: an adapter of random numbers, its probe and its records."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from recipes.job import LaunchSpec, Result, write_record
from recipes.load import load_recipe, recipe_sha256
from trainer import probe
from trainer.base_files import BaseFiles, file_sha256

RANK, ALPHA = 4, 8
TARGETS = {
    "qwen3_next": (
        ["q_proj", "o_proj", "in_proj_qkvz"],
        ["mlp.shared_expert.up_proj.weight", "mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    ),
    "qwen3": (["q_proj", "v_proj", "down_proj"], []),
}
MODELS = {"qwen3_next": "lorry/smoke", "qwen3": "Qwen/Qwen3-8B"}
CONVERSATIONS = [([7 * n % 100 for n in range(20)], [3, 9, 15]), ([5 * n % 100 for n in range(12)], [2, 8])]


def adapted(family: str, base: Path, size: float, dtype: torch.dtype = torch.float32) -> Any:
    """The base with LoRA whose B is of this size."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    modules, parameters = TARGETS[family]
    config = LoraConfig(
        r=RANK, lora_alpha=ALPHA, target_modules=modules, target_parameters=parameters or None, task_type="CAUSAL_LM"
    )
    model = get_peft_model(model, config, autocast_adapter_dtype=False)
    generator = torch.Generator().manual_seed(3)
    for name, parameter in sorted(model.named_parameters()):
        if ".lora_" in name:
            drawn = torch.randn(parameter.shape, generator=generator)
            parameter.data = (drawn * (size if ".lora_B." in name else 0.125)).to(parameter.dtype)
    return model.eval()


def make_job(family: str, base: Path, job: Path, size: float = 0.2, quantize: str | None = None) -> Any:
    """Writes the job folder; the adapted model."""
    model = adapted(family, base, size)
    model.save_pretrained(job / "adapter")
    (job / "adapter" / "README.md").unlink(missing_ok=True)
    said = probe.log_probabilities(model, CONVERSATIONS, torch.device("cpu"))
    with model.disable_adapter():
        base_said = probe.log_probabilities(model, CONVERSATIONS, torch.device("cpu"))
    probe.write_probe(job / "probe.safetensors", CONVERSATIONS, base_said, said)
    recipe = load_recipe("smoke/zero3").recipe
    hardware = {"engine": "replica", "quantize": quantize} if quantize else {}
    recipe = recipe.model_copy(
        update={
            "base": recipe.base.model_copy(update={"id": MODELS[family]}),
            "hardware": recipe.hardware.model_copy(update=hardware),
        }
    )
    spec = {
        "job_id": "merge-me", "recipe_name": "toy", "recipe_sha256": recipe_sha256(recipe), "recipe": recipe,
        "backend": "local", "offer": None, "model_type": family, "gpus": 1, "nodes": 1, "accumulation_steps": 1,
        "total_steps": 1, "steps_per_epoch": 1, "trainable_parameters": 1, "deadline_seconds": 1, "quote_usd": 0.0,
        "cap_usd": 1.0, "source": "x", "source_sha256": "", "train_sha256": "", "valid_sha256": "",
        "train_examples": 1, "valid_examples": 0, "store": job.parent.as_uri(),
    }  # fmt: skip
    write_record(job / "launch.json", LaunchSpec.model_validate(spec))
    vouch(job, base)
    return model


def vouch(job: Path, base: Path) -> None:
    """result.json over the adapter as it is now."""
    names = ("adapter_config.json", "adapter_model.safetensors")
    result = Result(
        job_id="merge-me", outcome="completed", exit_code=0, attempt=1, step=1, total_steps=1,
        adapter_sha256={name: file_sha256(job / "adapter" / name) for name in names},
        base_sha256=BaseFiles(base).sha256(), base_revision="f" * 40,
    )  # fmt: skip
    write_record(job / "result.json", result)


def change_config(folder: Path, **values: Any) -> None:
    """Sets fields of adapter_config.json."""
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_bytes()) | values))
