"""Writes the adapter in PEFT form and reads it back before anyone may see it."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from recipes.recipe import Base
from trainer.base_files import file_sha256
from trainer.targets import TargetPlan

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def write_adapter(folder: Path, config: Any, base: Base, weights: dict[str, Any], plan: TargetPlan) -> dict[str, str]:
    """adapter/ from full fp32 LoRA weights by PEFT's parameter names; SHA-256 per file. Rank 0 alone.

    The folder appears whole or not at all. Raises ValueError when what was written is not the plan.
    """
    temporary = folder.with_name(f"{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    # In PEFT's files the adapter's own name is left out of the keys.
    tensors = {file_key(name): tensor.contiguous() for name, tensor in weights.items()}
    save_file(tensors, temporary / WEIGHTS, metadata={"format": "pt"})
    (temporary / CONFIG).write_text(_config_text(config, base), encoding="utf-8")
    refuse_wrong_file(temporary / WEIGHTS, plan)
    for path in temporary.iterdir():
        path.chmod(0o644)  # safetensors creates its files readable by their owner alone
    sums = {name: file_sha256(temporary / name) for name in (CONFIG, WEIGHTS)}
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(temporary, folder)
    return sums


def refuse_wrong_file(path: Path, plan: TargetPlan) -> None:
    """Re-opens the file: keys and shapes as planned (an ungathered save writes empty tensors), all numbers finite."""
    expected = {file_key(name): target.shape for name, target in plan.targets.items()}
    with safe_open(path, "pt") as file:
        if set(file.keys()) != set(expected):
            different = sorted(set(file.keys()) ^ set(expected))
            raise ValueError(f"{path.name}: {len(different)} keys are not as planned, first {different[0]}")
        for key, shape in expected.items():
            tensor = file.get_tensor(key)
            if tuple(tensor.shape) != shape:
                raise ValueError(f"{path.name}: {key} has shape {tuple(tensor.shape)}, planned {shape}")
            if not torch.isfinite(tensor).all():
                raise ValueError(f"{path.name}: {key} holds numbers that are not finite")


def file_key(name: str) -> str:
    """The key of a LoRA matrix in adapter_model.safetensors."""
    return name.replace(".default.weight", ".weight")


def _config_text(config: Any, base: Base) -> str:
    """adapter_config.json: the base by name, not by a path of this machine; sets sorted, so equal is equal."""
    values = {key: sorted(value) if isinstance(value, set) else value for key, value in config.to_dict().items()}
    values |= {"inference_mode": True, "base_model_name_or_path": base.id, "revision": base.revision}
    return json.dumps(values, indent=2, sort_keys=True) + "\n"
