"""Which expert gets which token: routes sorted by expert once, cut into blocks, and summed back per token."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag


@dataclass(frozen=True)
class Block:
    """Consecutive experts and the sorted rows routed to them."""

    experts: slice
    rows: slice
    ends: Tensor
    "(experts,) int32 on the device of the rows: where the rows of each expert end, counted from the block's first."


@dataclass(frozen=True)
class Routes:
    """T tokens x k routes as S = T*k rows in the order of their experts; within one expert, of the tokens."""

    order: Tensor
    "(S,) int64: row -> flat route; route // k is its token."
    tokens: int
    blocks: tuple[Block, ...]

    @property
    def token(self) -> Tensor:
        """(S,) int64: row -> token."""
        return self.order // self.per_token

    @property
    def per_token(self) -> int:
        """Routes per token, k."""
        return max(1, len(self.order) // max(1, self.tokens))

    @property
    def whole(self) -> bool:
        """One block holds all rows."""
        return len(self.blocks) == 1


def sort_routes(index: Tensor, experts: int, experts_per_block: int | None) -> Routes:
    """Routes of `index` (T, k), the expert of each token's routes.

    `experts_per_block` None makes one block of all experts and never reads a number back from the device; a number
    makes blocks of that many experts, leaves out those without rows, and reads the row counts back once.
    """
    ids, order = torch.sort(index.reshape(-1), stable=True)
    # searchsorted instead of bincount, which on CUDA waits for the largest id.
    ends = torch.searchsorted(ids, torch.arange(experts, device=ids.device), right=True, out_int32=True)
    if experts_per_block is None:
        blocks = [Block(slice(0, experts), slice(0, len(order)), ends)] if len(order) else []
    else:
        blocks = _cut(ends, experts, experts_per_block)
    return Routes(order, len(index), tuple(blocks))


class TokenSums:
    """Rows summed back to their tokens: (T, width)."""

    def __init__(self, routes: Routes, like: Tensor):
        self._routes = routes
        self._like = like
        # Ten bf16 additions per token would each round; fp32 rounds once at the end.
        wide = torch.float32 if like.dtype in (torch.bfloat16, torch.float16) else like.dtype
        self._total = None if routes.whole else torch.zeros(like.shape, dtype=wide, device=like.device)

    def add(self, rows: Tensor, token: Tensor, weights: Tensor | None = None) -> None:
        """Adds the rows of one block, each times its weight if weights (T, k) are given; `rows` may be overwritten."""
        if self._total is None:
            # Gathered per token and summed in fp32 by one kernel, in a fixed order: scattered bf16 atomics would not.
            weights = weights if weights is None else weights.to(rows.dtype)
            self._total = embedding_bag(_inverse(self._routes), rows, per_sample_weights=weights, mode="sum")
        else:
            self._total.index_add_(0, token, rows.to(self._total.dtype))

    def result(self) -> Tensor:
        """The sums, in the precision of `like`."""
        assert self._total is not None
        return self._total.to(self._like.dtype)


def _cut(ends: Tensor, experts: int, size: int) -> list[Block]:
    bounds = [0, *ends.tolist()]
    blocks = []
    for first in range(0, experts, size):
        last = min(first + size, experts)
        if bounds[first] < bounds[last]:
            rows = slice(bounds[first], bounds[last])
            blocks.append(Block(slice(first, last), rows, ends[first:last] - bounds[first]))
    return blocks


def _inverse(routes: Routes) -> Tensor:
    inverse = torch.empty_like(routes.order)
    inverse[routes.order] = torch.arange(len(inverse), device=inverse.device)
    return inverse.view(routes.tokens, routes.per_token)
