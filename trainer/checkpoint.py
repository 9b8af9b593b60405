"""Portable checkpoints: LoRA weights and Adam moments in full shape and fp32, so that any number of ranks resumes.

checkpoints/step-000040/lora.safetensors   "<name>/weight", "<name>/exp_avg", "<name>/exp_avg_sq"
                        state.json         step, what it fits, losses and times so far
                        COMPLETE           SHA-256 of the two, written last; a folder without it does not exist
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from safetensors import safe_open
from safetensors.torch import save_file

from recipes.job import LaunchSpec
from trainer.base_files import file_sha256

FORMAT = 1
KEPT = 2
WEIGHT, MOMENTS = "weight", ("exp_avg", "exp_avg_sq")


def fit_key(spec: LaunchSpec, base_sha256: str) -> str:
    """SHA-256 of all that a step's arithmetic depends on; the number of ranks and the saving rhythm do not count."""
    recipe = spec.recipe
    free = {"micro_batch", "micro_tokens", "checkpoint_minutes", "checkpoint_steps"}
    said = {
        "base": base_sha256,
        "adapter": recipe.adapter.model_dump(mode="json"),
        "training": recipe.training.model_dump(mode="json", exclude=free),
        "train_sha256": spec.train_sha256,
        "total_steps": spec.total_steps,
    }
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def newest(folder: Path, fits: str) -> Path | None:
    """The newest complete, undamaged checkpoint with this key; others are passed over."""
    for path in sorted(folder.glob("step-*"), reverse=True):
        if _is_whole(path) and read_state(path)["fits"] == fits:
            return path
    return None


def read_state(path: Path) -> dict[str, Any]:
    """state.json of a checkpoint."""
    state: dict[str, Any] = json.loads((path / "state.json").read_text(encoding="utf-8"))
    return state


def save(folder: Path, step: int, trainable: dict[str, Any], state: dict[str, Any], keeper: bool) -> Path:
    """Gathers every tensor in turn on all ranks; the keeper (rank 0) writes. Collective. Raises OSError."""
    path = folder / f"step-{step:06d}"
    tensors = {key: tensor for key, tensor in _gathered(trainable) if keeper}
    if keeper:
        _write(path, tensors, {"format": FORMAT, "step": step, **state})
        for old in sorted(folder.glob("step-*"))[:-KEPT]:
            shutil.rmtree(old)
    dist.barrier()
    return path


def load_weights(path: Path, trainable: dict[str, Any]) -> None:
    """Copies the LoRA weights in. Before deepspeed.initialize: after it the working copy would stay stale."""
    with safe_open(path / "lora.safetensors", "pt") as file, torch.no_grad():
        for name, parameter in trainable.items():
            parameter.copy_(file.get_tensor(f"{name}/{WEIGHT}"))


def load_optimizer(path: Path, optimizer: Any, trainable: dict[str, Any], rank: int, world: int) -> None:
    """Restores fp32 masters and Adam moments, after deepspeed.initialize, each rank its part."""
    step = float(read_state(path)["step"])
    for flat in optimizer.fp32_partitioned_groups_flat:  # the state does not exist before the first step
        zeros = {moment: torch.zeros_like(flat) for moment in MOMENTS}
        optimizer.optimizer.state[flat] = {"step": torch.tensor(step), **zeros}
    with safe_open(path / "lora.safetensors", "pt") as file:
        for name, parameter in trainable.items():
            safe_set_local_fp32_param(parameter, _part(file.get_tensor(f"{name}/{WEIGHT}"), rank, world))
            for moment in MOMENTS:
                part = _part(file.get_tensor(f"{name}/{moment}"), rank, world)
                safe_set_local_optimizer_state(parameter, part, moment)


def full_weights(trainable: dict[str, Any], keeper: bool) -> dict[str, Any]:
    """The fp32 LoRA weights in full shape by name, on the keeper; empty elsewhere. Collective."""
    weights = {}
    for name, parameter in trainable.items():
        full = safe_get_full_fp32_param(parameter)
        if keeper:
            weights[name] = full.detach().to("cpu", copy=True)
    return weights


def _gathered(trainable: dict[str, Any]) -> Iterator[tuple[str, Any]]:

    for name, parameter in trainable.items():
        yield f"{name}/{WEIGHT}", safe_get_full_fp32_param(parameter).detach().to("cpu", copy=True)
        for moment in MOMENTS:
            yield f"{name}/{moment}", safe_get_full_optimizer_state(parameter, moment).to("cpu", copy=True)


def _part(full: Any, rank: int, world: int) -> Any:
    """This rank's part of a ZeRO-3 partition: ceil(n / world) numbers, the last rank's filled up with zeros."""
    flat = full.flatten()
    size = -(-flat.numel() // world)
    return torch.nn.functional.pad(flat, (0, size * world - flat.numel())).narrow(0, rank * size, size)


def _write(path: Path, tensors: dict[str, Any], state: dict[str, Any]) -> None:

    temporary = path.with_name(f".{path.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        save_file(tensors, temporary / "lora.safetensors")
        (temporary / "state.json").write_text(json.dumps(state, indent=2) + "\n", encoding="utf-8")
        sums = {name: file_sha256(temporary / name) for name in ("lora.safetensors", "state.json")}
        (temporary / "COMPLETE").write_text(json.dumps(sums, indent=2) + "\n", encoding="utf-8")
        _publish(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)  # a full disk needs the space to say that it is full
        raise


def _publish(temporary: Path, path: Path) -> None:
    for file in temporary.iterdir():
        file.chmod(0o644)
        with file.open("rb") as handle:
            os.fsync(handle.fileno())
    shutil.rmtree(path, ignore_errors=True)
    os.replace(temporary, path)


def _is_whole(path: Path) -> bool:
    try:
        sums = json.loads((path / "COMPLETE").read_text(encoding="utf-8"))
        return all(file_sha256(path / name) == sums[name] for name in ("lora.safetensors", "state.json"))
    except (OSError, ValueError, KeyError, TypeError):
        return False
