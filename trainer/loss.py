"""The model as the steps call it: a micro-batch in, the summed loss of its trained tokens out."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import pad

from trainer.cross_entropy import IGNORED, chunked_cross_entropy


class WithLoss(torch.nn.Module):
    """A causal language model that takes its loss from hidden states, without ever holding the logits of all tokens.

    Called with labels (rows, tokens), as `input_ids` and IGNORED where not trained, it returns the sum over the trained
    tokens of -log p(token | what precedes it), an fp32 scalar. Called without, it returns the model's own output.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.head = _Head(model.get_output_embeddings())

    def forward(self, labels: Any = None, **inputs: Any) -> Any:
        """The summed loss, or without labels the model's output."""
        if labels is None:
            return self.model(**{"use_cache": False, **inputs})
        hidden = self.model.get_decoder()(**inputs, use_cache=False).last_hidden_state
        return self.head(hidden, labels)


class _Head(torch.nn.Module):
    """Shares the output head's weight, as tied embeddings do, so that an engine which partitions weights gathers it."""

    def __init__(self, head: Any) -> None:
        super().__init__()
        if getattr(head, "bias", None) is not None:
            raise ValueError("the output head has a bias; the loss from hidden states knows none")
        self.weight = head.weight

    def forward(self, hidden: Any, labels: Any) -> Any:
        targets = pad(labels[:, 1:], (0, 1), value=IGNORED)
        return chunked_cross_entropy(hidden.flatten(0, 1), self.weight, targets.flatten())
