"""Cross-entropy from hidden states without ever holding the logits of all tokens.

loss = chunked_cross_entropy(hidden, model.lm_head.weight, labels)      # summed over supervised tokens
(loss / tokens).backward()

Full cross-entropy holds 12 bytes per token and vocabulary entry in bf16 (logits, an fp32 copy, two gradients): 1.82 MB
a token at a vocabulary of 151,936. Here one chunk of rows holds 6, and only the hidden states' gradient is kept.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

IGNORED = -100
"Label of a token that is not supervised."


def chunked_cross_entropy(hidden: Tensor, head: Tensor, labels: Tensor, rows_per_chunk: int = 1024) -> Tensor:
    """Sum over supervised tokens of -log softmax(hidden head^T)[label], an fp32 scalar (fp64 for fp64 inputs).

    hidden (T, H), the frozen head (V, H), labels (T,) already shifted, IGNORED where not supervised: such rows cost
    nothing. Raises ValueError when the head wants a gradient or the sizes do not fit.
    """
    if head.requires_grad:
        raise ValueError("the head's weight wants a gradient; freeze it: only the hidden states get one")
    if hidden.shape != (len(labels), head.shape[1]):
        raise ValueError(
            f"hidden states {tuple(hidden.shape)} with {len(labels)} labels and a head of width {head.shape[1]}; "
            f"flatten them to ({len(labels)}, {head.shape[1]})"
        )
    return _ChunkedCrossEntropy.apply(hidden, head, labels, rows_per_chunk)


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Tensor, labels: Tensor, rows_per_chunk: int) -> Tensor:
        supervised = (labels != IGNORED).nonzero().squeeze(1)
        d_hidden = hidden.new_empty(len(supervised), hidden.shape[1]) if ctx.needs_input_grad[0] else None
        precision = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        loss = torch.zeros((), dtype=precision, device=hidden.device)
        for begin in range(0, len(supervised), rows_per_chunk):
            chunk = supervised[begin : begin + rows_per_chunk]
            logits = torch.mm(hidden.index_select(0, chunk), head.t())
            # No copy in fp32; in bf16 the logits' own memory later takes their gradient.
            scores = logits.to(precision)
            loss += _softmax_gradient(scores, labels[chunk])
            if d_hidden is not None:
                torch.mm(logits.copy_(scores), head, out=d_hidden[begin : begin + len(chunk)])
            del logits, scores  # before the next chunk makes its own
        ctx.save_for_backward(supervised, d_hidden)
        ctx.shape = hidden.shape
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_loss: Tensor) -> tuple[Tensor, None, None, None]:
        supervised, d_hidden = ctx.saved_tensors
        gradient = d_hidden.new_zeros(ctx.shape)
        return gradient.index_copy_(0, supervised, d_hidden * d_loss.to(d_hidden.dtype)), None, None, None


def _softmax_gradient(scores: Tensor, labels: Tensor) -> Tensor:
    """The summed loss of logits (n, V), which become their own gradient, softmax - one_hot(label), in place."""
    largest = scores.amax(1, keepdim=True)
    scores.sub_(largest)
    target = scores.gather(1, labels[:, None])
    total = scores.exp_().sum(1, keepdim=True)
    scores.div_(total).scatter_add_(1, labels[:, None], torch.full_like(target, -1.0))
    return (total.log_() - target).sum()
