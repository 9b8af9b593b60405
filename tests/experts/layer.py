"""A small expert layer with random weights, and its float64 reference with every delta written out."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import linear, silu

from trainer.experts.lora_function import expert_mlp
from trainer.experts.projection import Call, Factors
from trainer.experts.storage import Dense, FrozenStack

SCALE = 2.0
NAMES = ("x", "weight", *Factors._fields)


@dataclass(frozen=True)
class Layer:
    gate_up: Tensor
    down: Tensor
    factors: Factors
    x: Tensor
    index: Tensor
    weight: Tensor

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        return (self.x, self.weight, *self.factors)

    def to(self, dtype: torch.dtype) -> Layer:
        cast = {k: v.to(dtype) for k, v in vars(self).items() if k not in ("index", "factors")}
        return Layer(**cast, index=self.index, factors=Factors(*(f.to(dtype) for f in self.factors)))

    def with_leaves(self, leaves: tuple[Tensor, ...]) -> Layer:
        return dataclasses.replace(self, x=leaves[0], weight=leaves[1], factors=Factors(*leaves[2:]))


def make_layer(
    experts: int = 16,
    hidden: int = 64,
    width: int = 32,
    tokens: int = 50,
    k: int = 4,
    rank: int = 8,
    shared: bool = False,
) -> Layer:
    """float64. Expert 3 gets no token: what was routed to it goes to 5, so that some tokens meet 5 twice."""
    generator = torch.Generator().manual_seed(1)

    def normal(*size: int, std: float = 1.0) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64) * std

    index = torch.rand(tokens, experts, generator=generator).topk(k).indices
    outer = () if shared else (experts,)
    return Layer(
        gate_up=normal(experts, 2 * width, hidden, std=hidden**-0.5),
        down=normal(experts, hidden, width, std=width**-0.5),
        factors=Factors(
            normal(*outer, rank, hidden, std=hidden**-0.5),
            normal(experts, 2 * width, rank, std=0.1),
            normal(experts, rank, width, std=width**-0.5),
            normal(*outer, hidden, rank, std=0.1),
        ),
        x=normal(tokens, hidden),
        index=torch.where(index == 3, 5, index),
        weight=torch.softmax(normal(tokens, k), 1),
    )


def reference(layer: Layer) -> Tensor:
    """y by merging W + s B A per expert."""
    gate_up = layer.gate_up + SCALE * layer.factors.gate_up_b @ layer.factors.gate_up_a
    down = layer.down + SCALE * layer.factors.down_b @ layer.factors.down_a
    y = torch.zeros_like(layer.x)
    for e in range(len(gate_up)):
        token, slot = torch.where(layer.index == e)
        gate, up = linear(layer.x[token], gate_up[e]).chunk(2, 1)
        y = y.index_add(0, token, linear(silu(gate) * up, down[e]) * layer.weight[token, slot, None])
    return y


def ours(layer: Layer, call: Call) -> Tensor:
    return expert_mlp(layer.x, layer.index, layer.weight, layer.factors, call)


def dense_call(layer: Layer, summation: str = "split", keep_gate_up: bool = True, per_block: int | None = 1) -> Call:
    columns = layer.factors.down_a.shape[1] if summation == "accumulator" else 0
    stacks = Dense(layer.gate_up, columns), Dense(layer.down, columns)
    return Call(*stacks, SCALE, summation, keep_gate_up, per_block)


def outcome(function: Callable[[Layer], Tensor], layer: Layer) -> dict[str, Tensor]:
    """y and the gradients of all leaves under a fixed upstream gradient."""
    layer = layer.with_leaves(tuple(leaf.detach().clone().requires_grad_() for leaf in layer.leaves))
    y = function(layer)
    upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    gradients = torch.autograd.grad(y, layer.leaves, upstream.to(y.dtype))
    return {"y": y.detach(), **dict(zip(NAMES, gradients, strict=True))}


def worst_error(got: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest relative error of any of them."""
    return max(float((got[k].double() - v.double()).norm() / v.double().norm()) for k, v in expected.items())


def as_dequantised(layer: Layer, stacks: tuple[FrozenStack, FrozenStack]) -> Layer:
    """The layer with the weights that these storages really hold."""
    read = (stack.dequantise(0, stack.experts, layer.x.dtype) for stack in stacks)
    return dataclasses.replace(layer, **dict(zip(("gate_up", "down"), read, strict=True)))
