"""The matrix products of one block of experts: plain mm for one expert or shared factors, F.grouped_mm for several.

Rows (n, K) stand in the order of their experts; weights are (experts, K, N), or (K, N) where all experts share them.
CUDA's grouped_mm takes bf16 and wants strides of 16 bytes; on CPU it is a loop over mm (torch 2.13), so blocks of one
expert cost the same there and need less memory.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import grouped_mm

from trainer.experts.routing import Block


def rows_times(rows: Tensor, weights: Tensor, block: Block) -> Tensor:
    """(n, N): each row times the matrix of its expert."""
    single = _single(weights)
    if single is not None:
        return torch.mm(rows, single)
    return grouped_mm(rows, weights, offs=block.ends)


def add_rows_times(total: Tensor, rows: Tensor, weights: Tensor, block: Block) -> None:
    """total (n, N) += each row times the matrix of its expert."""
    single = _single(weights)
    if single is not None:
        total.addmm_(rows, single)
    else:
        total.add_(grouped_mm(rows, weights, offs=block.ends))


def outer_products(left: Tensor, right: Tensor, block: Block, shared: bool) -> Tensor:
    """(experts, p, q), or (p, q) if shared: left^T right over each expert's rows of left (n, p) and right (n, q)."""
    if shared:
        return torch.mm(left.t(), right)
    if len(block.ends) == 1:
        return torch.mm(left.t(), right)[None]
    products = grouped_mm(left.t(), right, offs=block.ends)
    # An expert without rows is an empty sum; on some GPUs the kernel leaves what was in memory there.
    counts = torch.diff(block.ends, prepend=block.ends.new_zeros(1))
    return products.masked_fill_((counts == 0)[:, None, None], 0.0)


def _single(weights: Tensor) -> Tensor | None:
    if weights.dim() == 2:
        return weights
    return weights[0] if len(weights) == 1 else None
