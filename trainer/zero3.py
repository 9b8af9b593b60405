"""The engine that partitions weights, adapter and optimizer over the ranks: DeepSpeed ZeRO-3."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import deepspeed
import torch
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_get_local_fp32_param,
    safe_get_local_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from transformers.integrations import HfDeepSpeedConfig

from recipes.catalog import Family
from trainer.base_files import BaseFiles
from trainer.engine import MOMENTS, WEIGHT, MakeOptimizer
from trainer.environment import Place
from trainer.experts.projection import Summation
from trainer.load import load_partitioned, refuse_gathered


class Zero3:
    """DeepSpeed behind trainer.engine.Engine."""

    summation: Summation = "split"  # a partitioned stack has no free columns to sum in
    expert_dtype = None

    def __init__(self, config: dict[str, Any], place: Place) -> None:
        self.model: Any = None
        self.trainable: dict[str, Any] = {}
        self._config, self._place = config, place
        self._optimizer: Any = None
        self._passes_left = 0

    def load(self, files: BaseFiles, family: Family, dtype: Any) -> Any:
        """Partitioned from the first byte on. Raises TrainingStopped."""
        holder = HfDeepSpeedConfig(self._config)  # weakly referenced by transformers: must outlive loading
        model = load_partitioned(files, family, dtype)
        del holder
        return model

    def start(self, model: Any, trainable: dict[str, Any], make_optimizer: MakeOptimizer) -> None:
        """fp32 masters of all matrices; rank 0's adapter wins."""
        refuse_gathered(model)
        self.trainable = trainable
        adamw = make_optimizer(list(trainable.values()))
        self.model, self._optimizer, *_ = deepspeed.initialize(model=model, optimizer=adamw, config=self._config)

    def begin(self, rate: float, passes: int) -> None:
        """DeepSpeed steps by itself in the last pass."""
        self._passes_left = passes
        for group in self._optimizer.param_groups:
            group["lr"] = rate

    def backward(self, loss: Any) -> None:
        """DeepSpeed averages over the ranks, so their number is multiplied back."""
        self._passes_left -= 1
        self.model.set_gradient_accumulation_boundary(self._passes_left == 0)
        self.model.backward(loss * self._place.world)
        self.model.step()

    def end(self) -> float:
        """The step was taken in the last pass."""
        return float(self.model.get_global_grad_norm() or 0.0)

    def part(self, name: str) -> tuple[Any, Any]:
        """The partition."""
        parameter = self.trainable[name]
        return safe_get_local_fp32_param(parameter), safe_get_local_optimizer_state(parameter, "exp_avg")

    def full(self, name: str) -> dict[str, Any]:
        """Gathers one matrix at a time, never the base."""
        parameter = self.trainable[name]
        found = {WEIGHT: safe_get_full_fp32_param(parameter).detach()}
        if self.model.global_steps:
            found |= {moment: safe_get_full_optimizer_state(parameter, moment) for moment in MOMENTS}
        return {kind: tensor.to("cpu", copy=True) for kind, tensor in found.items()}

    def restore(self, step: int, read: Callable[[str], Any]) -> None:
        """Masters and moments, each rank its part. The working copies were loaded before `start`, or stay stale."""
        for flat in self._optimizer.fp32_partitioned_groups_flat:  # the state does not exist before the first step
            zeros = {moment: torch.zeros_like(flat) for moment in MOMENTS}
            self._optimizer.optimizer.state[flat] = {"step": torch.tensor(float(step), device=flat.device), **zeros}
        for name, parameter in self.trainable.items():
            safe_set_local_fp32_param(parameter, self._partition(read(f"{name}/{WEIGHT}")))
            for moment in MOMENTS:
                safe_set_local_optimizer_state(parameter, self._partition(read(f"{name}/{moment}")), moment)

    def _partition(self, full: Any) -> Any:
        return partition(full, self._place.rank, self._place.world)


def partition(full: Any, rank: int, world: int) -> Any:
    """A rank's part of a ZeRO-3 partition: ceil(n / world) numbers, the last rank's filled up with zeros."""
    flat = full.flatten()
    size = -(-flat.numel() // world)
    return torch.nn.functional.pad(flat, (0, size * world - flat.numel())).narrow(0, rank * size, size)
