"""Why a run ended without an adapter: one word, one exit code, one sentence each. Shared by trainer and container."""

from __future__ import annotations

from typing import Literal

Cause = Literal[
    "out_of_memory",
    "nan_loss",
    "bad_data",
    "disk_full",
    "lost_rank",
    "no_progress",
    "deadline",
    "cancelled",
    "bad_base_model",
    "bad_targets",
    "no_effect",
    "cannot_run_here",
    "unexpected",
    "too_slow",
]

EXIT_CODES: dict[Cause, int] = {
    "out_of_memory": 20,
    "nan_loss": 21,
    "bad_data": 22,
    "disk_full": 23,
    "lost_rank": 24,
    "no_progress": 25,
    "deadline": 26,
    "cancelled": 27,
    "bad_base_model": 28,
    "bad_targets": 29,
    "no_effect": 30,
    "cannot_run_here": 31,
    "unexpected": 32,
    "too_slow": 33,
}
"Exit codes of `python -m trainer.train`; 0 is completed. Kept clear of the shell's own 1, 2 and 126-165."

ADVICE: dict[Cause, str] = {
    "out_of_memory": "a GPU ran out of memory; lower training.micro_batch or data.max_tokens, or take a larger offer",
    "nan_loss": "the loss is not a finite number; lower training.learning_rate",
    "bad_data": "the training set cannot be used as it is; run `lorry check` on it",
    "disk_full": "the disk is full; take an offer with more disk, or free some space",
    "lost_rank": "a training process died; the run resumes from its newest checkpoint when started again",
    "no_progress": "no step was finished for too long; the machine is stuck",
    "deadline": "the time limit was reached before the last step; raise limits.max_hours or lower training.epochs",
    "cancelled": "it was stopped on request",
    "bad_base_model": "the base model is not the one the recipe names, or its files are incomplete; stage it again",
    "bad_targets": "the adapter would not train exactly what the recipe says",
    "no_effect": "the adapter does not change what the model says; it was not kept",
    "cannot_run_here": "this machine lacks what the recipe needs",
    "too_slow": "its first steps show that it cannot end in time; raise limits.max_hours or lower training.epochs",
    "unexpected": "an error nobody foresaw; its text is in the log",
}
"What a person can do about it."

RETRYABLE: frozenset[Cause] = frozenset({"lost_rank", "no_progress"})
"Causes after which the supervisor starts the trainer again from the newest checkpoint."
