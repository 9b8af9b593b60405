"""One frozen stack with its LoRA factors: W x + s B (A x), its gradients, and nothing of the size of W beside W."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from trainer.experts.products import add_rows_times, outer_products, rows_times
from trainer.experts.routing import Block
from trainer.experts.storage import FrozenStack

Summation = Literal["split", "accumulator"]


class Factors(NamedTuple):
    """LoRA of one layer's experts. A factor shared by all experts has no expert dimension."""

    gate_up_a: Tensor
    "(E, r, H), or (r, H) shared."
    gate_up_b: Tensor
    "(E, 2I, r)."
    down_a: Tensor
    "(E, r, I)."
    down_b: Tensor
    "(E, H, r), or (H, r) shared."


@dataclass(frozen=True)
class Call:
    """What a forward pass needs beside tensors with gradients."""

    gate_up: FrozenStack
    down: FrozenStack
    scale: float = 1.0
    "alpha / rank."
    summation: Summation = "split"
    """split: the LoRA part is added to a base output already rounded to the working precision; in bf16 about half of an
    update of 1e-3 of the weights is lost. accumulator: the LoRA part is summed inside the base product, in its fp32
    accumulator, by r more columns of weights and rows; the columns are filled from B at every use, so they cannot be
    stale."""
    keep_gate_up: bool = True
    "False: backward repeats the first product instead of keeping g, (T k, 2I)."
    experts_per_block: int | None = None
    "Experts worked on at a time; None takes all at once and never waits for the device."


class Projection:
    """One frozen stack with its LoRA factors, for one pass."""

    def __init__(self, stack: FrozenStack, a: Tensor | None, b: Tensor | None, call: Call):
        self._stack, self._a, self._b, self._scale = stack, a, b, call.scale
        self._accumulator = a is not None and call.summation == "accumulator"
        self.columns = a.shape[-2] if a is not None and self._accumulator else 0
        "How many free columns the rows given to `forward` need behind them."
        self._d_a, self._d_b = _FactorGradient(a), _FactorGradient(b)

    def low(self, rows: Tensor, block: Block) -> Tensor | None:
        """(n, r): A x of the rows, without their free columns."""
        if self._a is None:
            return None
        return rows_times(rows[:, : self._stack.in_features], _of(self._a, block).mT, block)

    def forward(self, rows: Tensor, low: Tensor | None, block: Block) -> Tensor:
        """(n, out): W x + s B low. In accumulator summation `low` goes into the rows' free columns."""
        if low is None or self._b is None:
            return rows_times(rows, self._weights(block, rows.dtype).mT, block)
        b = _of(self._b, block)
        if self._accumulator:
            rows[:, self._stack.in_features :] = low
            first, last = block.experts.start, block.experts.stop
            return rows_times(rows, self._stack.widened(first, last, rows.dtype, b, self._scale).mT, block)
        out = rows_times(rows, self._weights(block, rows.dtype).mT, block)
        add_rows_times(out, low * self._scale, b.mT, block)
        return out

    def row_gradient(self, d_out: Tensor, block: Block) -> tuple[Tensor, Tensor | None]:
        """(n, in): the gradient of the rows, and (n, r): s times the gradient of low."""
        d_rows = rows_times(d_out, self._weights(block, d_out.dtype), block)
        if self._a is None or self._b is None:
            return d_rows, None
        d_low = rows_times(d_out, _of(self._b, block), block).mul_(self._scale)
        add_rows_times(d_rows, d_low, _of(self._a, block), block)
        return d_rows, d_low

    def add_factor_gradients(
        self, block: Block, d_out: Tensor, rows: Tensor, low: Tensor | None, d_low: Tensor | None, weight: Any = 1.0
    ) -> None:
        """dA += (weight d_low)^T x and dB += s d_out^T (weight low); `d_low` is overwritten."""
        if low is None or d_low is None:
            return
        self._d_a.add(block, d_low.mul_(weight), rows[:, : self._stack.in_features])
        self._d_b.add(block, d_out, low * (weight * self._scale))

    def gradients(self) -> tuple[Tensor | None, Tensor | None]:
        """dA and dB."""
        return self._d_a.result(), self._d_b.result()

    def _weights(self, block: Block, dtype: torch.dtype) -> Tensor:
        return self._stack.dequantise(block.experts.start, block.experts.stop, dtype)


class _FactorGradient:
    """The gradient of one factor, block by block; experts without rows get zero."""

    def __init__(self, factor: Tensor | None):
        self._factor = factor
        self._total: Any = None

    def add(self, block: Block, left: Tensor, right: Tensor) -> None:
        factor: Any = self._factor
        shared = factor.dim() == 2
        products = outer_products(left, right, block, shared)
        if shared:
            # Summed over all blocks: in fp32, lest the later ones be rounded away.
            wide = products.to(torch.promote_types(products.dtype, torch.float32))
            self._total = wide if self._total is None else self._total.add_(wide)
        elif len(products) == len(factor):
            self._total = products
        else:
            self._total = torch.zeros_like(factor) if self._total is None else self._total
            self._total[block.experts] = products

    def result(self) -> Tensor | None:
        if self._factor is None:
            return None
        return torch.zeros_like(self._factor) if self._total is None else self._total.to(self._factor.dtype)


def _of(factor: Tensor, block: Block) -> Tensor:
    return factor if factor.dim() == 2 else factor[block.experts]
