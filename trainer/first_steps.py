"""The first three steps hold the plan to account: pace and memory as measured, and an end at once where they cannot do.

Step 1 also passes the largest micro-batch of the set, uncounted: a run that lacks memory ends there, not hours later.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist

from recipes.job import ContainerState, LaunchSpec, read_record
from trainer.environment import Place
from trainer.failures import TrainingStopped
from trainer.journal import Journal

STEPS = 3
HOUR = 3600


class Pace:
    """Seconds per token over the steps of this attempt; the first, which warms everything up, does not count."""

    def __init__(self, tokens_per_step: float) -> None:
        self.steps = 0
        self._tokens_per_step, self._seconds, self._tokens = tokens_per_step, 0.0, 0

    def add(self, seconds: float, tokens: int) -> None:
        """One more step."""
        self.steps += 1
        if self.steps > 1:
            self._seconds += seconds
            self._tokens += tokens

    @property
    def step_seconds(self) -> float | None:
        """What a step of mean size takes; None after fewer than two steps."""
        return self._seconds / self._tokens * self._tokens_per_step if self._tokens else None


def hold_to_account(spec: LaunchSpec, place: Place, journal: Journal, pace: Pace, steps_left: int) -> None:
    """Says what was measured beside what was planned. Collective: the slowest and fullest rank speaks for all.

    Raises TrainingStopped: too_slow when the steps left pass the machine's deadline, out_of_memory when the peak
    passes what the offer has.
    """
    started = _machine_started_at(journal)
    time_left = started + spec.deadline_seconds - journal.now()
    said = torch.tensor([pace.step_seconds or 0.0, peak_gib(place), -time_left], dtype=torch.float64)
    said = said.to(place.device)
    dist.all_reduce(said, op=dist.ReduceOp.MAX)
    seconds, peak, time_left = float(said[0]), float(said[1]), -float(said[2])
    journal.learn(step_seconds=seconds, peak_gib=peak)
    pace_said = f"{seconds:.2f} s a step ({_planned(spec.expected_step_seconds, 's')})"
    peak_said = f"peak {peak:.2f} GiB ({_planned(spec.expected_peak_gib, 'GiB')})"
    journal.say(f"after {STEPS} steps: {pace_said}, {peak_said}")
    if spec.capacity_gib is not None and peak > spec.capacity_gib:
        raise TrainingStopped(
            "out_of_memory",
            f"after {STEPS} steps: {peak_said} of {spec.capacity_gib:g}; lower training.micro_tokens, micro_batch or "
            "data.max_tokens, or take a larger offer",
        )
    if seconds * steps_left > time_left:
        raise TrainingStopped(
            "too_slow",
            f"after {STEPS} steps: {pace_said}, so the {steps_left:,} steps left take "
            f"{seconds * steps_left / HOUR:.2f} h, but the machine ends itself in {max(0.0, time_left) / HOUR:.2f} h; "
            "raise limits.max_hours and limits.max_usd, or lower training.epochs",
        )


def peak_gib(place: Place) -> float:
    """What torch reserved of the GPU at most; on a CPU the most this process held."""
    if place.cuda:
        return float(torch.cuda.max_memory_reserved() / 2**30)
    # Not ru_maxrss: Linux hands a child the peak of the process that started it.
    return int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]) / 2**20


def _planned(value: float | None, unit: str) -> str:
    return "not planned" if value is None else f"planned {value:.2f} {unit}"


def _machine_started_at(journal: Journal) -> float:
    """The deadline counts from the machine's first word, without waits that were free; without a container, from the
    trainer's start."""
    container = read_record(ContainerState, journal.job / "container.json")
    return container.started_at + container.waited_seconds if container else journal.started_at
