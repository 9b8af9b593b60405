"""A job's recipe as other trainers read it: Axolotl, LLaMA-Factory, SkyPilot. Pure: a LaunchSpec in, files out.

files = foreign_files(spec, "axolotl")      # {"axolotl.yaml": "..."}; its data lies beside it in data/

Nobody is locked in: what Lorry trains, others can train from the same data with the same numbers. Keys as of Axolotl
0.21.0, LLaMA-Factory 0.9.5 and SkyPilot 0.14.1 (2026-11).
"""

from __future__ import annotations

import json
from typing import Any

import yaml

from recipes.catalog import Family, load_catalog
from recipes.job import LaunchSpec
from scripts.errors import Problem, Refused

Values = dict[str, Any]

_ACCELERATORS = {  # gpu of hardware.yaml -> SkyPilot's name
    "h100-sxm": "H100",
    "h100-pcie": "H100",
    "h100-nvl": "H100",
    "h200": "H200",
    "b200": "B200",
    "a100-pcie": "A100-80GB",
    "a100-sxm": "A100-80GB-SXM",
    "a100-40-sxm": "A100",
    "l40s": "L40S",
}
_TEMPLATES = {"mistral": "mistral"}
"LLaMA-Factory's chat template per family; the others are Qwen's."


def foreign_files(spec: LaunchSpec, tool: str) -> dict[str, str]:
    """Text by file name. Raises Refused for what the tool cannot express."""
    return {"axolotl": _axolotl, "llamafactory": _llamafactory, "skypilot": _skypilot}[tool](spec)


def _axolotl(spec: LaunchSpec) -> dict[str, str]:
    recipe, training = spec.recipe, spec.recipe.training
    linears, parameters = _targets(spec)
    values: Values = {
        "base_model": recipe.base.id,
        "revision_of_model": recipe.base.revision,
        "trust_remote_code": False,
        "adapter": "qlora" if recipe.hardware.quantize == "nf4" else "lora",
        "load_in_4bit": recipe.hardware.quantize == "nf4" or None,
        "load_in_8bit": recipe.hardware.quantize == "int8" or None,
        "quantize_moe_experts": bool(recipe.hardware.quantize and _family(spec).moe_block) or None,
        "lora_r": recipe.adapter.rank,
        "lora_alpha": recipe.adapter.alpha,
        "lora_dropout": 0.0,
        "lora_target_modules": linears or None,
        "lora_target_parameters": parameters or None,
        "datasets": [_axolotl_set("data/train.jsonl")],
        "test_datasets": [{**_axolotl_set("data/valid.jsonl"), "split": "train"}] if spec.valid_examples else None,
        "sequence_len": recipe.data.max_tokens,
        "sample_packing": False,
        "micro_batch_size": training.micro_batch,
        "gradient_accumulation_steps": spec.accumulation_steps,
        "num_epochs": training.epochs,
        "max_steps": training.max_steps,
        "optimizer": "adamw_torch",
        "learning_rate": training.learning_rate,
        "lr_scheduler": training.schedule,
        "warmup_ratio": training.warmup_fraction,
        "weight_decay": training.weight_decay,
        "max_grad_norm": training.gradient_clipping,
        "seed": training.seed,
        "bf16": training.precision == "bf16",
        "gradient_checkpointing": True,
        "deepspeed": "deepspeed_configs/zero3_bf16.json" if recipe.hardware.engine == "zero3" else None,
        "output_dir": "out",
    }
    return {"axolotl.yaml": _text(spec, "axolotl train axolotl.yaml", values)}


def _axolotl_set(path: str) -> Values:
    return {
        "path": path,
        "ds_type": "json",
        "type": "chat_template",
        "field_messages": "messages",
        "message_field_training": "trained",
        "train_on_eos": "turn",
    }


def _llamafactory(spec: LaunchSpec) -> dict[str, str]:
    recipe, training = spec.recipe, spec.recipe.training
    linears, parameters = _targets(spec)
    if parameters or recipe.hardware.quantize:
        groups = [t for t in recipe.adapter.targets if _family(spec).groups[t].parameters]
        got = f"adapter.targets {groups}" if parameters else f"hardware.quantize {recipe.hardware.quantize}"
        raise Refused(Problem("export", f"LLaMA-Factory 0.9.5 has no setting for {got}", "--for axolotl"))
    values: Values = {
        "model_name_or_path": recipe.base.id,
        "model_revision": recipe.base.revision,
        "trust_remote_code": False,
        "stage": "sft",
        "do_train": True,
        "finetuning_type": "lora",
        "lora_rank": recipe.adapter.rank,
        "lora_alpha": recipe.adapter.alpha,
        "lora_dropout": 0.0,
        "lora_target": ",".join(linears),
        "dataset_dir": ".",
        "dataset": "lorry_train",
        "eval_dataset": "lorry_valid" if spec.valid_examples else None,
        "template": _TEMPLATES.get(_family(spec).model_type, "qwen3_nothink"),
        "cutoff_len": recipe.data.max_tokens,
        "packing": False,
        "per_device_train_batch_size": training.micro_batch,
        "gradient_accumulation_steps": spec.accumulation_steps,
        "num_train_epochs": float(training.epochs),
        "max_steps": training.max_steps,
        "learning_rate": training.learning_rate,
        "lr_scheduler_type": training.schedule,
        "warmup_ratio": training.warmup_fraction,
        "weight_decay": training.weight_decay,
        "max_grad_norm": training.gradient_clipping,
        "seed": training.seed,
        "bf16": training.precision == "bf16",
        "deepspeed": "examples/deepspeed/ds_z3_config.json" if spec.gpus * spec.nodes > 1 else None,
        "logging_steps": 1,
        "output_dir": "out",
    }
    names = ("train", "valid") if spec.valid_examples else ("train",)
    sets = {f"lorry_{name}": _llamafactory_set(f"data/{name}.jsonl") for name in names}
    note = "llamafactory-cli train llamafactory.yaml     # it trains on every assistant turn"
    return {
        "llamafactory.yaml": _text(spec, note, values),
        "dataset_info.json": json.dumps(sets, indent=2) + "\n",
    }


def _llamafactory_set(path: str) -> Values:
    tags = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
    return {
        "file_name": path,
        "formatting": "sharegpt",
        "columns": {"messages": "messages"},
        "tags": tags | {"system_tag": "system"},
    }


def _skypilot(spec: LaunchSpec) -> dict[str, str]:
    """The job itself on a machine that SkyPilot rents: our container, which keeps deadline and store."""
    offer = load_catalog().offers.get(spec.offer or "")
    name = _ACCELERATORS.get(offer.gpu) if offer else None
    if offer and name is None and offer.gpu != "cpu":
        raise Refused(Problem("export", f"nobody has checked SkyPilot's name for {offer.gpu}", "--for axolotl"))
    resources: Values = {"use_spot": False, "autostop": {"idle_minutes": 10, "down": True}}
    if name:
        resources["accelerators"] = {name: spec.gpus}
    if spec.image:
        resources["image_id"] = f"docker:{spec.image}"
    values: Values = {
        "name": spec.job_id,
        "num_nodes": spec.nodes,
        "resources": resources,
        "envs": {"LORRY_STORE": spec.store, "LORRY_MODELS": "/models"},
        "workdir": None if spec.image else ".",
        "setup": None if spec.image else "pip install --requirement requirements.lock && pip install --no-deps .",
        "run": f'python -m scripts.container --store "$LORRY_STORE" --job {spec.job_id}\n',
    }
    return {"skypilot.yaml": _text(spec, f"sky launch --down --cluster {spec.job_id} skypilot.yaml", values)}


def _targets(spec: LaunchSpec) -> tuple[list[str], list[str]]:
    """(names of linear modules, names of parameters) of the recipe's target groups."""
    groups = [_family(spec).groups[target] for target in spec.recipe.adapter.targets]
    return [n for g in groups for n in g.linears], [n for g in groups for n in g.parameters]


def _family(spec: LaunchSpec) -> Family:
    return load_catalog().family_of(spec.recipe.base.id)


def _text(spec: LaunchSpec, command: str, values: Values) -> str:
    head = f"# Recipe {spec.recipe_name} (sha256 {spec.recipe_sha256[:12]}) of job {spec.job_id}\n# {command}\n"
    kept = {name: value for name, value in values.items() if value is not None}
    return head + yaml.safe_dump(kept, sort_keys=False, allow_unicode=True)
