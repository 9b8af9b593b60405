"""How much of a small LoRA update survives where it is added to an output that is rounded already: the split sum.

The LoRA part lies on the grid of the base output by then; what is smaller than half a step of it is lost or doubled.
"""

from __future__ import annotations

import torch
from torch import Tensor

from trainer.experts.projection import Call, Projection
from trainer.experts.routing import sort_routes
from trainer.experts.storage import Dense

SMALL = 1e-3
"Root mean square of the update over that of the weights: what a few hundred steps at a usual rate reach."
ROWS, OUTPUTS = 512, 256


def split_share(weight: Tensor, rank: int, dtype: torch.dtype) -> float:
    """The share of an update of SMALL times the weights that reaches the output of one expert (out, in), in `dtype`:
    the projection of what it changes on what it should change, 1 where nothing is lost. Rows and factors are drawn."""
    generator = torch.Generator().manual_seed(0)

    def drawn(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    outputs, inputs = min(len(weight), OUTPUTS), weight.shape[1]
    weight, a, b = weight[:outputs].double(), drawn(rank, inputs), drawn(outputs, rank)
    b *= SMALL * weight.square().mean().sqrt() / (b @ a).square().mean().sqrt()
    rows, a, b = (tensor.to(dtype) for tensor in (drawn(ROWS, inputs), a, b))
    stack = Dense(weight.to(dtype)[None])
    call = Call(stack, stack)
    (block,) = sort_routes(torch.zeros(ROWS, 1, dtype=torch.int64), 1, None).blocks
    out = []
    for projection in (Projection(stack, a[None], b[None], call), Projection(stack, None, None, call)):
        out.append(projection.forward(rows, projection.low(rows, block), block).double())
    true = rows.double() @ (b.double() @ a.double()).mT
    return float(((out[0] - out[1]) * true).sum() / true.square().sum())
