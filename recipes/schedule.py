"""Which examples and which learning rate belong to a step: pure, so the step number is the whole data cursor."""

from __future__ import annotations

import math
import random
from functools import lru_cache


def steps_in(examples: int, epochs: int, global_batch: int, max_steps: int | None = None) -> int:
    """Optimizer steps of a run: ceil(examples x epochs / global_batch), at most max_steps.

    The last step is filled up with the first examples of one more epoch, so that every step has the same batch.
    """
    steps = math.ceil(examples * epochs / global_batch)
    return min(steps, max_steps) if max_steps else steps


def batch_of_step(step: int, examples: int, global_batch: int, seed: int) -> list[int]:
    """Indices of the examples of step `step` (from 0): a window of the endless run of shuffled epochs."""
    places = range(step * global_batch, (step + 1) * global_batch)
    return [_order(place // examples, examples, seed)[place % examples] for place in places]


def epoch_of_step(step: int, examples: int, global_batch: int) -> int:
    """The epoch (from 0) in which step `step` (from 0) begins."""
    return step * global_batch // examples


def learning_rate_of_step(step: int, total_steps: int, peak: float, schedule: str, warmup_fraction: float) -> float:
    """Learning rate of step `step` (from 0): linear warm-up to `peak`, then cosine down to 10 % of it, or constant.

    The warm-up takes ceil(warmup_fraction x total_steps) steps; its first step already moves.
    """
    warmup = math.ceil(warmup_fraction * total_steps)
    if step < warmup:
        return peak * (step + 1) / warmup
    if schedule == "constant":
        return peak
    done = (step - warmup) / max(1, total_steps - warmup)
    return peak * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * done)))


@lru_cache(maxsize=4)
def _order(epoch: int, examples: int, seed: int) -> tuple[int, ...]:
    order = list(range(examples))
    random.Random(f"{seed}/{epoch}").shuffle(order)
    return tuple(order)
