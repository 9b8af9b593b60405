"""Expert adapters as other programs read them: PEFT's fused, vLLM's per-expert 2-D and shared-outer layout, all exact.

| | A | B | keys behind the name of the experts module |
|---|---|---|---|
| PEFT 0.21.2 | (E*r, in), expert slowest | (out, r*E), expert **fastest** | base_layer.lora_*: gate_up; lora_*: down |
| vLLM 2-D | (r, in) per expert | (out, r) per expert | {i}.{gate,up,down}_proj.lora_*; gate and up share A |
| shared-outer | (1, r, in); w2 (E, r, in) | (E, out, r); w2 (1, out, r) | w1: gate, w3: up, w2: down |

The first two have room for a factor per expert only: a shared factor is written once per expert and shared again at
import. The third has room for shared ones only: vLLM 0.33 --enable-moe-shared-loras, SGLang experts_shared_outer_loras.
`layers` maps names of experts modules (model.layers.0.mlp.experts) to their factors.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from trainer.experts.projection import Factors

PREFIX = "base_model.model."
PEFT_KEYS = ("base_layer.lora_A", "base_layer.lora_B", "lora_A", "lora_B")


def to_peft(layers: Mapping[str, Factors]) -> dict[str, Tensor]:
    """Tensors of adapter_model.safetensors. The adapter's config targets the experts' gate_up_proj and down_proj."""
    tensors = {}
    for name, factors in layers.items():
        for key, factor in zip(PEFT_KEYS, _per_expert(factors), strict=True):
            fused = factor.flatten(0, 1) if key.endswith("A") else factor.permute(1, 2, 0).flatten(1)
            tensors[f"{PREFIX}{name}.{key}.weight"] = fused.contiguous()
    return tensors


def from_peft(tensors: Mapping[str, Tensor], experts: int, *, shared: bool = False) -> dict[str, Factors]:
    """The factors of an adapter for layers of `experts` experts; other keys are left alone.

    Raises ValueError when a layer lacks a key, a size does not divide, or `shared` factors differ between experts.
    """
    layers = {}
    for name in _names(tensors, r"\.base_layer\.lora_A\.weight$"):
        found = []
        for key in PEFT_KEYS:
            tensor = _tensor(tensors, f"{PREFIX}{name}.{key}.weight")
            split = 0 if key.endswith("A") else 1
            if tensor.shape[split] % experts:
                raise ValueError(
                    f"{name}.{key}: shape {tuple(tensor.shape)}; dimension {split} must divide by {experts}"
                )
            found.append(
                tensor.unflatten(0, (experts, -1))
                if split == 0
                else tensor.unflatten(1, (-1, experts)).permute(2, 0, 1)
            )
        layers[name] = _laid_out(Factors(*(factor.contiguous() for factor in found)), name, shared)
    return layers


def to_vllm(layers: Mapping[str, Factors]) -> dict[str, Tensor]:
    """Tensors of an adapter with one small matrix per expert and projection."""
    tensors = {}
    for name, factors in layers.items():
        a1, b1, a2, b2 = _per_expert(factors)
        width = b1.shape[1] // 2
        for e in range(len(a1)):
            parts = {"gate": (a1[e], b1[e, :width]), "up": (a1[e], b1[e, width:]), "down": (a2[e], b2[e])}
            for projection, (a, b) in parts.items():
                key = f"{PREFIX}{name}.{e}.{projection}_proj"
                # safetensors refuses tensors that share memory: gate and up each get their own A.
                tensors[f"{key}.lora_A.weight"] = a.clone(memory_format=torch.contiguous_format)
                tensors[f"{key}.lora_B.weight"] = b.clone(memory_format=torch.contiguous_format)
    return tensors


def from_vllm(tensors: Mapping[str, Tensor], experts: int, *, shared: bool = False) -> dict[str, Factors]:
    """The factors of a per-expert adapter. Raises ValueError, also when gate and up do not share their A."""
    layers = {}
    for name in _names(tensors, r"\.0\.gate_proj\.lora_A\.weight$"):

        def stacked(projection: str, kind: str, name: str = name) -> Tensor:
            keys = (f"{PREFIX}{name}.{e}.{projection}_proj.lora_{kind}.weight" for e in range(experts))
            return torch.stack([_tensor(tensors, key) for key in keys])

        a1 = stacked("gate", "A")
        if not torch.equal(a1, stacked("up", "A")):
            raise ValueError(f"{name}: gate_proj and up_proj have different lora_A; a fused gate_up has one for both")
        b1 = torch.cat([stacked("gate", "B"), stacked("up", "B")], 1)
        layers[name] = _laid_out(Factors(a1, b1, stacked("down", "A"), stacked("down", "B")), name, shared)
    return layers


def to_shared(layers: Mapping[str, Factors]) -> dict[str, Tensor]:
    """Tensors of an adapter whose factors on the hidden dimension are one for all experts of a layer.

    Raises ValueError when they differ between experts: then no shared factor says the same.
    """
    tensors = {}
    for name, factors in layers.items():
        a1, b1, a2, b2 = _laid_out(_per_expert(factors), name, shared=True)
        width = b1.shape[1] // 2
        parts = {"w1": (a1[None], b1[:, :width]), "w3": (a1[None], b1[:, width:]), "w2": (a2, b2[None])}
        for part, (a, b) in parts.items():
            tensors[f"{PREFIX}{name}.{part}.lora_A.weight"] = a.clone(memory_format=torch.contiguous_format)
            tensors[f"{PREFIX}{name}.{part}.lora_B.weight"] = b.clone(memory_format=torch.contiguous_format)
    return tensors


def from_shared(tensors: Mapping[str, Tensor]) -> dict[str, Factors]:
    """The factors of a shared-outer adapter. Raises ValueError, also when gate and up do not share their A."""
    layers = {}
    for name in _names(tensors, r"\.w1\.lora_A\.weight$"):
        w1, w3, w2 = (
            [_tensor(tensors, f"{PREFIX}{name}.{part}.lora_{kind}.weight") for kind in "AB"]
            for part in ("w1", "w3", "w2")
        )
        if not torch.equal(w1[0], w3[0]) or len(w1[0]) != 1 or len(w2[1]) != 1:
            raise ValueError(f"{name}: w1 and w3 need one lora_A for both and for all experts, w2 one lora_B")
        layers[name] = Factors(w1[0][0], torch.cat([w1[1], w3[1]], 1), w2[0], w2[1][0])
    return layers


def _per_expert(factors: Factors) -> Factors:
    """The same numbers with an expert dimension on every factor, off the graph."""
    experts = len(factors.gate_up_b)
    return Factors(*(f.detach() if f.dim() == 3 else f.detach().expand(experts, -1, -1) for f in factors))


def _laid_out(factors: Factors, name: str, shared: bool) -> Factors:
    if not shared:
        return factors
    for factor in (factors.gate_up_a, factors.down_b):
        if not bool((factor == factor[0]).all()):
            raise ValueError(f"{name}: a factor of the hidden dimension differs between experts; read it as per expert")
    return factors._replace(gate_up_a=factors.gate_up_a[0].clone(), down_b=factors.down_b[0].clone())


def _names(tensors: Mapping[str, Tensor], ending: str) -> list[str]:
    return sorted(re.sub(ending, "", key).removeprefix(PREFIX) for key in tensors if re.search(ending, key))


def _tensor(tensors: Mapping[str, Tensor], key: str) -> Tensor:
    if key not in tensors:
        raise ValueError(f"{key} is missing; the adapter does not hold the experts it begins with")
    return tensors[key]
