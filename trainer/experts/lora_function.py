"""Frozen fused experts with LoRA on both projections, as one autograd function that keeps little and forms no delta.

Per expert e of gate_up (E, 2I, H) and down (E, H, I), with s = alpha / rank:
    g = W1 x + s B1 (A1 x);  h = silu(g_gate) * g_up;  o = W2 h + s B2 (A2 h);  y[t] = sum_k w[t, k] o
Kept for backward: x once and unsorted, the order of the routes, the routing weights, A1 x and A2 h, and g unless
`keep_gate_up` is off, when one more product makes it again. No weight-sized delta or gradient is ever formed.
The gradient of a routing weight is <dh, h> before weighting: o is linear in h, so it equals <dy, o> without o.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import silu

from trainer.experts.projection import Call, Factors, Projection
from trainer.experts.routing import Block, Routes, TokenSums, sort_routes


def expert_mlp(x: Tensor, index: Tensor, weight: Tensor, factors: Factors | None, call: Call) -> Tensor:
    """y (T, H) of tokens x (T, H) routed by index (T, k) with weights (T, k).

    Without factors the frozen experts alone. Raises ValueError when dtypes differ.
    """
    for name, factor in factors._asdict().items() if factors else ():
        if factor.dtype != x.dtype:
            raise ValueError(f"{name}: {factor.dtype} for tokens in {x.dtype}; cast the factors to the tokens' dtype")
    return _ExpertMlp.apply(x, index, weight, call, *(factors or (None,) * 4))


class _ExpertMlp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, weight: Tensor, call: Call, *factors: Tensor | None) -> Tensor:
        gate_up, down = _projections(call, factors)
        routes = sort_routes(index, call.gate_up.experts, call.experts_per_block)
        token, row_weight = routes.token, weight.reshape(-1)[routes.order]
        kept, sums = _Kept(routes), TokenSums(routes, x)
        for block in routes.blocks:
            rows = _gathered(x, token[block.rows], gate_up.columns)
            low = gate_up.low(rows, block)
            g = gate_up.forward(rows, low, block)
            hidden = _gated(g, down.columns)
            hidden_low = down.low(hidden, block)
            out = down.forward(hidden, hidden_low, block)
            kept.put(block, low=low, hidden_low=hidden_low, g=g if call.keep_gate_up else None)
            if not routes.whole:
                out.mul_(row_weight[block.rows, None])
            sums.add(out, token[block.rows], weight)
        ctx.save_for_backward(x, weight, routes.order, *kept.tensors(), *factors)
        ctx.call, ctx.blocks = call, routes.blocks
        return sums.result()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, order, kept_low, kept_hidden_low, kept_g, *factors = ctx.saved_tensors
        gate_up, down = _projections(ctx.call, factors)
        routes = Routes(order, len(x), ctx.blocks)
        token, row_weight = routes.token, weight.reshape(-1)[order].to(x.dtype)
        d_weight, sums = torch.zeros_like(row_weight), TokenSums(routes, x)
        for block in routes.blocks:
            low, hidden_low = (None if t is None else t[block.rows] for t in (kept_low, kept_hidden_low))
            rows = _gathered(x, token[block.rows], gate_up.columns) if kept_g is None else None
            g = kept_g[block.rows] if rows is None else gate_up.forward(rows, low, block)
            gate, up = g.chunk(2, 1)
            active = silu(gate)
            hidden = active * up
            d_out = dy.index_select(0, token[block.rows])
            d_hidden, d_low = down.row_gradient(d_out, block)
            d_weight[block.rows] = (d_hidden * hidden).sum(1)
            w = row_weight[block.rows, None]
            d_hidden.mul_(w)
            down.add_factor_gradients(block, d_out, hidden, hidden_low, d_low, w)
            del d_out  # as large as the rows, which are gathered only now unless g needed them
            dg = torch.empty_like(g)
            d_gate, d_up = dg.chunk(2, 1)
            torch.mul(d_hidden, active, out=d_up)
            torch.ops.aten.silu_backward.grad_input(d_hidden.mul_(up), gate, grad_input=d_gate)
            d_rows, d_low = gate_up.row_gradient(dg, block)
            rows = _gathered(x, token[block.rows], 0) if rows is None else rows
            gate_up.add_factor_gradients(block, dg, rows, low, d_low)
            sums.add(d_rows, token[block.rows])
        d_routes = torch.empty_like(d_weight).index_copy_(0, order, d_weight).view_as(weight).to(weight.dtype)
        return sums.result(), None, d_routes, None, *gate_up.gradients(), *down.gradients()


class _Kept:
    """What backward needs of each row, in the order of the rows."""

    def __init__(self, routes: Routes):
        self._routes = routes
        self._tensors: dict[str, Any] = {"low": None, "hidden_low": None, "g": None}

    def put(self, block: Block, **values: Tensor | None) -> None:
        for name, value in values.items():
            if value is None or self._routes.whole:
                self._tensors[name] = value
                continue
            if self._tensors[name] is None:
                self._tensors[name] = value.new_empty(len(self._routes.order), value.shape[1])
            self._tensors[name][block.rows] = value

    def tensors(self) -> tuple[Tensor | None, ...]:
        return tuple(self._tensors.values())


def _projections(call: Call, factors: Any) -> tuple[Projection, Projection]:
    a1, b1, a2, b2 = factors
    return Projection(call.gate_up, a1, b1, call), Projection(call.down, a2, b2, call)


def _gathered(x: Tensor, token: Tensor, columns: int) -> Tensor:
    """The rows of these tokens with free columns behind them."""
    if not columns:
        return x.index_select(0, token)
    rows = x.new_empty(len(token), x.shape[1] + columns)
    torch.index_select(x, 0, token, out=rows[:, : x.shape[1]])
    return rows


def _gated(g: Tensor, columns: int) -> Tensor:
    """silu(gate) * up of g (n, 2I) with free columns behind it."""
    gate, up = g.chunk(2, 1)
    hidden = g.new_empty(len(g), up.shape[1] + columns)
    torch.mul(silu(gate), up, out=hidden[:, : up.shape[1]])
    return hidden
