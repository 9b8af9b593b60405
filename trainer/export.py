"""Writes the adapter in PEFT form and reads it back before anyone may see it."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from recipes.recipe import Base
from trainer.base_files import file_sha256
from trainer.experts.layouts import PREFIX, from_peft, to_peft
from trainer.experts.projection import Factors
from trainer.targets import TargetPlan

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
EXPERTS = ".lora."
"What stands between an experts module's name and its factor's; PEFT's own layers say lora_A and lora_B."


def write_adapter(folder: Path, config: Any, base: Base, weights: dict[str, Any], plan: TargetPlan) -> dict[str, str]:
    """adapter/ from full fp32 LoRA weights by their name in the model; SHA-256 per file. Rank 0 alone.

    The folder appears whole or not at all. Raises ValueError when what was written is not the plan.
    """
    temporary = folder.with_name(f"{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    save_file(file_tensors(weights), temporary / WEIGHTS, metadata={"format": "pt"})
    (temporary / CONFIG).write_text(_config_text(config, base), encoding="utf-8")
    refuse_wrong_file(temporary / WEIGHTS, plan)
    for path in temporary.iterdir():
        path.chmod(0o644)  # safetensors creates its files readable by their owner alone
    sums = {name: file_sha256(temporary / name) for name in (CONFIG, WEIGHTS)}
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(temporary, folder)
    return sums


def file_tensors(weights: Mapping[str, Any]) -> dict[str, Any]:
    """The tensors of adapter_model.safetensors: PEFT's keys, experts in its fused layout, shared factors expanded.

    In PEFT's files the adapter's own name is left out of the keys.
    """
    tensors = {
        PREFIX + name.replace(".default.weight", ".weight"): tensor.contiguous()
        for name, tensor in weights.items()
        if EXPERTS not in name
    }
    layers = {
        layer: Factors(*(weights[f"{layer}{EXPERTS}{field}"] for field in Factors._fields))
        for layer in _expert_layers(weights)
    }
    return tensors | to_peft(layers)


def read_adapter(path: Path, plan: TargetPlan) -> dict[str, Any]:
    """The LoRA weights of a file by their name in the model: what `write_adapter` was given.

    Raises ValueError when the file holds other tensors than the plan's.
    """
    refuse_wrong_file(path, plan)
    tensors = load_file(path)
    weights = {}
    for name in plan.targets:
        if EXPERTS not in name:
            weights[name] = tensors[PREFIX + name.replace(".default.weight", ".weight")]
    for layer in _expert_layers(plan.targets):
        shapes = [plan.targets[f"{layer}{EXPERTS}{field}"].shape for field in Factors._fields]
        mine = {key: tensor for key, tensor in tensors.items() if key.startswith(f"{PREFIX}{layer}.")}
        factors = from_peft(mine, experts=shapes[1][0], shared=len(shapes[0]) == 2)[layer]
        weights |= {f"{layer}{EXPERTS}{field}": factor for field, factor in factors._asdict().items()}
    return weights


def refuse_wrong_file(path: Path, plan: TargetPlan) -> None:
    """Re-opens the file: keys and shapes as planned (an ungathered save writes empty tensors), all numbers finite."""
    planned = {name: torch.empty(target.shape, device="meta") for name, target in plan.targets.items()}
    expected = {key: tuple(tensor.shape) for key, tensor in file_tensors(planned).items()}
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


def _expert_layers(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(name.partition(EXPERTS)[0] for name in names if EXPERTS in name))


def _config_text(config: Any, base: Base) -> str:
    """adapter_config.json: the base by name, not by a path of this machine; sets sorted, so equal is equal."""
    values = {key: sorted(value) if isinstance(value, set) else value for key, value in config.to_dict().items()}
    values |= {"inference_mode": True, "base_model_name_or_path": base.id, "revision": base.revision}
    return json.dumps(values, indent=2, sort_keys=True) + "\n"
