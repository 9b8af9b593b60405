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
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file

from recipes.job import LaunchSpec
from trainer.base_files import file_sha256
from trainer.engine import WEIGHT, Engine
from trainer.failures import TrainingStopped

FORMAT = 1
KEPT = 2


def fit_key(spec: LaunchSpec, base_sha256: str) -> str:
    """SHA-256 of all that a step depends on; engine, number of ranks and the saving rhythm do not count."""
    recipe = spec.recipe
    free = {"micro_batch", "micro_tokens", "checkpoint_minutes", "checkpoint_steps"}
    said = {
        "base": base_sha256,
        "adapter": recipe.adapter.model_dump(mode="json"),
        "training": recipe.training.model_dump(mode="json", exclude=free),
        "train_sha256": spec.train_sha256,
        "total_steps": spec.total_steps,
        "quantize": recipe.hardware.quantize,
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


def save(folder: Path, step: int, engine: Engine, state: dict[str, Any], keeper: bool) -> Path:
    """Gathers every tensor in turn on all ranks; the keeper (rank 0) writes. Collective. Raises OSError."""
    path = folder / f"step-{step:06d}"
    tensors: dict[str, Any] = {}
    for name in engine.trainable:
        full = engine.full(name)
        tensors |= {f"{name}/{kind}": tensor for kind, tensor in full.items()} if keeper else {}
    if keeper:
        _write(path, tensors, {"format": FORMAT, "step": step, **state})
        for old in sorted(folder.glob("step-*"))[:-KEPT]:
            shutil.rmtree(old)
    dist.barrier()
    return path


class Resumed:
    """The checkpoint that all ranks go on from: rank 0 reads it and hands it out, so no other node needs its files."""

    def __init__(self, folder: Path, fits: str, device: Any) -> None:
        """The newest with this key in rank 0's folder. Collective. Raises TrainingStopped on a rank of another."""
        path = newest(folder, fits) if dist.get_rank() == 0 else None
        said = [(fits, path.name, read_state(path), _shapes(path)) if path else (fits, "", {}, {})]
        dist.broadcast_object_list(said, src=0, device=device)
        wanted, self.name, self.state, self._shapes = said[0]
        if fits != wanted:
            raise TrainingStopped(
                "cannot_run_here",
                "this node has another base model or launch.json than node 0; stage the same model on every node",
            )
        self._path, self._device = path, device

    def __bool__(self) -> bool:
        """Whether there is one."""
        return bool(self.name)

    def tensor(self, name: str) -> Any:
        """One tensor, fp32, on the CPU. Collective: every rank asks for the same ones in the same order."""
        if self._path:
            with safe_open(self._path / "lora.safetensors", "pt") as file:
                tensor = file.get_tensor(name).to(self._device)
        else:
            tensor = torch.empty(self._shapes[name], device=self._device)
        dist.broadcast(tensor, src=0)
        return tensor.cpu()

    def load_weights(self, trainable: dict[str, Any]) -> None:
        """Copies the LoRA weights in. Before the engine starts: after it DeepSpeed's working copy would stay stale."""
        with torch.no_grad():
            for name, parameter in trainable.items():
                parameter.copy_(self.tensor(f"{name}/{WEIGHT}"))

    def load_optimizer(self, engine: Engine) -> None:
        """Restores fp32 masters and Adam moments in an engine that has started."""
        engine.restore(int(self.state["step"]), self.tensor)


def _shapes(path: Path) -> dict[str, list[int]]:
    with safe_open(path / "lora.safetensors", "pt") as file:
        return {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118  # it is no mapping


def full_weights(engine: Engine, keeper: bool) -> dict[str, Any]:
    """The fp32 LoRA weights in full shape by name, on the keeper; empty elsewhere. Collective."""
    weights = {}
    for name in engine.trainable:
        full = engine.full(name)[WEIGHT]
        if keeper:
            weights[name] = full
    return weights


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
