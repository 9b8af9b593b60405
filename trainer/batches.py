"""Which examples share a forward pass, and their tensors: padded rows, or one row packed by best fit. Pure.

The examples of a step are divided by a budget, then over the ranks: the same plan on every rank, whatever their number.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch

from recipes.recipe import Training
from trainer.cross_entropy import IGNORED
from trainer.data import Example


@dataclass(frozen=True)
class Layout:
    """How a micro-batch is made: so many examples, or as many as `tokens` hold, padded or packed."""

    examples: int
    tokens: int | None
    packed: bool
    pad_id: int

    def groups(self, examples: Sequence[Example]) -> list[list[Example]]:
        """The examples in micro-batches, the cheapest first; the order in which they come does not matter."""
        ordered = sorted(examples, key=lambda e: (len(e.ids), e.line, e.id))
        if self.tokens is None:
            return [ordered[i : i + self.examples] for i in range(0, len(ordered), self.examples)]
        if not self.packed:
            return _padded_within(ordered, self.tokens)
        bins = pack([len(e.ids) for e in ordered], self.tokens)
        return sorted(([ordered[i] for i in inside] for inside in bins), key=token_count)

    def largest(self, examples: Sequence[Example]) -> list[Example]:
        """The micro-batch of these examples that takes the most memory."""
        if self.tokens is None:
            return sorted(examples, key=lambda e: (len(e.ids), e.line, e.id))[-self.examples :]
        return max(self.groups(examples), key=lambda g: token_count(g) if self.packed else len(g) * len(g[-1].ids))

    def tensors(self, examples: Sequence[Example], device: Any) -> dict[str, Any]:
        """What the model is called with."""
        return packed(examples, device) if self.packed else padded(examples, self.pad_id, device)


def layout_of(training: Training, can_pack: bool, pad_id: int) -> Layout:
    """The recipe's layout. Where packed conversations would leak into each other, `can_pack` is False."""
    tokens = training.micro_tokens
    return Layout(training.micro_batch, tokens, tokens is not None and can_pack, pad_id)


def passes(examples: Sequence[Example], layout: Layout, world: int) -> list[list[list[Example]]]:
    """passes[pass][rank]: micro-batches of like cost side by side. The last pass may have fewer than `world`."""
    groups = layout.groups(examples)
    return [groups[i : i + world] for i in range(0, len(groups), world)]


def share(groups: Sequence[list[Example]], rank: int) -> tuple[list[Example], bool]:
    """This rank's micro-batch of a pass, and whether it counts: a surplus rank repeats the first one uncounted."""
    return (groups[rank], True) if rank < len(groups) else (groups[0], False)


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Indices of `lengths` in bins of at most `capacity`: best fit, longest first, O(n log n).

    Needs at most 11/9 of the fewest bins possible, plus one (Johnson 1973). A length over capacity gets its own bin.
    """
    bins: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # (room left, bin), sorted
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        at = bisect_left(rooms, (lengths[index], -1))
        if at == len(rooms):
            bins.append([])
            room, number = capacity, len(bins) - 1
        else:
            room, number = rooms.pop(at)
        bins[number].append(index)
        insort(rooms, (room - lengths[index], number))
    return bins


def padded(examples: Sequence[Example], pad_id: int, device: Any) -> dict[str, Any]:
    """input_ids, attention_mask and labels, (rows, longest), padded on the right, out of every real token's sight."""
    shape = (len(examples), max(len(e.ids) for e in examples))
    ids = torch.full(shape, pad_id, dtype=torch.long)
    mask = torch.zeros(shape, dtype=torch.long)
    labels = torch.full(shape, IGNORED, dtype=torch.long)
    for row, example in enumerate(examples):
        length = len(example.ids)
        ids[row, :length], labels[row, :length] = _ids_and_labels(example)
        mask[row, :length] = 1
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device), "labels": labels.to(device)}


def packed(examples: Sequence[Example], device: Any) -> dict[str, Any]:
    """One row (1, tokens) of all examples, told apart in every way a layer may ask.

    Full attention goes by position_ids (or cu_seq_lens with flash kernels), the delta rule by cu_seq_lens, the short
    convolution by seq_idx.
    """
    pairs = [_ids_and_labels(example) for example in examples]
    lengths = [len(example.ids) for example in examples]
    ends = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)
    numbers = torch.tensor(range(len(lengths)), dtype=torch.int32).repeat_interleave(torch.tensor(lengths))
    return {
        "input_ids": torch.cat([ids for ids, _ in pairs])[None].to(device),
        "labels": torch.cat([labels for _, labels in pairs])[None].to(device),
        "position_ids": torch.cat([torch.arange(length) for length in lengths])[None].to(device),
        "cu_seq_lens_q": ends,
        "cu_seq_lens_k": ends,
        "max_length_q": max(lengths),
        "max_length_k": max(lengths),
        "seq_idx": numbers[None].to(device),
    }


def token_count(examples: Sequence[Example]) -> int:
    """Tokens of the examples, padding left out."""
    return sum(len(e.ids) for e in examples)


def trained_count(examples: Sequence[Example]) -> int:
    """Tokens that carry loss."""
    return sum(e.trained_tokens for e in examples)


def _padded_within(ordered: Sequence[Example], tokens: int) -> list[list[Example]]:
    """Consecutive examples, shortest first, while rows x longest stays within the budget."""
    groups: list[list[Example]] = []
    for example in ordered:
        if groups and (len(groups[-1]) + 1) * len(example.ids) <= tokens:
            groups[-1].append(example)
        else:
            groups.append([example])
    return groups


def _ids_and_labels(example: Example) -> tuple[Any, Any]:
    """(tokens,) each; the first token is never trained: nothing stands before it to predict it from."""
    ids = torch.tensor(example.ids, dtype=torch.long)
    trained = torch.frombuffer(bytearray(example.trained), dtype=torch.uint8).bool()
    labels = torch.where(trained, ids, IGNORED)
    labels[0] = IGNORED
    return ids, labels
