"""What will be trained, planned on the meta device before any weight is read, and asserted after it was attached.

Linears get PEFT's layers, routed experts our own module. Given a mixture-of-experts model PEFT rewrites targets named
gate_proj, up_proj or down_proj to all routed experts, drops names that match nothing, and can reach routers: so the
list is ours, PEFT sees no configuration of the model, and what was made must equal the plan.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import AutoModelForCausalLM

from recipes.catalog import Family
from recipes.job import TrainedGroup
from recipes.recipe import Adapter, TargetGroup
from trainer.experts.module import STACKS, Layout, attach_expert_lora, base_model_only
from trainer.experts.projection import Summation
from trainer.failures import TrainingStopped


@dataclass(frozen=True)
class Target:
    """One LoRA matrix, or one stack of them: the target group it belongs to and its full shape."""

    group: str
    shape: tuple[int, ...]

    @property
    def parameters(self) -> int:
        """How many numbers it holds."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class TargetPlan:
    """All LoRA matrices by their name in the model."""

    targets: dict[str, Target]

    @property
    def parameters(self) -> int:
        """Trainable parameters in total."""
        return sum(target.parameters for target in self.targets.values())


def meta_model(config: Any, dtype: Any) -> Any:
    """The model without storage: names and shapes only. Call it before HfDeepSpeedConfig exists."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=dtype)


def plan_targets(model: Any, family: Family, adapter: Adapter) -> TargetPlan:
    """The LoRA matrices of the recipe's groups on this (meta) model.

    A linear of shape (out, in) gets A (r, in) and B (out, r). The experts of a layer get the four factors of
    trainer.experts. Raises TrainingStopped (bad_targets) when a name matches nothing.
    """
    targets: dict[str, Target] = {}
    problems = []
    for name in adapter.targets:
        if name not in family.groups:
            problems.append(f"family {family.model_type} has no group '{name}'")
            continue
        missing = []
        for suffix in _suffixes(family, name):
            found = dict(_shapes(model, suffix, adapter))
            targets |= {parameter: Target(name, shape) for parameter, shape in found.items()}
            missing += [] if found else [suffix]
        if missing:
            problems.append(f"'{name}': {', '.join(sorted(missing))} matches nothing in this model")
    if problems:
        raise TrainingStopped("bad_targets", "adapter.targets: " + "; ".join(problems))
    return TargetPlan(targets)


def lora_config(family: Family, adapter: Adapter) -> Any:
    """The configuration under which PEFT reads the exported adapter: what lies in an MoE block by parameter name."""
    groups = [family.groups[name] for name in adapter.targets]
    return LoraConfig(
        r=adapter.rank,
        lora_alpha=adapter.alpha,
        lora_dropout=0.0,  # PEFT refuses any other with target_parameters
        bias="none",
        task_type="CAUSAL_LM",
        target_modules=[suffix for group in groups for suffix in group.linears] or None,
        target_parameters=[suffix for group in groups for suffix in group.parameters] or None,
    )


def attach(
    model: Any,
    family: Family,
    adapter: Adapter,
    plan: TargetPlan,
    *,
    seed: int,
    dtype: torch.dtype,
    summation: Summation = "split",
    expert_dtype: torch.dtype | None = None,
) -> None:
    """Freezes the model and puts the adapter in, proven to be exactly the plan. Raises TrainingStopped (bad_targets).

    B is zero, so nothing changes yet. The same seed draws the same A on every rank.
    """
    model.requires_grad_(False)
    suffixes = [suffix for name in adapter.targets for suffix in _suffixes(family, name) if suffix != "experts"]
    torch.manual_seed(seed)  # here: loading may draw more numbers on one rank than on another
    if suffixes:
        config = LoraConfig(r=adapter.rank, lora_alpha=adapter.alpha, lora_dropout=0.0, target_modules=suffixes)
        # Inside a container PEFT finds no model configuration, so it rewrites no names.
        inject_adapter_in_model(config, torch.nn.ModuleDict({"model": model}))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
    if "experts" in adapter.targets:
        layout: Layout = adapter.expert_layout
        attach_expert_lora(
            model,
            rank=adapter.rank,
            alpha=adapter.alpha,
            layout=layout,
            summation=summation,
            dtype=expert_dtype or dtype,
            seed=seed,
        )
    problems = differences(model, plan, family)
    if problems:
        raise TrainingStopped("bad_targets", "; ".join(problems[:5]))


@contextmanager
def base_only(model: Any) -> Iterator[None]:
    """Within it the model computes without the adapter that `attach` put in."""
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    try:
        for layer in layers:
            layer.enable_adapters(False)
        with base_model_only(model):
            yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


def named_trainable(model: Any) -> dict[str, Any]:
    """The LoRA matrices, in the model's order."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def is_b(name: str) -> bool:
    """Whether a LoRA matrix is a B, which starts at zero; else it is an A."""
    return name.endswith("_b") or ".lora_B." in name


def differences(model: Any, plan: TargetPlan, family: Family) -> list[str]:
    """How what would train differs from the plan, in sentences; empty when it is the plan."""
    real = {name: _full_shape(p) for name, p in named_trainable(model).items()}
    problems = [f"{name} would train, but is not planned" for name in sorted(real.keys() - plan.targets)]
    problems += [f"{name} is planned, but would not train" for name in sorted(plan.targets.keys() - real)]
    for name in sorted(real.keys() & plan.targets):
        if real[name] != plan.targets[name].shape:
            problems.append(f"{name} has shape {real[name]}, planned {plan.targets[name].shape}")
    for suffix in family.frozen:
        found = [p.requires_grad for n, p in model.named_parameters() if n.endswith(suffix)]
        if not found or any(found):
            problems.append(f"{suffix} must be there and stay frozen" + ("" if found else ", but PEFT wrapped it"))
    return problems


def trained_groups(plan: TargetPlan) -> tuple[TrainedGroup, ...]:
    """The table of what is trained, one row per group; an adapted matrix, or stack of them, has two LoRA matrices."""
    rows = []
    for group in dict.fromkeys(target.group for target in plan.targets.values()):
        mine = [target for target in plan.targets.values() if target.group == group]
        rows.append(TrainedGroup(group=group, matrices=len(mine) // 2, parameters=sum(t.parameters for t in mine)))
    return tuple(rows)


def table(rows: tuple[TrainedGroup, ...]) -> str:
    """The rows as aligned text with a total."""
    lines = [f"{'trained':<18}{'matrices':>9}{'parameters':>15}"]
    lines += [f"{row.group:<18}{row.matrices:>9,}{row.parameters:>15,}" for row in rows]
    lines.append(f"{'total':<18}{sum(r.matrices for r in rows):>9,}{sum(r.parameters for r in rows):>15,}")
    return "\n".join(lines)


def _suffixes(family: Family, name: TargetGroup) -> list[str]:
    """The last names of the modules that a group adapts; `experts` for the stacks, which are adapted together."""
    group = family.groups[name]
    if name == "experts":
        return ["experts"]
    return [*group.linears, *(parameter.removesuffix(".weight") for parameter in group.parameters)]


def _shapes(model: Any, suffix: str, adapter: Adapter) -> Iterator[tuple[str, tuple[int, ...]]]:
    rank = adapter.rank
    for name, module in model.named_modules():
        if not f".{name}".endswith(f".{suffix}"):
            continue
        if suffix == "experts":
            stacks = [_full_shape(getattr(module, stack)) for stack in STACKS]
            yield from _expert_shapes(name, stacks, rank, shared=adapter.expert_layout == "shared_outer")
        elif isinstance(module, torch.nn.Linear):
            yield f"{name}.lora_A.default.weight", (rank, module.in_features)
            yield f"{name}.lora_B.default.weight", (module.out_features, rank)


def _expert_shapes(
    name: str, stacks: list[tuple[int, ...]], rank: int, shared: bool
) -> Iterator[tuple[str, tuple[int, ...]]]:
    (experts, twice_width, hidden), (_, _, width) = stacks
    outer = () if shared else (experts,)
    yield f"{name}.lora.gate_up_a", (*outer, rank, hidden)
    yield f"{name}.lora.gate_up_b", (experts, twice_width, rank)
    yield f"{name}.lora.down_a", (experts, rank, width)
    yield f"{name}.lora.down_b", (*outer, hidden, rank)


def _full_shape(parameter: Any) -> tuple[int, ...]:
    return tuple(getattr(parameter, "ds_shape", parameter.shape))
