"""What the end of a trainer means for its job: pure, from what it wrote, how it died, and what the attempts reached.

ending = judge(attempts, result, explain_death(end, log_tail, free_bytes), newest)      # None: one more attempt
"""

from __future__ import annotations

import re
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from recipes.causes import ADVICE, EXIT_CODES, RETRYABLE, Cause
from recipes.job import Attempt, Result, Stop

MAX_ATTEMPTS = 5
FULL_DISK_BYTES = 2**20

Halt = Literal["deadline", "stop", "interrupted", "no_progress", "node_failed"]
"""Why a child is ended from outside: the job's deadline, stop.json, SIGTERM to the container, silence for too long, or
another node that said it cannot go on."""


@dataclass(frozen=True)
class End:
    """How a child ended: its exit code (negative: a signal), and why we ended it, if we did."""

    code: int
    halt: Halt | None


@dataclass(frozen=True)
class Death:
    """What is known of a trainer that left no result: the likeliest cause and the words for it."""

    cause: Cause
    detail: str


@dataclass(frozen=True)
class Ending:
    """How the job ends."""

    outcome: Literal["completed", "failed", "cancelled"]
    cause: Cause | None = None
    sentence: str = ""


def judge(attempts: Sequence[Attempt], result: Result | None, death: Death, newest: str | None) -> Ending | None:
    """What follows the last of `attempts`: an ending, or None for one more attempt from the newest checkpoint.

    result: what that attempt wrote, None when it wrote nothing. newest: the newest complete checkpoint afterwards.
    A retryable cause or an unexplained death is tried again, unless two attempts in a row died with neither a new
    checkpoint nor a new step between them, or MAX_ATTEMPTS were made. An attempt without an exit code did not die by
    itself: its machine did.
    """
    cause, sentence = death.cause, sentence_of(death)
    if result is not None and result.outcome == "completed":
        return Ending("completed")
    if result is not None and result.outcome == "failed":
        cause = result.cause or "unexpected"
        sentence = result.sentence or ADVICE[cause]
    elif result is not None and cause != "no_progress":  # it was told to stop, and not by us
        cause, sentence = "lost_rank", ADVICE["lost_rank"]
    unexplained = result is None and cause == "unexpected"
    if cause not in RETRYABLE and not unexplained:
        return Ending("failed", cause, sentence)
    if len(attempts) >= MAX_ATTEMPTS:
        return Ending("failed", cause, f"{sentence}; it was started {len(attempts)} times")
    if _moved(attempts, newest):
        return None
    return Ending("failed", cause, f"{sentence}; two attempts in a row ended at step {attempts[-1].last_step}")


def explain_death(end: End, log_tail: str, free_bytes: int) -> Death:
    """The likeliest cause of a trainer that left no result: its worker's exit code, the disk, a signal, or unknown."""
    if end.halt in ("no_progress", "node_failed"):
        return Death("no_progress", "")
    worker = _worker_code(log_tail)
    code = end.code if worker is None else worker
    if known := cause_of_code(code):
        return Death(known, "")
    if free_bytes < FULL_DISK_BYTES:
        return Death("disk_full", "")
    if code < 0:
        return Death("lost_rank", f"by signal {-code}, {signal.strsignal(-code) or 'unknown'}")
    last = " | ".join(line.strip() for line in log_tail.strip().splitlines()[-5:])
    return Death("unexpected", f"exit code {code}" + (f"; its log ends: {last[-1000:]}" if last else ""))


def ending_of_halt(halt: Halt | None, stop: Stop | None) -> Ending | None:
    """The ending of a job that was stopped from outside; None when only its machine was told to end.

    Only the user's own stop counts as cancelled; every other stop is a failure that the user shall hear of.
    """
    if halt == "deadline":
        return Ending("failed", "deadline", ADVICE["deadline"])
    if halt == "stop" and stop is not None:
        if stop.by == "user":
            return Ending("cancelled", "cancelled", f"{ADVICE['cancelled']}: {stop.reason}".removesuffix(": "))
        cause: Cause = "deadline" if stop.by in ("deadline", "cap") else "cancelled"
        return Ending("failed", cause, f"it was stopped ({stop.by}): {stop.reason}")
    return None


def cause_of_code(code: int) -> Cause | None:
    """The cause that an exit code of the trainer stands for; None for every other number."""
    return next((cause for cause, number in EXIT_CODES.items() if number == code), None)


def sentence_of(death: Death) -> str:
    """The advice for the cause, and what is known beyond it."""
    return f"{ADVICE[death.cause]} ({death.detail})" if death.detail else ADVICE[death.cause]


def _moved(attempts: Sequence[Attempt], newest: str | None) -> bool:
    last = attempts[-1]
    if len(attempts) == 1 or last.exit_code is None or newest != last.resumed_from:
        return True
    return last.last_step > attempts[-2].last_step


def _worker_code(log_tail: str) -> int | None:
    """The exit code of the worker that failed first, from torchrun's report: torchrun itself exits with 1."""
    codes = re.findall(r"^\s*exitcode\s*:\s*(-?\d+) ", log_tail, re.MULTILINE)
    return int(codes[-1]) if codes else None
