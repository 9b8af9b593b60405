"""What the end of a trainer means: one row per case."""

from __future__ import annotations

import pytest

from recipes.causes import ADVICE, EXIT_CODES, RETRYABLE, Cause
from recipes.job import Attempt, Result, Stop
from scripts.container.verdict import MAX_ATTEMPTS, Death, End, Ending, ending_of_halt, explain_death, judge

REPORT = """
trainer.train FAILED
------------------------------------------------------------
Root Cause (first observed failure):
[0]:
  time      : 2026-11-22_20:00:00
  rank      : 1 (local_rank: 1)
  exitcode  : {code} (pid: 4711)
"""


def attempt(number: int, code: int | None = 1, resumed: str | None = None, step: int = 0) -> Attempt:
    return Attempt(number=number, started_at=0.0, ended_at=1.0, exit_code=code, resumed_from=resumed, last_step=step)


def result(outcome: str, cause: Cause | None = None, sentence: str = "") -> Result:
    code = EXIT_CODES[cause] if cause else 0
    return Result.model_validate(
        {"job_id": "job", "outcome": outcome, "cause": cause, "sentence": sentence, "exit_code": code, "attempt": 1,
         "step": 1, "total_steps": 9}
    )  # fmt: skip


UNKNOWN = Death("unexpected", "exit code 1")


@pytest.mark.parametrize(
    ("end", "tail", "free", "cause", "detail"),
    [
        (End(1, None), "", 2**30, "unexpected", "exit code 1"),
        (
            End(1, None),
            "first\nTypeError: no\n",
            2**30,
            "unexpected",
            "exit code 1; its log ends: first | TypeError: no",
        ),
        (End(1, None), REPORT.format(code=20), 2**30, "out_of_memory", ""),
        (End(1, None), REPORT.format(code=-9), 2**30, "lost_rank", "by signal 9, Killed"),
        (End(1, None), "", 0, "disk_full", ""),
        (End(-9, None), "", 2**30, "lost_rank", "by signal 9, Killed"),
        (End(-9, "no_progress"), "", 2**30, "no_progress", ""),
        (End(28, None), "", 2**30, "bad_base_model", ""),
    ],
)
def test_a_death_without_a_result_is_explained_by_what_is_left(
    end: End, tail: str, free: int, cause: Cause, detail: str
) -> None:
    assert explain_death(end, tail, free) == Death(cause, detail)


@pytest.mark.parametrize("cause", sorted(EXIT_CODES))
def test_a_cause_is_tried_again_only_where_that_can_help(cause: Cause) -> None:
    ending = judge([attempt(1)], result("failed", cause, "because"), UNKNOWN, None)
    assert ending == (None if cause in RETRYABLE else Ending("failed", cause, "because"))


def test_a_completed_result_counts_whatever_the_exit_code() -> None:
    assert judge([attempt(1, code=1)], result("completed"), UNKNOWN, None) == Ending("completed")


def test_a_trainer_that_was_stopped_by_somebody_else_goes_on() -> None:
    assert judge([attempt(1)], result("cancelled", "cancelled"), UNKNOWN, "step-000003") is None


@pytest.mark.parametrize(
    ("attempts", "newest", "goes_on"),
    [
        ([attempt(1)], None, True),
        ([attempt(1), attempt(2)], None, False),
        ([attempt(1, step=3), attempt(2, step=3)], None, False),
        ([attempt(1, step=3), attempt(2, step=4)], None, True),
        ([attempt(1, step=5), attempt(2, resumed="step-000004", step=5)], "step-000004", False),
        ([attempt(1, step=5), attempt(2, resumed="step-000002", step=5)], "step-000004", True),
        ([attempt(1, step=5), attempt(2, code=None, resumed="step-000004", step=0)], "step-000004", True),
        ([attempt(n, code=-9, step=n) for n in range(1, MAX_ATTEMPTS + 1)], None, False),
        ([attempt(n, code=None) for n in range(1, MAX_ATTEMPTS + 1)], None, False),
    ],
)
def test_attempts_go_on_while_they_get_further(attempts: list[Attempt], newest: str | None, goes_on: bool) -> None:
    assert (judge(attempts, None, UNKNOWN, newest) is None) == goes_on


def test_the_last_sentence_keeps_the_reason() -> None:
    ending = judge([attempt(1), attempt(2)], None, UNKNOWN, None)
    assert ending is not None
    assert ending.sentence == f"{ADVICE['unexpected']} (exit code 1); two attempts in a row ended at step 0"


@pytest.mark.parametrize(
    ("halt", "by", "outcome", "cause"),
    [
        ("deadline", None, "failed", "deadline"),
        ("stop", "user", "cancelled", "cancelled"),
        ("stop", "operator", "failed", "cancelled"),
        ("stop", "reaper", "failed", "cancelled"),
        ("stop", "cap", "failed", "deadline"),
        ("stop", "deadline", "failed", "deadline"),
    ],
)
def test_only_the_users_own_stop_is_a_cancellation(halt: str, by: str | None, outcome: str, cause: str) -> None:
    stop = Stop.model_validate({"by": by, "reason": "because", "at": 1.0}) if by else None
    ending = ending_of_halt(halt, stop)  # type: ignore[arg-type]
    assert ending is not None
    assert (ending.outcome, ending.cause) == (outcome, cause)
    assert by is None or "because" in ending.sentence


def test_a_machine_that_ends_does_not_end_its_job() -> None:
    assert ending_of_halt("interrupted", None) is None
