"""What will be trained, planned on the meta device before any weight is read, and asserted after PEFT has attached it.

PEFT rewrites targets named gate_proj, up_proj or down_proj to all routed experts in mixture-of-experts families, drops
names that match nothing, and can reach routers: so the list is ours, and what PEFT made must equal it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from recipes.catalog import Family, Group
from recipes.job import TrainedGroup
from recipes.recipe import Adapter
from trainer.failures import TrainingStopped

PREFIX = "base_model.model."


@dataclass(frozen=True)
class Target:
    """One LoRA matrix: the target group it belongs to and its full shape."""

    group: str
    shape: tuple[int, ...]

    @property
    def parameters(self) -> int:
        """How many numbers it holds."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class TargetPlan:
    """All LoRA matrices by PEFT's parameter name, and whether any is reached through a parameter (needs leaves)."""

    targets: dict[str, Target]
    through_parameters: bool

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

    A linear of shape (out, in) gets A (r, in) and B (out, r). An expert stack (E, out, in) gets A (E*r, in), expert
    slowest, and B (out, r*E), expert fastest: PEFT's layout. Raises TrainingStopped when a name matches nothing.
    """
    targets: dict[str, Target] = {}
    problems = []
    for name in adapter.targets:
        group = family.groups.get(name)
        if group is None:
            problems.append(f"family {family.model_type} has no group '{name}'")
            continue
        matched: set[str] = set()
        for suffix, places in (*_linears(model, group), *_parameters(model, group)):
            matched.add(suffix)
            for kind, shape in _lora_shapes(places.shape, adapter.rank).items():
                targets[f"{PREFIX}{places.module}.lora_{kind}.default.weight"] = Target(name, shape)
        missing = sorted({*group.linears, *group.parameters} - matched)
        if missing:
            problems.append(f"'{name}': {', '.join(missing)} matches nothing in this model")
    if problems:
        raise TrainingStopped("bad_targets", "adapter.targets: " + "; ".join(problems))
    return TargetPlan(targets, any(family.groups[name].parameters for name in adapter.targets))


def lora_config(family: Family, adapter: Adapter) -> Any:
    """The PEFT configuration: linears by their last name, everything inside an MoE block by parameter name."""
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


def attach(model: Any, config: Any, plan: TargetPlan, family: Family) -> Any:
    """The PEFT model, proven to train exactly the plan. Raises TrainingStopped (bad_targets)."""
    try:
        # LoRA in the base's own precision: ZeRO keeps the fp32 masters, as it does in any mixed-precision run.
        peft_model = get_peft_model(model, config, autocast_adapter_dtype=False)
    except (ValueError, RuntimeError) as error:
        raise TrainingStopped("bad_targets", f"PEFT refuses these targets: {error}".splitlines()[0]) from error
    problems = differences(peft_model, plan, family)
    if problems:
        raise TrainingStopped("bad_targets", "; ".join(problems[:5]))
    return peft_model


def differences(peft_model: Any, plan: TargetPlan, family: Family) -> list[str]:
    """How what would train differs from the plan, in sentences; empty when it is the plan."""
    real = {name: _full_shape(p) for name, p in peft_model.named_parameters() if p.requires_grad}
    problems = [f"{name} would train, but is not planned" for name in sorted(real.keys() - plan.targets)]
    problems += [f"{name} is planned, but would not train" for name in sorted(plan.targets.keys() - real)]
    for name in sorted(real.keys() & plan.targets):
        if real[name] != plan.targets[name].shape:
            problems.append(f"{name} has shape {real[name]}, planned {plan.targets[name].shape}")
    for suffix in family.frozen:
        found = [p.requires_grad for n, p in peft_model.named_parameters() if n.endswith(suffix)]
        if not found or any(found):
            problems.append(f"{suffix} must be there and stay frozen" + ("" if found else ", but PEFT wrapped it"))
    rank_pattern = peft_model.peft_config["default"].rank_pattern
    if rank_pattern:
        problems.append(f"PEFT changed the rank of {', '.join(rank_pattern)}")
    return problems


def trained_groups(plan: TargetPlan) -> tuple[TrainedGroup, ...]:
    """The table of what is trained, one row per group; an adapted matrix has two LoRA matrices."""
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


@dataclass(frozen=True)
class _Place:
    module: str
    shape: tuple[int, ...]


def _linears(model: Any, group: Group) -> Iterator[tuple[str, _Place]]:

    for name, module in model.named_modules():
        suffix = name.rpartition(".")[2]
        if suffix in group.linears and isinstance(module, torch.nn.Linear):
            yield suffix, _Place(name, (module.out_features, module.in_features))


def _parameters(model: Any, group: Group) -> Iterator[tuple[str, _Place]]:
    """PEFT wraps the second parameter of a module around the first: p_i of k lies (k-1-i) base_layers deep."""
    for module_name, module in model.named_modules():
        mine = []
        for parameter_name, parameter in module.named_parameters(recurse=False):
            full = f"{module_name}.{parameter_name}"
            mine += [(suffix, parameter) for suffix in group.parameters if full.endswith(f".{suffix}")]
        for i, (suffix, parameter) in enumerate(mine):
            yield suffix, _Place(module_name + ".base_layer" * (len(mine) - 1 - i), tuple(parameter.shape))


def _lora_shapes(shape: tuple[int, ...], rank: int) -> dict[str, tuple[int, ...]]:
    experts = shape[0] if len(shape) == 3 else 1
    out_features, in_features = shape[-2:]
    return {"A": (experts * rank, in_features), "B": (out_features, rank * experts)}


def _full_shape(parameter: Any) -> tuple[int, ...]:
    return tuple(getattr(parameter, "ds_shape", parameter.shape))
