"""Proof at start-up that conversations packed into one row do not see each other, on real ones of the set.

Full attention tells them apart by position_ids; linear attention carries its state across them unless its kernels are
given cu_seq_lens and seq_idx. A trainer that forgets one learns from leaked text, and no loss curve shows it.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

import torch

from trainer.batches import packed, padded
from trainer.data import Example
from trainer.failures import TrainingStopped

SHOWN = 4
"So many conversations are packed for the proof, the shortest of the set."
FLOOR = {"fp32": 1e-3, "bf16": 1e-2}
"Mean absolute difference of log p (nats) that is rounding in any case."
NOISE = 3.0
"Beyond the floor, so many times what the harmless way, padding, moves the same log p."

Pack = Callable[[Sequence[Example], Any], dict[str, Any]]


def can_pack(layer_types: Sequence[str]) -> bool:
    """Full attention always; linear attention only with both fast kernels, whose fallbacks know no boundaries.

    Sliding attention never: the one class that has it here, gpt_oss of transformers 5.23.0, makes its masks without
    position_ids.
    """
    if "sliding_attention" in layer_types:
        return False
    kernels = all(importlib.util.find_spec(name) for name in ("fla", "causal_conv1d"))
    return kernels or "linear_attention" not in layer_types


def prove_packing(
    model: Any, examples: Sequence[Example], budget: int, precision: str, device: Any, pack: Pack = packed
) -> str:
    """A sentence with the figures. Collective: every rank runs the same examples. Raises TrainingStopped.

    Compares log p of the trained tokens of each conversation but the first, packed against alone.
    """
    chosen = _shortest_within(examples, budget)
    if len(chosen) < 2:
        return "no two conversations fit one micro-batch, so nothing is packed"
    model.eval()
    with torch.no_grad():
        alone = [_log_p(model, padded([e], 0, device), [e])[0] for e in chosen]
        beside = _log_p(model, padded(chosen, 0, device), chosen)
        together = _log_p(model, pack(chosen, device), chosen)
    model.train()
    noise, difference = (_worst(alone, other) for other in (beside, together))
    limit = max(FLOOR[precision], NOISE * noise)
    figures = f"packed against alone moves log p by {difference:.1e}, padded against alone by {noise:.1e}"
    if not difference <= limit:
        raise TrainingStopped(
            "cannot_run_here",
            f"packed conversations see each other: {figures}; leave training.micro_tokens out, or mend the kernels",
        )
    return figures


def _shortest_within(examples: Sequence[Example], budget: int) -> list[Example]:
    chosen: list[Example] = []
    for example in sorted(examples, key=lambda e: (len(e.ids), e.line, e.id))[:SHOWN]:
        budget -= len(example.ids)
        if budget >= 0:
            chosen.append(example)
    return chosen


def _log_p(model: Any, batch: dict[str, Any], examples: Sequence[Example]) -> list[Any]:
    """Per example log p of its trained tokens, (tokens,), fp32. The batch has a row each, or one row of all."""
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    logits = model(**inputs).logits
    out, start = [], 0
    for row, example in enumerate(examples):
        at = torch.tensor(example.predicted, device=logits.device)
        scores = logits[row, at - 1] if len(logits) > 1 else logits[0, start + at - 1]
        targets = torch.tensor(example.ids, device=logits.device)[at]
        out.append(torch.log_softmax(scores.float(), -1).gather(1, targets[:, None]).squeeze(1))
        start += len(example.ids)
    return out


def _worst(first: Sequence[Any], second: Sequence[Any]) -> float:
    return max(float((a - b).abs().mean()) for a, b in zip(first[1:], second[1:], strict=True))
