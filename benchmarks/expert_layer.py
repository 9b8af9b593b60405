"""One expert layer with random weights, tokens and routes: our function, PEFT's over grouped_mm, and a plain reference.

The two benchmarks of experts, on CPU and on a GPU, make the same layer of it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, silu

from trainer.experts.layouts import from_peft, to_peft
from trainer.experts.lora_function import expert_mlp
from trainer.experts.projection import Call, Factors, Summation
from trainer.experts.storage import Dense, FrozenStack

SCALE = 2.0
Step = Callable[[], None]


@dataclass(frozen=True)
class Shape:
    """One layer and its tokens."""

    experts: int
    hidden: int
    width: int
    tokens: int
    per_token: int
    rank: int
    dtype: torch.dtype = torch.float32

    @property
    def rows(self) -> float:
        """Rows per expert."""
        return self.tokens * self.per_token / self.experts


@dataclass(frozen=True)
class Layer:
    """Random weights in the size that initialisation gives, tokens, routes, and an upstream gradient."""

    gate_up: Tensor
    down: Tensor
    factors: Factors
    x: Tensor
    index: Tensor
    weight: Tensor
    gradient: Tensor

    def to(self, dtype: torch.dtype) -> Layer:
        """The same numbers in another precision."""
        cast = {k: v if k == "index" else v.to(dtype) for k, v in vars(self).items() if k != "factors"}
        return Layer(**cast, factors=Factors(*(f.to(dtype) for f in self.factors)))


def make_layer(shape: Shape, dtype: torch.dtype | None = None, seed: int = 0, device: str = "cpu") -> Layer:
    """A layer of this shape; routes are uniform and never name an expert twice for one token."""
    dtype = dtype or shape.dtype
    e, h, i, r = shape.experts, shape.hidden, shape.width, shape.rank
    generator = torch.Generator(device).manual_seed(seed)
    # In float64 first, so that a layer in another precision holds the same numbers; a GPU's would not fit so.
    drawn = torch.float64 if device == "cpu" else dtype

    def normal(*size: int, std: float = 1.0) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=drawn, device=device).mul_(std).to(dtype)

    return Layer(
        gate_up=normal(e, 2 * i, h, std=h**-0.5),
        down=normal(e, h, i, std=i**-0.5),
        factors=Factors(
            normal(e, r, h, std=h**-0.5),
            normal(e, 2 * i, r, std=0.1),
            normal(e, r, i, std=i**-0.5),
            normal(e, h, r, std=0.1),
        ),
        x=normal(shape.tokens, h),
        index=torch.rand(shape.tokens, e, generator=generator, device=device).topk(shape.per_token).indices,
        weight=torch.softmax(normal(shape.tokens, shape.per_token).double(), 1).to(dtype),
        gradient=normal(shape.tokens, h),
    )


def ours(
    layer: Layer,
    stacks: tuple[FrozenStack, FrozenStack],
    summation: Summation = "split",
    keep: bool = True,
    experts_per_block: int | None = 1,
) -> Callable[[Tensor, Tensor], Tensor]:
    """Our function on this layer's factors, as a function of tokens and routing weights."""
    call = Call(*stacks, SCALE, summation, keep, experts_per_block)
    factors = Factors(*(f.requires_grad_() for f in layer.factors))
    return lambda x, weight: expert_mlp(x, layer.index, weight, factors, call)


def dense(layer: Layer, columns: int = 0) -> tuple[Dense, Dense]:
    """The layer's frozen weights as they are."""
    return Dense(layer.gate_up, columns), Dense(layer.down, columns)


class Peer(nn.Module):
    """PEFT's LoRA on both fused parameters over transformers' grouped_mm experts, holding the same numbers."""

    def __init__(self, layer: Layer):
        from peft import LoraConfig, get_peft_model
        from transformers import Qwen3NextConfig
        from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextExperts

        super().__init__()
        count, rank, hidden = layer.factors.gate_up_a.shape
        config = Qwen3NextConfig(num_experts=count, hidden_size=hidden, moe_intermediate_size=layer.down.shape[2])
        config._experts_implementation = "grouped_mm"
        base = _Holder(Qwen3NextExperts(config).to(layer.x.dtype))
        base.experts.gate_up_proj.data, base.experts.down_proj.data = layer.gate_up, layer.down
        parameters = ["experts.gate_up_proj", "experts.down_proj"]
        lora = LoraConfig(r=rank, lora_alpha=round(SCALE * rank), target_modules=[], target_parameters=parameters)
        self.model = get_peft_model(base, lora, autocast_adapter_dtype=False)
        self._named = {k.replace(".default", ""): p for k, p in self.model.named_parameters() if p.requires_grad}
        for key, tensor in to_peft({"experts": layer.factors}).items():
            self._named[key].data = tensor.clone()
        self.index, self.experts = layer.index, count

    def forward(self, x: Tensor, weight: Tensor) -> Tensor:
        """y of tokens and routing weights."""
        return self.model(x, self.index, weight)

    def factor_gradients(self) -> Factors:
        """The gradients of A and B in our order."""
        return from_peft({key: parameter.grad for key, parameter in self._named.items()}, self.experts)["experts"]


class _Holder(nn.Module):
    def __init__(self, experts: nn.Module):
        super().__init__()
        self.experts = experts

    def forward(self, x: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        return self.experts(x, index, weight)


def reference(layer: Layer, factors: Factors, x: Tensor, weight: Tensor) -> Tensor:
    """y with every delta written out, differentiable; in the layer's own precision."""
    gate_up = layer.gate_up + SCALE * factors.gate_up_b @ factors.gate_up_a
    down = layer.down + SCALE * factors.down_b @ factors.down_a
    y = torch.zeros_like(x)
    for e in range(len(gate_up)):
        token, slot = torch.where(layer.index == e)
        gate, up = linear(x[token], gate_up[e]).chunk(2, 1)
        y = y.index_add(0, token, linear(silu(gate) * up, down[e]) * weight[token, slot, None])
    return y


def step_of(function: Callable[[Tensor, Tensor], Tensor], layer: Layer) -> Step:
    """One forward and backward."""

    def step() -> None:
        x, weight = layer.x.clone().requires_grad_(), layer.weight.clone().requires_grad_()
        function(x, weight).backward(layer.gradient)

    return step
