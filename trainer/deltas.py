"""The change that an adapter makes to each tensor of the base model's files, one matrix at a time and in fp32.

deltas = Deltas(adapter_folder)
deltas.of("model.layers.0.mlp.experts.gate_up_proj", 7)       # of one expert of a fused stack
deltas.of("model.layers.0.mlp.experts.7.up_proj.weight")      # the same where files hold a tensor per expert
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any

from torch import Tensor

from trainer.export import CONFIG, WEIGHTS
from trainer.failures import TrainingStopped
from trainer.shards import Header

PREFIX = "base_model.model."
_KEY = re.compile(rf"{re.escape(PREFIX)}(.+)\.lora_[AB]\.weight")
_STRANGE = ("use_dora", "use_rslora", "rank_pattern", "alpha_pattern", "modules_to_save", "lora_bias", "fan_in_fan_out")
_ONE_EXPERT = re.compile(r"(.+\.experts)\.(\d+)\.(gate|up|down)_proj\.weight")


class Deltas:
    """s B A of every adapted matrix, s = alpha / rank.

    Raises TrainingStopped (bad_targets) for an adapter that is more than LoRA of one rank, or of another shape.
    """

    def __init__(self, adapter: Path) -> None:
        config = json.loads((adapter / CONFIG).read_bytes())
        if strange := [name for name in _STRANGE if config.get(name)]:
            raise TrainingStopped("bad_targets", f"{adapter / CONFIG}: {strange[0]} is set; only plain LoRA is merged")
        self._rank, self._scale = int(config["r"]), config["lora_alpha"] / config["r"]
        self._header = Header(adapter / WEIGHTS)
        self._modules = dict.fromkeys(match[1] for key in self._header.tensors if (match := _KEY.fullmatch(key)))
        if len(self._modules) * 2 != len(self._header.tensors):
            raise TrainingStopped("bad_targets", f"{adapter / WEIGHTS}: it holds more than pairs of lora_A and lora_B")
        self._factors = lru_cache(maxsize=2)(self._read)

    @property
    def modules(self) -> list[str]:
        """The adapted modules by PEFT's name."""
        return list(self._modules)

    def of(self, name: str, expert: int | None = None) -> Tensor | None:
        """The change of a tensor of the model, or of one matrix of a fused stack; None where there is none."""
        if expert is not None:
            return self._of_expert(name, expert)
        if match := _ONE_EXPERT.fullmatch(name):
            return self._of_projection(match[1], int(match[2]), match[3])
        module = name.removesuffix(".weight")
        return self._product(module) if module in self._modules and name.endswith(".weight") else None

    def require_places(self, names: Iterable[str]) -> None:
        """Refuses an adapter of which a module changes none of these tensors: it is of another model."""
        reached = set()
        for name in names:
            match = _ONE_EXPERT.fullmatch(name)
            stack = f"{match[1]}.{'down' if match[3] == 'down' else 'gate_up'}_proj" if match else name
            reached |= {name.removesuffix(".weight"), module_of_stack(stack)}
        if lost := [module for module in self._modules if module not in reached]:
            raise TrainingStopped("bad_targets", f"{len(lost)} adapted modules are not in the base, first {lost[0]}")

    def _of_projection(self, experts: str, expert: int, projection: str) -> Tensor | None:
        if projection == "down":
            return self._of_expert(f"{experts}.down_proj", expert)
        both = self._of_expert(f"{experts}.gate_up_proj", expert)
        return None if both is None else both.chunk(2)[0 if projection == "gate" else 1]

    def _of_expert(self, stack: str, expert: int) -> Tensor | None:
        """PEFT keeps A (E r, in) with the expert slowest and B (out, r E) with the expert fastest."""
        module = module_of_stack(stack)
        if module not in self._modules:
            return None
        a, b = self._factors(module)
        if a.shape[0] % self._rank or b.shape[1] != a.shape[0]:
            raise TrainingStopped(
                "bad_targets", f"{module}: factors {tuple(a.shape)}, {tuple(b.shape)} of no expert stack"
            )
        one = a[expert * self._rank : (expert + 1) * self._rank]
        return self._scale * (b.unflatten(1, (self._rank, -1))[:, :, expert] @ one)

    def _product(self, module: str) -> Tensor:
        a, b = self._factors(module)
        return self._scale * (b @ a)

    def _read(self, module: str) -> tuple[Any, Any]:
        a, b = (self._header.read(f"{PREFIX}{module}.lora_{kind}.weight").float() for kind in "AB")
        return a, b


def module_of_stack(stack: str) -> str:
    """PEFT's name for LoRA on a fused stack: gate_up lies one base_layer deeper than down."""
    experts, _, last = stack.rpartition(".")
    return {"gate_up_proj": f"{experts}.base_layer", "down_proj": experts}.get(last, stack)
