"""Frozen expert stacks (E, out, in), read a few experts at a time: the base of all storages, and weights as they are.

Each is a module whose `tensors()` go into safetensors as they stand; `quantised.storage_from_tensors` makes the same
storage of them again. `.to(device)` moves it; its dtypes never change.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class FrozenStack(nn.Module):
    """A stack of E frozen matrices (out, in)."""

    experts: int
    out_features: int
    in_features: int

    def dequantise(self, first: int, last: int, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
        """Experts first..last as (last - first, out, in) in `dtype`, in `out` where that is given."""
        raise TypeError(f"{type(self).__name__} is no storage; use Dense, Int8 or Nf4")

    def widened(self, first: int, last: int, dtype: torch.dtype, b: Tensor, scale: float) -> Tensor:
        """(last - first, out, in + r): the experts, and behind them scale * b for b (experts, out, r) or (out, r)."""
        wide = b.new_empty(last - first, self.out_features, self.in_features + b.shape[-1], dtype=dtype)
        self.dequantise(first, last, dtype, out=wide[:, :, : self.in_features])
        return fill_columns(wide, b, scale)

    def tensors(self) -> dict[str, Tensor]:
        """What a file must hold to make this storage again."""
        return dict(self.named_buffers())

    @property
    def device(self) -> torch.device:
        """Where it lies."""
        return next(self.buffers()).device

    @property
    def bytes_per_parameter(self) -> float:
        """Bytes held per frozen weight."""
        held = sum(t.numel() * t.element_size() for t in self.buffers())
        return held / (self.experts * self.out_features * self.in_features)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        # model.to(bfloat16) must not round scales: only the device may change.
        return super()._apply(lambda t: moved if (moved := fn(t)).dtype == t.dtype else t.to(moved.device), recurse)


class Dense(FrozenStack):
    """Weights as they are, (E, out, in). With `columns`, each row has that many free ones behind it for `widened`."""

    def __init__(self, weight: Tensor, columns: int = 0):
        super().__init__()
        self.experts, self.out_features, self.in_features = weight.shape
        self.columns = columns
        if columns:
            wide = weight.new_zeros(self.experts, self.out_features, self.in_features + columns)
            wide[:, :, : self.in_features] = weight.detach()
            weight = wide
        self.register_buffer("weight", weight)

    def dequantise(self, first: int, last: int, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
        """A view where neither dtype nor place differ."""
        weight = self.weight[first:last, :, : self.in_features]
        return weight.to(dtype) if out is None else out.copy_(weight)

    def widened(self, first: int, last: int, dtype: torch.dtype, b: Tensor, scale: float) -> Tensor:
        """A view of the weights and of as many free columns, filled. Raises ValueError when there are too few."""
        rank = b.shape[-1]
        if rank > self.columns or dtype != self.weight.dtype:
            raise ValueError(
                f"Dense: {self.columns} free columns of {self.weight.dtype} for a factor of rank {rank} in {dtype}; "
                f"build it with columns={rank} in that dtype, or use split summation"
            )
        return fill_columns(self.weight[first:last, :, : self.in_features + rank], b, scale)

    def tensors(self) -> dict[str, Tensor]:
        """The weights without their free columns."""
        return {"weight": self.weight[:, :, : self.in_features].contiguous()}


def fill_columns(wide: Tensor, b: Tensor, scale: float) -> Tensor:
    """`wide` (experts, out, in + r) with scale * b in its last r columns, for b (experts, out, r) or (out, r)."""
    columns = b.expand(len(wide), -1, -1)
    torch.mul(columns, scale, out=wide[:, :, -columns.shape[2] :])
    return wide
