"""Log-probabilities at a few trained positions, with and without the adapter: what the proof compares.

probe.safetensors: for conversation i `ids.i` (tokens), `positions.i` (places whose next token is looked at),
`base.i` and `trained.i` (log-softmax there, positions x vocabulary, fp32).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from trainer.data import Example

CONVERSATIONS = 4
POSITIONS = 16
EFFECT_FLOOR = {"fp32": 1e-4, "bf16": 1e-2}
"Smaller RMS differences (nats) are rounding, not training."
REPRODUCTION_LIMIT = {"fp32": 1e-3, "bf16": 0.3}
"Largest reproduction error as a share of the effect."


def choose(train: Sequence[Example], valid: Sequence[Example]) -> list[tuple[list[int], list[int]]]:
    """Up to 4 conversations (held-out ones first) as (ids, up to 16 positions spread evenly)."""
    chosen = []
    for example in [*valid, *train][:CONVERSATIONS]:
        places = [i - 1 for i in example.predicted]
        stride = max(1, len(places) // POSITIONS)
        chosen.append((list(example.ids), places[::stride][:POSITIONS]))
    return chosen


def log_probabilities(model: Any, conversations: Sequence[tuple[list[int], list[int]]], device: Any) -> list[Any]:
    """Per conversation (positions, vocabulary), fp32 on the CPU. One at a time: no padding, no neighbour."""
    out = []
    with torch.no_grad():
        for ids, positions in conversations:
            batch = torch.tensor([ids], device=device)
            keep = torch.tensor(positions, device=device)
            mask = torch.ones_like(batch)
            logits = model(input_ids=batch, attention_mask=mask, use_cache=False, logits_to_keep=keep).logits[0]
            out.append(torch.log_softmax(logits.float(), dim=-1).cpu())
    return out


def rms(first: Sequence[Any], second: Sequence[Any]) -> float:
    """Root mean square difference over all positions and all tokens of the vocabulary."""
    total = sum(float((a.double() - b.double()).square().sum()) for a, b in zip(first, second, strict=True))
    return float((total / sum(a.numel() for a in first)) ** 0.5)


def write_probe(
    path: Path, conversations: Sequence[tuple[list[int], list[int]]], base: Sequence[Any], trained: Sequence[Any]
) -> None:
    """Writes probe.safetensors beside its place, then renames."""
    tensors: dict[str, Any] = {}
    for i, (ids, positions) in enumerate(conversations):
        tensors |= {f"ids.{i}": torch.tensor(ids), f"positions.{i}": torch.tensor(positions)}
        tensors |= {f"base.{i}": base[i].contiguous(), f"trained.{i}": trained[i].contiguous()}
    temporary = path.with_name(f".{path.name}.tmp")
    save_file(tensors, temporary)
    temporary.chmod(0o644)
    temporary.replace(path)


def read_probe(path: Path) -> tuple[list[tuple[list[int], list[int]]], list[Any], list[Any]]:
    """(conversations, base, trained) as written."""
    tensors = load_file(path)
    count = sum(key.startswith("ids.") for key in tensors)
    conversations = [(tensors[f"ids.{i}"].tolist(), tensors[f"positions.{i}"].tolist()) for i in range(count)]
    return conversations, [tensors[f"base.{i}"] for i in range(count)], [tensors[f"trained.{i}"] for i in range(count)]
